"""RveRNet: what an object in a picture is, told from the object and from what surrounds it.

"Knowledge distillation to effectively attain both region-of-interest and global semantics from an image where multiple
objects appear" (2024). One backbone sees the region of interest on black, a second one the picture with the region
blacked out; both keep their 1000-way ImageNet classifiers, whose answers two layers turn into the region's class.
`RegionPooling` is a cheaper successor of ours: one backbone sees the picture once, and its features are averaged inside
and outside the region.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.layers import LayerNorm
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

from nearfar.core.cards import Card
from nearfar.core.checkpoints import Checkpoint, load_state_dict, read, rename
from nearfar.core.errors import CheckpointError, UserError
from nearfar.core.hub import HUB, unreachable

Answer = Tensor | tuple[Tensor, Tensor]
"""Log-probabilities (B, classes); in training those of both classifiers, where there is one for a teacher."""

FEATURES = 1000
"""Classes of the backbones' own classifiers, which the published network keeps."""


def mobilenet_v2() -> nn.Module:
    return torchvision.models.mobilenet_v2()


def transformer(name: str = "vit_base_patch16_224", eps: float = 1e-6, **settings: Any) -> nn.Module:
    """A vision transformer of timm's with the epsilon of the norms that its weights were published with."""
    return timm.create_model(name, norm_layer=lambda dim, **kw: LayerNorm(dim, eps=eps), **settings)


BACKBONES: dict[str, Callable[[], nn.Module]] = {
    "mnet": mobilenet_v2,
    "vit": transformer,
    "deit": lambda: transformer(eps=1e-12),
    # the distillation token takes part in attention; the classifier reads the class token alone
    "deit-dist": lambda: transformer(eps=1e-12, reg_tokens=1),
    "mixer": lambda: timm.create_model("mixer_b16_224"),
}
"""The published names of backbones; any ordered pair is a network. `mixer` is named beside them and has no
published code."""

PARAMS = {"mnet": 3_504_872, "vit": 86_567_656, "deit": 86_567_656, "deit-dist": 86_569_192, "mixer": 59_880_472}
"""Parameters of the backbones, classifier included."""


def create_backbone(name: str) -> nn.Module:
    """A backbone by its published name, any classifier of timm's with its own classes, or `hub:NAME`: one of timm's
    with the weights that timm fetches."""
    if name in BACKBONES:
        return BACKBONES[name]()
    plain = name.removeprefix(HUB)
    if not timm.is_model(plain.partition(".")[0]):
        raise UserError(f"{name}: no backbone; one of {', '.join(BACKBONES)}, a name of timm's, or hub: before it")
    try:
        return timm.create_model(plain, pretrained=name.startswith(HUB))
    except (RuntimeError, OSError) as error:
        raise UserError(f"{name}: its weights cannot be had ({unreachable(name, True, error)})") from error


