"""MossFormer and MossFormer2: separate overlapping voices in a one-channel recording, in the time domain.

    frames  = relu(Linear(windows of 16 samples, hop 8))                                  (B, S, N)
    y       = W_in GroupNorm(frames) + scale * positions
    y       = y + GroupNorm(LayerNorm(blocks(y)))      gated joint attention; MossFormer2: each with a gated FSMN
    masks   = relu(W_m (tanh(W_a s_k) * sigmoid(W_b s_k))),  [s_1 .. s_K] = W_s PReLU(y)
    voice k = overlap-add of Linear(masks_k * frames)

Papers: Zhao and Ma, "MossFormer: pushing the performance limit of monaural speech separation using gated single-head
transformer with convolution-augmented joint self-attentions" (ICASSP 2023, arXiv 2302.11824); Zhao et al.,
"MossFormer2: combining transformer and RNN-free recurrent network" (ICASSP 2024, arXiv 2312.11825). Where paper and
released code differ (PReLU before the expansion to speakers, positions behind the 1x1 convolution, token shift, outer
skip with GroupNorm) this is the code. The released code has no mask for unequal lengths and its `causal` switch leaves
the convolutions symmetric; `lengths` and `causal=True` are ours.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from nearfar.core.cards import Card
from nearfar.core.checkpoints import load_state_dict, read_state_dict, unwrap
from nearfar.core.errors import CheckpointError, UserError
from nearfar.core.finite import check_weights
from nearfar.core.reading import reading
from nearfar.ops.attention.joint import GatedAttentionBlock
from nearfar.ops.attention.rotary import rotary_table
from nearfar.ops.common.sequence_norms import TimeNorm
from nearfar.ops.recurrence.fsmn import GatedFSMN


class MossFormer(nn.Module, PyTorchModelHubMixin):
    """MossFormer: (B, T) samples of a mixture to (B, num_speakers, T) samples, one row per voice, in no fixed order.

    The output scales with the input, so no level has to be set. T is at least `kernel_size` samples.
    Cost O(T); one frame per `kernel_size / 2` samples.

    Args:
        num_speakers: voices that come out. num_filters: N. dim: width of the blocks. depth: number of blocks.
        kernel_size: samples per frame; frames begin every half of it.
        group_size, query_key_dim, expansion_factor: of the joint attention, see `GatedAttentionBlock`.
        masking: multiply the frames with the net's output; False: the output itself is decoded ("mapping").
        causal: False; True: no output depends on samples more than `kernel_size` later, and `stream` carries the
            network's state from call to call (to be trained as such: no released weights are); or "attention", the
            released code's switch, which concerns the attention alone.
        dropout: rate in the blocks' projections and attention.
        sample_rate: in Hz, what the weights were trained for; the computation does not use it.

    Raises ValueError for an odd kernel_size, an odd dim, or numbers below 1.
    """

    CARD = Card(
        "MossFormer, MossFormer2",
        "2302.11824",
        "gated attention in chunks and linear attention over all; MossFormer2: with feed-forward sequential memory",
        1.9e-6,
        weights="ModelScope's and Hugging Face's releases",
    )

    def __init__(
        self,
        num_speakers: int = 2,
        num_filters: int = 512,
        dim: int = 512,
        depth: int = 24,
        kernel_size: int = 16,
        group_size: int = 256,
        query_key_dim: int = 128,
        expansion_factor: float = 4.0,
        conv_kernel_size: int = 17,
        masking: bool = True,
        causal: bool | Literal["attention"] = False,
        dropout: float = 0.1,
        sample_rate: int = 8000,
    ):
        super().__init__()
        if min(num_speakers, num_filters, depth) < 1:
            raise ValueError(
                f"num_speakers, num_filters and depth are {num_speakers}, {num_filters}, {depth}; "
                "each must be at least 1"
            )
        if kernel_size < 2 or kernel_size % 2:
            raise ValueError(f"kernel_size is {kernel_size}; it must be even, frames begin every half of it")
        if dim < 2 or dim % 2:
            raise ValueError(f"dim is {dim}; it must be even, half sines and half cosines mark the positions")
        self.num_speakers, self.dim, self.kernel_size, self.stride = num_speakers, dim, kernel_size, kernel_size // 2
        self.masking, self.causal, self.sample_rate = masking, causal, sample_rate
        past_only = causal is True
        self.encoder = nn.Linear(kernel_size, num_filters, bias=False)
        self.norm = TimeNorm(num_filters, causal=past_only)
        self.input_proj = nn.Linear(num_filters, dim, bias=False)
        self.position_scale = nn.Parameter(torch.ones(1))
        self.blocks = nn.ModuleList(
            GatedAttentionBlock(
                dim,
                group_size,
                query_key_dim,
                expansion_factor,
                kernel_size=conv_kernel_size,
                causal=causal,
                dropout=dropout,
            )
            for _ in range(depth)
        )
        self.block_norm = nn.LayerNorm(dim, eps=1e-6)
        self.outer_norm = TimeNorm(dim, causal=past_only)
        self.prelu = nn.PReLU()
        self.speaker_proj = nn.Linear(dim, num_speakers * dim)
        self.output = nn.Linear(dim, dim)
        self.output_gate = nn.Linear(dim, dim)
        self.mask_proj = nn.Linear(dim, num_filters, bias=False)
        self.decoder = nn.Linear(num_filters, kernel_size, bias=False)
        nn.init.uniform_(self.decoder.weight, -(kernel_size**-0.5), kernel_size**-0.5)

    def sequence(self, y: Tensor, mask: Tensor | None, state: dict | None, frames_at_once: int | None) -> Tensor:
        """The stack of blocks, (B, S, dim) to (B, S, dim)."""
        for block in self.blocks:
            y = block(y, mask, state, frames_at_once)
        return y

    def separate_frames(
        self, windows: Tensor, mask: Tensor | None, state: dict | None = None, frames_at_once: int | None = None
    ) -> Tensor:
        """(B, S, kernel_size) windows of the mixture to (B, K, S, kernel_size) windows of the voices."""
        frames = windows.shape[1]
        first = 0 if state is None else state.get("frames", 0)
        encoded = F.relu(self.encoder(windows))
        cos, sin = rotary_table(frames, self.dim, 10000.0, first, windows.device, windows.dtype)
        y = self.input_proj(self.norm(encoded, mask, state))
        y = y + self.position_scale * torch.cat([sin, cos], dim=-1)
        y = y + self.outer_norm(self.block_norm(self.sequence(y, mask, state, frames_at_once)), mask, state)
        y = self.speaker_proj(self.prelu(y)).unflatten(-1, (self.num_speakers, self.dim))
        y = torch.tanh(self.output(y)) * torch.sigmoid(self.output_gate(y))
        y = F.relu(self.mask_proj(y))
        if self.masking:
            y = y * encoded.unsqueeze(2)
        if state is not None:
            state["frames"] = first + frames
        voices = self.decoder(y).transpose(1, 2)
        return voices if mask is None else voices * mask[:, None, :, None]

    def forward(self, mix: Tensor, lengths: Tensor | None = None, frames_at_once: int | None = None) -> Tensor:
        """mix: (B, T) samples -> (B, num_speakers, T).

        lengths: (B,) samples of each item, the rest being padding; an item then comes out as it would alone, with
            zeros behind its end.
        frames_at_once: sweep the attention over pieces of so many frames (see `JointAttention`) to save memory.

        Raises ValueError where an item has fewer than `kernel_size` samples.
        """
        samples = mix.shape[-1]
        shortest = samples if lengths is None or torch.compiler.is_compiling() else int(lengths.min())
        if shortest < self.kernel_size:
            raise ValueError(f"{shortest} samples are too few: one frame has {self.kernel_size}")
        windows = mix.unfold(-1, self.kernel_size, self.stride)
        mask = None
        if lengths is not None:
            counts = (lengths - self.kernel_size) // self.stride + 1
            mask = torch.arange(windows.shape[1], device=mix.device) < counts.to(mix.device)[:, None]
        out = overlap_add(self.separate_frames(windows, mask, None, frames_at_once))
        return F.pad(out, (0, samples - out.shape[-1]))

    def stream(self, samples: Tensor, state: dict, final: bool = False) -> Tensor:
        """The next piece of a stream: (B, n) samples in, (B, num_speakers, m) samples out, m = what is settled.

        Start with an empty dict as `state` and hand the same one in at every call; pieces may have any length.
        `final=True` gives out the rest, after which as many samples have come out as went in. Everything together
        equals `forward` on the whole. The state's size does not depend on the length of the stream.

        Raises ValueError unless the model was built with causal=True.
        """
        if self.causal is not True:
            raise ValueError("only a model built (and trained) with causal=True can be streamed")
        held = torch.cat([state["samples"], samples], dim=-1) if "samples" in state else samples
        frames = max((held.shape[-1] - self.kernel_size) // self.stride + 1, 0)
        state["samples"] = held[:, frames * self.stride :]
        out = samples.new_zeros(samples.shape[0], self.num_speakers, 0)
        if frames:
            windows = held.unfold(-1, self.kernel_size, self.stride)
            voices = overlap_add(self.separate_frames(windows, None, state))
            if "tail" in state:
                voices = voices + F.pad(state["tail"], (0, voices.shape[-1] - self.stride))
            out, state["tail"] = voices[..., : -self.stride], voices[..., -self.stride :]
        if final:
            rest = state["samples"].shape[-1]
            tail = state.get("tail", out[..., :0])
            out = torch.cat([out, F.pad(tail, (0, rest - tail.shape[-1]))], dim=-1)
        return out

    @classmethod
    def from_published(
        cls,
        source: str | Path | Mapping[str, Tensor],
        *,
        sample_rate: int | None = None,
        masking: bool | None = None,
        **settings: Any,
    ) -> "MossFormer":
        """The model of a released checkpoint, weights loaded; every tensor of it is accounted for.

        source: a file, a downloaded folder, or a state dict, in any of the four released layouts: MossFormer of the
            ModelScope hub (folder with encoder.bin, decoder.bin and masknet.bin), MossFormer2 of the hub, the
            ClearerVoice folder with its `last_best_checkpoint`, and the stand-alone MossFormer2 releases.
        sample_rate: in Hz. Must be given for the ClearerVoice layout, which serves 8000 and 16000 with the same
            shapes; the other three are 8000.
        masking: True by default; the released WHAMR! weights need False, which names and shapes do not show.
        settings: what shapes do not show, such as group_size, causal or dropout.

        Returns a `MossFormer` or `MossFormer2` by what the tensors say. Raises CheckpointError where they fit none,
        UserError where an argument is missing.
        """
        state = read_published(source) if isinstance(source, str | Path) else unwrap(source, ())
        if sample_rate is None:
            if any(name.startswith("model.") for name in state):
                raise UserError(
                    f"{_name(source)}: this layout holds 8 kHz as well as 16 kHz models; "
                    "say sample_rate=8000 or sample_rate=16000"
                )
            sample_rate = 8000
        if masking is None:
            if "whamr" in _name(source).lower():
                raise UserError(
                    f"{_name(source)}: the released WHAMR! weights do not mask; say masking=False (or True for others)"
                )
            masking = True
        state = published_state(state)
        found, kwargs = detect(state)
        if not issubclass(found, cls):
            raise CheckpointError(f"{_name(source)}: these are weights of {found.__name__}, not of {cls.__name__}")
        model = found(**{**kwargs, **settings}, sample_rate=sample_rate, masking=masking)
        load_state_dict(model, state)
        return model.eval()

    def _save_pretrained(self, save_directory: Path) -> None:
        check_weights(self.state_dict(), save_directory)
        super()._save_pretrained(save_directory)


class MossFormer2(MossFormer):
    """MossFormer2: behind every attention block of `MossFormer` a gated FSMN (`GatedFSMN`), else the same.

    Args beyond MossFormer's: inner: channels inside the recurrent blocks. order, fsmn_depth: their memory filters.
    hidden: width inside the memory unit, `inner` by default.
    """

    def __init__(
        self,
        num_speakers: int = 2,
        num_filters: int = 512,
        dim: int = 512,
        depth: int = 24,
        kernel_size: int = 16,
        group_size: int = 256,
        query_key_dim: int = 128,
        expansion_factor: float = 4.0,
        conv_kernel_size: int = 17,
        inner: int = 256,
        order: int = 20,
        fsmn_depth: int = 2,
        hidden: int | None = None,
        masking: bool = True,
        causal: bool | Literal["attention"] = False,
        dropout: float = 0.1,
        sample_rate: int = 8000,
    ):
        super().__init__(
            num_speakers,
            num_filters,
            dim,
            depth,
            kernel_size,
            group_size,
            query_key_dim,
            expansion_factor,
            conv_kernel_size,
            masking,
            causal,
            dropout,
            sample_rate,
        )
        self.recurrent = nn.ModuleList(
            GatedFSMN(dim, inner, order, fsmn_depth, hidden, conv_kernel_size, causal is True, dropout)
            for _ in range(depth)
        )

    def sequence(self, y: Tensor, mask: Tensor | None, state: dict | None, frames_at_once: int | None) -> Tensor:
        for block, recurrent in zip(self.blocks, self.recurrent):
            y = recurrent(block(y, mask, state, frames_at_once), mask, state)
        return y


def overlap_add(windows: Tensor) -> Tensor:
    """(..., S, 2h) windows that begin every h samples to (..., (S + 1) h) samples."""
    first, second = windows.chunk(2, dim=-1)
    return (F.pad(first, (0, 0, 0, 1)) + F.pad(second, (0, 0, 1, 0))).flatten(-2)


VARIANTS: dict[str, tuple[type[MossFormer], dict[str, Any]]] = {
    "mossformer-s": (MossFormer, {"num_filters": 256, "dim": 256, "depth": 23}),
    "mossformer-m": (MossFormer, {"num_filters": 512, "dim": 384, "depth": 25}),
    "mossformer-l": (MossFormer, {"num_filters": 512, "dim": 512, "depth": 24}),
    "mossformer2": (MossFormer2, {"num_filters": 512, "dim": 512, "depth": 24}),
}
"""Sizes by name. Of S and M only the parameter count is published; these widths and depths give it."""


def create_model(variant: str, **settings: Any) -> MossFormer:
    """A freshly initialized model of the named size; `settings` override or add constructor arguments.

    Raises ValueError for an unknown name.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant is {variant!r}; it must be one of {', '.join(VARIANTS)}")
    cls, kwargs = VARIANTS[variant]
    return cls(**{**kwargs, **settings})


