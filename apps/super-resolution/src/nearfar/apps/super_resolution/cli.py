"""`nearfar super-resolution`: enlarge pictures, train and score the networks that do it."""

import zipfile
from pathlib import Path
from typing import Annotated, Any

import typer

from nearfar.apps.super_resolution.page import before_and_after
from nearfar.core.cli.batch import Places, raise_failures, run_batch
from nearfar.core.cli.console import messages, progress, show, track
from nearfar.core.cli.options import (
    Device,
    Devices,
    Engine,
    Fresh,
    Json,
    Memory,
    Nodes,
    Precision,
    RunFolder,
    Settings,
    Strategy,
    Timeout,
    Workers,
    anywhere,
    recipe_option,
    whole,
)
from nearfar.core.devices import choose_device
from nearfar.core.errors import UserError, some
from nearfar.core.files import temporary_folder, write_csv
from nearfar.core.made_from import MadeFrom
from nearfar.core.memory import parse_memory, resident_memory
from nearfar.core.reading import check_announced, reading
from nearfar.core.recipes import read_recipe
from nearfar.core.report import Report
from nearfar.vision.data.images import is_picture, picture_files
from nearfar.vision.restoration import evaluation
from nearfar.vision.restoration.files import LIMIT, SUFFIXES, read_file
from nearfar.vision.restoration.networks import load_restorer, restorers
from nearfar.vision.restoration.tiles import Tiling
from nearfar.vision.restoration.upscaler import Upscaler

BICUBIC = "bicubic"
RECIPES = Path(__file__).parent / "recipes"
WEIGHTS = Path(__file__).parent / "weights"
"""The small networks that come along, x2 and x4; `small.py` says how they are made."""

app = typer.Typer(
    help="Enlarge pictures by learned super-resolution: `upscale` does files, folders and zip files, `train` makes a "
    "network from a folder of pictures, `evaluate` and `compare` print the tables of test sets such as Set5, `models` "
    "lists what there is.\n\n"
    "A network is a published checkpoint of DRCT or CATANet in any of their layouts, or a folder that `train` wrote; "
    "without one, a small CATANet that comes along enlarges photographs that are clean, 2 or 4 times.",
    no_args_is_help=True,
)

Model = Annotated[
    Path | None,
    typer.Option(help="Checkpoint, or folder that `train` wrote. (default: the small one for --scale)", parser=whole),
]
Scale = Annotated[int | None, typer.Option(help="How many times. (default: the model's; 2 for the small one)")]
Tile = Annotated[int | None, typer.Option(help="Side of the tiles in pixels of the input.", min=16)]
Overlap = Annotated[int, typer.Option(help="Pixels of the input that neighbouring tiles share.", min=0)]
Blending = Annotated[
    str, typer.Option(help="How tiles join: cosine, core (middles with context) or average (equal weights).")
]
Ensemble = Annotated[
    bool, typer.Option("--ensemble", help="Mean over the eight flips and turns; eight times the work.")
]
Sets = Annotated[list[Path], typer.Argument(help="Test sets: folders of pairs, or of high-resolution pictures.")]
Colour = Annotated[str, typer.Option(help="y (luma, as in the tables) or rgb.")]
ProtocolName = Annotated[
    str, typer.Option("--protocol", help="8bit (outputs rounded, as in the tables) or float (CATANet's own).")
]


Metric = Annotated[
    list[str] | None,
    typer.Option(help="Also lpips or niqe, by pyiqa where it is installed; it fetches their weights. Repeat."),
]


@app.command()
def models(as_json: Json = False) -> None:
    """List the published networks: system, scale and parameters."""
    rows = [
        {"model": name, "system": model.CARD.title, "scale": variant.settings["scale"],
         "params (M)": variant.params / 1e6}
        for name, (model, variant) in sorted(restorers().items())
    ]  # fmt: skip
    show(rows, as_json)


