"""A tile classifier: the network with what it was trained for, from pixels to probabilities, and its folder."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import HybridEmbed
from timm.models import VisionTransformer
from torch import Tensor, nn

from nearfar.core.checkpoints import load_state_dict, read_state_dict, save_state_dict
from nearfar.core.errors import CheckpointError, UserError
from nearfar.core.finite import check_finite
from nearfar.core.hub import pretrained_setting
from nearfar.core.model_folder import AGAIN, KINDS, TrainedOn, read, trained_on, writing
from nearfar.core.reading import check_sizes, reading
from nearfar.medical.models.duoformer import VARIANTS, DuoFormer

KIND = "tile classifier"
FITS, ROTATIONS = ("crop", "resize"), ("none", "quarter", "any")
OPTIMIZERS, SCHEDULES, CHOICES = ("adam", "adamw", "sgd"), ("constant", "warmup_cosine"), ("balanced", "loss")

IDENTITY = "-identity"
"""Behind a DuoFormer's name: both its stacks left out, for ablation."""

HYBRIDS: dict[str, dict[str, Any]] = {"+vit": {}, "+vit_small": {"depth": 4, "num_heads": 4, "dim": 128}}
"""Behind a timm backbone's name: a plain ViT over its coarsest features, DuoFormer's baseline; of 12 layers and 768
channels, or of as many layers and channels as the small DuoFormer."""

SMALL = {"backbone": "resnet10t", "scales": 3, "depth": 2, "num_heads": 4, "dim": 128}


