"""Attention residuals for a trained pre-norm transformer, whoever wrote it, without a change of what it computes."""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from nearfar.ops.aggregation.depth_attention import DepthAttention, DepthResiduals

EPS_NAMES = ("eps", "variance_epsilon")


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a LayerNorm or RMSNorm of any library, by its class's name and its eps."""
    name = type(module).__name__.lower()
    return ("layernorm" in name or "rmsnorm" in name) and eps_name(module) is not None


def eps_name(norm: nn.Module) -> str | None:
    return next((name for name in EPS_NAMES if isinstance(getattr(norm, name, None), float)), None)


class DepthHooks(nn.Module):
    """Attention residuals beside a model whose code still adds: its norms read a mixture instead of the sum.

    Every sub-layer of a pre-norm model starts with a norm of the residual stream, and so does the output. What stands
    at successive norms differs by exactly what the sub-layer between them added, which is the next source; the norm
    is then given the mixture. One forward pass visits the norms in order; anything else is an error.
    """

    def __init__(self, norms: Sequence[nn.Module], dim: int, block_size: int, **attention: Any) -> None:
        super().__init__()
        self.attends = nn.ModuleList(DepthAttention(dim, getattr(norm, eps_name(norm)), **attention) for norm in norms)
        self.block_size = block_size
        DepthResiduals(torch.empty(0), self.attends, block_size)  # refuses a bad block size now
        self.residuals: DepthResiduals | None = None
        self.stream: Tensor | None = None
        self.record = False
        """Keep the weights of the next forward pass in `weights`."""
        self.weights: list[Tensor] = []
        for number, norm in enumerate(norms):
            norm.register_forward_pre_hook(self.hook(number))

    def hook(self, number: int) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
        def mix(norm: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x, *rest = args
            if number == 0:
                self.residuals = DepthResiduals(x, self.attends, self.block_size)
                self.residuals.weights = [] if self.record else None
            elif self.residuals is None or self.residuals.number != number:
                raise RuntimeError(
                    f"norm {number} of {len(self.attends)} was called out of order: attention residuals need one "
                    "forward pass through all layers in order (no gradient checkpointing, no skipped or shared layers)"
                )
            else:
                self.residuals.add(x - self.stream)
            self.stream = x
            mixed = self.residuals.next_input()
            if number == len(self.attends) - 1:
                self.weights = self.residuals.weights or []
                self.residuals = self.stream = None
            return (mixed, *rest)

        return mix

    def heat_map(self) -> Tensor:
        """The mean weight of each source in each aggregation, `(aggregations, sources)`, of the recorded pass."""
        if not self.weights:
            raise ValueError("no pass has been recorded; set record=True and run the model")
        table = torch.zeros(len(self.weights), max(len(p) for p in self.weights))
        for row, p in zip(table, self.weights):
            row[: len(p)] = p.float().flatten(1).mean(1).cpu()
        return table


def residual_norms(model: nn.Module) -> list[str]:
    """The names of the norms that read the residual stream of a pre-norm transformer, in order, the output's last.

    Taken from the longest list of alike blocks with at least two norms as children; the last one is the norm that the
    model registers after that list. Raises ValueError where there is no such structure.
    """
    best: tuple[str, Any] | None = None
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module):
            norms = [[n for n, child in block.named_children() if is_norm(child)] for block in module]
            if all(len(own) == 2 for own in norms) and (best is None or len(module) > len(best[1])):
                best = name, module
    if best is None:
        raise ValueError(
            f"{type(model).__name__} has no list of blocks with two norms each; name its norms in order, norms=[...]"
        )
    name, blocks = best
    names = [
        f"{name}.{i}.{n}" for i, block in enumerate(blocks) for n, child in block.named_children() if is_norm(child)
    ]
    parent = name.rpartition(".")[0]
    siblings = list(model.get_submodule(parent).named_children())
    after = siblings[[n for n, _ in siblings].index(name.rpartition(".")[2]) + 1 :]
    final = [n for n, child in after if is_norm(child)]
    if not final:
        raise ValueError(f"no norm follows {name}; without one the output would change its scale (a post-norm model?)")
    return [*names, f"{parent}.{final[0]}" if parent else final[0]]