@app.command()
def upscale(
    inputs: Annotated[list[Path], typer.Argument(help="Pictures, folders or zip files of pictures.", parser=anywhere)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.", parser=anywhere)],
    model: Model = None,
    scale: Scale = None,
    format: Annotated[
        str | None, typer.Option(help="png, jpg, webp, tif or avif. (default: that of each picture)")
    ] = None,
    quality: Annotated[int, typer.Option(help="Of JPEG, WebP and AVIF.", min=1, max=100)] = 95,
    memory: Memory = None,
    tile: Tile = None,
    overlap: Overlap = 32,
    tiling: Blending = "cosine",
    ensemble: Ensemble = False,
    half: Annotated[bool, typer.Option("--half", help="Compute in bfloat16.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Print how far tiles are from the whole picture.")] = False,
    page: Annotated[bool, typer.Option("--page", help="Also a page with a slider between before and after.")] = False,
    first_frame: Annotated[bool, typer.Option("--first-frame", help="Take the first of several frames.")] = False,
    limit: Annotated[int, typer.Option(help="Pixels of the largest picture that is read.")] = LIMIT,
    device: Device = "auto",
    as_json: Json = False,
    workers: Workers = 0,
    engine: Engine = "local",
    timeout: Timeout = None,
) -> None:
    """Enlarge pictures; transparency, 16 bits, colour profile, EXIF data and resolution are kept.

    What is there is not done again, unless picture, network or options were others. After a stop, a picture goes on
    behind the last row of tiles.
    """
    upscaler = Upscaler.load(_network(model, scale), device, half=half)
    if scale not in (None, upscaler.model.scale):
        raise UserError(f"--scale {scale}: {model} enlarges {upscaler.model.scale} times")
    given = _tiling(tile, overlap, tiling, upscaler.model.multiple)
    budget = None if memory is None else parse_memory(memory)
    if format is not None and f".{format}" not in SUFFIXES:
        raise UserError(f"--format {format}: pictures are written as {', '.join(sorted(s[1:] for s in SUFFIXES))}")
    with temporary_folder() as unpacked:
        jobs = _jobs(inputs, output, format, unpacked)

        def one(job: tuple[Path, Path]) -> dict[str, Any]:
            path, target = job
            made = MadeFrom(
                target, [path], upscaler.digest, tile=tile, overlap=overlap, tiling=tiling, ensemble=ensemble,
                half=half, quality=quality, first_frame=first_frame, memory=memory,
            )  # fmt: skip
            row = {"picture": path.name, "file": str(target)}
            if made.done():
                return row | {"size": "done before", "tiles": "", "notes": ""}
            picture = read_file(path, limit=limit, first_frame=first_frame)
            with progress() as bar:
                task = bar.add_task(path.name, total=None)
                chosen = upscaler(
                    picture, target, given, memory=budget, ensemble=ensemble, quality=quality,
                    progress=lambda done, total: bar.update(task, completed=done, total=total),
                )  # fmt: skip
            made.write()
            notes = list(picture.notes)
            if memory is not None:
                notes.append(f"the process held at most {resident_memory(peak=True) / 2**20:.0f} MB")
            if chosen.tile < max(picture.pixels.shape[:2]) and upscaler.model.tiled:
                notes.append(f"in tiles: {upscaler.model.tiled}")
            if check:
                notes.append(_check(upscaler, picture, chosen))
            if page:
                before_and_after(path, target, target.with_name(f"{target.stem}.html"))
            height, width = (side * upscaler.model.scale for side in picture.pixels.shape[:2])
            tiles = "whole" if chosen.tile >= max(picture.pixels.shape[:2]) else str(chosen.tile)
            return row | {"size": f"{width} x {height}", "tiles": tiles, "notes": "; ".join(notes)}

        places = Places(workers, engine, timeout)
        rows, failures = run_batch(jobs, one, "enlarging", lambda job: str(job[0]), places, output / "failures.json")
    show(rows, as_json)
    raise_failures(failures, len(jobs))


def _check(upscaler: Upscaler, picture: Any, tiling: Tiling) -> str:
    """What tiles change in the middle of the picture, at most twice a tile a side."""
    import torch

    height, width = picture.pixels.shape[:2]
    tiling = tiling if tiling.tile < max(height, width) else Tiling(max(64, min(height, width) // 2 // 16 * 16), 32)
    side = 2 * tiling.tile
    top, left = (max(0, (n - side) // 2) for n in (height, width))
    pixels = picture.pixels[top : top + side, left : left + side, :3]
    planes = torch.tensor(pixels).permute(2, 0, 1)[: 3 if pixels.shape[2] == 3 else 1].float() / picture.peak
    found = evaluation.seam(upscaler.model, planes.expand(3, -1, -1).contiguous(), tiling)
    return (
        f"tiles of {tiling.tile}: at most {found['largest']:.2g} from the whole picture, the largest step at their "
        f"borders {found['step']:.2f} of the largest elsewhere"
    )


def _jobs(inputs: list[Path], output: Path, format: str | None, unpacked: Path) -> list[tuple[Path, Path]]:
    """(picture, where it goes) of everything in `inputs`; zip files are unpacked into `unpacked`."""
    found: list[tuple[Path, Path]] = []
    for path in inputs:
        if path.suffix.lower() == ".zip" and path.is_file():
            root = unpacked / path.name
            with reading(path, "cannot be read as a zip file"), zipfile.ZipFile(path) as archive:
                names = [n for n in archive.namelist() if is_picture(Path(Path(n).name))]
                if outside := [n for n in names if not (root / n).resolve().is_relative_to(root.resolve())]:
                    raise UserError(f"{path}: holds {some(outside)}, which lies outside of the archive")
                for info in map(archive.getinfo, names):
                    check_announced(path, info.file_size, info.compress_type != 0, info.compress_size)
                archive.extractall(root, names)
            if not names:
                raise UserError(f"{path}: no pictures there")
            found += [(p, output / path.stem / p.relative_to(root)) for p in picture_files([root])]
        elif path.is_dir():
            found += [(p, output / p.relative_to(path)) for p in picture_files([path])]
        else:
            found.append((path, output / path.name))
    jobs = []
    for path, target in found:
        named = target.suffix.lower() if format is None else f".{format}"
        jobs.append((path, target.with_suffix(named if named in SUFFIXES else ".png")))
    targets = [target for _, target in jobs]
    if twice := sorted({str(target) for target in targets if targets.count(target) > 1}):
        raise UserError(f"several pictures would be written to {some(twice)}; give them folders of their own")
    if same := [str(path) for path, target in jobs if path.resolve() == target.resolve()]:
        raise UserError(f"{some(same)}: would be overwritten; give another output folder")
    return jobs


@app.command("train")
def train_command(
    pictures: Annotated[list[Path], typer.Argument(help="High-resolution pictures, or folders of them.")],
    held: Annotated[
        list[Path], typer.Option(help="Pictures that choose the epoch, none of those to learn from. Repeat.")
    ],
    output: RunFolder,
    recipe: Annotated[str | None, recipe_option(RECIPES)] = None,
    settings: Settings = None,
    weights: Annotated[
        Path | None, typer.Option(help="Network to start from; of another scale, its upsampler starts afresh.")
    ] = None,
    vgg: Annotated[
        Path | None, typer.Option(help="torchvision's VGG19 weights, for recipes with a perceptual loss.")
    ] = None,
    workers: Workers = 0,
    device: Device = "auto",
    devices: Devices = 1,
    nodes: Nodes = 1,
    strategy: Strategy = "ddp",
    precision: Precision = "32-true",
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Train a network on random patches, reduced as the test sets were; the epoch of the best PSNR is kept.

    With `--set degradation=real` patches are blurred, noised and compressed as real pictures are. Recipes with an
    adversarial loss keep the last epoch.
    """
    from nearfar.vision.restoration.training import Recipe, train_restorer

    resolved = read_recipe(Recipe, recipe, settings or (), RECIPES)
    files, chosen = picture_files(pictures), picture_files(held)
    model, history = train_restorer(
        files, chosen, resolved, output, weights=weights, vgg=vgg, device=device, workers=workers, fresh=fresh,
        show_progress=messages.is_terminal,
    )  # fmt: skip
    best = history[-1] if resolved.adversarial else max(history, key=lambda row: row["psnr"])
    row = {"model": resolved.model, "parameters": sum(p.numel() for p in model.parameters()), "pictures": len(files)}
    row |= {"kept epoch": int(best["epoch"]) + 1, "PSNR of the held": best["psnr"], "folder": str(output)}
    show([row], as_json)


@app.command()
def evaluate(
    data: Sets,
    model: Annotated[
        str | None,
        typer.Option(help="Checkpoint, folder that `train` wrote, or bicubic. (default: the small one for --scale)"),
    ] = None,
    scale: Scale = None,
    colour: Colour = "y",
    protocol: ProtocolName = "8bit",
    metric: Metric = None,
    tile: Tile = None,
    overlap: Overlap = 32,
    tiling: Blending = "cosine",
    ensemble: Ensemble = False,
    csv: Annotated[Path | None, typer.Option(help="CSV with a row a picture.")] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Print PSNR and SSIM of a network on test sets, as the field's tables have them."""
    name = str(_network(None, scale)) if model is None else model
    rows = _scores(data, [name], scale, colour, protocol, tile, overlap, tiling, ensemble, device, csv, metric)
    show(rows, as_json)


@app.command()
def compare(
    data: Sets,
    model: Annotated[list[str], typer.Option(help="Checkpoint or folder. Repeat. Bicubic is always beside them.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the table and the page.")],
    colour: Colour = "y",
    protocol: ProtocolName = "8bit",
    metric: Metric = None,
    ensemble: Ensemble = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Score several networks of one scale and bicubic resizing on the same pictures: table, CSV, page."""
    scales = {load_restorer(name).scale for name in model}
    if len(scales) > 1:
        raise UserError(f"the networks enlarge {', '.join(map(str, sorted(scales)))} times; compare those of one scale")
    names = [BICUBIC, *model]
    rows = _scores(
        data,
        names,
        scales.pop(),
        colour,
        protocol,
        None,
        32,
        "cosine",
        ensemble,
        device,
        output / "pictures.csv",
        metric,
    )
    write_csv(output / "scores.csv", rows)
    Report("Super-resolution compared").table(rows, f"{colour.upper()}, {protocol}").write(output / "page.html")
    show(rows, as_json)


def _scores(
    data: list[Path], names: list[str], scale: int | None, colour: str, protocol: str, tile: int | None, overlap: int,
    blend: str, ensemble: bool, device: str, csv: Path | None, metrics: list[str] | None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Means of every model on every test set; with `csv`, all pictures there."""
    for option, value, allowed in (("--colour", colour, ("y", "rgb")), ("--protocol", protocol, ("8bit", "float"))):
        if value not in allowed:
            raise UserError(f"{option} {value}: allowed are {' and '.join(allowed)}")
    rows, pictures = [], []
    for name in names:
        network = None if name == BICUBIC else load_restorer(name).to(choose_device(device, "--device"))
        times = scale if network is None else network.scale
        if times is None:
            raise UserError("bicubic: say --scale")
        if scale not in (None, times):
            raise UserError(f"{name}: enlarges {times} times, not {scale}")
        tiling = _tiling(tile, overlap, blend, 1 if network is None else network.multiple)
        for folder in data:
            found = evaluation.evaluate(
                network, folder, times, colour=colour, protocol=protocol, tiling=tiling, ensemble=ensemble,  # type: ignore[arg-type]
                metrics=metrics or (),
                track=lambda pairs, folder=folder: track(pairs, folder.name),
            )  # fmt: skip
            shown = "the small one" if Path(name).parent == WEIGHTS else name
            rows.append({"model": shown, "set": folder.name, "scale": times, "pictures": len(found)})
            rows[-1] |= evaluation.mean(found)
            pictures += [{"model": shown, "set": folder.name, **row} for row in found]
    if csv is not None:
        write_csv(csv, pictures)
    return rows


def _network(model: Path | None, scale: int | None) -> Path:
    """The network that is named, else the one that comes along."""
    if model is None and scale not in (None, 2, 4):
        raise UserError(f"--scale {scale}: the networks that come along enlarge 2 and 4 times; name a --model")
    return WEIGHTS / f"x{scale or 2}" if model is None else model


def _tiling(tile: int | None, overlap: int, blend: str, multiple: int) -> Tiling | None:
    """The tiles that are asked for, None where none are."""
    if tile is None:
        return None
    try:
        found = Tiling(tile, overlap, blend)  # type: ignore[arg-type]
        found.check(multiple)
        return found
    except ValueError as error:
        raise UserError(f"--tile, --overlap, --tiling: {error}") from error
