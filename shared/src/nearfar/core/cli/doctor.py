"""`nearfar doctor`: what this machine and this environment are, and whether they compute rightly."""

import os
import platform
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distributions, entry_points, version
from typing import Annotated, Any

import typer

from nearfar.core.cli.console import console, show_json, table
from nearfar.core.entry_points import load_entry_point

LIBRARIES = (
    "numpy",
    "lightning",
    "timm",
    "torchaudio",
    "transformers",
    "datasets",
    "mne",
    "braindecode",
    "monai",
)

GIGABYTE = 1 << 30


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show environment, versions, devices and memory, and check that this machine computes rightly.

    Exit status 1 if a check failed.
    """
    found = {"environment": environment(), "devices": devices(), "memory": memory(), "batches": batches()}
    checks = [{"check": name, "result": check(run)} for name, run in CHECKS.items()]
    apps = [{"check": f"{point.name} imports", "result": check(lambda: load_entry_point(point))} for point in _apps()]  # noqa: B023
    checks += apps
    failed = [row for row in checks if not row["result"].startswith("ok")]
    if as_json:
        show_json(found | {"checks": checks})
    else:
        for title, values in found.items():
            console.print(table([{title: name, "": str(value)} for name, value in values.items()]))
        console.print(table(checks))
    if failed:
        raise typer.Exit(1)


def check(run: Callable[[], Any]) -> str:
    """ "ok" with what `run` says, or FAIL with why."""
    try:
        said = run()
    except Exception as error:
        return f"FAIL {error}".split("\n")[0]
    return f"ok, {said}" if isinstance(said, str) else "ok"


def environment() -> dict[str, Any]:
    """Versions, and the settings that change how numbers are computed."""
    import torch

    installed = {distribution.metadata["Name"]: distribution.version for distribution in distributions()}
    onednn = next((line for line in torch.__config__.show().split("\n") if "MKL-DNN" in line), "none").strip(" -")
    settings = {
        name: os.environ[name]
        for name in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
        if name in os.environ
    }
    return {
        "nearfar": version("nearfar-core"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "torch": torch.__version__,
        "oneDNN": onednn,
        **{name: installed[name] for name in LIBRARIES if name in installed},
        **settings,
    }


def devices() -> dict[str, Any]:
    """Processors and accelerators."""
    import torch

    about: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    found = {
        "cpu": f"{about.get('cpu_name', platform.machine())}, {os.cpu_count()} cores, {torch.get_num_threads()} used",
        "instructions": torch.backends.cpu.get_cpu_capability() + (" with AMX" if about.get("amx_tile") else ""),
    }
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        found[f"cuda:{i}"] = f"{properties.name}, {properties.total_memory / GIGABYTE:.1f} GB"
    if torch.backends.mps.is_available():
        found["mps"] = "there"
    return found


def memory() -> dict[str, Any]:
    """What the machine has, and what this process holds before any model: the base that `--memory` counts too."""
    from nearfar.core.memory import resident_memory

    found = {"this process": f"{resident_memory() / GIGABYTE:.2f} GB"}
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        page = os.sysconf("SC_PAGE_SIZE")
        found["machine"] = f"{page * os.sysconf('SC_PHYS_PAGES') / GIGABYTE:.1f} GB"
        found["free"] = f"{page * os.sysconf('SC_AVPHYS_PAGES') / GIGABYTE:.1f} GB"
    return found


def batches() -> dict[str, Any]:
    """Where batches can be worked on, and which URLs can be read and written."""
    from nearfar.core.remote import protocols

    try:
        ray = version("ray")
    except PackageNotFoundError:
        ray = "not here: pip install 'nearfar-core[ray]'"
    return {"--engine ray": ray, **protocols()}


def _bfloat16() -> str:
    from nearfar.ops.common.precision import bfloat16_error, check_bfloat16

    check_bfloat16()
    return f"error {bfloat16_error():.1e}"


def _convolution() -> str:
    """float32 convolutions and matrix products against float64."""
    import torch

    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(2, 8, 40, 40, generator=generator), torch.randn(8, 8, 5, 5, generator=generator))
    right = torch.conv2d(x.double(), w.double())
    error = float((torch.conv2d(x, w) - right).norm() / right.norm())
    if not error < 1e-5:
        raise RuntimeError(f"float32 convolutions are off by {error:.1e}")
    return f"error {error:.1e}"


def _fourier() -> str:
    """The fast Fourier transform against its definition."""
    import torch

    x = torch.randn(96, generator=torch.Generator().manual_seed(0))
    n = torch.arange(96, dtype=torch.float64)
    right = torch.exp(-2j * torch.pi * n[:, None] * n / 96) @ x.to(torch.complex128)
    error = float((torch.fft.fft(x) - right).abs().norm() / right.abs().norm())
    if not error < 1e-5:
        raise RuntimeError(f"Fourier transforms are off by {error:.1e}")
    return f"error {error:.1e}"


CHECKS: dict[str, Callable[[], Any]] = {
    "bfloat16 convolutions on the CPU": _bfloat16,
    "float32 convolutions": _convolution,
    "Fourier transforms": _fourier,
}


def _apps() -> list[Any]:
    return sorted(entry_points(group="nearfar.apps"), key=lambda point: point.name)
