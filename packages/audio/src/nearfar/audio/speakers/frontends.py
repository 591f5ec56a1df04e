"""From samples to what a speaker head reads: self-supervised backbones with all hidden states, and Kaldi filter banks.

Both map waveforms `(B, N)` with optional lengths in samples `(B,)` to features and a frame mask (None where no item is
shorter than the batch), and give an item in a padded batch the features that it has alone.
"""

import math
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchaudio.compliance.kaldi import get_mel_banks
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, PreTrainedModel

from nearfar.core.errors import UserError
from nearfar.core.hub import from_hub, unreachable
from nearfar.ops.aggregation.statistics import masked_moments

BACKBONES = ("wav2vec2", "hubert", "wavlm")
"""Model types of transformers that the front end takes."""


def sample_mask(waveforms: Tensor, lengths: Tensor | None) -> Tensor | None:
    """`(B, N)`, true at the samples that are not padding; None where no item is padded.

    Raises ValueError for lengths that are not between 1 and N.
    """
    if lengths is None:
        return None
    size = waveforms.shape[1]
    if lengths.shape != waveforms.shape[:1] or int(lengths.min()) < 1 or int(lengths.max()) > size:
        raise ValueError(f"lengths must be {waveforms.shape[0]} numbers from 1 to {size}, got {lengths.tolist()}")
    if bool((lengths == size).all()):
        return None
    return torch.arange(size, device=waveforms.device) < lengths.to(waveforms.device)[:, None]


class MaskedGroupNorm(nn.GroupNorm):
    """GroupNorm with one group per channel that takes its statistics over the real frames (`mask`) only.

    The base wav2vec2, HuBERT and WavLM normalize their first convolution over all of time, so padding would change
    every frame of a padded item; with the mask it changes none.
    """

    mask: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.mask is None:
            return super().forward(x)
        mean, variance = masked_moments(x, self.mask, 0)
        return (x - mean) * torch.rsqrt(variance + self.eps) * self.weight[:, None] + self.bias[:, None]


