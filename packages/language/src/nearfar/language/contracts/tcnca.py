"""Contracts of TCNCA: Mega's models and operators, and Bai's network."""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nearfar.core.checkpoints import load_state_dict
from nearfar.core.contracts import Contract
from nearfar.core.errors import UserError
from nearfar.language.configuration import SequenceClassifierConfig
from nearfar.language.layouts.tcnca import fairseq_names, layer_settings, norm_settings, our_names, translate
from nearfar.language.mixers.tcnca import CARD as CARD
from nearfar.language.mixers.tcnca import mega
from nearfar.language.modeling import MixerForCausalLM
from nearfar.language.tcnca import SequenceClassifier
from nearfar.ops.attention.gated import NormedFeedForward, RotaryBias, SimpleBias, toeplitz
from nearfar.ops.convolution.tcn import TemporalConvNet
from nearfar.ops.recurrence.ema import DampedEMA


def build_contract(contract: Contract) -> Callable[..., Any]:
    """The model or operator of a TCNCA contract."""
    settings = Choices(contract.settings)
    contract.document("op", "layout", "note")
    contract.require_text(norm=r"(?!.*eps (?!1e-0?5\b)).*")
    state = fairseq_names(contract.state())
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    if "layers.0.mega_layer.move.omega" in shapes:
        return language_model(contract, settings)
    if "rot.alpha" in shapes or "simple.rel_pos_bias" in shapes:
        return Biases(state, contract)
    if any("weight_v" in name for name in shapes):
        return network(state, contract)
    if "v_proj.weight" in shapes:
        require_layer(contract, shapes)
        module = mega(shapes["move.omega"][0], **layer_settings(shapes, settings))
        require(contract, causal=module.attention.causal, bidirectional=not module.attention.causal)
        return LengthFirst(loaded(module, our_names(state)))
    if "fc1.weight" in shapes:
        contract.require(activation="silu")
        hidden, dim = shapes["fc1.weight"]
        contract.require(d=dim, hidden=hidden)
        return LengthFirst(loaded(NormedFeedForward(dim, hidden, **norm_settings(shapes, settings)), our_names(state)))
    if "omega" in shapes:
        d, (rows, order) = shapes["omega"][0], shapes["gamma"]
        contract.require(d=d, ndim=order)
        pieces = re.search(r"pieces of ([\d, ]+)", settings.get("op", ""))
        truncation = None if pieces else settings.get("truncation")  # the published step does not truncate
        ema = DampedEMA(d, order, rows == 2 * d, truncation)
        require(contract, bidirectional=rows == 2 * d)
        tensors = {name: value.flatten(1) if value.dim() == 3 else value for name, value in state.items()}
        sizes = [int(n) for n in re.findall(r"\d+", pieces[1])] if pieces else None
        return LengthFirst(loaded(ema, tensors), sizes)
    raise UserError(f"{contract.path}: no operator of TCNCA has the tensors {', '.join(list(shapes)[:6])}")


class Choices(Mapping[str, Any]):
    """The settings of a contract without their descriptions, each looked up when it is asked for."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = settings

    def __getitem__(self, name: str) -> Any:
        return choice(name, self.settings[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.settings)

    def __len__(self) -> int:
        return len(self.settings)


def require_layer(contract: Contract, shapes: Mapping[str, tuple[int, ...]], at: str = "") -> None:
    """Hold a contract's settings to the Mega layer whose tensors begin with `at`."""
    contract.require(
        d=shapes[f"{at}move.omega"][0],
        z=shapes[f"{at}gamma"][1],
        v=shapes[f"{at}v_proj.weight"][0],
        ndim=shapes[f"{at}move.gamma"][1],
    )
    contract.require_text(bias="rotary.*" if f"{at}rel_pos_bias.alpha" in shapes else "simple.*")


def choice(name: str, value: Any) -> Any:
    """A setting without its description: "simple, 64 positions" is "simple"; norms stay text."""
    if isinstance(value, str) and name in ("bias", "attention", "activation"):
        return re.split(r"[\s,]", value.lower().replace("relu^2", "relu2"))[0]
    return value


def require(contract: Contract, **built: Any) -> None:
    """`Contract.require`, with the operator's own wording for what it is."""
    contract.require(**{name: value for name, value in built.items() if isinstance(contract.settings.get(name), bool)})


