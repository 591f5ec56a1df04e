"""Layer-wise relevance propagation: how much of a class score each pixel is answerable for.

Bach et al., "On Pixel-wise Explanations ... by Layer-wise Relevance Propagation" (2015). Every operation of a network
is replaced by one with the same values that is linear in what depends on the picture. Relevance is then R = x dS / dx
anywhere, one backward pass finds it, and what does not reach the pixels was taken by something that was added (biases,
position tables, class tokens), which is accounted for. The operations are intercepted as they are called, whatever
modules a network is written with.

    convolution, linear     by rule, see `RULES`; a batch norm after a convolution is folded into it
    activations a(z)        z (a(z) / z), the ratio fixed: ReLU, GELU, SiLU, ReLU6, hard swish, ELU, tanh ...
    norms                   linear in the input, mean included, with the standard deviation fixed (Ali et al. 2022)
    attention               softmax fixed: relevance goes through the values, none through queries and keys (likewise)
    gates                   sigmoid, softmax, exponentials, roots and divisors are fixed: the signal takes all
    x y, both of a picture  half to each
    max pooling             to the winner; `overlap` says what a winner of several windows gets
    sums, means, shapes     as they are

Attention, gates and products are rules of ours for what the released code, convolutions and linear layers without
residual additions, does not have.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nearfar.core.errors import UserError
from nearfar.vision.explain.gradients import (
    Point,
    Target,
    as_images,
    call,
    classes_of,
    evaluating,
    logit,
    logits_of,
    watching,
    weights_of,
)


@dataclass(frozen=True)
class Rules:
    """Which rule convolutions and linear layers follow: names of `LAYER_RULES`.

    Args:
        conv, linear: of convolutions and of linear layers.
        pixels: of the first of them, also `box` (z^B: relevance above and below the range of normalized pixels),
            `square` (w^2), `flat`; None for the rule of its kind.
        gamma: share of the positive weights added, of rule `gamma`.
        epsilon: what keeps denominators from zero, with their sign.
        overlap: `add`, or `overwrite`, the published: of the windows that share a winner the last one counts.
        low, high: normalized values of black and white, one for each channel, of rule `box`.
    """

    conv: str = "epsilon"
    linear: str = "epsilon"
    pixels: str | None = None
    gamma: float = 0.25
    epsilon: float = 1e-9
    overlap: str = "add"
    low: Sequence[float] = (-2.1179, -2.0357, -1.8044)
    high: Sequence[float] = (2.2489, 2.4286, 2.64)

    def __post_init__(self) -> None:
        for name, allowed in (("conv", LAYER_RULES), ("linear", LAYER_RULES), ("overlap", ("add", "overwrite"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; one of {', '.join(allowed)}")
        if self.pixels not in (None, *LAYER_RULES, *PIXEL_RULES):
            raise ValueError(f"pixels is {self.pixels!r}; None or one of {', '.join((*LAYER_RULES, *PIXEL_RULES))}")
        if not 0 <= self.gamma < math.inf or not 0 < self.epsilon < 1:
            raise ValueError(f"needs gamma >= 0 and 0 < epsilon < 1, got {self.gamma}, {self.epsilon}")


LAYER_RULES = ("epsilon", "gamma", "z_plus", "positive_weights", "alpha2_beta1", "alpha1_beta0")
"""Of convolutions and linear layers z = W x + b; s takes the part of z in the backward pass, R_x = x W' R_z / s.

    epsilon           s = z: biases take their share
    gamma             s = (W + gamma W+) x + b + gamma b+
    z_plus            s = W+ x+ + W- x-: what raises z; biases take nothing
    positive_weights  s = W+ x, the released code's of linear layers, whose inputs are not negative
    alpha2_beta1      2 of what raises z less 1 of what lowers it, biases on their sides
    alpha1_beta0      what raises z, biases included