RENAMES: list[tuple[re.Pattern[str], Any]] = [
    (re.compile(pattern), new)
    for pattern, new in [
        (r"^model\.", ""),
        (r"^(enc(oder)?\.)?conv1d\.", "encoder."),  # without a module's name in the files of the hub's first model
        (r"^(dec(oder)?\.)?weight$", "decoder.weight"),
        (r"^mask_?net\.", ""),
        (r"^(dual_mdl\.0|mdl)\.(intra|att)_norm\.", "outer_norm."),
        (r"^(dual_mdl\.0|mdl)\.(intra|att)_mdl\.(mdl\.)?norm\.(norm\.)?", "block_norm."),
        (r"^(dual_mdl\.0|mdl)\.(intra|att)_mdl\.(mdl\.)?(mossformerM|flashT)\.", ""),
        (r"^layers\.", "blocks."),
        (r"^fsmn\.", "recurrent."),
        (r"^conv1d_encoder\.", "input_proj."),
        (r"^pos_enc\.scale$", "position_scale"),
        (r"^conv1d_out\.", "speaker_proj."),
        (r"^conv1_decoder\.", "mask_proj."),
        (r"^(output|output_gate)\.0\.", r"\1."),
        # inside the blocks
        (r"\bto_(hidden|qk|out)\.mdl\.0\.", r"to_\1.norm."),
        (r"\bto_(hidden|qk|out)\.mdl\.1\.", r"to_\1.linear."),
        (r"\bto_(hidden|qk|out)\.mdl\.3\.sequential\.1\.conv\.weight$", r"to_\1.depthwise"),
        (r"\bqk_offset_scale\.", ""),
        # inside the recurrent blocks
        (r"\bgated_fsmn\.to_([uv])\.mdl\.0\.", r"\1.norm."),
        (r"\bgated_fsmn\.to_([uv])\.mdl\.1\.", r"\1.linear."),
        (r"\bgated_fsmn\.to_([uv])\.mdl\.3\.sequential\.1\.conv\.weight$", r"\1.depthwise"),
        (r"\bgated_fsmn\.fsmn\.", "fsmn."),
        (r"\bfsmn\.conv\.conv(\d+)\.weight$", lambda m: f"fsmn.memory.convs.{int(m[1]) - 1}"),
        (r"\bfsmn\.conv\.norm(\d+)\.", lambda m: f"fsmn.memory.norms.{int(m[1]) - 1}."),
        (r"\bfsmn\.conv\.prelu(\d+)\.weight$", lambda m: f"fsmn.memory.slopes.{int(m[1]) - 1}"),
        (r"\bconv1\.0\.(weight|bias)$", r"reduce.\1"),
        (r"\bconv1\.1\.weight$", "prelu.weight"),
        (r"(^|\d\.)norm1\.(weight|bias)$", r"\1norm_in.\2"),
        (r"(^|\d\.)norm2\.(weight|bias)$", r"\1norm_out.\2"),
        (r"(^|\d\.)conv2\.(weight|bias)$", r"\1expand.\2"),
    ]
]

