"""A mixture of feed-forward experts, of which each token visits a few."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nearfar.ops.common.layers import linear_map


class ExpertMixture(nn.Module):
    """`y = sum_{e in top} w_e f_e(x) + f_shared(x)`, `f(x) = W_d (silu(W_g x) W_u x)`, no biases.

    Scores are sigmoid(W x), in float32 or better. The top experts are those with the largest score + `correction`, a
    buffer for load balancing that no gradient reaches (its update belongs to the training); their weights are the
    scores without it, over their sum + 1e-20, times `scale`. DeepSeek-V3 (arXiv 2412.19437), as Kimi Linear has it.
    Shapes `(..., d)` to `(..., d)`. Cost O(top d hidden) per token; sorted by expert, so that each expert runs once.

    Args:
        dim: channels d. hidden: width of an expert. num_experts, top: how many there are and how many a token visits.
        shared: shared experts, one of `shared` times the width; 0: none.
        scale: see above.
    """

    def __init__(
        self, dim: int, hidden: int, num_experts: int = 8, top: int = 2, shared: int = 1, scale: float = 1.0
    ) -> None:
        super().__init__()
        if min(dim, hidden) < 1 or not 1 <= top <= num_experts or shared < 0:
            raise ValueError(
                f"dim={dim} and hidden={hidden} must be at least 1, top={top} in 1..num_experts={num_experts}, "
                f"shared={shared} at least 0"
            )
        self.top, self.scale = top, scale
        self.router = nn.Linear(dim, num_experts, bias=False)
        self.register_buffer("correction", torch.zeros(num_experts))
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2 * hidden, dim))
        self.down = nn.Parameter(torch.empty(num_experts, dim, hidden))
        self.shared_gate_up = nn.Linear(dim, 2 * shared * hidden, bias=False) if shared else None
        self.shared_down = nn.Linear(shared * hidden, dim, bias=False) if shared else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Experts from N(0, 0.02), correction 0; the linear maps reset themselves."""
        nn.init.normal_(self.gate_up, std=0.02)
        nn.init.normal_(self.down, std=0.02)
        nn.init.zeros_(self.correction)

    def route(self, x: Float[Tensor, "t d"]) -> tuple[Float[Tensor, "t k"], Tensor]:
        """Weights and numbers `(t, top)` of the experts that each token visits."""
        with torch.autocast(x.device.type, enabled=False):
            wide = torch.promote_types(x.dtype, torch.float32)
            scores = torch.sigmoid(F.linear(x.to(wide), linear_map(self.router)[0].to(wide)))
        chosen = (scores + self.correction).topk(self.top, -1, sorted=False).indices
        weights = scores.gather(-1, chosen)
        return weights / (weights.sum(-1, keepdim=True) + 1e-20) * self.scale, chosen

    def forward(self, x: Float[Tensor, "*s d"]) -> Float[Tensor, "*s d"]:
        tokens = x.flatten(0, -2)
        weights, chosen = self.route(tokens)
        order = chosen.flatten().argsort(stable=True)
        source = order // self.top
        counts = chosen.flatten().bincount(minlength=len(self.down)).tolist()
        parts = [
            glu(part, gate_up, down)
            for part, gate_up, down in zip(tokens[source].split(counts), self.gate_up.unbind(0), self.down.unbind(0))
            if len(part)
        ]
        visited = torch.cat(parts) * weights.flatten()[order, None].to(parts[0].dtype)
        y = torch.zeros_like(tokens, dtype=visited.dtype).index_add(0, source, visited)
        if self.shared_down is not None:
            gate, up = self.shared_gate_up(tokens).chunk(2, -1)
            y = y + self.shared_down(F.silu(gate) * up)
        return y.view(x.shape).to(x.dtype)


def glu(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """`W_d (silu(W_g x) W_u x)`, W_g and W_u one above the other."""
    gate, up = F.linear(x, gate_up).chunk(2, -1)
    return F.linear(F.silu(gate) * up, down)
