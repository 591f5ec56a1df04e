"""The survey of state space models in medical image analysis as data: what of it is here, and by which call.

"Computation-Efficient Era: A Comprehensive Survey of State Space Models in Medical Image Analysis" (2024, arXiv
2406.03430). The survey defines no model of its own. `python -m nearfar.medical.state_space_survey` prints the table.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """A system of the survey."""

    branch: str
    name: str
    status: str
    """"implemented", "composable" from parts that are here, or "absent"."""
    how: str = ""
    """The call that builds it, or the part of it that a call builds; for a composable system what it leaves out."""


def _absent(branch: str, *names: str) -> list[Row]:
    return [Row(branch, name, "absent") for name in names]


TAXONOMY: list[Row] = [
    *_absent("foundations", "HiPPO", "S4", "S5"),
    Row("foundations", "H3", "implemented", "nearfar.ops.recurrence.h3.H3(dim)"),
    Row("foundations", "S6 / Mamba", "implemented", "nearfar.ops.recurrence.mamba.Mamba(dim)"),
    Row(
        "foundations",
        "Mamba-2",
        "composable",
        "nearfar.ops.recurrence.ssd.ssd(x, dt, A, B, C); the block around the scan is not here",
    ),
    Row("vision backbones", "Vim", "implemented", 'timm.create_model("vim_tiny")'),
    Row("vision backbones", "VMamba", "implemented", 'timm.create_model("vmamba_tiny_s1l8")'),
    Row(
        "vision backbones",
        "LocalMamba",
        "composable",
        'SS2D(dim, directions=("windowed", "windowed-reversed"), window=7); without its search for directions',
    ),
    Row(
        "vision backbones",
        "EfficientVMamba",
        "composable",
        'SS2D(dim, directions=("atrous", "atrous-reversed"), step=2); without its inverted residual stages',
    ),
    Row(
        "vision backbones",
        "PlainMamba",
        "composable",
        'SS2D(dim, directions=("snake", "snake-reversed")); without its direction vectors',
    ),
    Row("vision backbones", "Mamba-ND", "composable", 'SS2D(dim, directions=("row",), dims=3), an axis per layer'),
    *_absent("vision backbones", "MambaMixer"),
    Row("segmentation 2-D", "VM-UNet", "implemented", "nearfar.medical.models.vmunet.VMUNet(num_classes)"),
    Row("segmentation 2-D", "Mamba-UNet", "composable", "VMUNet(num_classes); its decoder has other depths and skips"),
    Row(
        "segmentation 2-D",
        "Swin-UMamba",
        "composable",
        'smp.Unet("tu-vmamba_tiny_s2l5"): the encoder, with another decoder',
    ),
    Row(
        "segmentation 2-D",
        "LMa-UNet",
        "composable",
        'SS2D(dim, directions=("windowed", "windowed-reversed"), window=...), its windows of pixels alone',
    ),
    *_absent(
        "segmentation 2-D",
        "VM-UNet-v2",
        "H-vmunet",
        "LightM-UNet",
        "UltraLight VM-UNet",
        "TM-UNet",
        "P-Mamba",
        "ProMamba",
    ),
    Row("segmentation 3-D", "U-Mamba", "implemented", "nearfar.medical.models.umamba.UMamba(num_classes, dims=3)"),
    Row("segmentation 3-D", "SegMamba", "implemented", "nearfar.medical.models.segmamba.SegMamba(num_classes)"),
    *_absent("segmentation 3-D", "nnMamba", "T-Mamba", "Vivim"),
    *_absent("semi- and weakly supervised", "Semi-Mamba-UNet", "Weak-Mamba-UNet"),
    *_absent("classification", "MedMamba", "MambaMIL", "Vim4Path", "CMViM"),
    *_absent("registration", "MambaMorph", "VMambaMorph"),
    *_absent("reconstruction and restoration", "MambaMIR", "FD-Vision Mamba", "MambaIR", "DenoMamba", "MambaRoll"),
    *_absent("synthesis and other", "DiM", "ZigMa", "MD-Dose"),
]

AXES = {
    "scan order": "nearfar.ops.recurrence.scan_orders: row, column, middle, snake, windowed, atrous, slices, reversed",
    "state size": "d_state of every model and operator",
    "gate": "SS2D(gate=...)",
    "placement": "UMamba(placement=...): bottleneck or every encoder stage; VMUNet: the whole network",
    "host": "U-Net (UMamba, SegMamba) or pure (Vim, VMamba, VMUNet)",
    "dimension": "SS2D(dims=...), UMamba(dims=...), SegMamba(dims=...)",
    "no scan": "scan=False puts the identity in its place, in every model",
}
"""What the survey's systems differ in, and where each is set here."""


def page() -> str:
    """The taxonomy as Markdown."""
    lines = ["| branch | system | here | how |", "|---|---|---|---|"]
    lines += [f"| {r.branch} | {r.name} | {r.status} | {f'`{r.how}`' if r.how else ''} |" for r in TAXONOMY]
    lines += ["", "| axis | set by |", "|---|---|", *(f"| {name} | {how} |" for name, how in AXES.items())]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
