"""VMamba: the surface, both forms, checkpoints under the older names, the ablation."""

from typing import Any, ClassVar

import pytest
import torch

from nearfar.vision.models.vmamba import VMamba
from tests.vision.base import BackboneTester, close, randomize

FIRST: dict[str, Any] = {
    "stem": "patches",
    "d_state": 4,
    "ssm_ratio": 2.0,
    "conv_bias": True,
    "gate": True,
    "mlp_ratio": 0.0,
}


class VMambaTester(BackboneTester):
    model = VMamba
    fuses = False  # nothing to fold; the maps run in other kernels

    def saved_macs(self, model: VMamba, size: int) -> float:
        """The scans, which run on vectors; 9 a state and 1 a channel and direction, as published."""
        total = 0
        for i, stage in enumerate(model.stages):
            positions = (size // 2 ** (i + 2)) ** 2
            for block in stage.blocks:
                directions, inner, states = block.mixer.scan.A_log.shape
                total += positions * directions * inner * (9 * states + 1)
        return total

    @pytest.mark.ci
    def test_published_macs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().test_published_macs(monkeypatch)


class TestVMamba(VMambaTester):
    name = "vmamba_tiny_s1l8"
    tiny: ClassVar = {"depths": (1, 1, 1, 1), "dims": (16, 32, 48, 64)}
    least: ClassVar = {"depths": (1, 1), "dims": (16, 32)}


class TestFirstForm(VMambaTester):
    name = "vmamba_tiny_v0"
    tiny: ClassVar = {"depths": (1, 1, 1, 1), "dims": (16, 32, 64, 128)}
    least: ClassVar = {"depths": (1, 1), "dims": (16, 32), **FIRST}


@torch.no_grad()
def test_older_names_and_pointwise_convolutions() -> None:
    model = randomize(VMamba((1, 1), (8, 16), num_classes=3, **FIRST))
    x = torch.randn(1, 3, 40, 36)
    old = {}
    for name, value in model.state_dict().items():
        for new, was in (
            ("stem.0.", "patch_embed.proj."),
            ("stem.1.", "patch_embed.norm."),
            ("stages.1.downsample.", "layers.0.downsample."),
            ("stages.", "layers."),
            (".mixer.scan.x_proj", ".self_attention.x_proj_weight"),
            (".mixer.scan.dt_proj", ".self_attention.dt_projs_weight"),
            (".mixer.scan.dt_bias", ".self_attention.dt_projs_bias"),
            (".mixer.scan.A_log", ".self_attention.A_logs"),
            (".mixer.scan.D", ".self_attention.Ds"),
            (".mixer.conv.", ".self_attention.conv2d."),
            (".mixer.", ".self_attention."),
            (".blocks.0.norm.", ".blocks.0.ln_1."),
            ("head.norm.", "norm."),
            ("head.fc.", "head."),
        ):
            name = name.replace(new, was)
        if name.endswith(("A_logs", "Ds")):
            value = value.flatten(0, 1)
        elif name.endswith("_proj.weight"):
            value = value[..., None, None]
        old[name] = value
    close(VMamba.from_published({"model_ema": old, "model": {}})(x), model(x), 1e-6)


def test_without_scans_a_pixel_reaches_no_further_than_the_convolutions() -> None:
    settings = {"depths": (1,), "dims": (16,), "num_classes": 0, "global_pool": ""}
    reach = {}
    for scan in (True, False):
        model = randomize(VMamba(**settings, scan=scan))
        x = torch.randn(1, 3, 64, 64, requires_grad=True)
        model.forward_features(x)[0, :, 0, 0].sum().backward()
        reach[scan] = x.grad[0, :, 32:, 32:].abs().max() > 0
    assert reach == {True: True, False: False}
