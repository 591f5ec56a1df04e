"""Selective scans in several directions at once: SS2D over grids, bidirectional and tri-orientated Mamba."""

import math
import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nearfar.ops.common.layers import ChannelNorm, DepthwiseConv
from nearfar.ops.convolution.causal import ShortConv
from nearfar.ops.recurrence.mamba import init_decay_, init_steps_, selective_scan
from nearfar.ops.recurrence.scan_orders import SETS, invert, scan_order


class DirectionalScan(nn.Module):
    """The selective scan in K directions, each with its own parameters, in one pass over K groups.

    (r, B, C)_k = W_k u; dt_k = softplus(V_k r + b_k); A_k = -exp(A_log_k);
    `y_k = S6(u, dt_k, A_k, B_k, C_k) + D_k u`, the positions visited in the order of direction k.

    As W and V act on single positions, nothing is reordered before the scan: it reads and writes at the positions of
    its order. Cost O(K N E (S + R)).

    Args:
        inner: channels E.
        directions: K.
        d_state: S, states per channel.
        dt_rank: R, width of r.
    """

    def __init__(self, inner: int, directions: int, d_state: int, dt_rank: int):
        super().__init__()
        if min(inner, directions, d_state, dt_rank) < 1:
            raise ValueError(
                f"inner={inner}, directions={directions}, d_state={d_state} and dt_rank={dt_rank} must be at least 1"
            )
        self.widths = [dt_rank, d_state, d_state]
        self.x_proj = nn.Parameter(torch.empty(directions, dt_rank + 2 * d_state, inner))
        self.dt_proj = nn.Parameter(torch.empty(directions, inner, dt_rank))
        self.dt_bias = nn.Parameter(torch.empty(directions, inner))
        self.A_log = nn.Parameter(torch.empty(directions, inner, d_state))
        self.D = nn.Parameter(torch.empty(directions, inner))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As in Mamba, the same for every direction."""
        bound = self.x_proj.shape[-1] ** -0.5
        nn.init.uniform_(self.x_proj, -bound, bound)
        init_steps_(self.dt_proj, self.dt_bias)
        init_decay_(self.A_log)
        nn.init.ones_(self.D)

    def forward(
        self, u: Float[Tensor, "b n e"] | Float[Tensor, "b n k e"], order: Tensor | None
    ) -> Float[Tensor, "b n k e"]:
        """u: what all directions read, or each its own; order: `(K, N)`, see `scan_order`; None: as they come."""
        k = len(self.x_proj)
        if u.dim() == 3:
            projected = F.linear(u, self.x_proj.flatten(0, 1)).unflatten(-1, (k, -1))
        else:
            projected = torch.einsum("bnke,kpe->bnkp", u, self.x_proj)
        r, B, C = projected.split(self.widths, -1)
        A = -torch.exp(self.A_log.float() if self.A_log.dtype != torch.float64 else self.A_log)
        y, _ = selective_scan(
            u if u.dim() == 3 else u.flatten(2),
            (torch.einsum("bnkr,ker->bnke", r, self.dt_proj) + self.dt_bias).flatten(2),
            A.flatten(0, 1),
            B,
            C,
            D=self.D.flatten(),
            softplus=True,
            order=order,
        )
        return y.unflatten(-1, (k, -1))


class DirectionalMamba(nn.Module):
    """Mamba in several directions over one sequence, with shared projections in and out.

    (x, z) = W_in u; per direction k: `y_k = S6_k(silu(conv_k(x in order k))) silu(z)`, back in place;
    out = W_out (w sum_k y_k), w = 1 / K for `merge="mean"`, 1 for "sum".

    `("row", "row-reversed")` with the mean is Vim's bidirectional block (Zhu et al. 2024, arXiv 2401.09417), "tri"
    with the sum SegMamba's tri-orientated one (Xing et al. 2024, arXiv 2401.13560), whose third direction takes one
    position of each of `slices` equal runs in turn. Not causal. The released code runs a CUDA kernel per direction;
    here all directions are groups of one scan. Cost O(K N d (d + S)).

    Args:
        dim: channels d.
        directions: orders of `scan_orders.ORDERS`, or a name of its `SETS`.
        merge: "mean" or "sum" over the directions.
        d_state, d_conv, expand, dt_rank: as in `Mamba`.
        scan: False puts the identity in the scans' place, for ablation.
    """

    def __init__(
        self,
        dim: int,
        directions: str | tuple[str, ...] = "bidirectional",
        merge: str = "mean",
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | None = None,
        scan: bool = True,
    ):
        super().__init__()
        if merge not in ("mean", "sum"):
            raise ValueError(f"merge is {merge!r}; allowed are 'mean' and 'sum'")
        self.directions = SETS.get(directions, (directions,)) if isinstance(directions, str) else directions
        scan_order(self.directions, (1,), window=1, step=1, slices=1)  # refuses unknown names
        k, inner = len(self.directions), expand * dim
        self.weight = 1 / k if merge == "mean" else 1.0
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.conv = ShortConv(k * inner, d_conv)
        rank = math.ceil(dim / 16) if dt_rank is None else dt_rank
        self.scan = DirectionalScan(inner, k, d_state, rank) if scan else None
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def forward(
        self, x: Float[Tensor, "b n d"], size: tuple[int, ...] | None = None, slices: int | None = None
    ) -> Float[Tensor, "b n d"]:
        """size: the grid whose row-major positions the sequence holds, where an order needs it; None: one axis."""
        x, z = self.in_proj(x).chunk(2, -1)
        order = scan_order(self.directions, size or x.shape[1:2], slices=slices, device=x.device)
        k, n = order.shape
        # every direction in its own order, for the convolution
        y = x[:, order.T.reshape(-1)].unflatten(1, (n, k)).flatten(2)
        y = F.silu(self.conv(y)).unflatten(-1, (k, -1))
        if self.scan is not None:
            y = self.scan(y, None)
        back = invert(order) * k + torch.arange(k, device=x.device)[:, None]
        y = y.flatten(1, 2)[:, back.T.reshape(-1)].unflatten(1, (n, k)).sum(2)
        return self.out_proj(y * F.silu(z) * self.weight)


class SS2D(nn.Module):
    """2-D selective scan (VMamba, Liu et al. 2024, arXiv 2401.10166), on grids of 1, 2 or 3 axes.

    x (and, with a gate, z) = W_in u; x <- silu(depthwise convolution of x); y = sum over the directions of the
    selective scan of x in each; `out = W_out (LayerNorm(y) silu(z))`.

    `gate=True` is the first form ("v0": E = 2 d, S = 16), `gate=False, conv_bias=False, d_state=1` the later one
    ("v05_noz"). Runs channels-last. The released code copies the map four times and un-copies it by flips and
    transpositions; here the scan visits the positions through tables. Any grid. Cost O(K N d (d + S)).

    Args:
        dim: channels d.
        d_state: S, states per channel.
        ratio: E / d.
        dt_rank: width of the step sizes' bottleneck; None: ceil(d / 16).
        kernel_size: of the depthwise convolution.
        conv_bias: whether that has a bias.
        gate: whether the output is multiplied by silu(z).
        directions: orders of `scan_orders.ORDERS`, or a name of its `SETS`; None: along every axis, both ways.
        window, step: for the orders "windowed" and "atrous".
        dims: axes of the grid.
        scan: False puts the identity in the scans' place, for ablation.
    """

    def __init__(
        self,
        dim: int,
        d_state: int = 16,
        ratio: float | int = 2,
        dt_rank: int | None = None,
        kernel_size: int = 3,
        conv_bias: bool = True,
        gate: bool = True,
        directions: str | tuple[str, ...] | None = None,
        window: int | None = None,
        step: int | None = None,
        dims: int = 2,
        scan: bool = True,
    ):
        super().__init__()
        if directions is None:
            directions = {1: "bidirectional", 2: "cross", 3: "axes"}.get(dims, "cross")
        self.directions = SETS.get(directions, (directions,)) if isinstance(directions, str) else directions
        self.options = {"window": window, "step": step}
        scan_order(self.directions, (1,), **self.options)  # refuses unknown names
        inner = int(ratio * dim)
        self.gate = gate
        self.in_proj = nn.Linear(dim, 2 * inner if gate else inner, bias=False)
        self.conv = DepthwiseConv(inner, kernel_size, dims=dims, bias=conv_bias)
        rank = math.ceil(dim / 16) if dt_rank is None else dt_rank
        self.scan = DirectionalScan(inner, len(self.directions), d_state, rank) if scan else None
        self.out_norm = ChannelNorm(inner, eps=1e-5)
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Float[Tensor, "b c *s"]) -> Float[Tensor, "b c *s"]:
        size = x.shape[2:]
        x = self.in_proj(x.movedim(1, -1))
        x, z = x.chunk(2, -1) if self.gate else (x, None)
        u = F.silu(self.conv(x.movedim(-1, 1))).movedim(1, -1).flatten(1, -2)
        if self.scan is not None:
            order = scan_order(self.directions, tuple(size), **self.options, device=x.device)
            u = self.scan(u, order).sum(2)
        y = u.unflatten(1, size)
        y = F.layer_norm(y, y.shape[-1:], self.out_norm.weight, self.out_norm.bias, self.out_norm.eps)
        return self.out_proj(y if z is None else y * F.silu(z)).movedim(-1, 1)


_SS2D = (
    (r"\bx_proj_weight$", "scan.x_proj"),
    (r"\bdt_projs_weight$", "scan.dt_proj"),
    (r"\bdt_projs_bias$", "scan.dt_bias"),
    (r"\bA_logs$", "scan.A_log"),
    (r"\bDs$", "scan.D"),
    (r"\bconv2d\.", "conv."),
)


def released_ss2d(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names and shapes for every SS2D in a state dict of the released VMamba or VM-UNet.

    There the directions are one axis with the channels in `A_logs` and `Ds`, and channel-first networks may keep
    their projections as 1x1 convolutions.
    """
    renamed = {}
    for name, tensor in state.items():
        old = name
        for pattern, new in _SS2D:
            name = re.sub(pattern, new, name)
        if old.endswith(("A_logs", "Ds")):
            directions = len(state[old.removesuffix("A_logs").removesuffix("Ds") + "x_proj_weight"])
            tensor = tensor.unflatten(0, (directions, -1))
        elif old.endswith(("in_proj.weight", "out_proj.weight")) and tensor.dim() == 4:
            tensor = tensor[..., 0, 0]
        renamed[name] = tensor
    return renamed


