"""Contracts of NiNformer: any published variant from its settings and shapes."""

from collections.abc import Callable
from typing import Any

from nearfar.core.checkpoints import loaded, rename
from nearfar.core.contracts import Contract
from nearfar.ops.tokens.mixer_gate import FourierGate, MixerBlock, MixerGate
from nearfar.vision.models.ninformer import LAYOUT, NiNBlock, NiNformer


def build_contract(contract: Contract) -> Callable[..., Any]:
    """The network, one block, a gate of either kind or the mixer, that a contract describes."""
    contract.document("dropout")
    contract.require_text(gate=r"real part of the unnormalised 2-D DFT.*")
    contract.require(norm_eps=1e-5, activation="exact GELU")
    published = contract.state()
    if "patcher.weight" in published:
        model = NiNformer.from_published(published, **size_of(contract))
        found = NiNformer.published_settings(NiNformer.published_state(published))
        names = {"patch_size": "patch_size", "in_channels": "in_chans", "num_classes": "num_classes", "d_model": "dim"}
        names |= {"d_ffn": "hidden", "num_layers": "depth"}
        contract.require(**{theirs: found[ours] for theirs, ours in names.items()})
        if found["gate"] == "mixer":
            hidden = found["hidden"]
            contract.require(
                token_hidden=found["token_hidden"] or hidden,
                channel_hidden=found["channel_hidden"] or hidden,
                seq_len=model.blocks[0].mgu.mixer.token_mix[0].in_features,
            )
        return model
    state = rename(published, LAYOUT, anywhere=True)
    inner = next((p for p in ("mgu.mixer.", "mixer.", "") if f"{p}token_mix.0.weight" in state), None)
    if "token_mix.2.net.0.weight" in published:  # a mixer on its own has no name before its parts
        names = {"token_mix.0.": "token_norm.", "token_mix.2.net.": "token_mix."}
        names |= {"channel_mix.0.": "channel_norm.", "channel_mix.1.net.": "channel_mix."}
        state, inner = rename(published, list(names.items())), ""
    if inner is None:
        dim = len(state["mgu.proj.bias" if "mgu.proj.bias" in state else "proj.bias"])
        contract.require(dim=dim)
        if "norm.weight" in state:
            return loaded(NiNBlock(dim, 1, len(state["ffn.0.bias"]), gate="fourier"), state)
        return loaded(FourierGate(dim), state)
    token_hidden, tokens = state[f"{inner}token_mix.0.weight"].shape
    channel_hidden, dim = state[f"{inner}channel_mix.0.weight"].shape
    contract.require(dim=dim, tokens=tokens, token_hidden=token_hidden, channel_hidden=channel_hidden)
    if inner == "mgu.mixer.":
        hidden = len(state["ffn.0.bias"])
        contract.require(d_ffn=hidden)
        block = NiNBlock(dim, tokens, hidden, token_hidden=token_hidden, channel_hidden=channel_hidden)
        return loaded(block, state)
    operator = MixerGate if inner else MixerBlock
    return loaded(operator(dim, tokens, token_hidden, channel_hidden), state)


def size_of(contract: Contract) -> dict[str, Any]:
    """The pictures' size, where the settings give it or the input shows it."""
    size = contract.settings.get("image_size", contract.inputs[0]["shape"][-2:])
    return {"img_size": size if isinstance(size, int) else tuple(size)}
