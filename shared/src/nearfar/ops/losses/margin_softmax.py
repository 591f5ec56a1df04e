"""Classification with an angular margin: the loss that trains embeddings to be compared by cosine."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


class AAMSoftmax(nn.Module):
    """Additive angular margin softmax (ArcFace, Deng et al. 2019), with sub-centres and an inter-top-k penalty.

    cos_j is the cosine between the embedding and the nearest of the K centres of class j (Deng et al. 2020). At the
    label y it becomes ``phi = cos(theta_y + m)``, or ``cos_y - m sin(pi - m)`` where theta_y + m passes pi. The
    `top_k` hardest other classes become ``cos(theta_j - penalty)`` (Zhao et al. 2022). The loss is the cross entropy of
    `scale` times these. Everything is computed in float32, under autocast too.

    The margin may be moved during training: set `margin` (see `margin_ramp`). With a margin of 0 there is no penalty.

    Args:
        embedding_dim: E.
        num_classes: C.
        margin: m in radians (0.2).
        scale: s (30).
        sub_centers: K (1).
        top_k, penalty: the inter-top-k penalty (0 = none; LAP has 5 and 0.06).

    Shapes: embedding `(B, E)`, label `(B,)` to `(logits (B, C), loss ())`. `weight` is `(K, E, C)`.
    Cost and memory are O(B C K).
    """

    def __init__(
        self,
        embedding_dim: int,
        num_classes: int,
        margin: float = 0.2,
        scale: float = 30.0,
        sub_centers: int = 1,
        top_k: int = 0,
        penalty: float = 0.06,
    ) -> None:
        super().__init__()
        if num_classes < 2 or sub_centers < 1 or not 0 <= margin < math.pi / 2 or scale <= 0:
            raise ValueError(
                "needs num_classes >= 2, sub_centers >= 1, 0 <= margin < pi/2 and scale > 0, got "
                f"{num_classes}, {sub_centers}, {margin}, {scale}"
            )
        if not 0 <= top_k < num_classes:
            raise ValueError(f"top_k must be below the number of classes ({num_classes}), got {top_k}")
        self.margin, self.scale, self.top_k, self.penalty = margin, scale, top_k, penalty
        self.weight = nn.Parameter(torch.empty(sub_centers, embedding_dim, num_classes))
        nn.init.xavier_normal_(self.weight)

    def cosines(self, embedding: Float[Tensor, "b e"]) -> Float[Tensor, "b c"]:
        """Cosine to the nearest centre of each class."""
        with torch.autocast(embedding.device.type, enabled=False):
            weight = self.weight if self.weight.dtype == torch.float64 else self.weight.float()
            unit = nn.functional.normalize(embedding.to(weight.dtype), dim=1)
            return (unit @ nn.functional.normalize(weight, dim=1)).amax(0)

    def forward(
        self, embedding: Float[Tensor, "b e"], label: Int[Tensor, " b"]
    ) -> tuple[Float[Tensor, "b c"], Float[Tensor, ""]]:
        cosine = self.cosines(embedding)
        sine = (1 - cosine.square()).clamp(0, 1)
        sine = torch.where(sine > 0, sine, torch.finfo(sine.dtype).tiny).sqrt()  # a finite slope at cos = 1
        margin, penalty = float(self.margin), float(self.penalty)
        shifted = cosine * math.cos(margin) - sine * math.sin(margin)
        past_pi = cosine <= math.cos(math.pi - margin)
        shifted = torch.where(past_pi, cosine - margin * math.sin(math.pi - margin), shifted)
        is_label = nn.functional.one_hot(label, cosine.shape[1]).bool()
        logits = torch.where(is_label, shifted, cosine)
        if self.top_k and margin > 0:
            hardest = cosine.masked_fill(is_label, -2.0).topk(self.top_k, 1).indices
            is_hard = torch.zeros_like(is_label).scatter(1, hardest, torch.ones_like(hardest, dtype=torch.bool))
            logits = torch.where(is_hard, cosine * math.cos(penalty) + sine * math.sin(penalty), logits)
        logits = self.scale * logits
        return logits, nn.functional.cross_entropy(logits, label)


def margin_ramp(progress: float, final: float, start: float = 0.0, end: float = 1.0) -> float:
    """The margin at `progress` (epochs or steps): 0 until `start`, then a straight line to `final` at `end`."""
    if end < start:
        raise ValueError(f"the ramp must not end ({end}) before it starts ({start})")
    if progress >= end:
        return final
    return final * max(0.0, progress - start) / (end - start)