def released_mamba(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names and shapes for every Mamba block in a state dict of the released Mamba, Vim or SegMamba.

    There each direction has tensors of its own: `conv1d`, `x_proj`, `dt_proj`, `A_log` and `D` for the first, the
    same with `_b` for the reversed one (`A_b_log`) and `_s` for the one between slices.
    """
    renamed = dict(state)
    for name in [name for name in state if re.search(r"(^|(?<!scan)\.)A_log$", name)]:
        prefix = name.removesuffix("A_log")
        ends = [end for end in ("", "_b", "_s") if f"{prefix}D{end}" in state]
        take = lambda pattern, p=prefix, e=ends, s=renamed: [s.pop(p + pattern.format(end)) for end in e]  # noqa: E731
        renamed |= {
            f"{prefix}conv.weight": torch.cat(take("conv1d{}.weight")),
            f"{prefix}conv.bias": torch.cat(take("conv1d{}.bias")),
            f"{prefix}scan.x_proj": torch.stack(take("x_proj{}.weight")),
            f"{prefix}scan.dt_proj": torch.stack(take("dt_proj{}.weight")),
            f"{prefix}scan.dt_bias": torch.stack(take("dt_proj{}.bias")),
            f"{prefix}scan.A_log": torch.stack(take("A{}_log")),
            f"{prefix}scan.D": torch.stack(take("D{}")),
        }
    return renamed
