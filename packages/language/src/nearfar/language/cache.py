"""The states of a language model: constant in size for recurrent mixers, kept in a file where wanted."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from nearfar.core.errors import UserError
from nearfar.core.files import atomic_path
from nearfar.core.reading import reading
from nearfar.language.packing import Layout
from nearfar.ops.common.streaming import State

MOST_LAYERS = 10_000
"""Layers that a saved state may name."""


def digest(ids: Tensor, before: Tensor | None = None) -> Tensor:
    """A number `(B, 1)` per row that tells texts apart, continued from that of the text `before` it."""
    n, factor = ids.shape[1], 6364136223846793005
    powers = torch.full((n,), factor, dtype=torch.long, device=ids.device).cumprod(0)  # wraps round, as it may
    weights = torch.cat([powers.flip(0)[1:], powers.new_ones(1)])
    own = ((ids.long() + 1) * weights).sum(1, keepdim=True)
    return own if before is None else own + before * powers[-1]


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
        self.pieces: list[tuple[list[dict[str, State]], int, State]] | None = None
        """Since `activate_past_recording`: the states before each piece, their tokens, and the piece."""

    def reset(self) -> None:
        super().reset()
        self.pieces = None if self.pieces is None else []

    def activate_past_recording(self) -> None:
        """From now on `crop` can take back what is read. The states before each piece are kept until it is called."""
        self.pieces = [] if self.pieces is None else self.pieces

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that the text has, with those that `crop` left to be read again."""
        again = self.layers[0].states.get("again")
        return super().get_seq_length(layer_idx) + (0 if again is None else again[0].shape[1])

    def begin(self, x: Tensor, ids: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The piece to read now, embedded `(B, N, d)`, as ids and which are real: what a `crop` left comes first."""
        if mask is not None:
            mask = mask[:, -x.shape[1] :]
        again = self.layers[0].states.get("again")
        if again is not None:
            before, real, *known = again
            mask = real.new_ones(x.shape[:2]) if mask is None else mask.to(real.dtype)
            x, mask = torch.cat([before.to(x.dtype), x], 1), torch.cat([real, mask], 1)
            ids = torch.cat([*known, ids], 1) if ids is not None and known else None
        if self.pieces is not None:
            real = x.new_ones(x.shape[:2], dtype=torch.long) if mask is None else mask.long()
            piece = (x.detach(), real) if ids is None else (x.detach(), real, ids)
            self.pieces.append(([dict(layer.states) for layer in self.layers], self.layers[0].tokens, piece))
        return x, ids, mask

    def advance(
        self,
        states: Sequence[dict[str, State] | None],
        tokens: int,
        ids: Tensor | None,
        layout: Layout | None,
    ) -> None:
        """Take in the states after another piece of `tokens` columns; of several documents in a row, the last one's."""
        for layer, after in zip(self.layers, states):
            layer.states, layer.tokens = dict(after), layer.tokens + tokens
            if layout is not None and layout.packed:
                layer.map(lambda t: t.index_select(0, layout.last))
        if self.pieces is not None and layout is not None and layout.packed:
            self.pieces.clear()  # within several documents there is no way back
        self.layers[0].states.pop("again", None)
        read = self.layers[0].states.pop("read", None)
        if ids is not None and (read is not None or self.get_seq_length() == tokens):
            self.layers[0].states["read"] = (digest(ids, None if read is None else read[0]),)

    def knows_text(self) -> bool:
        """Whether the cache can tell the text that it has read from others: where all of it came as ids."""
        return self.layers[0].tokens == 0 or "read" in self.layers[0].states

    def has_read(self, ids: Tensor) -> bool:
        """Whether `ids` `(B, N)` is a longer text that begins with what the cache has read."""
        states, seen, now = self.layers[0].states, self.get_seq_length(), self.layers[0].tokens
        if not self.knows_text() or ids.shape[1] <= seen:
            return False
        if seen > now and not (
            len(states["again"]) == 3 and torch.equal(ids[:, now:seen], states["again"][2].to(ids.device))
        ):
            return False
        return now == 0 or torch.equal(digest(ids[:, :now]), states["read"][0].to(ids.device))

    def copy(self) -> "MixerCache":
        """Another cache at the same place of the text, to go on differently; states are shared, never changed."""
        return self._with(lambda t: t)

    def detach(self) -> "MixerCache":
        """The same without its graph: the gradient of a later piece ends here (truncated backpropagation)."""
        return self._with(Tensor.detach)

    def to(self, *args: Any, **kwargs: Any) -> "MixerCache":
        """The same on another device."""
        return self._with(lambda t: t.to(*args, **kwargs))

    def _with(self, change: Callable[[Tensor], Tensor]) -> "MixerCache":
        other = MixerCache(len(self.layers))
        for layer, own in zip(other.layers, self.layers):
            layer.states, layer.tokens = own.states, own.tokens
            layer.map(change)
        return other

    def crop(self, tokens: int) -> None:
        """Take back the last `-tokens` tokens, or all but the first `tokens`; 0 takes back none, as in transformers.

        The states return to where a piece began, and the rest of that piece is read again with the next one. Without
        `activate_past_recording` before it was read, a state can only be taken back to nothing: keep a `copy`.
        """
        length, now = self.get_seq_length(), self.layers[0].tokens
        wanted = tokens + length if tokens <= 0 else tokens
        pieces = list(self.pieces or ())
        if length > now:  # cut already
            pieces = [([layer.states for layer in self.layers], now, self.layers[0].states["again"])]
        if wanted == 0 < length:
            self.reset()
        elif wanted < length:
            kept = [piece for piece in pieces if piece[1] <= wanted]
            if not kept:
                raise ValueError(
                    f"a state of {length} tokens cannot be cut to {wanted}; keep a copy() made there, or call "
                    "activate_past_recording() before what is to be taken back is read"
                )
            states, before, piece = kept[-1]
            for layer, own in zip(self.layers, states):
                layer.states, layer.tokens = {name: s for name, s in own.items() if name != "again"}, before
            if wanted > before:
                self.layers[0].states["again"] = tuple(t[:, : wanted - before] for t in piece)
        if self.pieces is not None:
            self.pieces.clear()

    def save(self, path: str | Path, model: "PreTrainedModel | None" = None) -> Path:
        """Write all states to `path`, atomically; with `model`, also whose they are."""
        tensors = {
            f"{i}.{name}.{j}": t.detach().cpu().contiguous().clone()
            for i, layer in enumerate(self.layers)
            for name, state in layer.states.items()
            for j, t in enumerate(state)
        }
        with atomic_path(path) as temporary:
            about = {"tokens": str(self.layers[0].tokens), "layers": str(len(self.layers))}
            if model is not None:
                about["model"] = model.fingerprint()
            safetensors.torch.save_file(tensors, temporary, metadata=about)
        return Path(path)

    @classmethod
    def load(
        cls, path: str | Path, device: str | torch.device = "cpu", model: "PreTrainedModel | None" = None
    ) -> "MixerCache":
        """Read what `save` wrote. With `model`, a state that another model left is a UserError."""
        with reading(path, "is no saved state of a nearfar language model", "read the text again"):
            with safetensors.safe_open(str(path), "pt", device=str(device)) as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if not 0 < int(about["layers"]) <= MOST_LAYERS or int(about["tokens"]) < 0:
                raise ValueError(f"{about['layers']} layers, {about['tokens']} tokens")
            cache = cls(int(about["layers"]))
            tokens = int(about["tokens"])
        if model is not None and about.get("model") != model.fingerprint():
            raise UserError(f"{path}: is the state of another model; read the text again with this one")
        with reading(path, "is no saved state of a nearfar language model", "read the text again"):
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
