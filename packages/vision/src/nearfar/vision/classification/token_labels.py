"""Token labelling: what is at every patch of a training picture, as a loss, as files, and from any teacher.

Jiang et al., "All Tokens Matter: Token Labeling for Training Better Vision Transformers" (2021), as VOLO is trained.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import create_transform
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.ops import roi_align
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.functional import hflip, resized_crop

from nearfar.core.errors import UserError
from nearfar.core.files import atomic_path
from nearfar.core.reading import check_announced, reading
from nearfar.vision.classification.classifier import Classifier, evaluation_transform
from nearfar.vision.data.images import Pictures

Output = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, tuple[int, int, int, int]]
"""Class logits (B, K), patch logits (B, L, K), and the box of patches whose pictures changed places, if any did."""


class TokenLabelLoss(nn.Module):
    """cls_weight CE(class logits, t) + dense_weight CE(patch logits, t_patches), soft cross-entropies, means over rows.

    Targets are (B, K, 2 + L): the true class, the picture's soft label t, then that of each patch. Of the share of
    patches inside the box, t comes from the picture at the other end of the batch, as the patches in it do. Targets
    (B, K) serve for picture and patches alike.

    Args:
        ground_truth: blend t with the true class: t keeps a weight of 0.9, and 0.5 where its largest class is the
            true one (fine-tuning at larger sizes).

    Raises ValueError for negative weights, and at a call whose targets have another number of patches.
    """

    def __init__(self, dense_weight: float = 0.5, cls_weight: float = 1.0, ground_truth: bool = False) -> None:
        super().__init__()
        if dense_weight < 0 or cls_weight < 0:
            raise ValueError(f"weights are {cls_weight} and {dense_weight}; they must not be negative")
        self.dense_weight, self.cls_weight, self.ground_truth = dense_weight, cls_weight, ground_truth

    def forward(self, output: Output, target: Tensor) -> Tensor:
        logits, dense, *box = output
        top, left, bottom, right = box[0] if box else (0, 0, 0, 0)
        patches = dense.shape[1]
        if target.ndim == 2:
            picture, tokens = target, target[:, None].expand(-1, patches, -1)
        elif target.shape[2] != 2 + patches:
            raise ValueError(f"targets are of {target.shape[2] - 2} patches, the model has {patches}")
        else:
            picture, tokens = target[..., 1], target[..., 2:].mT
            if self.ground_truth:
                truth = target[..., 0]
                agree = truth.argmax(1, keepdim=True) == picture.argmax(1, keepdim=True)
                picture = torch.lerp(truth, picture, torch.where(agree, 0.5, 0.9).to(truth))
        swapped = (bottom - top) * (right - left) / patches
        if swapped:
            picture = torch.lerp(picture, picture.flip(0), swapped)
        loss = self.cls_weight * soft_cross_entropy(logits, picture)
        return loss + self.dense_weight * soft_cross_entropy(dense.flatten(0, 1), tokens.flatten(0, 1))


def soft_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over rows of -sum target log softmax(logits)."""
    return -(target * logits.log_softmax(-1)).sum(-1).mean()


def label_file(folder: str | Path, picture: str, suffix: str = ".safetensors") -> Path:
    """Where the label map of a picture lies: its class folder and name below `folder`, as in the training tree."""
    path = Path(picture)
    return Path(folder) / path.parent.name / (path.stem + suffix)


def read_label_map(folder: str | Path, picture: str, num_classes: int) -> tuple[Tensor, Tensor]:
    """Scores and class indices of the best classes, (k, h, w) both, of a picture.

    The file is `.safetensors` with the tensors `scores` and `classes`, as `make_token_labels` writes it, or a PyTorch
    file, `.pt`, of one tensor (2, k, h, w): scores, then classes. Raises UserError for a file that is missing or other.
    """
    path, published = label_file(folder, picture), label_file(folder, picture, ".pt")
    if path.is_file():
        with reading(path, "cannot be read as a label map"):
            tensors = load_file(path)
            scores, classes = tensors["scores"].float(), tensors["classes"].float()
    elif published.is_file():
        path = published
        with reading(path, "cannot be read as a label map"):
            both = torch.load(path, map_location="cpu", weights_only=True)
            check_announced(path, both.numel() * both.element_size(), compressed=True)  # strides of 0
            scores, classes = both.float()
    else:
        raise UserError(f"{path}: no label map of {picture} (nor {published.name}); make-token-labels writes them")
    if scores.ndim != 3 or scores.shape != classes.shape or not scores.isfinite().all():
        raise UserError(f"{path}: holds scores {tuple(scores.shape)} and classes {tuple(classes.shape)}, not (k, h, w)")
    if (classes != classes.round()).any() or classes.amin() < 0 or classes.amax() >= num_classes:
        raise UserError(f"{path}: its classes are no whole numbers below {num_classes}; are they of other data?")
    return scores, classes.long()


