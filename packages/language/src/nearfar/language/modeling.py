"""A causal language model whose sequence mixers are exchangeable, as a citizen of transformers.

Import this module once and `AutoModelForCausalLM.from_pretrained(folder)` works, without remote code; so do
`generate` (greedy, beams, sampling), `Trainer`, gradient checkpointing and lm-eval.
"""

import hashlib
import json
from collections.abc import Mapping
from functools import partial
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from nearfar.core.checkpoints import Checkpoint, identify, loaded, read
from nearfar.core.finite import check_weights
from nearfar.language import layouts
from nearfar.language.cache import MixerCache, MixerLayerCache
from nearfar.language.configuration import MixerConfig
from nearfar.language.registry import MIXERS, NORMS, STATE_MIXERS, build
from nearfar.ops.common.streaming import StreamingMixer

LAYOUTS = list(iter_modules(layouts.__path__))


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
        elif self.training:
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
            if isinstance(module, StreamingMixer):
                module.reset_linear(self.config.num_hidden_layers)
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

    def save_pretrained(self, save_directory: Any, *args: Any, **options: Any) -> None:
        """As transformers does; DivergedError where weights are not finite."""
        check_weights(self.state_dict(), save_directory)
        super().save_pretrained(save_directory, *args, **options)

    def state_size(self, length: int) -> int:
        """Numbers that a text of `length` tokens leaves in the mixers, as the literature counts them."""
        return sum(block.state_size(length) for block in self.model.layers)

    def fingerprint(self) -> str:
        """Tells models apart: their parameters' names and shapes and some of their weights."""
        shapes = json.dumps([(name, tuple(p.shape)) for name, p in self.named_parameters()])
        rows = self.get_input_embeddings().weight[:8].detach().float().cpu().numpy().tobytes()
        return hashlib.sha256(shapes.encode() + rows).hexdigest()[:16]

    @classmethod
    def from_published(cls, checkpoint: Checkpoint, **settings: Any) -> "MixerForCausalLM":
        """A model with the weights of a published checkpoint, a file or a state dict, in eval mode.

        `settings` give what names and shapes do not tell, see `nearfar.language.layouts`: each module there is a
        published layout, and exactly one has to account for every tensor.
        """
        state = read(checkpoint)
        known = {layout.name: import_module(f"{layouts.__name__}.{layout.name}") for layout in LAYOUTS}
        what = "the state dict" if isinstance(checkpoint, Mapping) else str(checkpoint)
        attempts = {name: partial(cls.translated, layout, state, settings) for name, layout in known.items()}
        return identify(attempts, what)[1]

    @classmethod
    def translated(
        cls,
        layout: ModuleType,
        state: Mapping[str, Tensor],
        settings: Mapping[str, Any],
        shapes: Mapping[str, tuple[int, ...]] | None = None,
    ) -> "MixerForCausalLM":
        """The model of a published state, read as the module `layout` says."""
        config, ours = layout.translate(state, settings, shapes)
        return loaded(cls(config), ours, ignore=[r".*positions$"])

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args: Any, **kwargs: Any) -> None:
        if generation_config.use_cache and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = MixerCache(self.config.num_hidden_layers)


AutoConfig.register(MixerConfig.model_type, MixerConfig, exist_ok=True)

AutoModel.register(MixerConfig, MixerModel, exist_ok=True)

AutoModelForCausalLM.register(MixerConfig, MixerForCausalLM, exist_ok=True)
