"""The configuration of a language model with exchangeable sequence mixers."""

from dataclasses import field
from math import isfinite
from typing import Any

from transformers import PreTrainedConfig

from nearfar.core.errors import UserError
from nearfar.language.registry import MIXERS, NORMS, RESIDUALS, Named


class MixerConfig(PreTrainedConfig):
    """What a `MixerForCausalLM` is made of.

    Args:
        mixers: sequence mixers, each a name of `MIXERS` or `{"type": name, setting: value, ...}`; layer i takes
            number i modulo their count, so `["base-conv", "attention"]` alternates.
        state_mixer: likewise, of `STATE_MIXERS`, or "none" for blocks that are a mixer alone (Mamba); a list of such
            choices gives layer i number i modulo their count.
        residual: "plain", `x + f(x)`, or "attention", attention residuals over depth, also as `{"type": "attention",
            "block_size": S, ...}` with S sub-layers per block (1: full) and the settings of `DepthAttention`.
        norm: one of `NORMS`, before each part and at the end.
        final_norm: the one at the end, where it is another.
        norm_eps: of the norms.
        embed_scale: factor on the embedding.
        embed_dropout: dropout after the embedding.
        dropout: dropout after each mixer.
        max_position_embeddings: longest sequence, for the mixers that have one (Hyena, long convolutions) and for
            learned positions.
        learned_positions: add a learned embedding of the position; attention without any convolution needs it.
    """

    model_type = "nearfar-mixer"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 256
    hidden_size: int = 128
    num_hidden_layers: int = 2
    mixers: list = field(default_factory=lambda: ["base-conv", "attention"])
    state_mixer: str | dict | list = "mlp"
    residual: str | dict = "plain"
    norm: str = "layernorm"
    final_norm: str | None = None
    norm_eps: float = 1e-5
    embed_scale: float = 1.0
    embed_dropout: float = 0.0
    dropout: float = 0.0
    max_position_embeddings: int = 2048
    learned_positions: bool = False
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings"):
            least = 0 if name == "vocab_size" and getattr(self, "real_valued", False) else 1  # numbers need no tokens
            if type(value := getattr(self, name)) is not int or value < least:
                raise UserError(f"{name} is {value!r}; it must be a positive whole number")
        for name in ("norm_eps", "embed_scale", "embed_dropout", "dropout", "initializer_range"):
            if (
                isinstance(value := getattr(self, name), bool)
                or not isinstance(value, int | float)
                or not isfinite(value)
            ):
                raise UserError(f"{name} is {value!r}; it must be a finite number")
        if not isinstance(self.mixers, list | tuple) or not all(isinstance(each, str | dict) for each in self.mixers):
            raise UserError(f"mixers is {self.mixers!r}; it must be a list of names or mappings with a type")
        if not self.mixers:
            raise UserError(f"mixers is empty; name at least one of {', '.join(sorted(MIXERS))}")
        for norm in (self.norm, self.final_norm or self.norm):
            if norm not in NORMS:
                raise UserError(f"unknown norm {norm!r}; known are {', '.join(sorted(NORMS))}")
        for choice in self.mixers:
            name = choice if isinstance(choice, str) else choice.get("type")
            if name not in MIXERS:
                raise UserError(f"unknown mixer {name!r}; known are {', '.join(sorted(MIXERS))}")
        if self.residual_name not in RESIDUALS:
            raise UserError(f"unknown residual {self.residual_name!r}; known are {', '.join(RESIDUALS)}")
        super().__post_init__(**kwargs)

    @property
    def residual_name(self) -> str | None:
        return self.residual if isinstance(self.residual, str) else self.residual.get("type")

    def layer_mixer(self, layer: int) -> Named:
        """The choice of mixer for `layer`."""
        return self.mixers[layer % len(self.mixers)]

    def layer_state_mixer(self, layer: int) -> Named:
        """The choice of state mixer for `layer`."""
        choices = self.state_mixer if isinstance(self.state_mixer, list) else [self.state_mixer]
        return choices[layer % len(choices)]


class SequenceClassifierConfig(MixerConfig):
    """A `MixerConfig` and the head of a `SequenceClassifier`.

    Args:
        num_labels: classes, of transformers' configs.
        classifier_hidden: widths of the head's hidden layers.
        classifier_dropout: behind each of them.
        real_valued: inputs are numbers, not token ids.
        pairs: an example is two sequences.
    """

    model_type = "nearfar-mixer-classifier"

    classifier_hidden: list | int = 128
    classifier_dropout: float = 0.0
    real_valued: bool = False
    pairs: bool = False