class SelfSupervised(nn.Module):
    """All hidden states of a wav2vec2, HuBERT or WavLM model of transformers, as `(B, L, T, D)`.

    L is the number of transformer layers + 1: index 0 is the transformer's input (behind the positional convolution;
    behind the layer norm too in the post-norm models), and of the pre-norm (large) models the last state of the whole
    backbone, it alone, has the final layer norm. `num_layers` keeps the first n transformer layers; the upper ones are
    removed and not computed, and the states are those of the whole model.

    Layer drop is switched off, because the heads need every state. The backbone starts frozen: see `tune`.

    Args:
        backbone: the model.
        normalize: bring each utterance to mean 0 and variance 1 first; `do_normalize` of the preprocessor's config.
        sample_rate: that the backbone was trained for.
        num_layers: keep this many transformer layers; None keeps all.

    Raises:
        ValueError: for another model type, or more layers than there are.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        normalize: bool,
        sample_rate: int = 16000,
        num_layers: int | None = None,
    ) -> None:
        super().__init__()
        config = backbone.config
        if config.model_type not in BACKBONES or getattr(config, "add_adapter", False):
            raise ValueError(
                f"the backbone must be one of {', '.join(BACKBONES)} without adapter, got {config.model_type}"
            )
        layers = backbone.encoder.layers
        keep = len(layers) if num_layers is None else num_layers
        if not 1 <= keep <= len(layers):
            raise ValueError(f"num_layers must be 1 to {len(layers)} for this backbone, got {num_layers}")
        if keep < len(layers):
            backbone.encoder.layers = layers[:keep]
            if config.do_stable_layer_norm:  # a middle state of a pre-norm model has no final norm
                backbone.encoder.layer_norm = nn.Identity()
        config.layerdrop = 0.0
        self.group_norm: list[MaskedGroupNorm] = []  # in a list: it is registered at its place in the backbone
        if config.feat_extract_norm == "group":
            first = backbone.feature_extractor.conv_layers[0]
            norm = MaskedGroupNorm(first.layer_norm.num_groups, first.layer_norm.num_channels, first.layer_norm.eps)
            norm.weight, norm.bias = first.layer_norm.weight, first.layer_norm.bias
            first.layer_norm = norm
            self.group_norm.append(norm)
        self.backbone = backbone
        self.normalize, self.sample_rate = normalize, sample_rate
        self.whole = keep == len(layers)
        self.tune(0)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, num_layers: int | None = None, normalize: bool | None = None
    ) -> "SelfSupervised":
        """A backbone from a folder that transformers saved, or from the Hugging Face hub by `hub:NAME`.

        `normalize=None` follows the preprocessor config that lies with it; the authors' trainer of the layer-aware TDNN
        never normalizes: pass False for it.

        Raises UserError where it cannot be read, or has no preprocessor config and `normalize` is None.
        """
        name = str(folder)
        place, is_hub = from_hub(name, "a backbone")
        asked: Any = {"local_files_only": not is_hub, "trust_remote_code": False}
        try:
            backbone = AutoModel.from_pretrained(place, **asked)
        except Exception as error:  # the hub's client has errors of its own, and damaged files raise anything
            why = unreachable(name, is_hub, error)
            raise UserError(f"{name}: no speech backbone that transformers can read ({why})") from error
        sample_rate = 16000
        try:
            preprocessor = AutoFeatureExtractor.from_pretrained(place, **asked)
            sample_rate = int(preprocessor.sampling_rate)
            normalize = bool(preprocessor.do_normalize) if normalize is None else normalize
        except (OSError, ValueError, AttributeError) as error:
            if normalize is None:
                raise UserError(
                    f"{name}: has no preprocessor_config.json that says whether to normalize the samples; "
                    "add it or choose by hand"
                ) from error
        try:
            return cls(backbone, normalize, sample_rate, num_layers)
        except ValueError as error:
            raise UserError(f"{name}: {error}") from error

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> "SelfSupervised":
        """The front end that `settings` describes, with random weights."""
        options = {k: v for k, v in settings["backbone"].items() if k != "model_type"}
        config = AutoConfig.for_model(settings["backbone"]["model_type"], **options)
        model = AutoModel.from_config(config)
        return cls(model, settings["normalize"], settings["sample_rate"], settings["num_layers"])

    @property
    def settings(self) -> dict[str, Any]:
        """What `from_settings` needs, as plain values. `num_layers` is None where the backbone is whole."""
        return {
            "type": "SelfSupervised",
            "backbone": self.backbone.config.to_dict(),
            "normalize": self.normalize,
            "sample_rate": self.sample_rate,
            "num_layers": None if self.whole else len(self.backbone.encoder.layers),
        }

    @property
    def num_states(self) -> int:
        """L: the number of hidden states."""
        return len(self.backbone.encoder.layers) + 1

    @property
    def hidden_size(self) -> int:
        """D: the width of the hidden states."""
        return self.backbone.config.hidden_size

    @property
    def min_samples(self) -> int:
        """Samples that the first frame needs."""
        size = 1
        for kernel, stride in zip(
            reversed(self.backbone.config.conv_kernel), reversed(self.backbone.config.conv_stride)
        ):
            size = (size - 1) * stride + kernel
        return size

    def tune(self, layers: int | Literal["all"]) -> None:
        """Choose what training changes: the top `layers` transformer layers (0: nothing), or "all" of the backbone.

        What is not tuned stays in evaluation mode, whatever `train()` says. With "all" the backbone's own dropout and
        SpecAugment act in training, as its config says.
        """
        blocks = list(self.backbone.encoder.layers)
        if layers != "all" and not 0 <= layers <= len(blocks):
            raise ValueError(f"can tune 0 to {len(blocks)} layers or 'all', got {layers}")
        self._tuned = [self.backbone] if layers == "all" else blocks[len(blocks) - layers :]
        self.backbone.requires_grad_(False)
        for module in self._tuned:
            module.requires_grad_(True)
        self.train(self.training)

    def train(self, mode: bool = True) -> "SelfSupervised":
        super().train(mode)
        self.backbone.eval()
        for module in self._tuned:
            module.train(mode)
        return self

    def frame_lengths(self, lengths: Tensor) -> Tensor:
        """Frames of utterances of `lengths` samples."""
        for kernel, stride in zip(self.backbone.config.conv_kernel, self.backbone.config.conv_stride):
            lengths = (lengths - kernel) // stride + 1
        return lengths

    def forward(self, waveforms: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Samples `(B, N)` at `sample_rate`, lengths `(B,)`: hidden states `(B, L, T, D)` and frame mask `(B, T)`.

        Raises ValueError for utterances shorter than one frame.
        """
        mask = sample_mask(waveforms, lengths)
        shortest = waveforms.shape[1] if mask is None else int(lengths.min())
        if shortest < self.min_samples:
            raise ValueError(f"an utterance of {shortest} samples is too short, the backbone needs {self.min_samples}")
        if self.normalize:
            mean, variance = masked_moments(waveforms[:, None], mask, 0)
            waveforms = (waveforms - mean[:, 0]) * torch.rsqrt(variance[:, 0] + 1e-7)
        frames = None
        if mask is not None:
            waveforms = waveforms * mask
            counts = self.frame_lengths(lengths.to(waveforms.device))
            total = int(self.frame_lengths(torch.tensor(waveforms.shape[1])))
            frames = torch.arange(total, device=waveforms.device) < counts[:, None]
            kernel, stride = self.backbone.config.conv_kernel[0], self.backbone.config.conv_stride[0]
            for norm in self.group_norm:
                first = (lengths.to(waveforms.device) - kernel) // stride + 1
                positions = torch.arange((waveforms.shape[1] - kernel) // stride + 1, device=waveforms.device)
                norm.mask = positions < first[:, None]
        try:
            with torch.set_grad_enabled(torch.is_grad_enabled() and bool(self._tuned)):
                output = self.backbone(
                    waveforms,
                    attention_mask=None if mask is None else mask.long(),
                    output_hidden_states=True,
                )
        finally:
            for norm in self.group_norm:
                norm.mask = None
        # releases of transformers differ in whether the last of the hidden states has the final norm
        states = [*output.hidden_states[:-1], output.last_hidden_state]
        return torch.stack(states, 1), frames


KALDI_FLOOR = torch.finfo(torch.float32).eps
"""Least power of a filter in Kaldi's features."""


class KaldiFbank(nn.Module):
    """Log mel filter-bank energies as Kaldi's `compute-fbank-feats`, in batches, minus their mean over the utterance.

    Per frame (25 ms every 10 ms, only whole frames): subtract the mean, pre-emphasis 0.97, Povey window, power
    spectrum, triangular mel filters from 20 Hz to `high_freq`, log. The samples are scaled to the 16-bit
    range first, as Kaldi reads them. Equal to `torchaudio.compliance.kaldi.fbank` without dither, utterance by
    utterance.

    Kaldi's floor of the filters' power, 2^-23, lies far below a 16-bit step: a pause that an editor has filled with
    zeros stands out by 20 nepers from one in a room. A higher `floor` hides what no microphone hears; `top_db` hides
    what is faint beside the speech, such as a hiss that fills the bands in which a voice has little.

    Args:
        num_mels: number of filters (80).
        sample_rate: in Hz (16000).
        floor: least power of a filter, in squared 16-bit steps (2^-23, what published weights were trained with).
        top_db: least power of a filter, in dB below the utterance's greatest (None: no such bound, as published).
        high_freq: upper end of the filters in Hz (None: the Nyquist frequency, as published).

    Shapes: `(B, N)` to `(B, T, num_mels)`.
    """

    def __init__(
        self,
        num_mels: int = 80,
        sample_rate: int = 16000,
        floor: float = KALDI_FLOOR,
        top_db: float | None = None,
        high_freq: float | None = None,
    ) -> None:
        super().__init__()
        if not 0 < floor < math.inf:
            raise ValueError(f"floor must be a positive number, got {floor}")
        if top_db is not None and not 0 < top_db < math.inf:
            raise ValueError(f"top_db must be a positive number, got {top_db}")
        if high_freq is not None and not 20 < high_freq <= sample_rate / 2:
            raise ValueError(f"high_freq must be above 20 and at most {sample_rate / 2:g} Hz, got {high_freq}")
        self.num_mels, self.sample_rate, self.floor = num_mels, sample_rate, float(floor)
        self.top_db, self.high_freq = (None if value is None else float(value) for value in (top_db, high_freq))
        self.size, self.shift = sample_rate * 25 // 1000, sample_rate // 100
        self.fft_size = 1 << (self.size - 1).bit_length()
        filters, _ = get_mel_banks(
            num_mels, self.fft_size, float(sample_rate), 20.0, self.high_freq or 0.0, 100.0, -500.0, 1.0
        )
        if not bool((filters.sum(1) > 0).all()):
            raise ValueError(f"{num_mels} mel filters are too many for {sample_rate} Hz: some would be empty")
        self.register_buffer("filters", nn.functional.pad(filters, (0, 1)).T.contiguous(), persistent=False)
        window = torch.hann_window(self.size, periodic=False).pow(0.85)
        self.register_buffer("window", window, persistent=False)

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> "KaldiFbank":
        """The front end that `settings` describes."""
        more = {name: settings[name] for name in ("floor", "top_db", "high_freq") if name in settings}
        return cls(settings["num_mels"], settings["sample_rate"], **more)

    @property
    def settings(self) -> dict[str, Any]:
        """What `from_settings` needs, as plain values."""
        names = ("num_mels", "sample_rate", "floor", "top_db", "high_freq")
        return {"type": "KaldiFbank"} | {name: getattr(self, name) for name in names}

    @property
    def min_samples(self) -> int:
        """Samples that the first frame needs."""
        return self.size

    def frame_lengths(self, lengths: Tensor) -> Tensor:
        """Frames of utterances of `lengths` samples."""
        return (lengths - self.size) // self.shift + 1

    def forward(self, waveforms: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Samples `(B, N)` in [-1, 1] and lengths `(B,)`: features `(B, T, num_mels)` and frame mask `(B, T)`.

        Raises ValueError for utterances shorter than one frame.
        """
        mask = sample_mask(waveforms, lengths)
        shortest = waveforms.shape[1] if mask is None else int(lengths.min())
        if shortest < self.size:
            raise ValueError(f"an utterance of {shortest} samples is too short, one frame needs {self.size}")
        with torch.autocast(waveforms.device.type, enabled=False):
            frames = (waveforms.to(self.filters.dtype) * 32768).unfold(1, self.size, self.shift)
            frames = frames - frames.mean(2, keepdim=True)
            before = torch.cat([frames[..., :1], frames[..., :-1]], 2)
            spectrum = torch.fft.rfft((frames - 0.97 * before) * self.window, self.fft_size)
            power = spectrum.real.square() + spectrum.imag.square()
            power, valid = power @ self.filters, None
            if mask is not None:
                counts = self.frame_lengths(lengths.to(waveforms.device))
                valid = torch.arange(power.shape[1], device=waveforms.device) < counts[:, None]
                power = power * valid[..., None]
            if self.top_db is not None:
                power = power.maximum(power.amax((1, 2), keepdim=True) * 10 ** (-self.top_db / 10))
            features = power.clamp(min=self.floor).log()
            if valid is None:
                return features - features.mean(1, keepdim=True), None
            mean, _ = masked_moments(features.transpose(1, 2), valid, 0)
            return (features - mean.transpose(1, 2)).masked_fill(~valid[..., None], 0.0), valid


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]