TABLES = re.compile(r"(.*\.)?(rotary_pos_emb\.freqs|pos_enc\.inv_freq)$")
"""What the released code computes and yet stores: 10000^(-2i/n), i = 0 .. n/2-1."""


def read_published(path: str | Path) -> dict[str, Tensor]:
    """The state dict of a released checkpoint: a file, or the folder as it was downloaded.

    Raises CheckpointError where no weights are found.
    """
    path = Path(path)
    if not path.is_dir():
        return read_state_dict(path)
    parts = {"encoder": "encoder", "decoder": "decoder", "masknet": "mask_net"}
    if (path / "masknet.bin").is_file():
        return {
            f"{prefix}.{name}": value
            for part, prefix in parts.items()
            for name, value in read_state_dict(path / f"{part}.bin").items()
        }
    if (path / "last_best_checkpoint").is_file():
        with reading(path / "last_best_checkpoint", "does not name a checkpoint"):
            named = (path / "last_best_checkpoint").read_text(encoding="utf-8").strip()
            if not (path / Path(named).name).is_file():
                raise ValueError(f"there is no {named[:80]!r} beside it")
        return read_state_dict(path / Path(named).name)
    files = sorted(f for ending in ("safetensors", "bin", "pt", "pth", "ckpt") for f in path.glob(f"*.{ending}"))
    if len(files) != 1:
        found = ", ".join(f.name for f in files) or "none"
        raise CheckpointError(f"{path}: expected one file of weights in this folder, found {found}; name the file")
    return read_state_dict(files[0])


