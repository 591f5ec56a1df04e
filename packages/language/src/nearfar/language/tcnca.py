"""TCNCA and Mega: language models, a sequence classifier for Long Range Arena, and Mega's published checkpoints.

TCNCA: Temporal Convolution Network with Chunked Attention (Terzic et al., 2023, arXiv 2312.05605) puts a dilated
convolution network where Mega (Ma et al., ICLR 2023, arXiv 2209.10655) has its moving average. No code or weights of
TCNCA were released and its hyperparameters could not be read, so those of its variants here are inferred; Mega's are
published. A layer is `MegaLayer` and `NormedFeedForward`; no positions but the relative bias inside a chunk.
"""

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification
from transformers import initialization as init
from transformers.modeling_outputs import SequenceClassifierOutput

from nearfar.core.checkpoints import Checkpoint, loaded, read
from nearfar.core.errors import CheckpointError, UserError
from nearfar.language.configuration import MixerConfig, SequenceClassifierConfig
from nearfar.language.layouts import tcnca as layout
from nearfar.language.modeling import MixerForCausalLM, MixerModel, MixerPreTrainedModel


class RealEmbedding(nn.Module):
    """A number as a vector, `x w + b`: pixels, normalized."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight, self.bias = (nn.Parameter(torch.empty(dim)) for _ in range(2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """w ~ N(0, 1), b ~ N(0, 0.1)."""
        init.normal_(self.weight)
        init.normal_(self.bias, std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x[..., None] * self.weight + self.bias


class SequenceClassifier(MixerPreTrainedModel):
    """Layers, the mean over real positions, then `W_2 gelu(drop(W_1 x + b))` (Long Range Arena).

    Two sequences go through the same layers, and the head reads the second's mean before the first's.
    """

    config_class = SequenceClassifierConfig

    def __init__(self, config: SequenceClassifierConfig) -> None:
        super().__init__(config)
        self.model = MixerModel(config)
        if config.real_valued:
            self.model.embed_tokens = nn.Embedding(0, config.hidden_size)
        self.embed_values = RealEmbedding(config.hidden_size) if config.real_valued else None
        hidden = config.classifier_hidden
        widths = [config.hidden_size * (1 + config.pairs), *([hidden] if isinstance(hidden, int) else hidden)]
        self.classifier = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.out = nn.Linear(widths[-1], config.num_labels, bias=False)
        self.loss_type = "ForSequenceClassification"
        self.post_init()

    def pool(self, inputs: Tensor, mask: Tensor | None, hidden: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The mean of the last hidden states over real positions, `(B, d)`, and with `hidden` those of every layer."""
        embeds = None if self.embed_values is None else self.embed_values(inputs)
        ids = inputs if embeds is None else None
        output = self.model(
            ids, mask, inputs_embeds=embeds, use_cache=False, output_hidden_states=hidden, return_dict=True
        )
        h, layers = output.last_hidden_state, output.hidden_states or ()
        if mask is None:
            return h.mean(1), layers
        if not mask.any(1).all():
            raise ValueError("a row has no real position, so it has no mean; leave it out")
        return (h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), layers

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        second_ids: Tensor | None = None,
        second_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> SequenceClassifierOutput | tuple:
        """input_ids `(B, N)`: token ids, or numbers with `real_valued`; second_ids: of each pair's other sequence.

        labels `(B,)`: classes, or by the config's `problem_type` numbers or `(B, num_labels)` of 0 and 1. The hidden
        states of pairs are those of the first sequences, then those of the second.
        """
        if (second_ids is not None) != self.config.pairs:
            raise ValueError(f"the model is for {'pairs of' if self.config.pairs else 'single'} sequences")
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        x, hidden = self.pool(input_ids, attention_mask, wanted)
        if second_ids is not None:
            second, more = self.pool(second_ids, second_mask, wanted)
            x, hidden = torch.cat([second, x], -1), hidden + more
        for linear in self.classifier:
            x = F.gelu(self.dropout(linear(x)))
        logits = self.out(x)
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        output = SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=hidden if wanted else None)
        if return_dict is None:
            return_dict = self.config.return_dict
        return output if return_dict else output.to_tuple()

    @classmethod
    def from_published(cls, checkpoint: Checkpoint, **settings: Any) -> "SequenceClassifier":
        """A model with the weights of one of Mega's Long Range Arena checkpoints, see `layouts.tcnca.translate`."""
        config, ours = layout.translate(read(checkpoint), settings)
        if not isinstance(config, SequenceClassifierConfig):
            raise CheckpointError("the checkpoint is a language model's; MixerForCausalLM.from_published loads it")
        return loaded(cls(config), ours)


