"""What torch.fx sees of a model: its blocks as wholes, so that no size of a picture is fixed in a graph."""

from typing import Any

from torch import fx, nn


def is_traced(x: Any) -> bool:
    """Whether `x` stands for a tensor in a trace of torch.fx."""
    return isinstance(x, fx.Proxy)


def whole(module: nn.Module, *inputs: Any) -> Any:
    """`module(*inputs)`; a trace of torch.fx notes it as one call, whichever tracer it is."""
    proxy = next((x for x in inputs if is_traced(x)), None)
    if proxy is None:
        return module(*inputs)
    tracer = proxy.tracer

    def note(*args: Any, **kwargs: Any) -> fx.Proxy:
        return tracer.create_proxy("call_module", tracer.path_of_module(module), args, kwargs)

    return tracer.call_module(module, note, inputs, {})
