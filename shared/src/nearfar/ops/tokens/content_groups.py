"""Attention inside groups of tokens that are alike, and to a few centres of their content."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from nearfar.ops.attention.patch_overlap import attend


def _alone(x: Tensor) -> Tensor:
    return x


class ContentGroupAttention(nn.Module):
    """Tokens sorted by the centre that they are most like attend to their group, the next group, and the centres.

    With centres u_1 .. u_m (m = `num_centres`) and g = min(N, `group_size`):

        c(i) = argmax_k cos(x_i, u_k);  pi sorts the tokens by c, stably
        group j holds the sorted tokens j g .. (j + 1) g - 1;  K_j, V_j those of the groups j and j + 1
        y_i = W_o (softmax(q_i K_j^T s) V_j + softmax(q_i Kc^T s) Vc),   Kc = W_kc u, Vc = W_vc u

    s = (qk_dim / num_heads)^-1/2, two separate softmaxes, no biases. Past the end the sorted tokens go on mirrored.

    x: (B, N, C) -> (B, N, C), any N. It knows no positions: permuting tokens that differ permutes the outputs, but for
    groups that a tie or the border of a group splits. Cost: O(N (g + m) C + N log N).
    Source: Liu et al., CATANet (CVPR 2025), TAB without its norm and residual. The released code fails where N is
    smaller than the tokens it mirrors; here the mirroring repeats. It also sorts with torch's unstable sort, so the
    order inside a centre, and with it who shares a group, is the implementation's: `stable=False` computes that.

    The centres are learned by spherical k-means, not by gradients: in training, `iterations` steps over all tokens of
    the batch start from the stored centres (the last step passes gradients on), and the stored ones move a share of
    1 - `momentum` towards the result. Before the first training step, means of consecutive chunks stand in for them.
    Where several processes share a batch, `batch_sum` is to give its argument's sum over all of them.
    """

    batch_sum: Callable[[Tensor], Tensor] = staticmethod(_alone)

    def __init__(
        self,
        dim: int,
        qk_dim: int,
        num_heads: int,
        num_centres: int,
        group_size: int,
        *,
        iterations: int = 5,
        momentum: float = 0.999,
        stable: bool = True,
    ) -> None:
        super().__init__()
        if dim % num_heads or qk_dim % num_heads:
            raise ValueError(f"num_heads is {num_heads}; it must divide dim = {dim} and qk_dim = {qk_dim}")
        if min(num_centres, group_size, iterations) < 1:
            raise ValueError(
                f"num_centres, group_size and iterations are {num_centres}, {group_size}, {iterations}; "
                "each must be at least 1"
            )
        self.num_heads, self.group_size = num_heads, group_size
        self.iterations, self.momentum, self.stable = iterations, momentum, stable
        self.scale = (qk_dim // num_heads) ** -0.5
        self.register_buffer("centres", torch.randn(num_centres, dim))
        self.register_buffer("initialized", torch.tensor(False))
        self.q = nn.Linear(dim, qk_dim, bias=False)
        self.k = nn.Linear(dim, qk_dim, bias=False)
        self.v = nn.Linear(dim, dim, bias=False)
        self.centre_k = nn.Linear(dim, qk_dim, bias=False)
        self.centre_v = nn.Linear(dim, dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        centres = self.present_centres(x)
        # the centre's length does not matter to the order of cosines, and the token's neither
        order = (x @ F.normalize(centres.detach(), dim=-1).mT.to(x.dtype)).argmax(-1).argsort(dim=1, stable=self.stable)
        y = self.attend(x, order, centres)
        if self.training:
            self.follow(centres.detach())
        return self.out(y)

    def attend(
        self, x: Float[Tensor, "b n c"], order: Int[Tensor, "b n"], centres: Float[Tensor, "m c"]
    ) -> Float[Tensor, "b n c"]:
        """Both attentions, in the order of the tokens of `x`."""
        n = x.shape[1]
        size = min(n, self.group_size)
        groups = -(-n // size)
        place = torch.arange((groups + 1) * size, device=x.device) % (2 * n)
        place = torch.minimum(place, 2 * n - 1 - place)  # onwards from the end, backwards
        index = order[:, place]

        def grouped(linear: nn.Linear) -> Float[Tensor, "b g s d"]:
            values = linear(x)
            return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1])).unflatten(1, (-1, size))

        def heads(t: Float[Tensor, "b s d"]) -> Float[Tensor, "b h s e"]:
            return t.unflatten(-1, (self.num_heads, -1)).transpose(-3, -2)

        q = grouped(self.q)[:, :-1]
        k, v = (torch.cat([t[:, :-1], t[:, 1:]], 2) for t in (grouped(self.k), grouped(self.v)))
        near = attend(*(heads(t.flatten(0, 1)) for t in (q, k, v)), scale=self.scale)
        near = near.transpose(1, 2).flatten(2).unflatten(0, (len(x), -1)).flatten(1, 2)[:, :n]
        inverse = torch.empty_like(order).scatter_(1, order, torch.arange(n, device=x.device).expand_as(order))
        near = near.gather(1, inverse[..., None].expand_as(near))
        keys, values = (heads(linear(centres)[None]) for linear in (self.centre_k, self.centre_v))
        far = attend(heads(self.q(x)), keys, values, self.scale)
        return near + far.transpose(1, 2).flatten(2)

    def present_centres(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "m c"]:
        """The stored centres; in training those that k-means finds from there in this batch, the last step with
        gradients."""
        with torch.no_grad():
            if torch.compiler.is_compiling():
                centres = torch.where(self.initialized, self.centres, self.chunk_means(x))
            else:
                centres = self.centres if bool(self.initialized) else self.chunk_means(x)
            if not self.training:
                return centres.to(x.dtype)
            tokens = F.normalize(x.detach().flatten(0, 1), dim=-1)
            centres = F.normalize(centres, dim=-1).to(x.dtype)
            for _ in range(self.iterations - 1):
                centres = k_means_step(tokens, centres, self.batch_sum)
        return k_means_step(F.normalize(x.flatten(0, 1), dim=-1), centres, self.batch_sum)

    def chunk_means(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "m c"]:
        """Means of as many consecutive chunks of the tokens as there are centres, over the batch."""
        n, count = x.shape[1], len(self.centres)
        place = torch.arange(n + count - n % count, device=x.device) % (2 * n)
        means = x[:, torch.minimum(place, 2 * n - 1 - place)].unflatten(1, (count, -1)).mean((0, 2))
        if not self.training:
            return means
        return self.batch_sum(means * len(x)) / self.batch_sum(means.new_tensor(len(x)))

    @torch.no_grad()
    def follow(self, centres: Float[Tensor, "m c"]) -> None:
        """Move the stored centres towards those of a batch; the first ones are taken as they are."""
        if bool(self.initialized):
            self.centres.lerp_(centres.to(self.centres.dtype), 1 - self.momentum)
        else:
            self.centres.copy_(centres)
            self.initialized.fill_(True)


def k_means_step(
    tokens: Float[Tensor, "n c"], centres: Float[Tensor, "m c"], batch_sum: Callable[[Tensor], Tensor] = _alone
) -> Float[Tensor, "m c"]:
    """The unit vectors along the sums of the (unit) tokens nearest to each (unit) centre; an idle centre stays."""
    nearest = (tokens.detach() @ centres.mT).argmax(-1)
    sums = batch_sum(torch.zeros_like(centres).index_add(0, nearest, tokens))
    idle = batch_sum(torch.bincount(nearest, minlength=len(centres))) == 0
    return torch.where(idle[:, None], centres, F.normalize(sums, dim=-1))