@dataclass
class TileRecipe:
    """How a network is trained on tiles.

    Args:
        network, settings: as in `create_tile_network`.
        size: pixels a side that the network sees, multiples of 32 for most.
        fit: how a tile gets there: "crop" takes its centre (in training any place), "resize" scales it.
        mpp: microns per pixel of the tiles, None where that is not known: slides are then read at their finest level.
        rotate: "quarter" turns, "any" angle (with `crop`, the tile is first cut to its inner square, so that nothing
            is made up where it is large enough), or "none". `flip` mirrors.
        stains: strength of the stain augmentation. jitter: of brightness and contrast.
        class_weights: rare classes count more in the loss, by N / (classes n_c).
        balanced: an epoch has as many tiles of each class, drawn by chance.
        tiles_per_epoch: 0 for as many as there are.
        optimizer, learning_rate, weight_decay: adam, adamw or sgd (momentum 0.9).
        schedule: "constant", or "warmup_cosine" over all steps, the first tenth of them a rise.
        validation: share of the training slides that chooses the epoch; 0 takes the last. They are not learnt from.
        choose_by: "balanced", the mean of the classes' accuracies, or the "loss".
    """

    network: str = "duoformer_small"
    settings: dict[str, Any] = field(default_factory=dict)
    size: int = 224
    fit: str = "crop"
    mpp: float | None = None
    rotate: str = "quarter"
    flip: bool = True
    stains: float = 0.05
    jitter: float = 0.1
    class_weights: bool = False
    balanced: bool = False
    tiles_per_epoch: int = 0
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    schedule: str = "warmup_cosine"
    batch_size: int = 32
    accumulate: int = 1
    epochs: int = 10
    validation: float = 0.0
    choose_by: str = "balanced"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (
            ("fit", FITS), ("rotate", ROTATIONS), ("optimizer", OPTIMIZERS), ("schedule", SCHEDULES),
            ("choose_by", CHOICES),
        ):  # fmt: skip
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed are {', '.join(allowed)}")
        for name, least in (("size", 8), ("batch_size", 1), ("accumulate", 1), ("epochs", 1), ("tiles_per_epoch", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if self.learning_rate <= 0 or self.weight_decay < 0:
            raise ValueError(f"learning_rate is {self.learning_rate}, weight_decay {self.weight_decay}; above 0, and 0")
        if self.mpp is not None and self.mpp <= 0:
            raise ValueError(f"mpp is {self.mpp}; it must be above 0")
        for name in ("stains", "jitter", "validation"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be in [0, 1)")
        if self.validation > 0.5:
            raise ValueError(f"validation is {self.validation}; at most half of the slides may choose the epoch")


def network_names() -> dict[str, str]:
    """The names that `create_tile_network` takes, with what they are."""

    def told(form: Mapping[str, Any]) -> str:
        extra, token = "frozen, " if form.get("frozen") else "", form.get("scale_token", "random")
        layers = f"{form['depth']} + {form['depth']} layers"
        return f"DuoFormer: {form['backbone']}, {extra}{form['scales']} scales, {token} token, {layers}"

    return {
        "duoformer": "DuoFormer of any form: settings are backbone, scales, scale_token, depth, num_heads, dim ...",
        **{name: f"{told(form)}, as published" for name, form in VARIANTS.items()},
        "duoformer_small": f"{told(SMALL)} of {SMALL['dim']} channels, for small data",
        f"NAME{IDENTITY}": "a DuoFormer with both stacks left out: the ablation",
        "BACKBONE+vit": "a plain ViT over a timm backbone's features (resnet50+vit): depth 12, num_heads 12, dim 768",
        "BACKBONE+vit_small": "the same of duoformer_small's size: depth 4, num_heads 4, dim 128",
        "NAME": "any encoder of timm with a linear head",
    }


def create_tile_network(
    name: str, num_classes: int, size: int, settings: Mapping[str, Any] | None = None, *, fetch: bool = True
) -> nn.Module:
    """A network for tiles (B, 3, size, size) to logits (B, num_classes), by one of `network_names`.

    `settings` go to its constructor; `pretrained: hub:timm` fetches timm's weights of the backbone, and not at all
    without `fetch`. Raises UserError for an unknown name or settings that the network refuses.
    """
    given = pretrained_setting(settings or {}, fetch)
    plain = name.removesuffix(IDENTITY)
    try:
        if plain == "duoformer" or plain.startswith("duoformer_"):
            forms = {"duoformer": {}, "duoformer_small": SMALL, **VARIANTS}
            if plain not in forms:
                raise ValueError(f"unknown; DuoFormer's forms are {', '.join(forms)}")
            if size % DuoFormer.size_multiple:
                raise ValueError(f"size is {size}; it must be a multiple of {DuoFormer.size_multiple}")
            ablation = {"identity": True} if plain != name else {}
            return DuoFormer(num_classes, **{**forms[plain], **given, **ablation})
        if plain != name:
            raise ValueError(f"{IDENTITY} is for DuoFormers")
        backbone, plus, _ = name.partition("+")
        if (form := HYBRIDS.get(name.removeprefix(backbone))) is not None:
            return _hybrid(backbone, num_classes, size, **{**form, **given})
        if plus:
            raise ValueError(f"unknown; behind a backbone may stand {', '.join(HYBRIDS)}")
        return timm.create_model(name, num_classes=num_classes, **given)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"network {name}: {first}; `networks` lists the names") from error


def _hybrid(
    backbone: str, num_classes: int, size: int, *, depth: int = 12, num_heads: int = 12, dim: int = 768,
    mlp_ratio: float = 4.0, frozen: bool = False, pretrained: bool = False,
) -> nn.Module:  # fmt: skip
    features = timm.create_model(backbone, pretrained, features_only=True, out_indices=[-1])
    info: Any = features.feature_info
    if size % (stride := info.reduction()[-1]):
        raise ValueError(f"size is {size}; it must be a multiple of {stride}")
    if frozen:
        features.requires_grad_(False)
        features.register_forward_pre_hook(_in_eval_mode)
    embed: Any = partial(HybridEmbed, backbone=features)
    return VisionTransformer(
        size, 1, num_classes=num_classes, embed_dim=dim, depth=depth, num_heads=num_heads, mlp_ratio=mlp_ratio,
        embed_layer=embed,
    )  # fmt: skip


def _in_eval_mode(module: nn.Module, _inputs: Any) -> None:
    """The statistics of a frozen backbone's batch norms stay."""
    module.eval()


def start_from(network: nn.Module, weights: str | Path) -> None:
    """Load a checkpoint into a network: a whole one, a published DuoFormer, or a ResNet trunk into its backbone.

    A trunk is a state dict of `conv1`, `bn1`, `layer1` ..., as self-supervised training on histology is released; a
    head of other classes, and a trunk's, start afresh. Raises CheckpointError that lists what does not fit.
    """
    state = {name.removeprefix("module."): value for name, value in read_state_dict(weights).items()}
    if isinstance(network, DuoFormer) and any("vision_transformer." in name for name in state):
        found = DuoFormer.from_published(state, num_heads=_heads(network))
        _load(network, found.state_dict(), ("head.",), weights)
        return
    heads = ("fc.", "head.", "classifier.", "head_dist.")
    if any(name.startswith(("conv1.", "backbone.conv1.", "encoder.conv1.")) for name in state):
        trunk = {n.removeprefix("backbone.").removeprefix("encoder."): v for n, v in state.items()}
        trunk = {name: value for name, value in trunk.items() if not name.startswith(heads)}
        into = getattr(network, "backbone", None) or getattr(getattr(network, "patch_embed", None), "backbone", None)
        if into is not None and not any(name.startswith(("blocks.", "tokens.")) for name in state):
            _load(into, trunk, (), weights)
            return
    _load(network, state, heads, weights)


def _heads(network: DuoFormer) -> int:
    return next((m.num_heads for m in network.modules() if hasattr(m, "num_heads")), 8)  # type: ignore[return-value]


def _load(module: nn.Module, state: Mapping[str, Tensor], fresh: tuple[str, ...], path: str | Path) -> None:
    own = module.state_dict()
    kept = {name: own[name] for name in own if fresh and name.startswith(fresh)}
    counters = {name: value for name, value in own.items() if name.endswith("num_batches_tracked")}
    try:
        other = {
            n: v for n, v in state.items() if not (fresh and n.startswith(fresh) and own.get(n, v).shape != v.shape)
        }
        load_state_dict(module, counters | kept | other)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


@dataclass
class TileClassifier:
    """A network, its classes, and the sides in pixels, smallest and largest, of the tiles that it was trained on."""

    network: nn.Module
    recipe: TileRecipe
    classes: list[str]
    sides: tuple[int, int]
    trained_on: TrainedOn = field(default_factory=TrainedOn)

    @property
    def side(self) -> int:
        """Pixels, at the resolution of the training, of the square that is cut from a slide for a tile."""
        if self.recipe.fit == "crop":
            return self.recipe.size
        low, high = self.sides
        if low != high:
            raise UserError(f"the model was trained on tiles of {low} to {high} pixels; say with --tile what to cut")
        return high

    def check_side(self, tile: np.ndarray, name: object) -> None:
        """Raise UserError for a tile of more than twice, or less than half, the sides of the training's."""
        low, high = self.sides
        sides = tile.shape[:2]
        if not (low / 2 <= min(sides) and max(sides) <= 2 * high):
            seen = f"{low}" if low == high else f"{low} to {high}"
            raise UserError(
                f"{name}: is a tile of {sides[1]} x {sides[0]} pixels, the model was trained on {seen}; cut it alike"
            )

    @torch.inference_mode()
    def probabilities(self, tiles: Sequence[np.ndarray], device: str = "cpu") -> Tensor:
        """Class probabilities (N, K) of tiles (height, width, 3) uint8."""
        batch = torch.stack([normalized(fitted(tile, self.recipe)) for tile in tiles])
        network = self.network.to(device).eval()
        return check_finite(network(batch.to(device)).float().softmax(1).cpu(), "the model's scores")

    def save(self, folder: str | Path) -> Path:
        """Write `model.safetensors` and `tiles.json` to `folder`."""
        about = {"recipe": asdict(self.recipe), "classes": self.classes, "sides": list(self.sides)}
        with writing(folder, KIND, about, self.trained_on) as place:
            save_state_dict(self.network, place / "model.safetensors")
        return Path(folder) / KINDS[KIND]

    @classmethod
    def load(cls, folder: str | Path) -> "TileClassifier":
        """Read what `save` wrote; raises UserError where it is not there or does not fit."""
        folder = Path(folder)
        content = read(folder, KIND)
        description, weights = folder / KINDS[KIND], folder / "model.safetensors"
        check_sizes(description, content.get("recipe"), weights, lambda name: name != "seed")
        with reading(description, "holds no trained model", AGAIN):
            recipe, classes = TileRecipe(**content["recipe"]), [str(name) for name in content["classes"]]
            low, high = map(int, content["sides"])
            network = create_tile_network(recipe.network, len(classes), recipe.size, recipe.settings, fetch=False)
        with reading(weights, "does not fit its description", AGAIN):
            load_state_dict(network, read_state_dict(weights))
        return cls(network.eval(), recipe, classes, (low, high), trained_on(folder))


def fitted(tile: np.ndarray, recipe: TileRecipe) -> Tensor:
    """A tile (height, width, 3) uint8 as (3, size, size) in 0..1: its centre, or scaled."""
    size = recipe.size
    if recipe.fit == "resize":
        if tile.shape[:2] != (size, size):
            tile = np.asarray(Image.fromarray(tile).resize((size, size), Image.Resampling.BICUBIC))
    else:
        top, left = ((n - size) // 2 for n in tile.shape[:2])
        if min(top, left) < 0:
            raise UserError(
                f"a tile is {tile.shape[1]} x {tile.shape[0]} pixels, the network sees {size}; lower size, or set "
                "fit=resize"
            )
        tile = tile[top : top + size, left : left + size]
    return torch.from_numpy(np.array(tile)).permute(2, 0, 1).float() / 255


def normalized(tile: Tensor) -> Tensor:
    """ImageNet's mean and deviation taken out, as timm's backbones expect."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    return (tile - mean) / std
