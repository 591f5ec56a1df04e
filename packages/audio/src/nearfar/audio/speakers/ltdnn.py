"""L-TDNN, the layer-aware time-delay network for speaker recognition (arXiv 2409.07770), and its relatives.

A self-supervised speech transformer has many hidden states per frame. Instead of a fixed weighted sum of them, L-TDNN
keeps them as a map (layer, time) with the hidden size as channels, runs a small 2-D network over it, pools over the
layers with weights that depend on the frame, and then over time with attentive statistics. `LAP` (arXiv 2512.22148) is
the light successor without the 2-D network; `ECAPA` is the same network in 1-D on filter banks, for use without any
backbone. `SpeakerEncoder` puts a front end and a head together: samples in, embeddings out.

None of them is causal: the padding is symmetric and the squeeze-and-excite takes a mean over the utterance.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nearfar.audio.speakers.frontends import KaldiFbank, SelfSupervised
from nearfar.core.cards import Card
from nearfar.core.checkpoints import load_state_dict, read_state_dict, save_state_dict, unwrap
from nearfar.core.errors import CheckpointError, UserError
from nearfar.core.files import write_json
from nearfar.core.reading import check_sizes, read_json, reading
from nearfar.ops.aggregation.layer_attention import LayerAttentionPool, LayerGate
from nearfar.ops.aggregation.statistics import AttentiveStatisticsPool
from nearfar.ops.convolution.se_blocks import ConvReLUNorm, SED2Block, SERes2Block

Form = Literal["ecapa", "d3net"]


class FrameNetwork(nn.Module):
    """BN, a first convolution, chained blocks, and a 1x1 convolution with ReLU over all the blocks' outputs.

    Args:
        in_dim: channels of the input.
        conv_dim: channels inside (256).
        form: "ecapa" (`SERes2Block`s of dilation 2, 3, 4) or "d3net" (`SED2Block`s of depth 4).
        kernel_size: of the first convolution, (layers, frames): (5, 3) in the ECAPA form, (1, 5) in the D3Net form.
        num_blocks: 3.
        dilations: of the blocks in the ECAPA form.
        scale: channel groups of the blocks in the ECAPA form.
        depth: stages of the blocks in the D3Net form.
        se_channels: hidden width of the squeeze-and-excites.
        dims: 2, or 1 for a sequence.

    Shapes: `(B, in_dim, *S)`, mask `(B, T)`, to `(B, num_blocks * conv_dim, *S)`.
    """

    def __init__(
        self,
        in_dim: int,
        conv_dim: int = 256,
        form: Form = "ecapa",
        kernel_size: Sequence[int] | None = None,
        num_blocks: int = 3,
        dilations: Sequence[int] | None = None,
        scale: int = 8,
        depth: int = 4,
        se_channels: int = 128,
        dims: int = 2,
    ) -> None:
        super().__init__()
        if form not in ("ecapa", "d3net"):
            raise ValueError(f"form must be 'ecapa' or 'd3net', got {form!r}")
        kernel = ((5, 3) if form == "ecapa" else (1, 5)) if kernel_size is None else tuple(kernel_size)
        dilations = tuple(range(2, 2 + num_blocks)) if dilations is None else tuple(dilations)
        if form == "ecapa" and len(dilations) != num_blocks:
            raise ValueError(f"{num_blocks} blocks need as many dilations, got {dilations}")
        self.norm_in = (nn.BatchNorm1d if dims == 1 else nn.BatchNorm2d)(in_dim)
        self.conv_in = ConvReLUNorm(in_dim, conv_dim, kernel, dims=dims)
        self.blocks = nn.ModuleList(
            SERes2Block(conv_dim, 3, dilations[i], scale, se_channels, dims)
            if form == "ecapa"
            else SED2Block(conv_dim, depth, 3, se_channels, dims)
            for i in range(num_blocks)
        )
        width = num_blocks * conv_dim
        self.fusion = (nn.Conv1d if dims == 1 else nn.Conv2d)(width, width, 1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.conv_in(self.norm_in(x), mask)
        outputs = []
        for block in self.blocks:
            x = block(x, mask)
            outputs.append(x)
        return torch.relu(self.fusion(torch.cat(outputs, 1)))


class SpeakerHead(nn.Module):
    """What the heads share: `settings` (their constructor's arguments) and the deviation that the time pool takes.

    In training the pool's context takes the biased deviation, in evaluation the unbiased one. The published code does
    so too, because it masks in training only; here a mask never changes it, so a padded batch equals its items.
    """

    settings: dict[str, Any]
    time_pool: AttentiveStatisticsPool

    @property
    def embedding_dim(self) -> int:
        """Size of the embedding."""
        return self.time_pool.linear.out_features

    def pool_time(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return self.time_pool(x, mask, correction=0 if self.training else 1)


class LTDNN(SpeakerHead):
    """The layer-aware TDNN head: all hidden states of a backbone to one embedding.

    Args:
        hidden_size: D of the backbone.
        num_states: L, its transformer layers + 1.
        form: "ecapa" or "d3net".
        conv_dim: channels of the 2-D network (256).
        layer_pool_dim, layer_pool_heads: of the pooling over layers (512, 8).
        embedding_dim: 192.
        dropout: in both pools (0.1).
        kernel_size, num_blocks, dilations, scale, depth, se_channels: see `FrameNetwork`.

    Shapes: hidden states `(B, L, T, D)`, mask `(B, T)`, to `(B, embedding_dim)`, before L2 normalization.

    With D = 768 and L = 13 the ECAPA form has 5.717 M parameters and the D3Net form 6.481 M; at 50 frames per second
    they cost about 2.98 and 3.47 GMAC per second of speech.
    """

    CARD = Card(
        "L-TDNN, LAP",
        "2409.07770",
        "time-delay network over all layers of a speech model; attentive pooling over layers and time",
        8.7e-7,
        weights="training checkpoints of L-TDNN in the published layout",
    )

    def __init__(
        self,
        hidden_size: int = 768,
        num_states: int = 13,
        form: Form = "ecapa",
        conv_dim: int = 256,
        layer_pool_dim: int = 512,
        layer_pool_heads: int = 8,
        embedding_dim: int = 192,
        dropout: float = 0.1,
        kernel_size: Sequence[int] | None = None,
        num_blocks: int = 3,
        dilations: Sequence[int] | None = None,
        scale: int = 8,
        depth: int = 4,
        se_channels: int = 128,
        attention_dim: int | None = None,
    ) -> None:
        self_settings = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        self.settings = {"type": "LTDNN", **self_settings}
        self.num_states, self.hidden_size = num_states, hidden_size
        self.net = FrameNetwork(
            hidden_size, conv_dim, form, kernel_size, num_blocks, dilations, scale, depth, se_channels
        )
        self.layer_pool = LayerAttentionPool(
            num_blocks * conv_dim, layer_pool_dim, num_states, layer_pool_heads, dropout
        )
        self.time_pool = AttentiveStatisticsPool(layer_pool_dim, embedding_dim, attention_dim, dropout)

    def forward(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        check_states(states, self.num_states, self.hidden_size)
        x = self.net(states.permute(0, 3, 1, 2), mask)
        return self.pool_time(self.layer_pool(x), mask)

    @classmethod
    def from_published(cls, path_or_state: str | Path | Mapping[str, Tensor]) -> "LTDNN":
        """The head of a training checkpoint in the published layout (`encoder.*`); form and sizes come from the shapes.

        Dilations leave no trace in the shapes: the blocks of the ECAPA form get 2, 3, 4 ... as published.
        What is not the head (`backbone.*`, the classifier) is left out.

        Raises CheckpointError that lists what does not fit.
        """
        state = published_state(read_published(path_or_state))
        head = {k: v for k, v in state.items() if not k.startswith(("backbone.", "classifier."))}
        model = cls(**published_settings(head))
        load_state_dict(model, head)
        return model.eval()


class LAP(SpeakerHead):
    """Layer attentive pooling (arXiv 2512.22148): the light head, straight on the hidden states without a 2-D network.

    BN, a 1x1 convolution D to D (none with one head), gates over the layers (`LayerGate`) and their maximum, a 1x1
    convolution D to `layer_pool_dim`, BN, attentive statistics. Its time pool drops frames in training, not weights.

    Args:
        hidden_size, num_states: D and L of the backbone.
        num_heads: 16 for wavlm-large, 12 for wavlm-base-plus; it must divide D.
        layer_pool_dim: 512.
        embedding_dim: 192.
        dropout: 0.1.

    Shapes: as `LTDNN`.
    """

    def __init__(
        self,
        hidden_size: int = 768,
        num_states: int = 13,
        num_heads: int = 12,
        layer_pool_dim: int = 512,
        embedding_dim: int = 192,
        dropout: float = 0.1,
    ) -> None:
        self_settings = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(f"hidden_size ({hidden_size}) must be a multiple of num_heads ({num_heads})")
        self.settings = {"type": "LAP", **self_settings}
        self.num_states, self.hidden_size = num_states, hidden_size
        self.norm_in = nn.BatchNorm2d(hidden_size)
        self.proj_in = nn.Conv2d(hidden_size, hidden_size, 1) if num_heads > 1 else nn.Identity()
        self.gate = LayerGate(num_states, num_heads, dropout=dropout)
        self.proj_out = nn.Conv1d(hidden_size, layer_pool_dim, 1)
        self.norm_out = nn.BatchNorm1d(layer_pool_dim)
        self.time_pool = AttentiveStatisticsPool(layer_pool_dim, embedding_dim, None, dropout, drop_frames=True)

    def forward(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        check_states(states, self.num_states, self.hidden_size)
        x = self.gate(self.proj_in(self.norm_in(states.permute(0, 3, 1, 2))))
        return self.pool_time(self.norm_out(self.proj_out(x)), mask)


class ECAPA(SpeakerHead):
    """The frame network of `LTDNN` in 1-D on filter banks: a speaker network that needs no backbone.

    In the manner of ECAPA-TDNN (Desplanques et al. 2020): a convolution over 5 frames, SE-Res2 blocks, their outputs
    joined, attentive statistics. The order inside the blocks and the pool are L-TDNN's.

    Args:
        feature_dim: features per frame (80 filters).
        channels: width (512).
        embedding_dim: 192.
        dropout: in the time pool (0.1).

    Shapes: features `(B, T, feature_dim)`, mask `(B, T)`, to `(B, embedding_dim)`.
    """

    def __init__(
        self, feature_dim: int = 80, channels: int = 512, embedding_dim: int = 192, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.settings = {
            "type": "ECAPA",
            "feature_dim": feature_dim,
            "channels": channels,
            "embedding_dim": embedding_dim,
            "dropout": dropout,
        }
        self.net = FrameNetwork(feature_dim, channels, "ecapa", (5,), dims=1)
        self.time_pool = AttentiveStatisticsPool(3 * channels, embedding_dim, 128, dropout)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.pool_time(self.net(features.transpose(1, 2), mask), mask)


def check_states(states: Tensor, num_states: int, hidden_size: int) -> None:
    """Raise ValueError where hidden states do not fit a head."""
    if states.dim() != 4 or states.shape[1] != num_states or states.shape[3] != hidden_size:
        raise ValueError(
            f"the head was built for hidden states (B, {num_states}, T, {hidden_size}), got {tuple(states.shape)}"
        )


def cut_spans(
    states: Tensor, mask: Tensor | None = None, item_prob: float = 0.3, start_prob: float = 0.05, span: int = 3
) -> tuple[Tensor, Tensor]:
    """SpanOut, an augmentation for training: cut short spans out of time and close the gap.

    With probability `item_prob` an item loses the `span` frames from each frame that is drawn with `start_prob`
    (about 15 % of its frames). Off by default in the published training.

    Shapes: states `(B, L, T, D)`, mask `(B, T)`, to the same, the frames that are left at the front. An item never
    loses its last frame left.
    """
    batch, frames = states.shape[0], states.shape[2]
    valid = torch.ones(batch, frames, dtype=torch.bool, device=states.device) if mask is None else mask
    starts = torch.rand(batch, frames, device=states.device) < start_prob
    starts &= torch.rand(batch, 1, device=states.device) < item_prob
    cut = nn.functional.max_pool1d(nn.functional.pad(starts.float(), (span - 1, 0)), span, 1) > 0
    keep = valid & ~cut
    keep = torch.where(keep.any(1, keepdim=True), keep, valid)
    order = (~keep).int().argsort(dim=1, stable=True)  # the kept frames first, in their order
    counts = keep.sum(1)
    longest = int(counts.max())
    states = states.gather(2, order[:, None, :, None].expand_as(states))[:, :, :longest]
    return states, torch.arange(longest, device=states.device) < counts[:, None]


class SpeakerEncoder(nn.Module):
    """Samples to speaker embeddings: a front end (`SelfSupervised` or `KaldiFbank`) and a head that fits it.

    `model(waveforms, lengths)` takes `(B, N)` samples in [-1, 1] at `model.sample_rate` and returns `(B, E)` before L2
    normalization, which is what the classification loss trains; compare embeddings by cosine. A shorter item in a
    padded batch gets the embedding that it has alone.

    Raises:
        ValueError: where the head does not fit the front end.
    """

    HEADS: Mapping[str, type[SpeakerHead]] = {"LTDNN": LTDNN, "LAP": LAP, "ECAPA": ECAPA}
    FRONTENDS: Mapping[str, type] = {"SelfSupervised": SelfSupervised, "KaldiFbank": KaldiFbank}

    def __init__(self, frontend: SelfSupervised | KaldiFbank, head: SpeakerHead, span_out: bool = False) -> None:
        super().__init__()
        if isinstance(head, LTDNN | LAP):
            if not isinstance(frontend, SelfSupervised):
                raise ValueError(f"{type(head).__name__} reads hidden states: give it a SelfSupervised front end")
            have, want = (frontend.num_states, frontend.hidden_size), (head.num_states, head.hidden_size)
            if have != want:
                raise ValueError(
                    f"the backbone gives {have[0]} hidden states of {have[1]}, the head needs {want[0]} of {want[1]}"
                )
        elif not isinstance(frontend, KaldiFbank) or frontend.num_mels != head.settings["feature_dim"]:
            raise ValueError(f"the head needs {head.settings['feature_dim']} filter-bank features per frame")
        if span_out and not isinstance(frontend, SelfSupervised):
            raise ValueError("span_out cuts hidden states: it needs a SelfSupervised front end")
        self.frontend, self.head, self.span_out = frontend, head, span_out

    @property
    def sample_rate(self) -> int:
        """Sample rate in Hz that the model needs."""
        return self.frontend.sample_rate

    @property
    def embedding_dim(self) -> int:
        """Size of the embedding."""
        return self.head.embedding_dim

    @property
    def min_samples(self) -> int:
        """Fewest samples that give an embedding."""
        return self.frontend.min_samples

    @property
    def digest(self) -> str:
        """Of settings and weights: the same embedding comes from the same digest."""
        settings = [self.frontend.settings, self.head.settings]
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def forward(self, waveforms: Tensor, lengths: Tensor | None = None) -> Tensor:
        features, mask = self.frontend(waveforms, lengths)
        if self.training and self.span_out:
            features, mask = cut_spans(features, mask)
        return self.head(features, mask)

    def save_pretrained(self, folder: str | Path, **notes: Any) -> Path:
        """Write `config.json` and `model.safetensors`, the backbone among it. `notes` go into the config."""
        folder = Path(folder)
        config = {"frontend": self.frontend.settings, "head": self.head.settings, "span_out": self.span_out, **notes}
        save_state_dict(self, folder / "model.safetensors")
        write_json(folder / "config.json", config)
        return folder

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "SpeakerEncoder":
        """The model that `save_pretrained` wrote, in evaluation mode.

        Raises UserError where the folder holds no such model, CheckpointError where its weights do not fit.
        """
        folder = Path(folder)
        path, weights = folder / "config.json", folder / "model.safetensors"
        if not path.is_file():
            raise UserError(f"{folder}: holds no speaker model, it lacks {path.name}; name one that training wrote")
        with reading(path, "describes no speaker model", "copy the folder again"):
            config = read_json(path, "a speaker model")
            check_sizes(path, [config["frontend"], config["head"]], weights)
            frontend, head = dict(config["frontend"]), dict(config["head"])
            build_head = cls.HEADS[head.pop("type")]
            model = cls(cls.FRONTENDS[frontend["type"]].from_settings(frontend), build_head(**head), config["span_out"])
        with reading(weights, "does not fit its config.json", "copy the folder again"):
            load_state_dict(model, read_state_dict(weights))
        return model.eval()

    @classmethod
    def from_published(
        cls, path_or_state: str | Path | Mapping[str, Tensor], frontend: SelfSupervised
    ) -> "SpeakerEncoder":
        """Backbone and head of a training checkpoint in the published layout.

        `frontend` gives the architecture of the backbone, and its weights where the checkpoint has no `backbone.*`.

        Raises CheckpointError where backbone and head do not fit each other, in layers or width, or the front end.
        """
        state = published_state(read_published(path_or_state))
        head = LTDNN.from_published(path_or_state)
        prefix = "backbone."
        backbone = {k: v for k, v in state.items() if k.startswith(prefix)}
        try:
            model = cls(frontend, head)
        except ValueError as error:
            raise CheckpointError(f"the checkpoint does not fit this backbone: {error}") from error
        if backbone:
            kept = len(frontend.backbone.encoder.layers)
            above = [
                k for k in backbone if (m := re.match(r"backbone\.encoder\.layers\.(\d+)\.", k)) and int(m[1]) >= kept
            ]
            for name in above:  # the published code keeps and runs layers that its head never reads
                del backbone[name]
            if not frontend.whole and isinstance(frontend.backbone.encoder.layer_norm, nn.Identity):
                backbone = {k: v for k, v in backbone.items() if not k.startswith("backbone.encoder.layer_norm.")}
            load_state_dict(frontend, backbone)
        return model.eval()


RENAMES = (
    (r"^module\.", ""),
    (r"^aam_softmax\.", "classifier."),
    (r"^encoder\.", ""),
    (r"^net\.in_conv\.0\.", "net.norm_in."),
    (r"^net\.in_conv\.1\.", "net.conv_in."),
    (r"^net\.block(\d+)\.", lambda m: f"net.blocks.{int(m[1]) - 1}."),
    (r"^net\.se_d2blocks\.", "net.blocks."),
    (r"^net\.fusion\.0\.", "net.fusion."),
    (r"\bse_res2block\.0\.", "conv_in."),
    (r"\bse_res2block\.1\.convs\.", "convs."),
    (r"\bse_res2block\.2\.", "conv_out."),
    (r"\bse_res2block\.3\.", "se."),
    (r"\blayers\.(\d+)\.(conv|bn)\.", r"stages.\1.\2."),
    (r"\bse_attention\.1\.", "reduce."),
    (r"\bse_attention\.3\.", "expand."),
    (r"\bbn\.", "norm."),
    (r"^l_pool\.", "layer_pool."),
    (r"^t_pool\.|^pool\.", "time_pool."),
    (r"\b([Wb])([12])$", lambda m: f"gate.{m[1].lower()}{m[2]}"),
    (r"\bin_projection\.0\.", "norm_in."),
    (r"\bin_projection\.1\.", "proj_in."),
    (r"\bout_projection\.0\.", "proj_out."),
    (r"\bout_projection\.1\.", "norm_out."),
    (r"\battention\.0\.", "reduce."),
    (r"\battention\.2\.", "attention_norm."),
    (r"\battention\.3\.", "expand."),
    (r"\battn_norm\.", "norm."),
    (r"\bout_proj\.", "linear."),
)
"""Published name -> ours, applied in order; the backbone keeps the names of transformers."""


def read_published(path_or_state: str | Path | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a checkpoint file, or of what was loaded from one."""
    return unwrap(path_or_state) if isinstance(path_or_state, Mapping) else read_state_dict(path_or_state)


def published_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published layout to ours: renames, and the squeeze-and-excite's 1x1 convolutions as matrices."""
    ours = {}
    for name, value in state.items():
        name = re.sub(r"^module\.", "", name)
        if name == "span_mask_kernel":
            continue
        if not name.startswith("backbone."):
            for pattern, new in RENAMES:
                name = re.sub(pattern, new, name)
            if re.search(r"\bse\.(reduce|expand)\.weight$", name):
                value = value.flatten(1)
        ours[name] = value
    return ours


def published_settings(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of `LTDNN` that the names and shapes of a head (in our names) tell.

    Raises CheckpointError where it is no such head, or its layers disagree.
    """
    shape = {name: tuple(value.shape) for name, value in state.items()}
    try:
        conv_dim, hidden_size, *kernel = shape["net.conv_in.conv.weight"]
        heads, num_states, _ = shape["layer_pool.gate.w1"]
        out_states = shape["layer_pool.gate.w2"][2]
        settings: dict[str, Any] = {
            "hidden_size": hidden_size,
            "num_states": num_states,
            "conv_dim": conv_dim,
            "kernel_size": tuple(kernel),
            "num_blocks": 1 + max(int(m[1]) for name in shape if (m := re.match(r"net\.blocks\.(\d+)\.", name))),
            "layer_pool_dim": shape["layer_pool.proj_in.weight"][0],
            "layer_pool_heads": heads,
            "embedding_dim": shape["time_pool.linear.weight"][0],
            "attention_dim": shape["time_pool.reduce.weight"][0],
            "se_channels": shape["net.blocks.0.se.reduce.weight"][0],
        }
        if "net.blocks.0.stages.0.conv.weight" in shape:
            stages = [name for name in shape if re.match(r"net\.blocks\.0\.stages\.\d+\.conv\.weight$", name)]
            settings |= {"form": "d3net", "depth": len(stages)}
        else:
            settings |= {"form": "ecapa", "scale": conv_dim // shape["net.blocks.0.convs.0.conv.weight"][0]}
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"this is no checkpoint of an L-TDNN head: {error} is missing or odd") from error
    if out_states != num_states:
        raise CheckpointError(
            f"the layer pool's weights disagree: {num_states} hidden states in, {out_states} out; "
            "the checkpoint mixes backbones"
        )
    return settings
