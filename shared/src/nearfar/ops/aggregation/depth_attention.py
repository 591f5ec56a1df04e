"""Attention residuals: each sub-layer's input is a learnt mixture over depth of what came before it."""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nearfar.ops.common.streaming import wide
from nearfar.ops.common.tables import Derived

QUERIES = ("static", "input", "scalar")
FEW = 64
"""Tokens up to which a pass without gradients is bound by the number of calls, see `FewTokens`."""


class _Mix(torch.autograd.Function):
    """`sum_i p_i v_i`, p = softmax_i(scale_i (v_i . key)) per head, from sources that are never stacked.

    key `(h, d / h)`, scales `(n, ...)`, sources `(..., h, d / h)`; p `(n, ..., h)`. Keeps no copy of a source.
    """

    @staticmethod
    def forward(ctx, key, scales, *sources):
        logits = torch.stack([project(v, key) * s[..., None] for v, s in zip(sources, scales)])
        p = logits.softmax(0)
        out = sources[0] * p[0, ..., None]
        for v, weight in zip(sources[1:], p[1:]):
            out.addcmul_(v, weight[..., None])
        ctx.save_for_backward(key, logits, p, scales, *sources)
        ctx.mark_non_differentiable(p)
        return out, p

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        key, logits, p, scales, *sources = ctx.saved_tensors
        along = torch.stack([torch.linalg.vecdot(grad, v) for v in sources])
        slope = p * (along - (p * along).sum(0))  # of the logits
        size = key.numel()
        grad_key, grads = torch.zeros_like(key), []
        for v, s, weight, dl, logit in zip(sources, scales, p, slope, logits):
            s = s[..., None]
            step = dl * s
            if len(key) == 1:
                grad_key += (v.flatten(0, -3).flatten(1).mT @ step.flatten()).view(key.shape)
            else:
                grad_key += torch.einsum("...hc,...h->hc", v, step)
            g = grad * weight[..., None]
            g.addcmul_(step[..., None], key)
            shrink = (dl * logit).sum(-1, keepdim=True) * s * s / -size  # the norm's own slope
            grads.append(g.addcmul_(v, shrink[..., None]))
        return grad_key, None, *grads


def project(v: Tensor, key: Tensor) -> Tensor:
    """`(..., h)`, each head's product with its key."""
    if len(key) == 1:
        return (v.flatten(-2) @ key.flatten())[..., None]
    return torch.einsum("...hc,hc->...h", v, key)