def attend_over_depth(
    model: nn.Module,
    example: Mapping[str, Any] | Sequence[Any],
    block_size: int = 1,
    norms: Sequence[str] | None = None,
    tolerance: float = 1e-4,
    **attention: Any,
) -> float:
    """Give a pre-norm transformer attention residuals, in place; the relative difference of its outputs is returned.

    New queries are zero, so each sub-layer reads the mean of its n sources, the plain residual over n; its norm does
    not see the factor once its eps is divided by n^2, which is done. So the model computes what it did, up to rounding,
    for every block size, and fine-tuning starts there. `model.depth` is the new part: `DepthHooks`, with its queries.
    To load a converted model's weights, build it plainly, convert it, then load.

    Args:
        model: a timm ViT, a Llama-like model of transformers, one of ours: anything whose sub-layers read the stream
            through a norm, `x + f(norm(x))`, and whose output does.
        example: inputs of a forward pass, by name or place; the outputs before and after are compared on it.
        block_size: sub-layers per block, 1: full.
        norms: names of the norms in order, the output's last; None: found by `residual_norms`.
        tolerance: largest relative difference.
        attention: settings of `DepthAttention`.

    Raises ValueError, the model as before, where the outputs differ by more: a post-norm model, or one whose layers
    read the stream without a norm.
    """
    if hasattr(model, "depth"):
        raise ValueError("the model has a part named depth already; it was converted before")
    names = residual_norms(model) if norms is None else list(norms)
    found = [model.get_submodule(name) for name in names]
    if len(found) < 2 or len({id(norm) for norm in found}) != len(found):
        raise ValueError(f"needs two or more different norms, given are {', '.join(names)}")
    if bad := [name for name, norm in zip(names, found) if eps_name(norm) is None]:
        raise ValueError(f"{', '.join(bad)}: has no eps, so it is no norm that ignores scale")
    training = model.training
    model.eval()
    before = outputs(model, example)
    width = check_additive(model, example, dict(zip(names, found)))
    old = [(norm, eps_name(norm), getattr(norm, eps_name(norm)), dict(norm._forward_pre_hooks)) for norm in found]
    depth = DepthHooks(found, width, block_size, **attention)
    like = next(model.parameters())
    model.depth = depth.to(like.device, like.dtype)
    for number, (norm, name, eps, _) in enumerate(old):
        finished = number // block_size + 1
        setattr(norm, name, eps / (finished + (number % block_size > 0)) ** 2)
    try:
        after = outputs(model, example)
        error = float((after - before).norm() / before.norm().clamp(min=1e-30))
        if not error <= tolerance:
            raise ValueError(
                f"the outputs differ by {error:.1e}, more than {tolerance:g}: the model is not pre-norm throughout, so "
                "attention residuals would change it"
            )
    except Exception:
        del model.depth
        for norm, name, eps, hooks in old:
            setattr(norm, name, eps)
            norm._forward_pre_hooks.clear()
            norm._forward_pre_hooks.update(hooks)
        raise
    finally:
        model.train(training)
    return error


def check_additive(model: nn.Module, example: Mapping[str, Any] | Sequence[Any], norms: Mapping[str, nn.Module]) -> int:
    """The width of the residual stream; ValueError where the norms' outputs are part of it (post-norm).

    With all norms silenced, sub-layers add the same to every token, so the stream at one norm differs from that at the
    one before by a constant; where the norm's output is the stream, nothing of it is left.
    """
    streams: list[tuple[str, Tensor]] = []
    handles = []
    for name, norm in norms.items():

        def see(_norm: nn.Module, args: tuple[Tensor, ...], out: Tensor, name: str = name) -> Tensor:
            streams.append((name, args[0].detach()))
            return torch.zeros_like(out)

        handles.append(norm.register_forward_hook(see))
    try:
        outputs(model, example)
    finally:
        for handle in handles:
            handle.remove()
    if [name for name, _ in streams] != list(norms):
        raise ValueError(f"a forward pass does not call the norms once each in this order: {', '.join(norms)}")
    first = streams[0][1].float()
    for (_, before), (name, after) in pairwise(streams):
        if before.shape != after.shape:
            raise ValueError(f"{name} reads {tuple(after.shape)}, the norm before it {tuple(before.shape)}")
        added = (after - before).float().flatten(0, -2)
        if (added - added.mean(0)).norm() > 0.5 * (first.flatten(0, -2) - first.flatten(0, -2).mean(0)).norm():
            raise ValueError(
                f"the model is not pre-norm: what {name} reads is no sum with what the norm before it read"
            )
    return first.shape[-1]


@torch.no_grad()
def outputs(model: nn.Module, example: Mapping[str, Any] | Sequence[Any]) -> Tensor:
    """The first floating-point tensor that the model returns, in float32 or better."""
    out = model(**example) if isinstance(example, Mapping) else model(*example)
    values = [out] if isinstance(out, Tensor) else out.values() if isinstance(out, Mapping) else out
    found = next((t for t in values if isinstance(t, Tensor) and t.is_floating_point()), None)
    if found is None:
        raise ValueError(f"the model returns no tensor but a {type(out).__name__}")
    return found.to(torch.promote_types(found.dtype, torch.float32))


def train_depth_only(model: nn.Module) -> list[nn.Parameter]:
    """Freeze everything but queries and key norms of the attention residuals; returns these."""
    model.requires_grad_(False)
    model.depth.requires_grad_(True)
    return list(model.depth.parameters())
