"""A causal language model whose sequence mixers are exchangeable, as a citizen of transformers.

Import this module once and `AutoModelForCausalLM.from_pretrained(folder)` works, without remote code; so do
`generate` (greedy, beams, sampling), `Trainer`, gradient checkpointing and lm-eval.
"""

import hashlib
import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
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
from nearfar.language.cache import MixerCache
from nearfar.language.configuration import MixerConfig
from nearfar.language.packing import Layout, check_arguments, document_starts
from nearfar.language.registry import MIXERS, NORMS, RESIDUALS, STATE_MIXERS, build
from nearfar.ops.aggregation.depth_attention import DepthResiduals
from nearfar.ops.common.streaming import FullPrecision, State, StreamingMixer

CONTINUED = "a piece that continues a cache cannot begin new documents; read those without the cache"
TAKEN_BACK = 2
"""Tokens of a prompt that an assistant of transformers reads again, at most."""
LAYOUTS = list(iter_modules(layouts.__path__))


def weights_at_hand(module: nn.Module | None) -> AbstractContextManager:
    """Within it the weights that accelerate keeps elsewhere (`device_map`, `disk_offload`) are there. Its hooks bring
    those of a module for its `forward` alone, but a mixer's states and its parts' weights are used otherwise too."""
    stack = ExitStack()
    if module is not None and any(p.is_meta for p in module.parameters()):
        for part in module.modules():
            if part is not module and hasattr(part, "_hf_hook"):
                part._hf_hook.pre_forward(part)
                stack.callback(part._hf_hook.post_forward, part, None)
    return stack


class MixerBlock(GradientCheckpointingLayer):
    """`x += drop(mixer(norm1(x)))`, then `x += drop(state_mixer(norm2(x)))`.

    A part with `residual_included` (Mega's) is a whole layer by itself and takes the place of its line.
    """

    def __init__(self, config: MixerConfig, layer: int) -> None:
        super().__init__()
        norm, dim = NORMS[config.norm], config.hidden_size
        self.layer = layer
        self.mixer: StreamingMixer = build(
            config.layer_mixer(layer), MIXERS, "mixer", dim=dim, max_length=config.max_position_embeddings
        )
        choice = config.layer_state_mixer(layer)
        self.state_mixer = None if choice == "none" else build(choice, STATE_MIXERS, "state mixer", dim=dim)
        self.norm1, self.norm2 = (
            None if part is None or getattr(part, "residual_included", False) else norm(dim, eps=config.norm_eps)
            for part in (self.mixer, self.state_mixer)
        )
        self.dropout = nn.Dropout(config.dropout)
        self.parts = ["mixer"] if self.state_mixer is None else ["mixer", "state_mixer"]
        for name, module in self.named_modules():
            if name.endswith(("out_proj", "fc2")):  # writes to the residual
                module.depth_scale = (2 * config.num_hidden_layers) ** -0.5

    def forward(
        self,
        x: Tensor | DepthResiduals,
        states: dict[str, State] | None = None,
        lengths: Tensor | None = None,
        part: str | None = None,
    ) -> tuple[Tensor | DepthResiduals, Tensor | None, dict[str, State] | None]:
        """The block's output, the auxiliary loss of a mixer that has one while training, and the states after it.

        `states`: of its parts, {} at the beginning of a text; None: none are kept. They are not changed. `part`: only
        what this one adds to the residual. Attention residuals take in what the parts add, and are the output.
        """
        if part is not None:
            return self.branch(part, x, states, lengths)
        auxiliary, over_depth = None, isinstance(x, DepthResiduals)
        for name in self.parts:
            h = x.next_input() if over_depth else x
            branch, loss, states = self.branch(name, h, states, lengths)
            if over_depth:
                x.add(branch)
            else:
                x = x + branch
            auxiliary = loss if auxiliary is None else auxiliary
        return x, auxiliary, states

    def branch(
        self, name: str, x: Tensor, states: dict[str, State] | None, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor | None, dict[str, State] | None]:
        """What part `name` adds to the residual, with the auxiliary loss and the states as in `forward`."""
        part, norm = (self.mixer, self.norm1) if name == "mixer" else (self.state_mixer, self.norm2)
        h, loss = x if norm is None else norm(x), None
        streaming = isinstance(part, StreamingMixer)
        if streaming and states is not None:
            h, after = part.extend(h, states.get(name), lengths)
            states = states | {name: after}
        elif streaming and self.training:
            h, loss = part.train_pass(h)
        elif streaming and not part.streams and lengths is not None:
            h = part(h, torch.arange(h.shape[1], device=h.device) < lengths[:, None])
        else:
            h = part(h)
        return (h - x if norm is None else self.dropout(h)), loss, states

    def state_size(self, length: int) -> int:
        own = self.state_mixer.state_size(length) if isinstance(self.state_mixer, StreamingMixer) else 0
        return own + self.mixer.state_size(length)