"""

PIXEL_RULES = ("box", "square", "flat")

RULES = {
    "epsilon": Rules(),
    "epsilon_plus": Rules(conv="z_plus"),
    "epsilon_plus_flat": Rules(conv="z_plus", pixels="flat"),
    "epsilon_gamma_box": Rules(conv="gamma", pixels="box"),
    "alpha2_beta1": Rules(conv="alpha2_beta1", linear="alpha2_beta1"),
    "alpha1_beta0": Rules(conv="alpha1_beta0", linear="alpha1_beta0"),
    "published": Rules(linear="positive_weights", overlap="overwrite"),
}
"""Name -> rules. `published` is the released code's: all weights and the bias in convolutions, positive weights without
bias in linear layers."""

FIXED = {
    "softmax", "log_softmax", "sigmoid", "hardsigmoid", "softplus", "sqrt", "rsqrt", "exp", "pow", "norm",
    "vector_norm", "reciprocal", "square", "std", "var", "softmin", "sin", "cos", "log", "cumprod", "prod",
}  # fmt: skip
"""Functions whose values are fixed: gates, weights of attention, scales."""

ACTIVATIONS = {
    "gelu", "silu", "mish", "relu6", "hardtanh", "hardswish", "leaky_relu", "elu", "selu", "celu", "tanh", "prelu",
    "silu_", "relu6_", "hardtanh_", "hardswish_", "leaky_relu_", "elu_", "clamp", "softsign", "tanhshrink",
    "hardshrink",
}  # fmt: skip

CONVOLUTIONS = {"conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}
PRODUCTS = {"mul", "__mul__", "__rmul__", "mul_", "__imul__", "multiply", "matmul", "__matmul__", "bmm", "einsum"}
QUOTIENTS = {"div", "div_", "__truediv__", "__itruediv__", "true_divide"}
SUMS = {"add", "__add__", "__radd__", "add_", "__iadd__", "sub", "__sub__", "sub_", "__isub__"}
JOINS = {"cat", "concat", "stack"}


def depends(x: Any) -> bool:
    """Whether `x` depends on the picture."""
    return isinstance(x, Tensor) and x.requires_grad


class LastWinner(torch.autograd.Function):
    """Max pooling whose backward pass writes instead of adding: of windows with one winner the last, row by row,
    counts."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, pool: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        y, index = pool(x)
        ctx.save_for_backward(index)
        ctx.shape = x.shape
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        index, gradient = index.flatten(2), gradient.flatten(2)
        windows = torch.arange(index.shape[2], device=index.device).expand_as(index)
        cells = gradient.new_full((*ctx.shape[:2], math.prod(ctx.shape[2:])), -1, dtype=torch.long)
        last = cells.scatter_reduce(2, index, windows, "amax")
        taken = gradient.gather(2, last.clamp(min=0)) * (last >= 0)
        return taken.reshape(ctx.shape), None


