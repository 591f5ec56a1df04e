"""`nearfar verify`: every model against the numbers of its published code."""

from functools import partial
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Annotated

import typer

from nearfar.core.cli.console import clean
from nearfar.core.cli.options import Device
from nearfar.core.entry_points import load_entry_point
from nearfar.core.errors import UserError


def verify(
    files: Annotated[
        list[Path] | None,
        typer.Argument(help="Contract files or folders of them. Default: those of the installed packages."),
    ] = None,
    device: Device = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, float64; bfloat16, float16: autocast.")] = "float32",
    compile: Annotated[bool, typer.Option("--compile", help="Run each model under torch.compile.")] = False,
    tolerance: Annotated[
        float | None,
        typer.Option(help="Largest relative error allowed. (default: the file's own, 1e-4, or 0.1 in half precision)"),
    ] = None,
) -> None:
    """Check that each model computes what its published code computes.

    Prints one line per contract: system, variant, the output that differs most, its relative error, ok or FAIL.
    Exit status 1 if any failed or is of a system that is not installed.
    """
    import torch  # not at the top: printing help should not wait for it

    from nearfar.core import contracts
    from nearfar.core.devices import check_precision

    dtypes = {name: getattr(torch, name) for name in ("float32", "float64", "bfloat16", "float16")}
    if dtype not in dtypes:
        raise UserError(f"--dtype {dtype}: must be one of {', '.join(dtypes)}")
    half = dtype in ("bfloat16", "float16")
    check_precision(dtype, device)
    points: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group="nearfar.contracts"):
        points.setdefault(point.name, []).append(point)
    counts = dict.fromkeys(("ok", "FAIL", "unknown"), 0)
    for path in _contract_files(files):
        contract = contracts.Contract.load(path)
        output, error, verdict = "-", "-", "unknown"
        if contract.system in points:
            try:
                each = [load_entry_point(point) for point in points[contract.system]]
                build = partial(contracts.first_that_builds, each)
                errors = contracts.verify(contract, build, device, dtypes[dtype], compile)
                output = max(errors, key=errors.__getitem__)
                limit = tolerance or max(contract.tolerance or 1e-4, 0.1 if half else 0)
                error, verdict = f"{errors[output]:.1e}", "ok" if errors[output] < limit else "FAIL"
            except UserError as problem:
                error, verdict = str(problem).split("\n")[0], "FAIL"
            except Exception as problem:  # one model that cannot be built must not hide the others
                error, verdict = f"{type(problem).__name__}: {problem}".split("\n")[0], "FAIL"
        counts[verdict] += 1
        print(clean(f"{contract.system}  {contract.variant}  {output}  {error}  {verdict}"), flush=True)
    print(f"{counts['ok']} ok, {counts['FAIL']} failed, {counts['unknown']} unknown")
    if counts["FAIL"] or counts["unknown"]:
        raise typer.Exit(1)


def _contract_files(paths: list[Path] | None) -> list[Path]:
    from nearfar.core.contracts import shipped

    if not paths:
        return shipped()
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(path.glob("*.json"))
            if not inside:
                raise UserError(f"{path}: no contract files (*.json) in this folder")
            found += inside
        else:
            found.append(path)
    return found