class MixerPreTrainedModel(PreTrainedModel):
    config_class = MixerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("MixerBlock",)
    _skip_keys_device_placement = ("past_key_values",)

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

    Padding may stand anywhere (`attention_mask` 0) and a row may hold several documents: each text is laid out in a row
    of its own, so every mixer sees an unbroken text, nothing passes from document to document, and the states stand at
    the last real token. At a padded position the hidden state is that of the last real token before it.
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
        self.depth, self.block_size = None, 1
        if config.residual_name == "attention":
            choice = {"eps": config.norm_eps} | (config.residual if isinstance(config.residual, dict) else {})
            self.block_size = choice.pop("block_size", 1)
            choice["type"] = "attention"
            count = sum(len(block.parts) for block in self.layers) + 1
            self.depth = nn.ModuleList(
                build(choice, RESIDUALS, "residual", dim=config.hidden_size) for _ in range(count)
            )
            DepthResiduals(torch.empty(0), self.depth, self.block_size)  # refuses a bad block size now
        self.gradient_checkpointing = False
        wide = {name for name, module in self.named_modules() if isinstance(module, FullPrecision)}
        self._keep_in_fp32_modules_strict = wide  # in what `from_pretrained` loads; `_apply` does the rest
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
        position_ids: Tensor | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple:
        """input_ids `(B, N)`, or inputs_embeds `(B, N, d)`; of attention_mask `(B, >= N)` the last N columns count.

        A cache is made with `use_cache=True` and continued with `past_key_values`. Documents that share a row are told
        apart by position_ids that restart at 0, by seq_idx, by cu_seq_lens_q, or by an attention_mask that numbers them
        1, 2, ...; the logits are those of each document alone, and a cache holds the row's last one.
        """
        check_arguments(kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if self.config.embed_scale != 1:
            x = x * self.config.embed_scale
        if use_cache is None and past_key_values is None:
            use_cache = self.config.use_cache and not self.training and self.streams
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if return_dict is None:
            return_dict = self.config.return_dict
        cache = MixerCache(len(self.layers)) if use_cache and past_key_values is None else past_key_values
        if cache is not None and not isinstance(cache, MixerCache):
            raise ValueError(f"past_key_values is a {type(cache).__name__}, it must be a MixerCache")
        if attention_mask is not None and (attention_mask.dim() != 2 or attention_mask.shape[1] < x.shape[1]):
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}, it must be (batch, length); documents in "
                "one row are told apart by position_ids, seq_idx, cu_seq_lens_q or a mask that numbers them"
            )
        new = x.shape[1]
        if cache is not None:
            x, input_ids, attention_mask = cache.begin(x, input_ids, attention_mask)
        columns = x.shape[1]
        if columns > new:
            real = attention_mask[:, -new:].bool()
            if document_starts(real.shape, real, position_ids, seq_idx, cu_seq_lens_q) is not None:
                raise ValueError(CONTINUED)
            position_ids = seq_idx = cu_seq_lens_q = None
        layout = self.layout(x, attention_mask, cache, position_ids, seq_idx, cu_seq_lens_q)
        if layout is not None:
            x = layout.pack(x)
            if not self.streams:  # what looks ahead, or norms over positions, finds zeros in the padding
                x = x * (torch.arange(x.shape[1], device=x.device) < layout.lengths[:, None])[..., None]
        lengths = None if layout is None else layout.lengths
        states = [None if cache is None else layer.states for layer in (self.layers if cache is None else cache.layers)]
        if self.embed_positions is not None:
            x = x + self.embed_positions(self.positions(x, cache, lengths))
            states[0] = None if cache is None else cache.layers[0].states
        x = self.dropout(x)
        hidden, losses = [], []

        def undo(h: Tensor) -> Tensor:
            h = h if layout is None else layout.undo(h)
            return h if columns == new else h[:, columns - new :]  # itself, so that a user can ask for its gradient

        residuals = None if self.depth is None else DepthResiduals(x, self.depth, self.block_size)
        weights = weights_at_hand if "_hf_hook" in self.embed_tokens.__dict__ else nullcontext
        with weights(self.depth):
            for i, block in enumerate(self.layers):
                if output_hidden_states and residuals is None:
                    hidden.append(undo(x))
                with weights(block):
                    if residuals is None:
                        x, loss, states[i] = block(x, states[i], lengths)
                    elif self.training or output_hidden_states:
                        loss, states[i] = self.attend_over_depth(block, residuals, states[i], lengths, hidden)
                    else:
                        _, loss, states[i] = block(residuals, states[i], lengths)
                if loss is not None:
                    losses.append(loss)
            if residuals is not None:
                x = residuals.next_input()
        if cache is not None:
            cache.advance(states, columns, input_ids, layout)
        x = undo(self.norm(x))
        self.auxiliary_loss = sum(losses).squeeze() if losses else None
        output = BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=cache,
            hidden_states=(*(undo(h) if residuals is not None else h for h in hidden), x)
            if output_hidden_states
            else None,
        )
        return output if return_dict is not False else output.to_tuple()

    def attend_over_depth(
        self,
        block: MixerBlock,
        residuals: DepthResiduals,
        states: dict[str, State] | None,
        lengths: Tensor | None,
        hidden: list[Tensor],
    ) -> tuple[Tensor | None, dict[str, State] | None]:
        """One block whose parts read a mixture of all that came before; its inputs are added to `hidden`. Each part is
        run by itself, as gradient checkpointing runs it a second time."""
        loss = None
        for name in block.parts:
            x = residuals.next_input()
            if name == "mixer":
                hidden.append(x)
            branch, auxiliary, states = block(x, states, lengths, name)
            residuals.add(branch)
            loss = auxiliary if loss is None else loss
        return loss, states

    @property
    def streams(self) -> bool:
        """Whether every mixer has a streaming form with its settings."""
        return all(m.streams for m in self.layers.modules() if isinstance(m, StreamingMixer))

    def layout(
        self,
        x: Tensor,
        attention_mask: Tensor | None,
        cache: MixerCache | None,
        position_ids: Tensor | None,
        seq_idx: Tensor | None,
        cu_seq_lens_q: Tensor | None,
    ) -> Layout | None:
        """How the rows become texts; None where each row is one text without padding."""
        real, shape = None, (x.shape[0], x.shape[1])
        continued = cache is not None and cache.get_seq_length() > 0
        if attention_mask is not None:
            mask = attention_mask[:, -x.shape[1] :]
            real = mask.bool()
            if mask.dtype not in (torch.bool, torch.uint8) and not mask.is_floating_point() and (mask > 1).any():
                seq_idx = mask if seq_idx is None else seq_idx
            if real.all():
                real = None
        if continued and x.shape[1] == 1:
            position_ids = None  # a single token goes on with its text
        starts = document_starts(shape, real, position_ids, seq_idx, cu_seq_lens_q)
        if starts is not None and continued:
            raise ValueError(CONTINUED)
        if real is None and starts is None:
            return None
        return Layout(torch.ones(shape, dtype=torch.bool, device=x.device) if real is None else real, starts)

    def positions(self, x: Tensor, cache: MixerCache | None, lengths: Tensor | None) -> Tensor:
        """The position of each token `(texts, N)` in its own text; the cache counts the tokens of each."""
        states = {} if cache is None else cache.layers[0].states
        new = torch.arange(x.shape[1], device=x.device)
        (seen,) = states.get("position", (torch.zeros(x.shape[0], dtype=torch.long, device=x.device),))
        after = seen + (x.shape[1] if lengths is None else lengths)
        if cache is not None:
            cache.layers[0].states = states | {"position": (after,)}
        limit = self.config.max_position_embeddings
        if (cache.get_seq_length() if cache is not None else 0) + x.shape[1] > limit and int(after.max()) > limit:
            raise ValueError(f"a text of {int(after.max())} tokens is longer than max_position_embeddings={limit}")
        return (seen[:, None] + new).clamp(max=limit - 1)