def two_answers(backbone: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """What a backbone says from its class token and from its distillation token, where it has one as timm's distilled
    transformers do; of any other its one answer twice."""
    if isinstance(backbone, VisionTransformerDistilled):
        tokens = backbone.forward_features(x)
        return backbone.head(tokens[:, 0]), backbone.head_dist(tokens[:, 1])
    answer = backbone(x)
    return answer, answer


def log_probabilities(own: Tensor, taught: Tensor | None, training: bool) -> Answer:
    """Of a classifier; with a second one, which a teacher teaches, of both in training, and of their mean in use."""
    if taught is None:
        return F.log_softmax(own, 1)
    if training:
        return F.log_softmax(own, 1), F.log_softmax(taught, 1)
    return F.log_softmax((own + taught) / 2, 1)


class RveRNet(nn.Module):
    """Log-probabilities (B, num_classes) of what the region shows, from two views (B, 3, H, W) of one picture.

    f = (roi(x * M), extra(x * (1 - M)));  log softmax(W2 relu(W1 f + b1) + b2)

    Args:
        roi, extra: names of the backbones for the region and for what surrounds it, see `create_backbone`; or modules.
        num_classes: classes.
        hidden: width of the layer between.
        frozen: backbones that do not learn, of `roi` and `extra`.
        distilled: a second classifier for a teacher's answers, as DeiT has it: on the backbones' distillation tokens
            where they have them. Both answer in training, their mean in use.
    """

    CARD = Card(
        "RveRNet",
        "2407.08257",
        "two views of a picture, the region and its surroundings, each with a backbone of its own",
        1e-6,
        weights="the released training code's",
    )

    def __init__(
        self,
        roi: str | nn.Module = "deit-dist",
        extra: str | nn.Module = "deit-dist",
        num_classes: int = 103,
        hidden: int = 640,
        frozen: tuple[str, ...] = (),
        distilled: bool = False,
    ) -> None:
        super().__init__()
        if num_classes < 1 or hidden < 1 or set(frozen) - {"roi", "extra"}:
            raise ValueError(
                f"needs num_classes >= 1, hidden >= 1, frozen of roi and extra; got {num_classes}, {hidden}, {frozen}"
            )
        self.num_classes = num_classes
        self.roi = create_backbone(roi) if isinstance(roi, str) else roi
        self.extra = create_backbone(extra) if isinstance(extra, str) else extra
        widths = [width_of(self.roi), width_of(self.extra)]
        self.fc1 = nn.Linear(sum(widths), hidden)
        self.fc2 = nn.Linear(hidden, num_classes)
        self.distilled = distilled
        if distilled:
            self.fc1_dist = nn.Linear(sum(widths), hidden)
            self.fc2_dist = nn.Linear(hidden, num_classes)
        for name in frozen:
            getattr(self, name).requires_grad_(False)

    def forward_features(self, roi: Tensor, extra: Tensor) -> tuple[Tensor, Tensor]:
        """The two backbones' answers."""
        check_views(roi, extra)
        return self.roi(roi), self.extra(extra)

    def forward_head(self, roi: Tensor, extra: Tensor) -> Tensor:
        return F.log_softmax(self.fc2(F.relu(self.fc1(torch.cat((roi, extra), 1)))), dim=1)

    def forward(self, roi: Tensor, extra: Tensor) -> Answer:
        if not self.distilled:
            return self.forward_head(*self.forward_features(roi, extra))
        check_views(roi, extra)
        own, taught = (
            torch.cat(parts, 1)
            for parts in zip(two_answers(self.roi, roi), two_answers(self.extra, extra), strict=True)
        )
        taught = self.fc2_dist(F.relu(self.fc1_dist(taught)))
        return log_probabilities(self.fc2(F.relu(self.fc1(own))), taught, self.training)

    @classmethod
    def from_published(cls, source: Checkpoint, roi: str | None = None, extra: str | None = None) -> "RveRNet":
        """The released training code's checkpoint, with torchvision's and transformers' names, old or new.

        `roi`, `extra`: which backbones they are, where names and shapes do not tell: `deit` and a ViT of transformers'
        differ in nothing else. By default what the names say.
        """
        state = read(source)
        parts: dict[str, dict[str, Tensor]] = {"roi": {}, "extra": {}, "": {}}
        for name, value in state.items():
            match = re.fullmatch(r"(extra_roi|roi)_module\.(.*)", name)
            if match:
                parts["extra" if match[1] == "extra_roi" else "roi"][match[2]] = value
            else:
                parts[""][re.sub(r"^integrated_fc([12])\.", r"fc\1.", name)] = value
        if not parts["roi"] or not parts["extra"] or "fc2.weight" not in parts[""]:
            raise CheckpointError(
                "is no checkpoint of RveRNet: it lacks roi_module, extra_roi_module or integrated_fc2"
            )
        names, renamed = {}, dict(parts[""])
        for place, said in (("roi", roi), ("extra", extra)):
            names[place], own = published_backbone(parts[place])
            if said is not None and said != names[place]:
                if {said, names[place]} != {"deit", "vit"}:
                    raise CheckpointError(f"{place}: is {names[place]}, not {said}")
                names[place] = said
            renamed |= {f"{place}.{name}": value for name, value in own.items()}
        hidden, classes = parts[""]["fc1.weight"].shape[0], parts[""]["fc2.weight"].shape[0]
        model = cls(names["roi"], names["extra"], classes, hidden)
        load_state_dict(model, renamed)
        return model.eval()


def check_views(roi: Tensor, extra: Tensor) -> None:
    if roi.shape != extra.shape:
        raise ValueError(f"the views are {tuple(roi.shape)} and {tuple(extra.shape)}; they must agree")


class Single(nn.Module):
    """The published baseline: one backbone on the region alone, and a linear layer. Log-probabilities (B, classes).

    `distilled`: as `RveRNet` has it.
    """

    def __init__(
        self, backbone: str | nn.Module = "deit-dist", num_classes: int = 103, distilled: bool = False
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.backbone = create_backbone(backbone) if isinstance(backbone, str) else backbone
        self.fc = nn.Linear(width_of(self.backbone), num_classes)
        self.fc_dist = nn.Linear(width_of(self.backbone), num_classes) if distilled else None

    def forward(self, roi: Tensor, extra: Tensor | None = None) -> Answer:
        if self.fc_dist is None:
            return F.log_softmax(self.fc(self.backbone(roi)), dim=1)
        own, taught = two_answers(self.backbone, roi)
        return log_probabilities(self.fc(own), self.fc_dist(taught), self.training)


class RegionPooling(nn.Module):
    """The region's class in one pass: features averaged inside and outside the region, two layers. Ours.

    A picture (B, 3, H, W) and its mask (B, 1, H, W) in [0, 1] give log-probabilities. Cost: one backbone, where
    `RveRNet` takes two.

    Args:
        backbone: see `create_backbone`, one of timm's whose features are a map (B, C, h, w), (B, h, w, C) or tokens
            (B, N, C); or a module with `forward_features` and `num_features`.
        distilled: a second classifier for a teacher's answers; both answer in training, their mean in use.
    """

    def __init__(self, backbone: str | nn.Module, num_classes: int, hidden: int = 640, distilled: bool = False) -> None:
        super().__init__()
        self.num_classes = num_classes
        made = create_backbone(backbone) if isinstance(backbone, str) else backbone
        if not hasattr(made, "forward_features") or not hasattr(made, "num_features"):
            raise UserError(f"{backbone}: gives no features that can be pooled; take a name of timm's")
        if isinstance(backbone, str):
            made.reset_classifier(0)
        self.backbone = made
        self.fc1 = nn.Linear(2 * made.num_features, hidden)
        self.fc2 = nn.Linear(hidden, num_classes)
        self.fc2_dist = nn.Linear(hidden, num_classes) if distilled else None

    def forward(self, picture: Tensor, mask: Tensor) -> Answer:
        from nearfar.vision.explain.gradients import grid_of, on_grid, prefix_tokens

        if mask.shape != (len(picture), 1, *picture.shape[2:]):
            raise ValueError(f"mask is {tuple(mask.shape)} for pictures {tuple(picture.shape)}; needs (B, 1, H, W)")
        features, size = self.backbone.forward_features(picture), picture.shape[2:]
        if grid_of(features, size, prefix_tokens(self.backbone)) is None:
            raise UserError(
                f"{type(self.backbone).__name__}: gives {tuple(features.shape[1:])} of {tuple(size)} pixels, no grid "
                "to pool on; take larger pictures, or another backbone"
            )
        features = on_grid(features, size, prefix_tokens(self.backbone))
        inside = F.adaptive_avg_pool2d(mask, features.shape[2:])
        pooled = [(features * share).sum((2, 3)) / share.sum((2, 3)).clamp(min=1e-6) for share in (inside, 1 - inside)]
        hidden = F.relu(self.fc1(torch.cat(pooled, 1)))
        return log_probabilities(
            self.fc2(hidden), None if self.fc2_dist is None else self.fc2_dist(hidden), self.training
        )


def width_of(backbone: nn.Module) -> int:
    """What a classifier gives: its classes, from its last linear layer or convolution."""
    for module in reversed(list(backbone.modules())):
        if isinstance(module, nn.Linear):
            return module.out_features
        if isinstance(module, nn.Conv2d):
            return module.out_channels
    raise ValueError(f"{type(backbone).__name__}: has no layer that tells the width of its answer")


TORCHVISION_VIT = [
    (r"^class_token$", "cls_token"),
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"^encoder\.ln\.", "norm."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.self_attention\.in_proj_(weight|bias)$", r".attn.qkv.\1"),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.linear_([12])\.", r".mlp.fc\1."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.3\.", ".mlp.fc2."),
    (r"^heads\.head\.", "head."),
]

NAMES_OF_PARTS = {"q": "query", "k": "key", "v": "value"}

TRANSFORMERS_VIT = [
    (r"^(?:deit|vit)\.", ""),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.distillation_token$", "reg_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^(?:encoder\.)?layers?\.(\d+)\.", r"blocks.\1."),
    (r"\.attention\.attention\.(query|key|value)\.", r".attn.\1."),
    (r"\.attention\.([qkv])_proj\.", lambda m: f".attn.{NAMES_OF_PARTS[m[1]]}."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.attention\.o_proj\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"^(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"^layernorm\.", "norm."),
    (r"^(?:cls_)?classifier\.", "head."),
]


def published_backbone(state: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """Published name and our tensors of a backbone, by the layout of its state dict."""
    if "features.0.0.weight" in state:
        return "mnet", dict(state)
    if "class_token" in state:
        return "vit", rename(state, TORCHVISION_VIT, anywhere=True)
    if "stem.proj.weight" in state:
        return "mixer", dict(state)
    if "patch_embed.proj.weight" in state:  # our own
        return ("deit-dist" if "reg_token" in state else "vit"), dict(state)
    if not any("embeddings.patch_embeddings" in name for name in state):
        raise CheckpointError(f"the layout of a backbone is not known; it starts with {', '.join(list(state)[:3])}")
    renamed = rename(state, TRANSFORMERS_VIT, anywhere=True)
    joined: dict[str, Tensor] = {}
    for name, value in renamed.items():
        if match := re.fullmatch(r"(.*\.attn)\.(query|key|value)\.(weight|bias)", name):
            if match[2] == "query":
                rows = [renamed[f"{match[1]}.{part}.{match[3]}"] for part in ("query", "key", "value")]
                joined[f"{match[1]}.qkv.{match[3]}"] = torch.cat(rows)
        else:
            joined[name] = value
    return ("deit-dist" if "reg_token" in joined else "deit"), joined
