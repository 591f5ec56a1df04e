"""AttNet: contracts and the surface."""

from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F

from nearfar.vision.contracts.attentive_convolution import build_contract
from nearfar.vision.generation.sit import SiT, position_table
from nearfar.vision.models.attnet import AttBlock, AttNet
from nearfar.vision.models.pyramid import Backbone
from tests.vision.base import BackboneTester, close, described, randomize, shapes_of


class TestAttNet(BackboneTester):
    model = AttNet
    name = "attnet_t1"
    tiny: ClassVar = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}
    least: ClassVar = {"depths": (1, 1), "dims": (8, 16), "expansions": (4, 4), "kernel_sizes": (3, 3)}

    def saved_macs(self, model: Backbone, size: int) -> float:
        """The kernel's projection of all positions, where ours projects the nine pooled ones."""
        stages = [(len(stage.blocks), stage.blocks[0].norm_1.weight.numel()) for stage in model.stages]
        return sum(depth * dim**2 * ((size // 2 ** (i + 2)) ** 2 - 9) for i, (depth, dim) in enumerate(stages))


@torch.no_grad()
def test_settings_are_read_from_a_checkpoint() -> None:
    source = randomize(
        AttNet((1, 2, 1, 1), (8, 12, 16, 20), 3, expansions=(8, 6, 4, 3), kernel_sizes=(5, 3, 3, 3), mlp_norm=True)
    )
    x = torch.randn(1, 3, 64, 64)
    close(AttNet.from_published(source.state_dict())(x), source(x), 1e-6)
    other = AttNet.from_published(source.state_dict(), norm_variance=True)
    assert not torch.allclose(other(x), source(x), rtol=1e-3)


@torch.no_grad()
def test_contract_without_depthwise_convolution_in_the_mlp() -> None:
    source = randomize(AttNet((1, 1, 1, 1), (8, 8, 12, 16), 3, mlp_depthwise=False, layer_scale=0.1))
    x = torch.randn(1, 3, 64, 64)
    contract = described(shapes_of(source), {"glu_depthwise": False})
    close(build_contract(contract)(x), source(x), 1e-6)


@torch.no_grad()
@pytest.mark.parametrize("norm", [False, True])
def test_contract_of_a_block(norm: bool) -> None:
    block = randomize(AttBlock(12, 20, 5, mlp_norm=norm, layer_scale=0.1))
    published = {
        name.replace("gamma_", "layer_scale_") + (".gamma" if name.startswith("gamma") else ""): shape
        for name, shape in shapes_of(block).items()
    }
    x = torch.randn(2, 12, 9, 8)
    contract = described(published, inputs=[tuple(x.shape)])
    for i in (1, 2):
        getattr(block, f"gamma_{i}").copy_(contract.state()[f"layer_scale_{i}.gamma"])
    close(build_contract(contract)(x), block(x), 1e-6)


@torch.no_grad()
def test_contract_of_a_kernel_without_some_biases() -> None:
    shapes = {"difference_control": (6,), "kernel_gen.weight": (9, 9), "kernel_gen.bias": (9,)}
    shapes |= {f"{name}.weight": (6, 6, 1, 1) for name in ("kernel_proj", "x_proj", "proj")}
    contract = described(shapes, inputs=[(1, 6, 9, 9)])
    w, x = contract.state(), torch.randn(1, 6, 9, 9)
    pooled = F.gelu(F.conv2d(x, w["kernel_proj.weight"]).flatten(2).unflatten(2, (9, 9)).mean(-1))
    kernel = F.linear(pooled, w["kernel_gen.weight"], w["kernel_gen.bias"])[0]
    kernel = kernel - w["difference_control"].sigmoid()[:, None] * kernel.mean(-1, keepdim=True)
    y = F.conv2d(F.conv2d(x, w["x_proj.weight"]), kernel.reshape(6, 1, 3, 3), padding=1, groups=6)
    close(build_contract(contract)(x), F.conv2d(y, w["proj.weight"]), 1e-5)


@torch.no_grad()
def test_contracts_of_diffusion_transformers() -> None:
    model = SiT(input_size=8, depth=3, dim=16, num_heads=4, mixer="hybrid", num_classes=2, learn_sigma=False)
    shapes = shapes_of(randomize(model))
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([0.2, 0.7]), torch.tensor([1, 2])
    settings = {"heads": 4, "num_classes": 2, "activation": "tanh GELU"}
    built = build_contract(described(shapes, settings))
    close(built(*inputs), model(*inputs), 1e-6)
    assert built.num_classes == 2
    assert built.y_embedder.dropout > 0
    doubled = torch.cat((inputs[0], inputs[0])), inputs[1].repeat(2), torch.tensor([0, 1, 2, 2])
    guided = build_contract(described(shapes, settings | {"guidance": 2.5, "guided_channels": 2}))
    close(guided(*doubled), model.guided(*doubled, guidance=2.5, guided_channels=2), 1e-6)
    # a table of positions that the contract does not hold is computed
    contract = described(shapes, settings)
    next(t for t in contract.content["state"] if t["name"] == "pos_embed")["kind"] = "constant"
    torch.testing.assert_close(build_contract(contract).pos_embed[0], position_table(16, 4))
    # the alignment code's projections of the tokens after a block
    for j, (out, into) in enumerate([(12, 16), (12, 12), (5, 12)]):
        shapes |= {f"projectors.0.{2 * j}.weight": (out, into), f"projectors.0.{2 * j}.bias": (out,)}
    contract = described(shapes, settings | {"encoder_depth": 2}, outputs=2)
    velocity, (projected,) = build_contract(contract)(*inputs)
    tokens, condition = model.x_embedder(inputs[0]) + model.pos_embed, model.t_embedder(inputs[1])
    for block in model.blocks[:2]:
        tokens = block(tokens, condition + model.y_embedder(inputs[2]))
    w = contract.state()
    for j in (0, 2, 4):
        tokens = F.linear(F.silu(tokens) if j else tokens, w[f"projectors.0.{j}.weight"], w[f"projectors.0.{j}.bias"])
    close(projected, tokens, 1e-5)
    close(velocity, model(*inputs), 1e-6)