def bit_sums(weight: Tensor) -> tuple[int, int]:
    """Two sums over the float32 bit patterns, plain and by place, that wrap round: the same in any order."""
    bits = weight.float().contiguous().view(torch.int32).flatten().long()
    place = torch.arange(1, len(bits) + 1, device=bits.device)
    return int(bits.sum()), int((bits * place).sum())


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
        position_ids: Tensor | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits `(B, N, vocab)`, or of the positions `logits_to_keep` alone (the last so many, or indices).

        labels `(B, N)`: as input_ids, -100 where nothing is to be predicted; they are shifted here. Documents that
        share a row: see `MixerModel`; what begins one is no target of the one before it only where its label is -100,
        as packing collators set it. shift_labels `(B, N)`: the targets of each position, of a trainer that shifted
        them before it shared out a sequence; they take the place of labels.
        """
        shift_labels = kwargs.pop("shift_labels", None)  # an argument of its own would make Trainer wait for it
        output = self.model(
            input_ids,
            attention_mask,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_hidden_states,
            True,
            position_ids,
            seq_idx,
            cu_seq_lens_q,
            **kwargs,
        )
        if return_dict is None:
            return_dict = self.config.return_dict
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, keep])
        loss = None
        if labels is not None or shift_labels is not None:
            more = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
            loss = self.loss_function(logits, labels, self.config.vocab_size, shift_labels=shift_labels, **more)
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

    def generate(self, inputs: Tensor | None = None, **kwargs: Any) -> Any:
        """transformers' `generate`. With `past_key_values` the ids may be the whole text, of which the cache has read
        the beginning, or only what comes after that: the cache knows what it has read, unless that was `inputs_embeds`.
        Then, and of inputs_embeds themselves, attention_mask tells: it has a column for every token of the whole text.
        In speculative and prompt-lookup decoding (`assistant_model`, `prompt_lookup_num_tokens`) tokens that are not
        accepted are taken back: states return to where they were before a piece, see `MixerCache.crop`."""
        cache = kwargs.get("past_key_values")
        ids, embeds = kwargs.get("input_ids") if inputs is None else inputs, kwargs.get("inputs_embeds")
        chosen = kwargs.get("generation_config") or self.generation_config

        def option(name: str) -> Any:
            value = kwargs.get(name)
            return getattr(chosen, name, None) if value is None else value

        recording = isinstance(cache, MixerCache) and cache.pieces is not None
        assisted = any(map(option, ("assistant_model", "prompt_lookup_num_tokens", "is_assistant")))
        if embeds is not None and (assisted or option("use_cache") is False):
            raise ValueError("inputs_embeds are read once, before the first new token: with use_cache, unassisted")
        if ids is not None and assisted:
            mask, pad = kwargs.get("attention_mask"), option("pad_token_id")
            told = mask is not None or pad is None or pad not in ids  # else transformers makes a mask of the padding
            if cache is None and ids.shape[1] > TAKEN_BACK and told and not option("output_hidden_states"):
                # all but what may be taken back, in a piece of its own that never has to be read again
                mask = None if mask is None else mask[:, :-TAKEN_BACK]
                with torch.no_grad():
                    cache = self.model(ids[:, :-TAKEN_BACK], mask, use_cache=True).past_key_values
                kwargs["past_key_values"] = cache
            if isinstance(cache, MixerCache):
                cache.activate_past_recording()
        if isinstance(cache, MixerCache) and cache.get_seq_length():
            self.place_after(cache, ids, kwargs)
            wanted = max(option(name) or 1 for name in ("num_beams", "num_return_sequences"))
            if wanted > 1:  # every beam goes on from the state, which stays as it was
                cache = kwargs["past_key_values"] = cache.copy()
                cache.batch_repeat_interleave(wanted)
        found = super().generate(inputs, **kwargs)
        if not recording and not option("is_assistant"):  # whose states are cut after the call
            for after in (cache, getattr(found, "past_key_values", None)):
                if isinstance(after, MixerCache):
                    after.pieces = None
        return found

    def place_after(self, cache: MixerCache, ids: Tensor | None, given: dict[str, Any]) -> None:
        """Make `given`, arguments of `generate`, say in transformers' way what of them the cache has read: ids are
        what comes after it where the mask is longer, and inputs_embeds the whole text. ValueError where nothing tells.
        """
        embeds, mask, read = given.get("inputs_embeds"), given.get("attention_mask"), cache.get_seq_length()
        new = ids if embeds is None else embeds
        if new is None or (embeds is None and cache.has_read(new)):
            return
        columns = 0 if mask is None else mask.shape[1]
        if embeds is None and cache.knows_text():  # other ids than it has read come after these
            if columns in (0, new.shape[1]):
                own = torch.ones_like(new) if mask is None else mask
                given["attention_mask"] = torch.cat([own.new_ones(len(own), read), own], 1)
        elif columns == read + new.shape[1]:  # what comes after; transformers leaves out embeddings of what was read
            if embeds is not None:
                given["inputs_embeds"] = torch.cat([embeds.new_zeros(len(embeds), read, embeds.shape[2]), embeds], 1)
        elif not columns == new.shape[1] > read:
            raise ValueError(
                f"are these {new.shape[1]} tokens the whole text or do they come after the {read} that "
                f"past_key_values has read? Give an attention_mask with a column for every token of the whole text"
            )

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """As in transformers, which in assisted decoding would have a text read again that the cache has read."""
        cache = kwargs.get("past_key_values")
        by_ids = kwargs.get("is_first_iteration") and inputs_embeds is None
        if by_ids and isinstance(cache, MixerCache) and cache.has_read(input_ids):
            kwargs["next_sequence_length"] = input_ids.shape[1] - cache.get_seq_length()
        return super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)

    def state_size(self, length: int) -> int:
        """Numbers that a text of `length` tokens leaves in the mixers, as the literature counts them."""
        return sum(block.state_size(length) for block in self.model.layers)

    def fingerprint(self) -> str:
        """Tells models apart: names and shapes of their parameters, and sums over the bits of every weight."""
        about = [(name, tuple(p.shape), *bit_sums(p.detach())) for name, p in self.named_parameters()]
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]

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
        if (kind := generation_config.cache_implementation) not in (None, "dynamic"):
            raise ValueError(f"cache_implementation is {kind!r}; these models' states have one form: leave it out")
        if generation_config.use_cache and model_kwargs.get("past_key_values") is None:
            cache = model_kwargs["past_key_values"] = MixerCache(self.config.num_hidden_layers)
            if generation_config.is_assistant:
                cache.activate_past_recording()


AutoConfig.register(MixerConfig.model_type, MixerConfig, exist_ok=True)

AutoModel.register(MixerConfig, MixerModel, exist_ok=True)

AutoModelForCausalLM.register(MixerConfig, MixerForCausalLM, exist_ok=True)