def loaded(module: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    load_state_dict(module, state)
    return module.eval()


class LengthFirst(nn.Module):
    """An operator on (length, batch, channels), whole or in pieces of the given sizes with a carried state."""

    def __init__(self, operator: nn.Module, pieces: list[int] | None = None) -> None:
        super().__init__()
        self.operator, self.pieces = operator, pieces

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        if self.pieces is None:
            return self.operator(x).transpose(0, 1)
        out, state = [], None
        for piece in x.split(self.pieces, 1):
            y, state = self.operator.extend(piece, state)
            out.append(y)
        return torch.cat(out, 1).transpose(0, 1)


class Biases(nn.Module):
    """Both relative biases as matrices; their size is that of the contract's outputs."""

    def __init__(self, state: dict[str, Tensor], contract: Contract) -> None:
        super().__init__()
        self.length = contract.outputs[0]["shape"][0]
        self.biases = nn.ModuleDict()
        if "rot.alpha" in state:
            vectors = {"alpha": state["rot.alpha"].flatten(), "beta": state["rot.beta"].flatten()}
            self.biases["rotary"] = loaded(RotaryBias(len(vectors["alpha"])), vectors)
            contract.require(zdim=len(vectors["alpha"]))
        if "simple.rel_pos_bias" in state:
            row = state["simple.rel_pos_bias"]
            self.biases["simple"] = loaded(SimpleBias((len(row) + 1) // 2), {"bias": row})
            contract.require(max_positions=(len(row) + 1) // 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {name: toeplitz(bias(self.length)) for name, bias in self.biases.items()}


def network(state: dict[str, Tensor], contract: Contract) -> nn.Module:
    """Bai's network; its convolutions stand in the state twice, and the last place counts."""
    ours, channels = {}, {}
    for name, value in state.items():
        found = re.match(r"(?:.*\.)?network\.(\d+)\.(?:net\.(\d+)|(\w+))\.(\w+)$", name)
        if found is None:
            raise UserError(f"{contract.path}: {name} is no tensor of a temporal convolution network")
        level, place, own, kind = found.groups()
        part = own or ("conv1" if place == "0" else "conv2")
        ours[f"{level}.{part}.{kind}"] = value
        if kind == "weight_v" and part == "conv1":
            channels[int(level)] = value.shape
    wanted = contract.settings.get("dilations")
    if wanted is not None and list(wanted) != [2**i for i in range(len(channels))]:
        raise UserError(f"{contract.path}: dilations are {wanted}; Bai's network doubles them, 1, 2, 4, ...")
    widths = [channels[i][0] for i in sorted(channels)]
    contract.require(channels=channels[0][1], levels=len(widths), kernel=channels[0][2])
    return loaded(TemporalConvNet(channels[0][1], widths, channels[0][2]), ours)


def language_model(contract: Contract, settings: dict[str, Any]) -> nn.Module:
    """A language model on ids as the contract draws them, or a classifier."""
    config, ours = translate(contract.state(), settings)
    shapes = {name: tuple(value.shape) for name, value in fairseq_names(contract.state()).items()}
    contract.require(
        vocab=config.vocab_size,
        layers=config.num_hidden_layers,
        ffn=shapes["layers.0.nffn.fc1.weight"][0],
    )
    require_layer(contract, shapes, "layers.0.mega_layer.")
    if isinstance(config, SequenceClassifierConfig):
        return Logits(loaded(SequenceClassifier(config), ours))
    model = loaded(MixerForCausalLM(config), ours)
    shift = re.search(r"ids = input \+ (\d+)", contract.notes)
    high = contract.inputs[0].get("high", model.config.vocab_size)
    offset = int(shift[1]) if shift else 4 if model.config.vocab_size - high == 4 else 0
    steps = [int(n) for n in re.findall(r"\d+", str(settings.get("run", "")))]
    return Logits(model, offset, steps[0] if steps else None)


class Logits(nn.Module):
    """A model that returns its logits alone; `prefill` tokens at once, then one by one with the cache, where given."""

    def __init__(self, model: nn.Module, offset: int = 0, prefill: int | None = None) -> None:
        super().__init__()
        self.model, self.offset, self.prefill = model, offset, prefill

    def forward(self, inputs: Tensor, *more: Tensor) -> Tensor:
        inputs = inputs + self.offset
        if self.prefill is None:
            return self.model(inputs, *more).logits
        cache, parts = None, []
        for piece in inputs.split([self.prefill, *[1] * (inputs.shape[1] - self.prefill)], 1):
            out = self.model(piece, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
        return torch.cat(parts, 1)