class DepthAttention(nn.Module):
    """One aggregation over depth: `out = sum_i p_i v_i`, `p = softmax_i(w . (g v_i / rms(v_i)))`, per token.

    Sources v_i `(..., d)` are what the network has computed so far; positions do not mix. Zero queries w, the initial
    ones, give the mean of the sources. No 1 / sqrt(d); values are not normed; in float32 or better. Attention Residuals
    (Kimi Team 2026, arXiv 2603.15031). Cost O(n d) per token for n sources.

    The paper's ablations: `query="input"` w = W v for the latest source v (which hidden state the paper means is
    inferred), "scalar" learnt logits without a look at the sources; `sigmoid` weights instead of softmax; `norm=False`
    keys that are not normed; `num_heads` groups of channels with weights of their own (the norm covers all channels).

    Args:
        dim: channels d. eps: of the norm.
        num_heads, query, sigmoid, norm: see above. max_sources: of "scalar".
    """

    no_weight_decay = ("query",)

    def __init__(
        self,
        dim: int,
        eps: float = 1e-6,
        num_heads: int = 1,
        query: str = "static",
        sigmoid: bool = False,
        norm: bool = True,
        max_sources: int | None = None,
    ) -> None:
        super().__init__()
        if query not in QUERIES or (query == "scalar") != (max_sources is not None):
            raise ValueError(
                f"query={query!r} must be one of {', '.join(QUERIES)}, max_sources={max_sources} set for 'scalar' alone"
            )
        if num_heads < 1 or dim < 1 or dim % num_heads:
            raise ValueError(f"num_heads={num_heads} must divide dim={dim}")
        self.dim, self.eps, self.num_heads, self.query_kind, self.sigmoid = dim, eps, num_heads, query, sigmoid
        shape = {"static": (dim,), "input": (dim, dim), "scalar": (max_sources, num_heads)}[query]
        self.query = nn.Parameter(torch.empty(shape))
        self.norm_weight = nn.Parameter(torch.empty(dim)) if norm and query != "scalar" else None
        self.together = Derived()  # see `spare_few_tokens`
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Queries (and scalar logits) 0, norm weights 1."""
        nn.init.zeros_(self.query)
        if self.norm_weight is not None:
            nn.init.ones_(self.norm_weight)

    @property
    def plain(self) -> bool:
        """Whether this is the paper's form, no ablation but heads."""
        return self.query_kind == "static" and not self.sigmoid and self.norm_weight is not None

    def key(self) -> Tensor:
        """The product of query and norm weight, which is all that counts, `(h, d / h)`, in float32 or better."""
        weights = (t.to(wide(t)[0]) for t in (self.query, self.norm_weight))
        return torch.mul(*weights).view(self.num_heads, -1)

    def forward(
        self, sources: Sequence[Float[Tensor, "*s d"]], squares: Sequence[Tensor] | None = None
    ) -> Float[Tensor, "*s d"]:
        """`squares`: `mean_square` of each source, where already known."""
        return self.mix(sources, squares)[0]

    def mix(
        self, sources: Sequence[Tensor], squares: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, Float[Tensor, "n *s h"]]:
        """The mixture, and the weight of every source for each token and head."""
        if not sources:
            raise ValueError("there is no source to attend to")
        x, heads = sources[-1], (self.num_heads, -1)
        dtype, unchanged = wide(x)
        with unchanged:
            parts = [v.to(dtype).unflatten(-1, heads) for v in sources]
            if self.plain and not torch.compiler.is_compiling():  # dynamo takes one number of sources for another
                squares = [mean_square(v) for v in sources] if squares is None else squares
                out, p = _Mix.apply(self.key(), torch.rsqrt(torch.stack(squares) + self.eps), *parts)
            else:
                p = self.logits(sources, parts)
                p = torch.sigmoid(p) if self.sigmoid else p.softmax(0)
                out = sum(weight[..., None] * v for weight, v in zip(p, parts))
        return out.flatten(-2).to(x.dtype), p

    def logits(self, sources: Sequence[Tensor], parts: Sequence[Tensor]) -> Tensor:
        """`(n, ..., h)`, of the ablations."""
        dtype = parts[-1].dtype
        if self.query_kind == "scalar":
            if len(sources) > len(self.query):
                raise ValueError(f"{len(sources)} sources are more than max_sources={len(self.query)}")
            logits = self.query[: len(sources)].to(dtype)
            shape = (len(sources), *(1,) * (parts[-1].dim() - 2), self.num_heads)
            return logits.view(shape).expand(-1, *parts[-1].shape[:-1])
        w = self.query.to(dtype)
        w = F.linear(sources[-1].to(dtype), w) if self.query_kind == "input" else w
        w = w.unflatten(-1, (self.num_heads, -1))
        keys = parts
        if self.norm_weight is not None:
            weight = self.norm_weight.to(dtype)
            keys = (F.rms_norm(v.flatten(-2), (self.dim,), weight, self.eps).unflatten(-1, w.shape[-2:]) for v in parts)
        return torch.stack([(w * k).sum(-1) for k in keys])


@torch.no_grad()
def mean_square(x: Tensor) -> Tensor:
    """`mean(x^2)` over the last axis, in float32 or better; a source's never changes."""
    x = x.to(wide(x)[0])
    return torch.linalg.vecdot(x, x) / x.shape[-1]