def label_targets(
    scores: Tensor,
    classes: Tensor,
    label: int,
    num_classes: int,
    grid: tuple[int, int],
    box: tuple[float, float, float, float] = (0, 0, 1, 1),
    flip: bool = False,
    smoothing: float = 0.0,
) -> Tensor:
    """Targets (K, 2 + L) of a crop of a picture, as `TokenLabelLoss` takes them, from its label map.

    The best classes' scores stand in a map of zeros, which is pooled (RoIAlign, shifted by half a cell as published) to
    the crop's `grid`, and once more to one cell for the picture as a whole; then a softmax over the classes, the true
    class in front, and smoothing of all.

    Args:
        scores, classes: (k, h, w). label: the true class.
        box: left, upper, right, lower edge of the crop, as shares of the picture.
        flip: whether the crop was flipped.
    """
    dense = torch.zeros(num_classes, *scores.shape[1:]).scatter_(0, classes, scores)
    height, width = scores.shape[1:]
    edges = torch.tensor([[0.0, box[0] * width, box[1] * height, box[2] * width, box[3] * height]])
    edges[:, 1:] -= 0.5
    tokens, whole = (roi_align(dense[None], edges, size, aligned=False)[0] for size in (grid, (1, 1)))
    if flip:
        tokens = tokens.flip(2)
    soft = torch.cat((whole.flatten(1), tokens.flatten(1)), dim=1).softmax(0)
    truth = F.one_hot(torch.tensor(label), num_classes).to(soft)[:, None]
    return torch.cat((truth, soft), dim=1) * (1 - smoothing) + smoothing / num_classes


class TokenLabelled(Dataset):
    """(augmented crop, targets of its patches) of labelled pictures with label maps in `folder`.

    The random crop and flip act on the map too; what follows (RandAugment, colours, erasing) on the picture alone, as
    published. `settings` are those of timm's `create_transform`.
    """

    def __init__(
        self, pictures: Pictures, folder: str | Path, grid: tuple[int, int], smoothing: float, **settings: Any
    ) -> None:
        shared = Counter(label_file(folder, name) for name in pictures.names)
        if twice := [str(path) for path, number in shared.items() if number > 1]:
            raise UserError(f"{twice[0]}: is the label map of {shared[Path(twice[0])]} pictures; give them other names")
        self.pictures, self.folder, self.grid, self.smoothing = pictures, folder, grid, smoothing
        crop, self.colours, self.finish = create_transform(is_training=True, separate=True, **settings)
        (self.crop,) = (step for step in crop.transforms if hasattr(step, "get_params"))
        self.transform = None

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        picture, label = self.pictures.read(index), self.pictures.labels[index]
        classes = len(self.pictures.classes)
        scores, best = read_label_map(self.folder, self.pictures.names[index], classes)
        top, left, height, width = RandomResizedCrop.get_params(picture, self.crop.scale, self.crop.ratio)
        x = self.cropped(picture, top, left, height, width)
        if flip := bool(torch.rand(()) < 0.5):
            x = hflip(x)
        box = (
            left / picture.width,
            top / picture.height,
            (left + width) / picture.width,
            (top + height) / picture.height,
        )
        target = label_targets(scores, best, label, classes, self.grid, box, flip, self.smoothing)
        return self.finish(self.colours(x)), target

    def cropped(self, picture: Image.Image, top: int, left: int, height: int, width: int) -> Image.Image:
        modes = (InterpolationMode.BILINEAR, InterpolationMode.BICUBIC)
        chosen = self.crop.interpolation
        mode = modes[int(torch.randint(2, ()))] if isinstance(chosen, tuple | list) else chosen
        return resized_crop(picture, top, left, height, width, list(self.crop.size), mode)


@torch.inference_mode()
def patch_scores(model: Any, x: Tensor) -> Tensor:
    """What a classifier says at every place of its last features, (B, K, h, w).

    Models with a classifier of patches are asked for its logits; of feature maps every cell goes through the head as if
    it were the whole map. Raises UserError for models with neither.
    """
    features = model.forward_features(x)
    if callable(getattr(model, "forward_dense", None)) and model.aux_head is not None:
        stride = model.feature_info[-1]["reduction"]
        grid = tuple(-(-n // stride) for n in x.shape[-2:])
        return model.forward_dense(features)[1].mT.unflatten(2, grid)
    if features.ndim != 4 or features.shape[1] != model.num_features:
        raise UserError(f"{type(model).__name__}: has no feature map whose cells its classifier could read")
    cells = features.movedim(1, -1).flatten(0, 2)[..., None, None]
    return model.forward_head(cells).unflatten(0, (len(x), *features.shape[-2:])).movedim(-1, 1)


def make_token_labels(
    teacher: Classifier,
    pictures: Pictures,
    folder: str | Path,
    *,
    size: int | None = None,
    top: int = 5,
    batch_size: int = 32,
    device: str = "cpu",
    num_workers: int = 0,
    show: Callable[[Sequence[int]], Any] = iter,
) -> int:
    """Write a label map for every picture that has none in `folder`; returns how many were written.

    The whole picture, squashed to `size` (by default the teacher's), is read by the teacher; of every place the `top`
    scores and their classes are kept, in half precision. Raises UserError where classes differ or scores are not
    finite.
    """
    if teacher.classes != pictures.classes:
        raise UserError(f"the teacher knows {len(teacher.classes)} classes, the pictures have others or another order")
    missing = [i for i, name in enumerate(pictures.names) if not label_file(folder, name).is_file()]
    view = pictures.subset(missing, evaluation_transform(size or teacher.size, 1.0, "squash"))
    model = teacher.model.to(device).eval()
    batches = DataLoader(view, batch_size, num_workers=num_workers)
    written = iter(view.names)
    for x, _ in show(batches):  # type: ignore[arg-type]
        scores = patch_scores(model, x.to(device)).float().cpu()
        if not scores.isfinite().all():
            raise UserError(f"{type(model).__name__}: its scores are not finite; no label map is written of them")
        best, classes = scores.topk(min(top, scores.shape[1]), dim=1)
        for picture_scores, picture_classes in zip(best.half(), classes.to(torch.int32), strict=True):
            path = label_file(folder, next(written))
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as part:
                save_file({"scores": picture_scores.contiguous(), "classes": picture_classes.contiguous()}, part)
    return len(missing)
