"""A causal language model whose sequence mixers are exchangeable, as a citizen of transformers.

Import this module once and `AutoModelForCausalLM.from_pretrained(folder)` works, without remote code; so do
`generate` (greedy, beams, sampling), `Trainer`, gradient checkpointing and lm-eval.
"""

import hashlib
import inspect
import json
from collections.abc import Callable
from dataclasses import field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from nearfar.core.errors import UserError
from nearfar.core.files import atomic_path
from nearfar.ops.attention.causal import CausalAttention
from nearfar.ops.convolution.base_conv import BaseConv
from nearfar.ops.convolution.hyena import Hyena
from nearfar.ops.recurrence.based import Based
from nearfar.ops.recurrence.h3 import H3
from nearfar.ops.recurrence.mamba import Mamba
from nearfar.ops.recurrence.retnet import Retention
from nearfar.ops.recurrence.rwkv4 import RWKV4ChannelMix, RWKV4TimeMix
from nearfar.ops.recurrence.streaming import State, StreamingMixer
from nearfar.ops.tokens.selective_lookup import SelectiveLookup

MIXERS: dict[str, Callable[..., StreamingMixer]] = {
    "attention": CausalAttention,
    "sliding-attention": CausalAttention,
    "base-conv": BaseConv,
    "based": Based,
    "hyena": Hyena,
    "h3": H3,
    "mamba": Mamba,
    "retnet": Retention,
    "rwkv4": RWKV4TimeMix,
    "selective-lookup": SelectiveLookup,
}
"""Name in a config -> sequence mixer. To add one, derive from `StreamingMixer` and enter it here."""


class Identity(nn.Module):
    """The state mixer that changes nothing; its block still adds the normed residual."""

    def __init__(self, dim: int):
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x


