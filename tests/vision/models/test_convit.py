"""ConViT: what every token model has, timm's models with the same weights, and the gates."""

from typing import Any

import pytest
import timm
import torch

from nearfar.core.errors import UserError
from nearfar.vision.explain.attention import draw_locality_gates
from nearfar.vision.models.convit import ConViT
from tests.vision.base import TokenTester, close


class TestConViT(TokenTester):
    model, name = ConViT, "nearfar_convit_tiny"
    tiny = {"dim": 48, "depth": 4, "local_layers": 2, "img_size": 64}
    least = {"depth": 2, "local_layers": 1}
    fuses = False

    def saved_macs(self, model: ConViT, size: int) -> float:
        """The paper leaves out the products of queries, keys and values, and of positions and values."""
        side = size // 16
        products = 2 * model.embed_dim * (len(model.blocks) * side**4 + model.local_layers * side**3)
        return -products

    def segmentation(self) -> dict[str, Any]:
        return {"dim": 48, "img_size": 64}

    @pytest.mark.parametrize("size", [224, 96])
    @torch.no_grad()
    def test_is_timms(self, size: int) -> None:
        theirs = timm.create_model("convit_tiny", img_size=size, depth=3, local_up_to_layer=2).eval()
        ours = ConViT.from_published(theirs.state_dict())
        x = self.input(size=(size, size))
        close(ours(x), theirs(x), 1e-5)

    def test_gates(self) -> None:
        gates = timm.create_model("nearfar_convit_tiny", depth=4, local_layers=3).gates()
        torch.testing.assert_close(gates, torch.full((3, 4), 0.7310586))
        with pytest.raises(UserError, match="no layer of it has a gate"):
            draw_locality_gates(timm.create_model("rmt_t"))

    def test_locality_survives_the_start_of_the_weights(self) -> None:
        block = timm.create_model("nearfar_convit_small", depth=2, local_layers=1).blocks[0]
        assert block.attn.pos_proj.weight[4].tolist() == [0, 0, -1]
        torch.testing.assert_close(block.attn.v.weight, torch.eye(432))

    def test_bad_arguments(self) -> None:
        with pytest.raises(ValueError, match="local_layers is 4"):
            ConViT(depth=4, local_layers=4)