class Propagation(TorchFunctionMode):
    """Functions called meanwhile are their linear stand-ins: see the module. `sources` is what relevance ends in."""

    def __init__(self, rules: Rules) -> None:
        super().__init__()
        self.rules = rules
        self.sources: list[Tensor] = []
        """What was added on the way, apart from the pixels."""
        self.pixels: list[Tensor] = []
        """What else stands for the pixels, in the rules of the first layer; each has the picture's shape."""
        self.first = True

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if not any(depends(x) for x in _flat((args, kwargs))):
            return func(*args, **kwargs)
        if name in CONVOLUTIONS or name == "linear":
            for old, new in (("input", "x"), ("weight", "w"), ("bias", "b")):
                kwargs = {new if key == old else key: value for key, value in kwargs.items()}
            return self.layer(func, name, *args, **kwargs)
        if name == "batch_norm":
            return self.batch_norm(*args, **kwargs)
        if name in ("layer_norm", "group_norm", "instance_norm", "rms_norm"):
            return self.norm(func, name, *args, **kwargs)
        if name in FIXED:
            return func(*_cut(args), **kwargs)
        if name in ACTIVATIONS:
            return self.activation(func, *args, **kwargs)
        if name == "scaled_dot_product_attention":
            return self.attention(*args, **kwargs)
        if name == "multi_head_attention_forward":
            return self.multi_head_attention(*args, **kwargs)
        if name in PRODUCTS:
            return self.product(func, args, kwargs)
        if name in QUOTIENTS:
            divided = args[1].detach() if depends(args[1]) else args[1]
            return func(args[0], divided, *args[2:], **kwargs) if depends(args[0]) else func(args[0], divided)
        if name in SUMS and not kwargs:
            return func(*(self.source(x, like=args[i - 1]) for i, x in enumerate(args[:2])), *args[2:])
        if name in JOINS:
            parts = [self.source(x, like=None) for x in args[0]]
            return func(parts, *args[1:], **kwargs)
        if name.startswith("max_pool") and self.rules.overlap == "overwrite":
            return self.max_pool(name, *args, **kwargs)
        return func(*args, **kwargs)

    def source(self, x: Any, like: Any) -> Any:
        """`x` as something that takes relevance, where it does not come from the picture."""
        if depends(x):
            return x
        if not isinstance(x, Tensor):
            if like is None or not isinstance(x, int | float) or not x:
                return x
            x = torch.full((), float(x), dtype=like.dtype, device=like.device)
        if not x.is_floating_point() and not x.is_complex():
            return x
        leaf = x.detach().clone().requires_grad_()
        self.sources.append(leaf)
        return leaf

    def carry(self, s: Tensor, z: Tensor, divisor: Tensor | None = None) -> Tensor:
        """z in value; in the backward pass s (z / s), so that what makes up s shares in z's relevance.

        `divisor`: s as z itself was rounded, which near 0 is another number.
        """
        s0 = s.detach() if divisor is None else divisor
        epsilon = self.rules.epsilon
        factor = z.detach() / torch.where(s0 < 0, s0 - epsilon, s0 + epsilon)
        part = s * factor
        return part + (z - part).detach()

    def layer(
        self, func: Any, name: str, x: Tensor, w: Tensor, b: Tensor | None = None, *rest: Any, **kw: Any
    ) -> Tensor:
        """A convolution or linear layer by its rule."""
        if depends(w):  # weights made from the picture
            return self.dynamic_layer(func, x, w, b, rest, kw)
        if not depends(x):
            return func(x, w, b, *rest, **kw)
        rules, kind = self.rules, "linear" if name == "linear" else "conv"
        rule = rules.pixels if self.first and rules.pixels else getattr(rules, kind)
        first, self.first = self.first, False
        axes = (-1,) if kind == "linear" else (-1, *(1,) * (w.ndim - 2))
        run = lambda x, w: func(x, w, None, *rest, **kw)  # noqa: E731
        plus, minus = (lambda t: t.clamp(min=0)), (lambda t: t.clamp(max=0))
        bias = lambda t: 0.0 if t is None else self.source(t, None).reshape(axes)  # noqa: E731
        with torch.no_grad():
            z = func(x, w, b, *rest, **kw)
        if rule == "epsilon":
            y = self.carry(run(x, w) + bias(b), z, z)
        elif rule == "gamma":
            y = self.carry(
                run(x, w + rules.gamma * plus(w)) + bias(None if b is None else b + rules.gamma * plus(b)), z
            )
        elif rule == "positive_weights":
            y = self.carry(run(x, plus(w)), z)
        elif rule == "z_plus":
            y = self.carry(run(plus(x), plus(w)) + run(minus(x), minus(w)), z)
        elif rule in ("alpha2_beta1", "alpha1_beta0"):
            up = run(plus(x), plus(w)) + run(minus(x), minus(w)) + bias(None if b is None else plus(b))
            alpha = 2.0 if rule == "alpha2_beta1" else 1.0
            y = alpha * self.carry(up, z)
            if rule == "alpha2_beta1":
                down = run(plus(x), minus(w)) + run(minus(x), plus(w)) + bias(None if b is None else minus(b))
                # where nothing lowers z, all of it is raised
                none = (down.detach() == 0).to(z.dtype)
                y = y - (1 - none) * self.carry(down, z) - none * self.carry(up, z)
            y = y + (z - y).detach()
        else:
            y = self.first_layer(rule, first, run, x, w, z)
        if kind == "conv":
            y.convolution = (func, name, x, w, b, rest, kw, first)  # type: ignore[attr-defined]
        return y

    def first_layer(
        self, rule: str, first: bool, run: Callable[..., Tensor], x: Tensor, w: Tensor, z: Tensor
    ) -> Tensor:
        """The rules that share relevance over pixels whatever their values: `box`, `square`, `flat`."""
        leaf = lambda t: t.detach().clone().requires_grad_()  # noqa: E731
        if rule == "box":
            shape = (1, -1, *(1,) * (x.ndim - 2))
            if x.shape[1] != len(self.rules.low) or x.shape[1] != len(self.rules.high):
                raise ValueError(f"low, high: have {len(self.rules.low)} values for {x.shape[1]} channels")
            low, high = (
                leaf(x.new_tensor(list(v)).reshape(shape).expand_as(x)) for v in (self.rules.low, self.rules.high)
            )
            self.pixels += [low, high]
            return self.carry(run(x, w) - run(low, w.clamp(min=0)) - run(high, w.clamp(max=0)), z)
        ones = leaf(torch.ones_like(x))
        self.pixels.append(ones)
        return self.carry(run(ones, w.square() if rule == "square" else torch.ones_like(w)), z)

    def dynamic_layer(self, func: Any, x: Tensor, w: Tensor, b: Tensor | None, rest: Any, kw: Any) -> Tensor:
        """Half of the relevance to the signal, half to the weights that the picture made."""
        y = func(x, w.detach(), None, *rest, **kw) + func(x.detach(), w, None, *rest, **kw)
        with torch.no_grad():
            z = func(x, w, None, *rest, **kw)
        y = 0.5 * y + (z - 0.5 * y).detach() if depends(x) else y
        axes = (-1,) if w.ndim == 2 else (-1, *(1,) * (w.ndim - 2))
        return y if b is None else y + self.source(b, None).reshape(axes)

    def batch_norm(
        self, input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
        bias: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
    ) -> Tensor:  # fmt: skip
        """An affine function; folded into the convolution before it."""
        x, mean, var, w, b = input, running_mean, running_var, weight, bias
        if mean is None or var is None:  # of this batch alone
            return self.norm(F.instance_norm, "instance_norm", x, None, None, w, b, True, momentum, eps)
        scale = torch.rsqrt(var + eps) * (1 if w is None else w)
        shift = (0 if b is None else b) - mean * scale
        made = getattr(x, "convolution", None)
        if made is not None and not made[1].startswith("conv_transpose"):
            func, name, before, kernel, added, rest, kw, self.first = made
            folded = kernel * scale.reshape(-1, *(1,) * (kernel.ndim - 1))
            moved = shift if added is None else shift + added * scale
            return self.layer(func, name, before, folded, moved, *rest, **kw)
        axes = (-1, *(1,) * (x.ndim - 2))
        return x * scale.reshape(axes) + self.source(shift, None).reshape(axes)

    def norm(self, func: Any, name: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Linear in x with the deviation fixed: x less its mean, times what the norm made of that, plus the bias."""
        place = {"layer_norm": (1, 2), "group_norm": (1, 2), "instance_norm": (2, 3), "rms_norm": (1, None)}[name]
        values = list(args)

        def take(key: str, at: int | None) -> Tensor | None:
            if at is not None and len(values) > at:
                value, values[at] = values[at], None
                return value
            return kwargs.pop(key, None)

        w, b = take("weight", place[0]), take("bias", place[1])
        with torch.no_grad():
            y = func(x, *values, **kwargs)
        if name == "rms_norm":
            centred = x
        elif name == "layer_norm":
            shape = values[0] if values else kwargs["normalized_shape"]
            centred = x - x.mean(tuple(range(-len(tuple(shape)), 0)), keepdim=True)
        else:
            groups = (values[0] if values else kwargs["num_groups"]) if name == "group_norm" else x.shape[1]
            parts = x.unflatten(1, (groups, -1)).flatten(2)
            centred = (parts - parts.mean(2, keepdim=True)).reshape(x.shape)
        y = self.scale(centred, y)
        axes = (-1,) if name in ("layer_norm", "rms_norm") else (-1, *(1,) * (x.ndim - 2))
        fit = lambda t: t if name in ("layer_norm", "rms_norm") and t.ndim > 1 else t.reshape(axes)  # noqa: E731
        if w is not None:
            y = y * fit(w)
        return y if b is None else y + fit(self.source(b, None))

    @staticmethod
    def scale(x: Tensor, y: Tensor) -> Tensor:
        """x (y / x) with the ratio fixed; 0 where x is."""
        ratio = torch.where(x == 0, 0.0, y / torch.where(x == 0, 1.0, x)).detach()
        return x * ratio

    def activation(self, func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x (a(x) / x) with the ratio fixed; where a(0) is not 0, that is added."""
        with torch.no_grad():
            kwargs = {key: value for key, value in kwargs.items() if key != "inplace"}
            args = tuple(value for i, value in enumerate(args) if not (func.__name__ == "relu6" and i == 0))
            y = func(x.detach().clone(), *args, **kwargs)
            tiny = torch.full_like(x, 1e-6)
            near = func(tiny, *args, **kwargs) / 1e-6
            ratio = torch.where(x.abs() < 1e-6, near, y / torch.where(x.abs() < 1e-6, 1.0, x))
        part = x * ratio
        return part + (y - part).detach()

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        """The weights of attention fixed: a mean of the values."""
        with torch.no_grad():
            if enable_gqa:
                k = k.repeat_interleave(q.shape[-3] // k.shape[-3], -3)
            logits = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
            if is_causal:
                allowed = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).tril()
                logits = logits.masked_fill(~allowed, -math.inf)
            if attn_mask is not None:
                boolean = attn_mask.dtype == torch.bool
                logits = logits.masked_fill(~attn_mask, -math.inf) if boolean else logits + attn_mask.detach()
            weights = logits.softmax(-1)
        if enable_gqa:
            v = v.repeat_interleave(q.shape[-3] // v.shape[-3], -3)
        return weights @ v

    def multi_head_attention(
        self, q: Tensor, k: Tensor, v: Tensor, dim: int, heads: int, in_w: Tensor | None, in_b: Tensor | None,
        bias_k: Tensor | None, bias_v: Tensor | None, zero: bool, dropout: float, out_w: Tensor, out_b: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """torch's attention layer, (N, B, C), written out."""
        if bias_k is not None or zero or in_w is None or kwargs.get("key_padding_mask") is not None:
            raise UserError(
                "relevance: nn.MultiheadAttention with masks of keys, added keys or other widths is not known"
            )
        parts_b = (None,) * 3 if in_b is None else in_b.chunk(3)
        # called by name, so that this mode sees them
        with self:
            query, key, value = (
                F.linear(x, w, b).unflatten(-1, (heads, -1)).permute(1, 2, 0, 3)
                for x, w, b in zip((q, k, v), in_w.chunk(3), parts_b, strict=True)
            )
            mixed = F.scaled_dot_product_attention(query, key, value, kwargs.get("attn_mask"))
            return F.linear(mixed.permute(2, 0, 1, 3).flatten(2), out_w, out_b), None

    def product(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        """Linear in what depends on the picture; of two such factors half to each."""
        equation, factors = (args[:1], args[1:]) if func.__name__ == "einsum" else ((), args)
        if len(factors) == 1 and isinstance(factors[0], list | tuple):
            factors = tuple(factors[0])
        moving = [i for i, x in enumerate(factors) if depends(x)]
        if func.__name__ in ("mul_", "__imul__") and len(moving) > 1:
            func = torch.mul
        if len(moving) < 2:
            return func(*equation, *factors, **kwargs)
        parts = [
            func(*equation, *(x.detach() if depends(x) and j != i else x for j, x in enumerate(factors)), **kwargs)
            for i in moving
        ]
        share = torch.stack([part / len(moving) for part in parts]).sum(0)
        return share + (parts[0] - share).detach()

    def max_pool(self, name: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Max pooling as released: see `LastWinner`."""
        kwargs.pop("return_indices", None)
        indexed = getattr(F, f"max_pool{x.ndim - 2}d_with_indices")
        arguments = args[:5] if len(args) > 5 else args
        return LastWinner.apply(x, lambda t: indexed(t, *arguments, **kwargs))


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for part in value:
            yield from _flat(part)
    elif isinstance(value, dict):
        yield from _flat(list(value.values()))
    else:
        yield value


def _cut(args: Any) -> Any:
    return tuple(x.detach() if isinstance(x, Tensor) else x for x in args)


@dataclass
class Relevance:
    """Relevance of every picture, as (B, C, *S) in the picture's own channels, and what became of the rest.

    `score` = sum of `pixels` + `absorbed` + what the rules lose, for each picture.
    """

    pixels: Tensor
    score: Tensor
    target: Tensor
    absorbed: Tensor
    """Relevance that biases and other additions took, (B,)."""
    layers: dict[str, Tensor] = field(default_factory=dict)
    """Name -> relevance at the input of a layer that was asked for."""

    @property
    def lost(self) -> Tensor:
        """Share of the score, (B,), that neither pixels nor additions account for: 0 where relevance is conserved."""
        total = self.pixels.flatten(1).sum(1) + self.absorbed
        return (self.score - total).abs() / self.score.abs().clamp(min=1e-12)


def relevance(
    model: nn.Module,
    images: Tensor,
    target: Target = None,
    rules: str | Rules = "epsilon",
    *,
    layers: Sequence[str] = (),
) -> Relevance:
    """Layer-wise relevance propagation of the class's logit, one picture after the other.

    In memory: one forward and backward pass of one picture, with as much again as its layers' outputs.

    Args:
        target: a class for all, one for each, or None for what the model answers.
        rules: a name of `RULES`, or rules.
        layers: names of modules at whose inputs relevance is wanted too.
    """
    if isinstance(rules, str):
        if rules not in RULES:
            raise ValueError(f"rules is {rules!r}; one of {', '.join(RULES)}")
        rules = RULES[rules]
    weights = weights_of(model)
    images = as_images(images, weights)
    results: list[tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]] = []
    wanted = torch.as_tensor(target) if target is not None else None
    if wanted is not None and wanted.ndim and wanted.shape != (len(images),):
        raise UserError(f"target: names {wanted.numel()} classes for {len(images)} pictures; give one, or one for each")
    with evaluating(model):
        for i, image in enumerate(images):
            x = image[None].requires_grad_()
            one = wanted[i : i + 1] if wanted is not None and wanted.ndim else target
            points: Mapping[str, Point]
            with watching(model, layers) as points, Propagation(rules) as made:
                output = call(model, x, weights)
            chosen = classes_of(logits_of(output, model), one)
            score = logit(output, chosen)
            ends = [x, *made.pixels, *made.sources, *(points[name].input for name in layers)]
            found = torch.autograd.grad(score.sum(), ends, allow_unused=True)
            parts = [torch.zeros_like(e) if g is None else (e * g.conj()).real.detach() for e, g in zip(ends, found)]
            spread, extra = 1 + len(made.pixels), 1 + len(made.pixels) + len(made.sources)
            pixels = torch.stack(parts[:spread]).sum(0)
            absorbed = torch.stack([p.sum() for p in (*parts[spread:extra], x.new_zeros(()))]).sum()
            results.append((pixels, score.detach(), chosen, absorbed[None], parts[extra:]))
    pixels, score, chosen, absorbed = (torch.cat(list(part)) for part in list(zip(*results, strict=True))[:4])  # type: ignore[arg-type]
    at = {name: torch.cat([r[4][i] for r in results]) for i, name in enumerate(layers)}
    return Relevance(pixels, score, chosen, absorbed, at)