def published_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A released state dict under our names and shapes; the stored tables are verified and left out.

    Raises CheckpointError where a stored table is not the one that this code computes.
    """
    ours = {}
    for name, value in state.items():
        if TABLES.match(name):
            size = 2 * value.numel()
            table = 10000.0 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
            if not torch.allclose(value.double().flatten(), table, rtol=1e-3, atol=1e-7):
                raise CheckpointError(f"{name} is not 10000^(-2i/{size}): this checkpoint marks positions otherwise")
            continue
        for pattern, new in RENAMES:
            name = pattern.sub(new, name)
        ours[name] = _reshaped(name, value)
    return ours


def _reshaped(name: str, value: Tensor) -> Tensor:
    if name == "decoder.weight":
        return value.squeeze(1).mT
    if name == "encoder.weight" or name.endswith("depthwise"):
        return value.squeeze(1)
    return value.squeeze(-1) if value.dim() > 2 else value


def detect(state: Mapping[str, Tensor]) -> tuple[type[MossFormer], dict[str, Any]]:
    """Class and constructor arguments that the shapes of a state dict (under our names) tell.

    Raises CheckpointError where tensors that tell them are missing.
    """
    try:
        filters, kernel = state["encoder.weight"].shape
        dim = state["input_proj.weight"].shape[0]
        hidden = state["blocks.0.to_hidden.linear.weight"].shape[0]
        kwargs = {
            "num_speakers": state["speaker_proj.weight"].shape[0] // dim,
            "num_filters": filters,
            "dim": dim,
            "depth": 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks.")),
            "kernel_size": kernel,
            "query_key_dim": state["blocks.0.gamma"].shape[1],
            "expansion_factor": hidden / dim,
            "conv_kernel_size": state["blocks.0.to_hidden.depthwise"].shape[1],
        }
        if not any(name.startswith("recurrent.") for name in state):
            return MossFormer, kwargs
        return MossFormer2, {**kwargs, **_detect_recurrent(state, "recurrent.0.")}
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"these are no weights of a MossFormer: {error} is missing or misshapen") from error


def _detect_recurrent(state: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
    memory = [name for name in state if re.match(re.escape(prefix) + r"fsmn\.memory\.convs\.\d+$", name)]
    return {
        "inner": state[prefix + "reduce.weight"].shape[0],
        "order": (state[prefix + "fsmn.memory.convs.0"].shape[-1] + 1) // 2,
        "fsmn_depth": len(memory),
        "hidden": state[prefix + "fsmn.linear.weight"].shape[0],
    }


def _name(source: Any) -> str:
    return str(source) if isinstance(source, str | Path) else "the state dict"
