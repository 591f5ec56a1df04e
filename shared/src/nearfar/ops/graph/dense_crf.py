"""Fully connected conditional random field with Gaussian edges: mean-field inference on 2-D and 3-D grids."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nearfar.ops.graph.permutohedral import PermutohedralLattice

NORMALIZATIONS = ("symmetric", "before", "after", "none")

KEPT = 1 << 20
"""Pixels of the largest grid whose spatial kernel is kept (a hundred bytes for each pixel of two axes)."""

Number = int | float
Compatibility = Number | Sequence[Number] | Sequence[Sequence[Number]] | Tensor


class DenseCRF(nn.Module):
    """Mean-field inference in a CRF whose every pixel is joined with every other by two Gaussian kernels.

    Krähenbühl and Koltun, "Efficient Inference in Fully Connected CRFs with Gaussian Edge Potentials" (2011):

        Q^0 = softmax_l(-U),   Q <- softmax_l(-U + sum_m w_m K~_m Q), `iterations` times, all pixels in parallel

    with K_ij = exp(-|f_i - f_j|^2 / 2), j = i included, and f the *spatial* features p / `spatial_std` or the
    *bilateral* ones (p / `bilateral_std`, c / `color_std`), p the position and c the image's channels. A number as
    weight w is the Potts model (reward for agreeing neighbours). A vector (L) or a symmetric matrix (L, L) of
    energies M takes the place of -w: M K~Q is subtracted. K~ is K normalized: "symmetric"
    n K n with n = 1 / sqrt(K 1); "before" K n^2; "after" n^2 K; "none" K N / sum(K 1).

    Two named modes: "lattice", what the papers and pydensecrf compute, in linear time on the permutohedral lattice;
    "exact", the Gaussian sum itself in O(N^2) time and bounded memory, for small grids. They are different
    numbers: by mean field small differences of the filter grow, up to other labels where colours are noisy.

    Args:
        iterations: mean-field steps.
        spatial_weight, bilateral_weight: number, vector or matrix; 0 leaves the kernel out.
        spatial_std, bilateral_std: standard deviations in pixels, or in the unit of `spacing` (mm); one number or one
            per axis in the grid's order.
        color_std: in the image's unit (0..255 for photographs), one number or one per channel.
        normalization, mode: see above.
        trainable: the weights are parameters with gradients (a CRF as a recurrent layer).

    The defaults are those of DeepLab v2's reproduction for PASCAL VOC. `forward(unary, image, spacing)` takes unary
    (B, L, *S), image (B, C, *S), S of one to three axes, and returns Q (B, L, *S) in float32 (float64 for float64
    input; half precision is not enough and is widened). The tables of an image are those of `kernels`, which `infer`
    takes, so several unaries or weights can share them; the positions' own are kept until a grid of another size
    comes, up to `KEPT` pixels. Gradients flow into the unary and the weights.

    Raises:
        ValueError: for values out of range, here or in `forward` for shapes that do not go together.
    """

    def __init__(
        self,
        iterations: int = 10,
        spatial_weight: Compatibility = 3.0,
        spatial_std: Number | Sequence[Number] = 1.0,
        bilateral_weight: Compatibility = 4.0,
        bilateral_std: Number | Sequence[Number] = 67.0,
        color_std: Number | Sequence[Number] = 3.0,
        *,
        normalization: str = "symmetric",
        mode: str = "lattice",
        trainable: bool = False,
    ) -> None:
        super().__init__()
        if iterations < 0:
            raise ValueError(f"iterations is {iterations}; it must not be negative")
        if normalization not in NORMALIZATIONS:
            raise ValueError(f"normalization is {normalization!r}; allowed are {', '.join(NORMALIZATIONS)}")
        if mode not in ("lattice", "exact"):
            raise ValueError(f"mode is {mode!r}; allowed are 'lattice' and 'exact'")
        for name, std in (("spatial_std", spatial_std), ("bilateral_std", bilateral_std), ("color_std", color_std)):
            if min(std if isinstance(std, Sequence) else [std]) <= 0:
                raise ValueError(f"{name} is {std}; it must be positive")
        self.iterations, self.normalization, self.mode = iterations, normalization, mode
        self.spatial_std, self.bilateral_std, self.color_std = spatial_std, bilateral_std, color_std
        self.weights = nn.ParameterList()
        for name, weight in (("spatial_weight", spatial_weight), ("bilateral_weight", bilateral_weight)):
            weight = torch.as_tensor(weight, dtype=torch.float32).detach().clone()
            if weight.ndim > 2 or (weight.ndim == 2 and weight.shape[0] != weight.shape[1]):
                raise ValueError(f"{name} has shape {tuple(weight.shape)}; allowed are a number, (L,) and (L, L)")
            self.weights.append(nn.Parameter(weight, requires_grad=trainable))
        self.uses = [trainable or bool(weight.any()) for weight in self.weights]
        self._spatial: tuple[tuple, _Kernel] | None = None

    def kernels(
        self,
        unary: Float[Tensor, "b l *s"],
        image: Float[Tensor, "n c *t"] | None = None,
        spacing: Sequence[Number] | None = None,
    ) -> list["_Kernel | None"]:
        """The two normalized kernels for the grid of `unary` (its values do not matter); None where the weight is 0."""
        shape, device = unary.shape, unary.device
        batch, _, *size = shape
        if not 1 <= len(size) <= 3:
            raise ValueError(f"the unary has shape {tuple(shape)}; it must be (B, L, *S) with one to three axes S")
        if spacing is not None and (len(spacing) != len(size) or min(spacing) <= 0):
            raise ValueError(f"spacing is {spacing}; it must be one positive number for each of {len(size)} axes")
        if self.uses[1] and image is None:
            raise ValueError("the bilateral kernel needs an image; give one or set bilateral_weight=0")
        if image is not None and (image.shape[0] != batch or list(image.shape[2:]) != size):
            raise ValueError(f"image {tuple(image.shape)} and unary {tuple(shape)} differ in batch or grid")
        dtype = torch.promote_types(unary.dtype, torch.float32)
        axes = [torch.arange(n, device=device, dtype=dtype) for n in size]
        grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)
        grid = grid * grid.new_tensor(spacing or [1.0] * len(size))

        def position(std: Number | Sequence[Number], name: str) -> Tensor:
            scaled = grid / grid.new_tensor(_spread(std, len(size), name))
            return scaled.flip(-1).expand(batch, -1, -1)  # x, the fastest axis, comes first

        made: list[_Kernel | None] = [None, None]
        if self.uses[0]:
            key = (batch, *size, *(spacing or ()), dtype, device, torch.is_inference_mode_enabled())
            if self._spatial is not None and self._spatial[0] == key:
                made[0] = self._spatial[1]
            else:
                made[0] = _Kernel(position(self.spatial_std, "spatial_std"), self.mode, self.normalization)
                self._spatial = (key, made[0]) if len(grid) <= KEPT else None
        if self.uses[1] and image is not None:
            colors = image.flatten(2).mT.to(dtype)
            colors = colors / colors.new_tensor(_spread(self.color_std, colors.shape[-1], "color_std"))
            features = torch.cat([position(self.bilateral_std, "bilateral_std"), colors], -1)
            made[1] = _Kernel(features, self.mode, self.normalization)
        return made

    def infer(self, unary: Float[Tensor, "b l *s"], kernels: list["_Kernel | None"]) -> Float[Tensor, "b l *s"]:
        """Mean field with the tables that `kernels` made."""
        energy = unary.to(torch.promote_types(unary.dtype, torch.float32))
        energy = energy.flatten(2).mT.contiguous()
        labels = energy.shape[-1]
        for weight in self.weights:
            if weight.ndim and len(weight) != labels:
                raise ValueError(f"a weight of shape {tuple(weight.shape)} does not go with {labels} labels")
        score = base = -energy
        for _ in range(self.iterations):
            q, score = _softmax(score), base
            for weight, kernel in zip(self.weights, kernels):
                if kernel is not None:
                    message, w = kernel(q), weight.to(q.dtype)
                    out = None if torch.is_grad_enabled() else message
                    if w.ndim == 2:
                        score = score - message @ ((w + w.mT) / 2)
                    elif w.ndim:
                        score = torch.addcmul(score, message, w, value=-1, out=out)
                    else:
                        score = torch.addcmul(score, message, w, out=out)
        return torch.softmax(score.mT.contiguous(), 1).view(unary.shape)

    @torch.compiler.disable
    def forward(
        self,
        unary: Float[Tensor, "b l *s"],
        image: Float[Tensor, "n c *t"] | None = None,
        spacing: Sequence[Number] | None = None,
    ) -> Float[Tensor, "b l *s"]:
        with torch.autocast(unary.device.type, enabled=False):
            return self.infer(unary, self.kernels(unary, image, spacing))

    def extra_repr(self) -> str:
        return (
            f"iterations={self.iterations}, spatial_std={self.spatial_std}, bilateral_std={self.bilateral_std}, "
            f"color_std={self.color_std}, normalization={self.normalization!r}, mode={self.mode!r}"
        )


class _Kernel:
    """One normalized Gaussian kernel over points with `features` (B, N, d); a call filters values (B, N, C)."""

    def __init__(self, features: Tensor, mode: str, normalization: str) -> None:
        self.features = features
        self.lattice = PermutohedralLattice(features) if mode == "lattice" else None
        ones = self._filter(torch.ones_like(features[..., :1]))
        self.before: Tensor | None = None
        self.after: Tensor | None = None
        if normalization == "symmetric":
            self.before = self.after = torch.rsqrt(ones + 1e-20)
        elif normalization == "before":
            self.before = 1 / (ones + 1e-20)
        elif normalization == "after":
            self.after = 1 / (ones + 1e-20)
        else:
            self.after = (ones.shape[1] / ones.sum(1, keepdim=True)).expand_as(ones)
        if self.lattice is not None:
            self.lattice = self.lattice.scaled(self.before, self.after)

    def __call__(self, values: Tensor) -> Tensor:
        if self.lattice is not None:
            return self.lattice.filter(values)
        values = self._filter(values if self.before is None else values * self.before.to(values.dtype))
        return values if self.after is None else values * self.after.to(values.dtype)

    def _filter(self, values: Tensor) -> Tensor:
        if self.lattice is not None:
            return self.lattice.filter(values)
        features = self.features.to(values.dtype)
        rows = max(1, 2**24 // features.shape[:2].numel())  # 64 MB of kernel at a time
        return torch.cat([torch.exp(-(torch.cdist(f, features) ** 2) / 2) @ values for f in features.split(rows, 1)], 1)


def _softmax(scores: Tensor) -> Tensor:
    """Softmax over the last axis of (B, N, L); of fewer labels than a processor's vector holds, label by label.

    154401 pixels of 5 labels: 4 ms where rows of five take 17 (EPYC, Zen 3); of 21 labels rows are faster.
    """
    if scores.is_cuda or scores.shape[-1] > 8:
        return scores.softmax(-1)
    return scores.mT.contiguous().softmax(1).mT.contiguous()


def unary_from_softmax(probabilities: Float[Tensor, "b l *s"], clip: float = 1e-5) -> Float[Tensor, "b l *s"]:
    """U = -log(clip(P, `clip`, 1)): energies (B, L, *S) from the probabilities of any model."""
    if not 0 < clip < 1:
        raise ValueError(f"clip is {clip}; it must lie between 0 and 1")
    wide = probabilities.to(torch.promote_types(probabilities.dtype, torch.float32))
    return -wide.clamp(clip, 1).log()


def unary_from_labels(
    labels: Int[Tensor, "b *s"], num_labels: int, certainty: float = 0.7, *, zero_unsure: bool = True
) -> Float[Tensor, "b l *s"]:
    """Energies (B, L, *S) of labels (B, *S): -log `certainty` of the label, -log((1 - certainty) / (L - 1)) of others.

    With `zero_unsure`, 0 in `labels` means "not known" (energy log L for each label) and l > 0 stands for label l - 1;
    without it l stands for label l.

    Raises:
        ValueError: for fewer than two labels, a certainty outside (0, 1) or labels out of range.
    """
    if num_labels < 2:
        raise ValueError(f"num_labels is {num_labels}; it must be at least 2")
    if not 0 < certainty < 1:
        raise ValueError(f"certainty is {certainty}; it must lie between 0 and 1")
    top = num_labels if zero_unsure else num_labels - 1
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) <= top:
        raise ValueError(f"labels span {int(labels.min())}..{int(labels.max())}; allowed are 0..{top}")
    index = (labels.long() - int(zero_unsure))[:, None]
    other = math.log((num_labels - 1) / (1 - certainty))
    energy = torch.full((len(labels), num_labels, *labels.shape[1:]), other, device=labels.device)
    energy.scatter_(1, index.clamp(min=0), -math.log(certainty))
    return torch.where(index < 0, math.log(num_labels), energy)


def _spread(std: Number | Sequence[Number], count: int, name: str) -> list[float]:
    values = list(std) if isinstance(std, Sequence) else [std] * count
    if len(values) != count:
        raise ValueError(f"{name} holds {len(values)} numbers; it needs one, or {count}")
    return [float(value) for value in values]
