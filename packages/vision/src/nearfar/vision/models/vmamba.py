"""VMamba: a hierarchical backbone whose blocks scan the map in four directions.

Liu et al., "VMamba: Visual State Space Model" (2024, arXiv 2401.10166): the first form ("v0", one residual branch, a
gate, 16 states) and the released one ("v05_noz": an MLP beside, no gate, one state). Runs without CUDA extensions.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from nearfar.core.cards import Card
from nearfar.core.checkpoints import count, ratio, rename
from nearfar.ops.common.layers import GELU, ChannelNorm, DropPath
from nearfar.ops.recurrence.directional_mamba import SS2D, released_ss2d
from nearfar.ops.tokens.patches import PatchMerge
from nearfar.vision.models.pyramid import Backbone, Head, Stage, drop_path_rates, init_weights
from nearfar.vision.models.registry import Variant, Weights, register

EPS = 1e-5
STEMS = ("convolutions", "patches")


class VSSBlock(nn.Module):
    """x + SS2D(LN(x)), then, with an MLP, x + W2 gelu(W1 LN(x))."""

    def __init__(self, dim: int, mlp_ratio: float, drop_path: float, **mixer: Any) -> None:
        super().__init__()
        self.norm = ChannelNorm(dim, EPS)
        self.mixer = SS2D(dim, **mixer)
        self.norm2 = self.mlp = None
        if mlp_ratio:
            hidden = int(mlp_ratio * dim)
            self.norm2 = nn.LayerNorm(dim, EPS)
            self.mlp = nn.Sequential(nn.Linear(dim, hidden), GELU(), nn.Linear(hidden, dim))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.mixer(self.norm(x)))
        if self.mlp is None:
            return x
        return x + self.drop_path(self.mlp(self.norm2(x.movedim(1, -1))).movedim(-1, 1))


class VMamba(Backbone):
    """Stem at 1/4, four stages of `VSSBlock`, pooled linear classifier.

    Input (B, in_chans, H, W) with H, W >= 32; odd maps are padded before patch merging, and rounded up by strided
    convolutions.

    Args:
        depths, dims: blocks and channels of each stage.
        num_classes: classes; 0 for pooled features.
        in_chans: input channels.
        stem: "convolutions" (two 3x3 with stride 2, norms and a GELU) or "patches" (4x4 with stride 4, norm); the way
            between stages goes with it, a 3x3 convolution with stride 2 or patch merging.
        d_state: states per channel.
        ssm_ratio: inner channels of the scan per channel.
        conv_bias: whether the depthwise convolution before the scan has a bias.
        gate: whether the scan's output is gated.
        mlp_ratio: hidden channels of the MLP per channel; 0 for no MLP.
        dt_rank: width of the step sizes' bottleneck; None: ceil(dim / 16).
        drop_path_rate: stochastic depth of the last block; grows linearly from 0.
        drop_rate: dropout before the classifier.
        global_pool: timm's pooling name; "" for none.
        scan: False puts the identity in the scans' place, for ablation.
    """

    CARD = Card(
        "VMamba",
        "2401.10166",
        "selective scans of the map in four directions",
        2.1e-6,
        weights="released layouts of both forms",
        small={"vmamba_tiny_s1l8": {"depths": (1, 1, 2, 1), "dims": (16, 32, 64, 128)}},
    )

    RULES = (
        (r"layers\.(\d+)\.downsample\.1\.", lambda m: f"stages.{int(m[1]) + 1}.downsample.0."),
        (r"layers\.(\d+)\.downsample\.3\.", lambda m: f"stages.{int(m[1]) + 1}.downsample.1."),
        (r"layers\.(\d+)\.downsample\.", lambda m: f"stages.{int(m[1]) + 1}.downsample."),
        (r"layers\.(\d+)\.blocks\.(\d+)\.(?:op|self_attention)\.", r"stages.\1.blocks.\2.mixer."),
        (r"layers\.(\d+)\.blocks\.(\d+)\.ln_1\.", r"stages.\1.blocks.\2.norm."),
        (r"layers\.(\d+)\.blocks\.(\d+)\.(?:ln_2|norm2)\.", r"stages.\1.blocks.\2.norm2."),
        (r"layers\.(\d+)\.blocks\.(\d+)\.mlp\.fc1\.", r"stages.\1.blocks.\2.mlp.0."),
        (r"layers\.(\d+)\.blocks\.(\d+)\.mlp\.fc2\.", r"stages.\1.blocks.\2.mlp.2."),
        (r"layers\.", "stages."),
        (r"patch_embed\.(?:0|proj)\.", "stem.0."),
        (r"patch_embed\.(?:2|norm)\.", "stem.1."),
        (r"patch_embed\.5\.", "stem.3."),
        (r"patch_embed\.7\.", "stem.4."),
        (r"(?:classifier\.)?norm\.", "head.norm."),
        (r"classifier\.head\.", "head.fc."),
        (r"head\.(weight|bias)$", r"head.fc.\1"),
    )

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 8, 2),
        dims: Sequence[int] = (96, 192, 384, 768),
        num_classes: int = 1000,
        in_chans: int = 3,
        *,
        stem: str = "convolutions",
        d_state: int = 1,
        ssm_ratio: float = 1.0,
        conv_bias: bool = False,
        gate: bool = False,
        mlp_ratio: float = 4.0,
        dt_rank: int | None = None,
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
        scan: bool = True,
    ) -> None:
        super().__init__()
        if len(depths) != len(dims):
            raise ValueError(f"depths {tuple(depths)} and dims {tuple(dims)} differ in length")
        if stem not in STEMS:
            raise ValueError(f"stem is {stem!r}; allowed are {', '.join(STEMS)}")
        first, norm = dims[0], lambda dim: ChannelNorm(dim, EPS)
        half = lambda a, b: nn.Conv2d(a, b, 3, stride=2, padding=1)  # noqa: E731
        if stem == "convolutions":
            narrow = first // 2
            self.stem = nn.Sequential(half(in_chans, narrow), norm(narrow), GELU(), half(narrow, first), norm(first))
        else:
            if any(b != 2 * a for a, b in pairwise(dims)):
                raise ValueError(f"dims is {tuple(dims)}; patch merging doubles the width from stage to stage")
            self.stem = nn.Sequential(nn.Conv2d(in_chans, first, 4, stride=4), norm(first))
        mixer = {
            "d_state": d_state,
            "ratio": ssm_ratio,
            "conv_bias": conv_bias,
            "gate": gate,
            "dt_rank": dt_rank,
            "scan": scan,
        }
        self.stages = nn.ModuleList()
        for i, (dim, rates) in enumerate(zip(dims, drop_path_rates(drop_path_rate, depths), strict=True)):
            down: nn.Module = nn.Identity()
            if i:
                before = dims[i - 1]
                down = PatchMerge(before, EPS) if stem == "patches" else nn.Sequential(half(before, dim), norm(dim))
            self.stages.append(Stage(down, [VSSBlock(dim, mlp_ratio, rate, **mixer) for rate in rates]))
        self.head = Head(
            dims[-1], num_classes, norm(dims[-1]), norm_first=True, global_pool=global_pool, drop_rate=drop_rate
        )
        self.finish(num_classes, in_chans, dims, [4 * 2**i for i in range(len(dims))])
        for module in self.modules():
            if isinstance(module, nn.Linear):  # convolutions keep torch's start, as published
                init_weights(module)

    def no_weight_decay(self) -> set[str]:
        """Decays and skips of the scans."""
        return {name for name, _ in self.named_parameters() if name.endswith(("A_log", ".D"))}

    @classmethod
    def published_state(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return rename(released_ss2d(state), cls.RULES)

    @classmethod
    def published_settings(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        stages = count(state, r"stages\.(\d+)\.")
        first = "stages.0.blocks.0"
        dims = [len(state[f"stages.{i}.blocks.0.norm.weight"]) for i in range(stages)]
        a_log, hidden = state[f"{first}.mixer.scan.A_log"], state.get(f"{first}.mlp.0.bias")
        inner, rank = a_log.shape[1], state[f"{first}.mixer.scan.dt_proj"].shape[-1]
        return {
            "depths": [count(state, rf"stages\.{i}\.blocks\.(\d+)\.") for i in range(stages)],
            "dims": dims,
            "num_classes": len(state.get("head.fc.bias", ())),
            "in_chans": state["stem.0.weight"].shape[1],
            "stem": "convolutions" if "stem.3.weight" in state else "patches",
            "d_state": a_log.shape[-1],
            "ssm_ratio": ratio(inner, dims[0]),
            "conv_bias": f"{first}.mixer.conv.bias" in state,
            "gate": len(state[f"{first}.mixer.in_proj.weight"]) == 2 * inner,
            "mlp_ratio": 0.0 if hidden is None else ratio(len(hidden), dims[0]),
            "dt_rank": None if rank == -(-dims[0] // 16) else rank,
        }


def _variant(
    depth: int, width: int, ssm_ratio: float, params: float, gmacs: float | None, top1: float | None
) -> Variant:
    dims = tuple(width * 2**i for i in range(4))
    settings = {"depths": (2, 2, depth, 2), "dims": dims, "stem": "convolutions", "ssm_ratio": ssm_ratio}
    return Variant(settings, params, gmacs, (Weights("in1k", top1),))


def _first_form(depth: int, width: int, params: float) -> Variant:
    settings = {
        "depths": (2, 2, depth, 2),
        "dims": tuple(width * 2**i for i in range(4)),
        "stem": "patches",
        "d_state": 16,
        "ssm_ratio": 2.0,
        "conv_bias": True,
        "gate": True,
        "mlp_ratio": 0.0,
    }
    return Variant(settings, params, None)


# accuracies that were only recalled are left out
VMAMBAS = {
    "vmamba_tiny_s1l8": _variant(8, 96, 1.0, 30.25, 4.9, 82.6),
    "vmamba_tiny_s2l5": _variant(5, 96, 2.0, 30.71, None, None),
    "vmamba_small_s2l15": _variant(15, 96, 2.0, 50.15, 8.7, 83.6),
    "vmamba_small_s1l20": _variant(20, 96, 1.0, 49.01, None, None),
    "vmamba_base_s2l15": _variant(15, 128, 2.0, 88.56, 15.4, 83.9),
    "vmamba_base_s1l20": _variant(20, 128, 1.0, 86.61, None, None),
    "vmamba_tiny_v0": _first_form(9, 96, 22.89),
    "vmamba_small_v0": _first_form(27, 96, 44.42),
    "vmamba_base_v0": _first_form(27, 128, 76.25),
}

register(VMamba, VMAMBAS)
