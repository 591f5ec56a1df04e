"""Contracts of attentive convolution (AttNet, SiT): any published variant from its settings and shapes."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from nearfar.core.checkpoints import count, loaded
from nearfar.core.contracts import Contract
from nearfar.ops.convolution.atconv import ATConv, GatedConvMLP, TokenATConv
from nearfar.vision.generation.sit import SiT, position_table
from nearfar.vision.models.attnet import AttBlock, AttNet


def build_contract(contract: Contract) -> Callable[..., Any]:
    """The classifier, the diffusion transformer, one block or one operator, that a contract describes."""
    state, settings = contract.state(), contract.settings
    contract.require(block_norm_eps=1e-6, rms_norm_eps=1e-6, rms_eps=1e-6, final_norm_eps=1e-5)
    contract.document("layer_scale_init", "drop_path_rate", "class_dropout", "layout")
    contract.require_text(activation="(exact )?gelu|tanh gelu|gelu tanh|silu")
    wanted = str(settings.get("activation", "")).lower()
    activation = "silu" if "silu" in wanted else "gelu_tanh" if "tanh" in wanted else "gelu"
    variance = settings.get("norm_variance", False)
    if "difference_control" in state:
        tokens = len(contract.inputs[0]["shape"]) == 3
        kernel_size = round(len(state["kernel_gen.weight"]) ** 0.5)
        dim = len(state["difference_control"])
        contract.require(dim=dim, kernel_size=kernel_size, bias="proj.bias" in state)
        operator = (TokenATConv if tokens else ATConv)(dim, kernel_size, activation)
        for name in ("kernel_proj", "kernel_gen", "x_proj", "proj"):
            if f"{name}.bias" not in state:
                getattr(operator, name).bias = None
        return loaded(operator, state)
    if "fc1.weight" in state:
        dim, hidden = state["fc2.weight"].shape[:2]
        depthwise, normed = "dwconv.weight" in state, "norm_layer.weight" in state
        contract.require(dim=dim, hidden=hidden, depthwise=depthwise, rms_norm=normed)
        contract.require_text(activation="(exact )?gelu")
        return loaded(GatedConvMLP(dim, hidden, depthwise, normed, variance), state)
    if "norm_1.weight" in state:
        place = "stages.0.blocks.0."
        block = AttNet.published_state({place + name: value for name, value in state.items()})
        block = {name.removeprefix(place): value for name, value in block.items()}
        dim, hidden = state["channel_mixer.fc2.weight"].shape[:2]
        kernel_size = round(len(state["token_mixer.kernel_gen.weight"]) ** 0.5)
        contract.require(dim=dim, hidden=hidden, kernel_size=kernel_size, layer_scale="gamma_1" in block)
        contract.require(depthwise="channel_mixer.dwconv.weight" in state)
        contract.require(rms_norm="channel_mixer.norm_layer.weight" in state)
        contract.require_text(activation="(exact )?gelu")
        operator = AttBlock(
            dim,
            hidden,
            kernel_size,
            mlp_depthwise="channel_mixer.dwconv.weight" in state,
            mlp_norm="channel_mixer.norm_layer.weight" in state,
            norm_variance=variance,
            layer_scale=1e-6 if "gamma_1" in block else None,
        )
        return loaded(operator, block)
    if any(name.startswith("x_embedder.") for name in state):
        return sit_contract(contract, activation if wanted else None)
    found = AttNet.published_settings(AttNet.published_state(state))
    contract.require(**{name: value for name, value in found.items() if name != "layer_scale"})
    contract.require(expansion=found["expansions"], glu_depthwise=found["mlp_depthwise"], glu_norm=found["mlp_norm"])
    contract.require(layer_scale=found["layer_scale"] is not None)
    contract.require_text(glu_hidden=r"floor\(2/3 ?\* ?floor\(dim ?\* ?expansion\)\)")
    contract.require_text(activation="(exact )?gelu")
    return AttNet.from_published(state, norm_variance=variance)


def sit_contract(contract: Contract, activation: str | None) -> Callable[..., Any]:
    """The diffusion transformer that a contract describes: its velocity, guided where the settings say so."""
    state, settings = contract.state(), contract.settings
    if "pos_embed" in contract.shapes and "pos_embed" not in state:
        _, tokens, dim = contract.shapes["pos_embed"]
        state["pos_embed"] = position_table(dim, math.isqrt(tokens))[None]
    found = SiT.published_settings(state)
    dropout = settings.get("class_dropout", found["label_dropout"])
    classes = len(state["y_embedder.embedding_table.weight"]) - (dropout > 0)
    given = {"num_heads": settings.get("heads"), "activation": activation}
    given |= {"num_classes": classes, "label_dropout": dropout}
    mixed = {
        "atconv": "atconv.*",
        "attention": "attention",
        "hybrid": "hybrid|attention in blocks 1,3.*atconv in.* 2,4.*",
    }
    contract.require_text(token_mixer=mixed[found["mixer"]])
    if found["mixer"] == "atconv":
        contract.document("heads")  # only attention has any
    contract.require(
        latent_size=contract.inputs[0]["shape"][-1],
        patch=found["patch_size"],
        latent_channels=found["in_channels"],
        num_classes=classes,
        position_table="pos_embed" in state,
        **{name: found[name] for name in ("dim", "depth", "mlp_ratio", "learn_sigma")},
    )
    model = SiT.from_published(state, **given)
    if settings.get("guidance"):
        return Guided(model, settings["guidance"], settings.get("guided_channels", 3)).eval()
    if len(contract.outputs) > 1:
        return Aligned(model, state, settings.get("encoder_depth", 8)).eval()
    return model


class Guided(nn.Module):
    """A SiT called for its guided velocity, see `SiT.guided`."""

    def __init__(self, model: SiT, guidance: float, guided_channels: int) -> None:
        super().__init__()
        self.model, self.guidance, self.guided_channels = model, guidance, guided_channels

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.model.guided(x, t, y, self.guidance, self.guided_channels)


class Aligned(nn.Module):
    """A SiT with what the REPA code aligns: the tokens after block `depth`, each through the projectors in `state`."""

    def __init__(self, model: SiT, state: Mapping[str, Tensor], depth: int) -> None:
        super().__init__()
        self.model, self.depth, self.projectors = model, depth, nn.ModuleList()
        for i in range(count(state, r"projectors\.(\d+)\.")):
            weights = [state[f"projectors.{i}.{j}.weight"] for j in (0, 2, 4)]
            maps = [nn.Linear(*weight.T.shape) for weight in weights]
            self.projectors.append(nn.Sequential(maps[0], nn.SiLU(), maps[1], nn.SiLU(), maps[2]))
        projectors = {name: value for name, value in state.items() if name.startswith("projectors.")}
        loaded(self.projectors, {name.removeprefix("projectors."): v for name, v in projectors.items()})

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, list[Tensor]]:
        kept: list[Tensor] = []
        hook = self.model.blocks[self.depth - 1].register_forward_hook(lambda _block, _x, tokens: kept.append(tokens))
        velocity = self.model(x, t, y)
        hook.remove()
        return velocity, [projector(kept[0]) for projector in self.projectors]