class MLP(nn.Module):
    """`W2 gelu(W1 x)`, exact GELU, hidden width `hidden` or else mult * dim."""

    def __init__(self, dim: int, mult: int = 4, hidden: int | None = None, bias: bool = True):
        super().__init__()
        hidden = hidden or mult * dim
        self.fc1 = nn.Linear(dim, hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class GLU(nn.Module):
    """`W3 ((W1 x) gelu(W2 x))`, exact GELU, hidden width `hidden` or else mult * dim."""

    def __init__(self, dim: int, mult: int = 4, hidden: int | None = None, bias: bool = False):
        super().__init__()
        hidden = hidden or mult * dim
        self.fc1 = nn.Linear(dim, 2 * hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.fc1(x).chunk(2, -1)
        return self.fc2(value * F.gelu(gate))


STATE_MIXERS: dict[str, Callable[..., nn.Module]] = {
    "identity": Identity,
    "mlp": MLP,
    "glu": GLU,
    "rwkv4-channel-mix": RWKV4ChannelMix,
}
"""Name in a config -> what follows the sequence mixer at each position ("none": nothing, not even the residual)."""

NORMS: dict[str, Callable[..., nn.Module]] = {"layernorm": nn.LayerNorm, "rmsnorm": nn.RMSNorm}

Named = str | dict[str, Any]


def build(choice: Named, table: dict[str, Callable[..., Any]], what: str, **given: Any) -> Any:
    """The entry of `table` that `choice` names: a name, or `{"type": name, argument: value, ...}`.

    Arguments in `given` are handed over where the entry takes them and `choice` does not set them.
    """
    arguments = {"type": choice} if isinstance(choice, str) else dict(choice)
    name = arguments.pop("type", None)
    if name not in table:
        raise UserError(f"unknown {what} {name!r}; known are {', '.join(sorted(table))}")
    allowed = inspect.signature(table[name]).parameters
    for argument in arguments:
        if argument not in allowed:
            raise UserError(f"{what} {name!r} has no setting {argument!r}; it has {', '.join(list(allowed)[1:])}")
    if name == "sliding-attention" and arguments.get("window") is None:
        raise UserError("mixer 'sliding-attention' needs its window, for example {type: sliding-attention, window: 64}")
    try:
        return table[name](**{k: v for k, v in given.items() if k in allowed} | arguments)
    except ValueError as error:
        raise UserError(f"{what} {name!r}: {error}") from error


class MixerConfig(PreTrainedConfig):
    """What a `MixerForCausalLM` is made of.

    Args:
        mixers: sequence mixers, each a name of `MIXERS` or `{"type": name, setting: value, ...}`; layer i takes
            number i modulo their count, so `["base-conv", "attention"]` alternates.
        state_mixer: likewise, of `STATE_MIXERS`, or "none" for blocks that are a mixer alone (Mamba).
        norm: "layernorm" or "rmsnorm", before each part and at the end.
        final_norm: the one at the end, where it is another.
        norm_eps: of the norms.
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
    state_mixer: str | dict = "mlp"
    norm: str = "layernorm"
    final_norm: str | None = None
    norm_eps: float = 1e-5
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
        if not self.mixers:
            raise UserError(f"mixers is empty; name at least one of {', '.join(sorted(MIXERS))}")
        for norm in (self.norm, self.final_norm or self.norm):
            if norm not in NORMS:
                raise UserError(f"unknown norm {norm!r}; known are {', '.join(sorted(NORMS))}")
        for choice in self.mixers:
            name = choice if isinstance(choice, str) else choice.get("type")
            if name not in MIXERS:
                raise UserError(f"unknown mixer {name!r}; known are {', '.join(sorted(MIXERS))}")
        super().__post_init__(**kwargs)

    def layer_mixer(self, layer: int) -> Named:
        """The choice of mixer for `layer`."""
        return self.mixers[layer % len(self.mixers)]


class MixerLayerCache(CacheLayerMixin):
    """The states of one block: its mixer's and, where it has one, its state mixer's."""

    def __init__(self) -> None:
        super().__init__()
        self.states: dict[str, State] = {}
        self.tokens = 0

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply `change` to every tensor."""
        self.states = {name: tuple(change(t) for t in state) for name, state in self.states.items()}

    def get_seq_length(self) -> int:
        return self.tokens

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.tokens + query_length, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise NotImplementedError("a mixer's state has no keys and values")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("a mixer's state has no keys and values")

    def reset(self) -> None:
        self.states, self.tokens = {}, 0

    def offload(self) -> None:
        self.map(lambda t: t.to("cpu", non_blocking=True))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.map(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.map(lambda t: t[indices.to(t.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.map(lambda t: t.repeat_interleave(repeats, 0))


class MixerCache(Cache):
    """What a `MixerForCausalLM` remembers of a text: pass it as `past_key_values` to read on where it stopped.

    Its size is constant for the mixers with a recurrent form. `save` and `load` keep it in a safetensors file: read a
    long text once, ask many times.
    """

    def __init__(self, num_layers: int) -> None:
        super().__init__(layers=[MixerLayerCache() for _ in range(num_layers)])

    def save(self, path: str | Path, model: "MixerForCausalLM | None" = None) -> Path:
        """Write all states to `path`, atomically; with `model`, also whose they are."""
        tensors = {
            f"{i}.{name}.{j}": t.detach().cpu().contiguous().clone()
            for i, layer in enumerate(self.layers)
            for name, state in layer.states.items()
            for j, t in enumerate(state)
        }
        with atomic_path(path) as temporary:
            about = {"tokens": str(self.get_seq_length()), "layers": str(len(self.layers))}
            if model is not None:
                about["model"] = model.fingerprint()
            safetensors.torch.save_file(tensors, temporary, metadata=about)
        return Path(path)

    @classmethod
    def load(
        cls, path: str | Path, device: str | torch.device = "cpu", model: "MixerForCausalLM | None" = None
    ) -> "MixerCache":
        """Read what `save` wrote. With `model`, a state that another model left is a UserError."""
        try:
            with safetensors.safe_open(str(path), "pt", device=str(device)) as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            cache = cls(int(about["layers"]))
            tokens = int(about["tokens"])
        except (OSError, KeyError, ValueError, safetensors.SafetensorError) as error:
            raise UserError(f"{path}: is no saved state of a nearfar language model ({error})") from error
        if model is not None and about.get("model") != model.fingerprint():
            raise UserError(f"{path}: is the state of another model; read the text again with this one")
        for name in sorted(tensors, key=lambda n: int(n.rsplit(".", 1)[1])):
            i, part, _ = name.split(".")
            layer = cache.layers[int(i)]
            layer.states[part] = (*layer.states.get(part, ()), tensors[name])
        for layer in cache.layers:
            layer.tokens = tokens
        return cache

    def numbers(self) -> int:
        """Floating-point numbers that the cache holds per sequence."""
        tensors = [t for layer in self.layers for state in layer.states.values() for t in state]
        return sum(t[0].numel() * (1 + t.is_complex()) for t in tensors if t.is_floating_point() or t.is_complex())


class MixerBlock(GradientCheckpointingLayer):
    """`x += drop(mixer(norm1(x)))`, then `x += drop(state_mixer(norm2(x)))`."""

    def __init__(self, config: MixerConfig, layer: int) -> None:
        super().__init__()
        norm, dim = NORMS[config.norm], config.hidden_size
        self.layer = layer
        self.norm1 = norm(dim, eps=config.norm_eps)
        self.mixer: StreamingMixer = build(
            config.layer_mixer(layer), MIXERS, "mixer", dim=dim, max_length=config.max_position_embeddings
        )
        self.dropout = nn.Dropout(config.dropout)
        self.norm2 = self.state_mixer = None
        if config.state_mixer != "none":
            self.norm2 = norm(dim, eps=config.norm_eps)
            self.state_mixer = build(config.state_mixer, STATE_MIXERS, "state mixer", dim=dim)
        for name, module in self.named_modules():
            if name.endswith(("out_proj", "fc2")):  # writes to the residual
                module.depth_scale = (2 * config.num_hidden_layers) ** -0.5

    def forward(
        self, x: Tensor, cache: MixerLayerCache | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The block's output, and the auxiliary loss of a mixer that has one while training."""
        h, auxiliary = self.norm1(x), None
        if cache is not None:
            h = self.extend(self.mixer, "mixer", h, cache, lengths)
        elif self.training and isinstance(self.mixer, SelectiveLookup):
            h, auxiliary = self.mixer.train_pass(h)
        else:
            h = self.mixer(h)
        x = x + self.dropout(h)
        if self.state_mixer is None:
            return x, auxiliary
        h = self.norm2(x)
        if cache is not None and isinstance(self.state_mixer, StreamingMixer):
            h = self.extend(self.state_mixer, "state_mixer", h, cache, lengths)
        else:
            h = self.state_mixer(h)
        return x + self.dropout(h), auxiliary

    @staticmethod
    def extend(mixer: StreamingMixer, name: str, x: Tensor, cache: MixerLayerCache, lengths: Tensor | None) -> Tensor:
        y, cache.states[name] = mixer.extend(x, cache.states.get(name), lengths)
        return y

    def state_size(self, length: int) -> int:
        own = self.state_mixer.state_size(length) if isinstance(self.state_mixer, StreamingMixer) else 0
        return own + self.mixer.state_size(length)


class MixerPreTrainedModel(PreTrainedModel):
    config_class = MixerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("MixerBlock",)
    _skip_keys_device_placement = ("past_key_values",)
    _is_stateful = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Linears and embeddings N(0, initializer_range), those that write to the residual smaller by
        sqrt(2 layers), biases 0; operators with parameters of their own set these themselves."""
        if isinstance(module, nn.Linear | nn.Embedding):
            init.normal_(module.weight, std=self.config.initializer_range * getattr(module, "depth_scale", 1.0))
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
            init.ones_(module.weight)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)
        elif hasattr(module, "reset_parameters"):
            loaded = [(p, p.clone()) for p in module.parameters() if getattr(p, "_is_hf_initialized", False)]
            if isinstance(module, Mamba):  # keeps torch's initial values for linear maps
                for linear in (module.in_proj, module.x_proj, module.out_proj):
                    linear.reset_parameters()
                module.out_proj.weight.mul_(self.config.num_hidden_layers**-0.5)
            module.reset_parameters()
            for parameter, value in loaded:
                parameter.copy_(value)


class MixerModel(MixerPreTrainedModel):
    """Embedding, blocks, final norm: token ids to hidden states.

    Padding may stand anywhere (`attention_mask` 0): the real tokens of each row are moved together, so every mixer
    sees an unbroken text, and the states stand at the last real token. At a padded position the hidden state is that
    of the last real token before it.
    """

    def __init__(self, config: MixerConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = None
        if config.learned_positions:
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.dropout = nn.Dropout(config.embed_dropout)
        self.layers = nn.ModuleList(MixerBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm = NORMS[config.final_norm or config.norm](config.hidden_size, eps=config.norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embed_tokens = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: MixerCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple:
        """input_ids `(B, N)`, or inputs_embeds `(B, N, d)`; of attention_mask `(B, >= N)` the last N columns count.

        A cache is made with `use_cache=True` and continued with `past_key_values`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = MixerCache(len(self.layers))
        if past_key_values is not None and not isinstance(past_key_values, MixerCache):
            raise ValueError(f"past_key_values is a {type(past_key_values).__name__}, it must be a MixerCache")
        lengths = restore = None
        if attention_mask is not None:
            if attention_mask.dim() != 2 or attention_mask.shape[1] < x.shape[1]:
                raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}, it must be (batch, length)")
            mask = attention_mask[:, -x.shape[1] :].bool()
            if not mask.all():
                lengths = mask.sum(1)
                order = (~mask).to(torch.int8).argsort(dim=1, stable=True)
                restore = (mask.cumsum(1) - 1).clamp(min=0)
                x = x.gather(1, order[..., None].expand_as(x))
        if self.embed_positions is not None:
            x = x + self.embed_positions(self.positions(x, past_key_values, lengths))
        x = self.dropout(x)
        hidden, losses = [], []
        undo = lambda h: h if restore is None else h.gather(1, restore[..., None].expand_as(h))  # noqa: E731
        for i, block in enumerate(self.layers):
            if output_hidden_states:
                hidden.append(undo(x))
            x, loss = block(x, None if past_key_values is None else past_key_values.layers[i], lengths)
            if loss is not None:
                losses.append(loss)
        if past_key_values is not None:
            for layer in past_key_values.layers:
                layer.tokens += x.shape[1]
        x = undo(self.norm(x))
        self.auxiliary_loss = sum(losses).squeeze() if losses else None
        output = BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=past_key_values,
            hidden_states=(*hidden, x) if output_hidden_states else None,
        )
        return output if return_dict is not False else output.to_tuple()

    def positions(self, x: Tensor, cache: MixerCache | None, lengths: Tensor | None) -> Tensor:
        """The position of each token `(B, N)` in its own text; the cache counts the tokens of each row."""
        states = {} if cache is None else cache.layers[0].states
        new = torch.arange(x.shape[1], device=x.device)
        (seen,) = states.get("position", (torch.zeros(x.shape[0], dtype=torch.long, device=x.device),))
        if cache is not None:
            states["position"] = (seen + (x.shape[1] if lengths is None else lengths),)
        limit = self.config.max_position_embeddings
        if (cache.get_seq_length() if cache is not None else 0) + x.shape[1] > limit:
            longest = int((seen + (x.shape[1] if lengths is None else lengths)).max())
            if longest > limit:
                raise ValueError(f"a text of {longest} tokens is longer than max_position_embeddings={limit}")
        return (seen[:, None] + new).clamp(max=limit - 1)


class MixerForCausalLM(MixerPreTrainedModel, GenerationMixin):
    """`MixerModel` with a head over the vocabulary, by default tied to the embedding and without bias."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MixerConfig) -> None:
        super().__init__(config)
        self.model = MixerModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: MixerCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits `(B, N, vocab)`, or of the positions `logits_to_keep` alone (the last so many, or indices).

        labels `(B, N)`: as input_ids, -100 where nothing is to be predicted; they are shifted here.
        """
        output = self.model(
            input_ids,
            attention_mask,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_hidden_states,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
            if self.model.auxiliary_loss is not None:
                loss = loss + self.model.auxiliary_loss
        output = CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=output.past_key_values, hidden_states=output.hidden_states
        )
        return output if return_dict is not False else output.to_tuple()

    def state_size(self, length: int) -> int:
        """Numbers that a text of `length` tokens leaves in the mixers, as the literature counts them."""
        return sum(block.state_size(length) for block in self.model.layers)

    def fingerprint(self) -> str:
        """Tells models apart: their parameters' names and shapes and some of their weights."""
        shapes = json.dumps([(name, tuple(p.shape)) for name, p in self.named_parameters()])
        rows = self.get_input_embeddings().weight[:8].detach().float().cpu().numpy().tobytes()
        return hashlib.sha256(shapes.encode() + rows).hexdigest()[:16]

    @classmethod
    def from_published(cls, checkpoint: str | Path | dict[str, Tensor], **settings: Any) -> "MixerForCausalLM":
        """A published Zoology checkpoint, see `nearfar.language.zoology.from_published`."""
        from nearfar.language.zoology import from_published  # imports this module

        return from_published(checkpoint, **settings)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args: Any, **kwargs: Any) -> None:
        if generation_config.use_cache and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = MixerCache(self.config.num_hidden_layers)


AutoConfig.register(MixerConfig.model_type, MixerConfig, exist_ok=True)
AutoModel.register(MixerConfig, MixerModel, exist_ok=True)
AutoModelForCausalLM.register(MixerConfig, MixerForCausalLM, exist_ok=True)