class FewTokens:
    """The sources of few tokens side by side in one tensor `(sources, ..., d)`, without gradients.

    An aggregation is then five calls at most whatever the number of sources, where a call for each source would cost
    more than what it computes. Behind the channels of a source stands sqrt(eps d), so that its length is sqrt(d) times
    its rms. Tensors and views are those of one network and shape, and serve one pass after the other, each from `begin`
    on.
    """

    def __init__(self, attends: Sequence[DepthAttention], like: Tensor, block_size: int) -> None:
        *shape, d = like.shape
        self.dtype, self.block_size, self.single = like.dtype, block_size, like.numel() == d
        wider, sources = wide(like)[0], 1 + -(-(len(attends) - 1) // block_size)
        keys = torch.stack([a.query for a in attends]).to(wider) * torch.stack([a.norm_weight for a in attends])
        self.keys = (keys * d**0.5).view(-1, *(like.shape if self.single else (d,))).unbind()
        long = keys.new_full((sources, *shape, d + 1), (attends[0].eps * d) ** 0.5)
        values, lengths = long[..., :d], keys.new_empty((sources, *shape))
        self.places = list(zip(values.unbind(), long.unbind(), lengths.unbind()))
        if self.single:
            values, lengths = values.view(sources, d), lengths.view(sources)
        self.seen = [(values[:n], lengths[:n], values[:n].mT) for n in range(1, sources + 1)]

    def begin(self, embedding: Tensor) -> "FewTokens":
        self.turn(0)
        self.add(embedding)
        return self

    def turn(self, source: int) -> None:
        """Let what comes join source number `source`."""
        self.row, self.long_row, self.length = self.places[source]
        self.begun = False

    def add(self, y: Tensor) -> None:
        self.row.add_(y) if self.begun else self.row.copy_(y)
        self.begun = True
        torch.linalg.vector_norm(self.long_row, dim=-1, out=self.length)

    def read(self, number: int) -> tuple[Tensor, Tensor]:
        """The mixture for sub-layer `number`, and the weights `(sources, ...)`, of one token `(..., sources)`."""
        finished, place = number // self.block_size + 1, number % self.block_size
        if place < 2:  # one source more
            self.values, self.lengths, self.turned = self.seen[finished + place - 1]
            if place == 0 and finished < len(self.places):
                self.turn(finished)
        if self.single:  # without a view
            p = F.linear(self.keys[number], self.values).div_(self.lengths).softmax(-1)
            out = F.linear(p, self.turned)
        else:
            p = (self.values @ self.keys[number]).div_(self.lengths).softmax(0)
            out = (p[..., None] * self.values).sum(0)
        return out if out.dtype == self.dtype else out.to(self.dtype), p


def spare_few_tokens(attends: Sequence[DepthAttention], like: Tensor, block_size: int) -> list[FewTokens] | None:
    """A list of what is not in use of this network with its present weights, to take from and to give back to; None
    where the form does not apply. Sub-layers are the paper's, with one head and one eps."""

    def compute() -> list[FewTokens] | None:
        return [] if {(a.plain, a.num_heads, a.eps) for a in attends} == {(True, 1, attends[0].eps)} else None

    settings = [like.shape, like.dtype, block_size, torch.is_inference_mode_enabled()]
    parameters: list[Tensor] = []
    for a in attends:  # in one go, as what is looked at has left the caches since the last token
        if a._modules:  # parametrized: what the weights come from is not looked at here
            return compute()
        settings.append(a.eps)
        parameters += [p for p in a._parameters.values() if p is not None]
    return attends[-1].together.get(parameters, tuple(settings), compute)


class DepthResiduals:
    """The residual stream of a network whose sub-layers attend over depth; it takes the place of `x = x + f(x)`:

        residuals = DepthResiduals(embedding, attends, block_size)
        for f in sublayers:
            residuals.add(f(residuals.next_input()))
        output = residuals.next_input()

    `attends` has one `DepthAttention` per sub-layer and one for the output. Sources are the embedding and the sum of
    each finished block of `block_size` sub-layers, and within a block also the sum so far; `block_size=1` keeps every
    sub-layer's output (full attention residuals). A block is finished before the sub-layer after it chooses, the last
    one may be short.

    Queries do not depend on data, so `two_phase` computes what all sub-layers of a block take from the finished
    blocks at once, and adds the sum so far to each by an online softmax: the same numbers, each finished source read
    once per block. In plain PyTorch that does not pay on a CPU, so it is off. `window`: only the last so many sources
    and the embedding (an ablation). Without gradients few tokens, as in decoding, take the form of `FewTokens`.
    """

    def __init__(
        self,
        embedding: Tensor,
        attends: Iterable[nn.Module],
        block_size: int = 1,
        two_phase: bool = False,
        window: int | None = None,
    ) -> None:
        if block_size < 1 or (block_size > 1 and block_size % 2):
            raise ValueError(f"block_size={block_size} must be 1 or an even number of sub-layers")
        if window is not None and window < 1:
            raise ValueError(f"window={window} must be at least 1, or None for all sources")
        self.attends, self.block_size, self.window = list(attends), block_size, window
        self.two_phase = two_phase and block_size > 1 and window is None and all(a.plain for a in self.attends)
        self.blocks: list[Tensor] = []
        self.squares: list[Tensor] = []
        self.partial: Tensor | None = embedding
        self.number = 0
        self.weights: list[Tensor] | None = None
        """Set to a list to collect the weights `(n, ..., h)` of each aggregation (without two phases)."""
        self.prepared: tuple[Tensor, Tensor, Tensor] | None = None
        self.few: FewTokens | None = None
        self.spare: list[FewTokens] | None = None

    def next_input(self) -> Tensor:
        """What the next sub-layer reads, or after the last one the output."""
        if self.number >= len(self.attends):
            raise ValueError(f"there are {len(self.attends)} aggregations and all have been made")
        if self.number == 0:
            self.few = self.few_tokens()
        if self.few is not None:
            out, p = self.few.read(self.number)
            self.number += 1
            if self.weights is not None:
                self.weights.append(p.view(-1, *out.shape[:-1], 1))
            if self.number == len(self.attends):
                self.spare.append(self.few)
                self.few = None
            return out
        attend, place = self.attends[self.number], self.number % self.block_size
        if place == 0:
            self.blocks.append(self.partial)
            if attend.plain:
                self.squares.append(mean_square(self.partial))
            self.partial = None
        self.number += 1
        if self.two_phase and self.weights is None:
            if place == 0:
                self.prepare(self.attends[self.number - 1 : self.number - 1 + self.block_size])
            return self.merge(place, attend)
        sources, squares = [*self.blocks], [*self.squares]
        if self.partial is not None:
            sources.append(self.partial)
            if attend.plain:
                squares.append(mean_square(self.partial))
        if self.window is not None and len(sources) > self.window + 1:
            sources, squares = ([t[0], *t[-self.window :]] if t else t for t in (sources, squares))
        out, p = attend.mix(sources, squares or None)
        if self.weights is not None:
            self.weights.append(p)
        return out

    def few_tokens(self) -> FewTokens | None:
        """`FewTokens` where it computes what is asked for."""
        x = self.partial
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type):
            return None
        if x.shape[:-1].numel() > FEW or self.two_phase or self.window is not None:
            return None
        self.spare = spare_few_tokens(self.attends, x, self.block_size)
        if self.spare is None:
            return None
        few = self.spare.pop() if self.spare else FewTokens(self.attends, x, self.block_size)
        return few.begin(x)

    def add(self, y: Tensor) -> None:
        """Take in what a sub-layer computed."""
        if self.few is not None:
            self.few.add(y)
            return
        self.partial = y if self.partial is None else self.partial + y

    def prepare(self, attends: Sequence[DepthAttention]) -> None:
        """Phase one: all queries of a block over the finished sources: unnormalized sums, totals and maxima."""
        dtype, unchanged = wide(self.blocks[0])
        with unchanged:
            keys = torch.stack([attend.key().to(dtype) for attend in attends])
            values = torch.stack([v.to(dtype) for v in self.blocks]).unflatten(-1, keys.shape[1:])
            squares = values.square().mean((-2, -1)) if values.requires_grad else torch.stack(self.squares)
            scales = torch.stack([torch.rsqrt(squares + attend.eps) for attend in attends])
            logits = torch.einsum("shc,n...hc->sn...h", keys, values) * scales[..., None]
            top = logits.amax(1).detach()
            weights = torch.exp(logits - top[:, None])
            self.prepared = torch.einsum("sn...h,n...hc->s...hc", weights, values), weights.sum(1), top

    def merge(self, place: int, attend: DepthAttention) -> Tensor:
        """Phase two: the sum so far joins what was prepared for this sub-layer."""
        out, total, top = (t[place] for t in self.prepared)
        dtype = self.blocks[0].dtype
        if self.partial is None:
            return (out / total[..., None]).flatten(-2).to(dtype)
        with wide(self.partial)[1]:
            v = self.partial.to(out.dtype)
            scale = torch.rsqrt(v.square().mean(-1, keepdim=True) + attend.eps)
            v = v.unflatten(-1, out.shape[-2:])
            logit = torch.einsum("...hc,hc->...h", v, attend.key().to(out.dtype)) * scale
            highest = torch.maximum(top, logit.detach())
            old, new = torch.exp(top - highest), torch.exp(logit - highest)
            out = (old[..., None] * out + new[..., None] * v) / (old * total + new)[..., None]
        return out.flatten(-2).to(dtype)