AutoConfig.register(SequenceClassifierConfig.model_type, SequenceClassifierConfig, exist_ok=True)

AutoModelForSequenceClassification.register(SequenceClassifierConfig, SequenceClassifier, exist_ok=True)


def layers(dim: int, z: int, v: int, memory: Mapping[str, Any], **mega: Any) -> dict[str, Any]:
    """The settings of a config with `dim` channels whose layers have a memory `{"type": "mega" or "tcnca", ...}`."""
    shared = {name: mega[name] for name in ("norm", "prenorm", "dropout", "feature_dropout") if name in mega}
    return {
        "hidden_size": dim,
        "mixers": [{**memory, "attention_dim": z, "value_dim": v, **mega}],
        "state_mixer": {"type": "nffn", "hidden": v, **shared},
        "final_norm": "plain-layernorm" if mega.get("prenorm", True) else "none",
    }


def language(layer_count: int, dim: int, z: int, v: int, memory: Mapping[str, Any], chunk: int) -> dict[str, Any]:
    settings = layers(dim, z, v, memory, chunk=chunk, dropout=0.1)
    return settings | {"num_hidden_layers": layer_count, "vocab_size": 256, "embed_scale": math.sqrt(dim)}


def arena(layer_count: int, dim: int, z: int, v: int, labels: int, **mega: Any) -> dict[str, Any]:
    memory = {"type": "mega", "bidirectional": True, "truncation": mega.pop("truncation", 1024)}
    head = {name: mega.pop(name) for name in ("real_valued", "pairs", "vocab_size") if name in mega}
    length = mega.pop("max_length", 4096)
    settings = layers(dim, z, v, memory, bias="simple", **mega)
    head |= {"vocab_size": 0} if head.get("real_valued") else {}
    if settings["final_norm"] == "plain-layernorm":
        settings["final_norm"] = {"scalenorm": "scalenorm", "batchnorm": "batchnorm"}.get(mega.get("norm"), "layernorm")
    more = {"num_labels": labels, "classifier_hidden": v, "max_position_embeddings": length, "use_cache": False}
    return settings | {"num_hidden_layers": layer_count} | more | head


EMA, TCN = {"type": "mega", "order": 16}, {"type": "tcnca", "kernel_size": 17, "dilation_factor": 17, "depth": 3}

VARIANTS: dict[str, dict[str, Any]] = {
    "mega-enwik8-base": language(12, 512, 128, 1024, EMA, 2048),
    "mega-enwik8-large": language(24, 1024, 128, 1536, EMA, 2048),
    "tcnca-enwik8-base": language(12, 512, 128, 1024, TCN, 2048),
    "mega-listops": arena(6, 80, 64, 160, 10, prenorm=False, dropout=0.1, vocab_size=16, max_length=2048),
    "mega-text": arena(4, 128, 64, 256, 2, norm="scalenorm", prenorm=False, dropout=0.1, vocab_size=257),
    "mega-retrieval": arena(
        6, 128, 64, 256, 2, norm="scalenorm", prenorm=False, dropout=0.1, vocab_size=257, pairs=True
    ),
    "mega-image": arena(8, 160, 96, 320, 10, norm="batchnorm", attention="laplace", real_valued=True),
    "mega-pathfinder": arena(6, 128, 64, 256, 2, norm="batchnorm", attention="laplace", real_valued=True),
    "mega-pathx": arena(
        4, 64, 32, 128, 2, norm="batchnorm", attention="laplace", truncation=4096, real_valued=True, max_length=16384
    ),
}
"""Published models, as settings of `MixerConfig` or `SequenceClassifierConfig`; chunks are those of training.

Whether ListOps, Text and Retrieval norm before or after a layer is not stated; here after, as their final norm tells.
Mega's figures: enwik8 1.02 bits per character; ListOps 63.14, Text 90.43, Retrieval 91.25, Image 90.44, Pathfinder
96.01, Path-X 97.98 % (without chunks). TCNCA states a lower enwik8 loss than Mega's under equal conditions; its tables
could not be read.
"""


def create(name: str, **overrides: Any) -> MixerForCausalLM | SequenceClassifier:
    """An untrained model of `VARIANTS`, with other settings where `overrides` gives them."""
    if name not in VARIANTS:
        raise UserError(f"unknown model {name!r}; known are {', '.join(VARIANTS)}")
    settings = VARIANTS[name] | overrides
    if "embed_scale" in settings:
        settings["embed_scale"] = overrides.get("embed_scale", math.sqrt(settings["hidden_size"]))
    if "num_labels" in settings:
        return SequenceClassifier(SequenceClassifierConfig(**settings))
    return MixerForCausalLM(MixerConfig(**settings))
