"""Keeping the tokens that a summary token attends to, and dropping or fusing the others."""

import math
from dataclasses import dataclass, field
from fractions import Fraction

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nearfar.ops.common.ranking import ranked


def keep_count(keep: float | int, tokens: int) -> int:
    """How many of `tokens` are kept: ceil(keep tokens) of a rate in (0, 1], or a whole number itself, at most all.

    The product is taken in float64 without rounding first, as in the released code. While exporting with a free number
    of tokens the rate is a decimal fraction in whole numbers, and refused if that gives other counts up to 4096 tokens.
    """
    if isinstance(keep, int) and not isinstance(keep, bool) and keep >= 1:
        return min(keep, tokens)
    if not 0 < keep <= 1:
        raise ValueError(f"keep is {keep}; it must be a rate in (0, 1] or a number of tokens of at least 1")
    if isinstance(tokens, int):
        return math.ceil(keep * tokens)
    over, under = Fraction(str(keep)).as_integer_ratio()
    if any(math.ceil(keep * n) != -(-over * n // under) for n in range(4097)):
        raise ValueError(f"keep is {keep}: rounding makes its counts irregular; export another rate or one size")
    return -(-over * tokens // under)


def summary_scores(q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h n d"]) -> Float[Tensor, "b m"]:
    """Mean over heads of the attention of token 0 to every other: softmax(q_0 k^T / sqrt(d))_{1..}; cost O(N C)."""
    return ((q[:, :, :1] @ k.mT) * q.shape[-1] ** -0.5).softmax(-1).mean(1)[:, 0, 1:]


def received_scores(q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h n d"], rows: int = 256) -> Float[Tensor, "b n"]:
    """Mean attention that every token receives, for models without a summary token; no N x N matrix at once."""
    total = torch.zeros(q.shape[0], k.shape[2], dtype=q.dtype, device=q.device)
    for part in q.split(rows, 2):
        total = total + ((part @ k.mT) * q.shape[-1] ** -0.5).softmax(-1).mean(1).sum(1)
    return total / q.shape[2]


def reorganize(
    x: Float[Tensor, "b n c"], scores: Float[Tensor, "b m"], count: int, *, fuse: bool = True, prefix: int = 1
) -> tuple[Float[Tensor, "b k c"], Int[Tensor, "b kept"], Int[Tensor, "b rest"]]:
    """The `prefix` tokens, then the `count` others of the highest scores, highest first; with `fuse` one more behind.

        fused = sum_i s_i x_i over the tokens that are not kept

    whose weights are not normalized again, so it is small. Equal scores keep the order of the tokens. Returns the
    tokens and the indices, among the others, of the kept and of the remaining ones (ascending). Where all are kept x
    itself comes back. Gradients reach the kept tokens and, through `fused`, the others and their scores.

    Liang et al., EViT (ICLR 2022), section 3.2. Not causal: it looks at all tokens, and they lose their order.
    """
    others = x[:, prefix:]
    order = ranked(scores)
    kept = order[:, :count]
    rest = order[:, count:].sort(dim=1).values
    if count >= others.shape[1]:
        return x, torch.arange(others.shape[1], device=x.device).expand(len(x), -1), rest
    parts = [x[:, :prefix], others.gather(1, kept[..., None].expand(-1, -1, x.shape[-1]))]
    if fuse:
        left = others.gather(1, rest[..., None].expand(-1, -1, x.shape[-1]))
        parts.append(scores.gather(1, rest)[:, None] @ left)
    return torch.cat(parts, 1), kept, rest


@dataclass
class TokenTrail:
    """Where the tokens of a grid went: for putting features of few tokens back on all its positions.

    `owner` (B, N): the place of each original token, or of what it was fused into, among the present ones, -1 once it
    is dropped; `kept`: the indices that each reorganization kept, as `reorganize` gives them.
    """

    owner: Int[Tensor, "b n"]
    dropped: Float[Tensor, "b n c"] | None = None
    kept: list[Tensor] = field(default_factory=list)

    @classmethod
    def start(cls, batch: int, tokens: int, device: torch.device) -> "TokenTrail":
        return cls(torch.arange(tokens, device=device).expand(batch, -1))

    def follow(self, kept: Tensor, rest: Tensor, before: Float[Tensor, "b m c"], fuse: bool) -> "TokenTrail":
        """The trail after one reorganization of the tokens `before` it; dropped ones keep the value they had."""
        count = kept.shape[1]
        place = torch.full(before.shape[:2], count if fuse else -1, device=before.device)
        place = place.scatter(1, kept, torch.arange(count, device=before.device).expand_as(kept))
        if rest.shape[1] == 0:
            return TokenTrail(self.owner, self.dropped, [*self.kept, kept])
        there = self.owner.clamp(min=0)
        owner = torch.where(self.owner < 0, self.owner, place.gather(1, there))
        values = before.gather(1, there[..., None].expand(-1, -1, before.shape[-1]))
        gone = (self.owner >= 0) & (owner < 0)
        dropped = torch.zeros_like(values) if self.dropped is None else self.dropped
        return TokenTrail(owner, torch.where(gone[..., None], values, dropped), [*self.kept, kept])

    def dense(self, x: Float[Tensor, "b m c"]) -> Float[Tensor, "b n c"]:
        """The present tokens x, without prefix, on all original positions: fused tokens fill their members, dropped
        ones show the value that they had when they were dropped."""
        values = x.gather(1, self.owner.clamp(min=0)[..., None].expand(-1, -1, x.shape[-1]))
        return values if self.dropped is None else torch.where((self.owner < 0)[..., None], self.dropped, values)
