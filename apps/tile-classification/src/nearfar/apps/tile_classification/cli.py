"""`nearfar tile-classification`: train on histology tiles, use on tiles and whole slides, score by slide, compare."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer

from nearfar.core.cli.batch import Places, raise_failures, run_batch
from nearfar.core.cli.console import console, messages, say, show, show_json, table, track
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
from nearfar.core.errors import UserError, some
from nearfar.core.files import write_csv, write_json
from nearfar.core.fingerprint import content_digest
from nearfar.core.made_from import KeptRows, MadeFrom, model_digest
from nearfar.core.memory import parse_memory
from nearfar.core.model_folder import mark
from nearfar.core.reading import read_json
from nearfar.core.recipes import read_recipe
from nearfar.core.report import Report
from nearfar.core.workers import Once
from nearfar.medical.data.groups import read_pairs
from nearfar.medical.data.slides import OTHERS, TIFFS, is_slide, open_slide
from nearfar.medical.data.tiles import READABLE, find_tiles, read_tile, split_by_slide, table_of
from nearfar.medical.histology import RECIPES
from nearfar.medical.histology.classifier import TileClassifier, TileRecipe, network_names
from nearfar.medical.histology.comparison import compare_networks, verdict
from nearfar.medical.histology.scores import classify_tiles, confusion, score_slides, score_tiles, short
from nearfar.medical.histology.slides import batch_for, classify_slide, classify_slides, slide_files, write_answer
from nearfar.medical.histology.training import check_sides_apart, readable_tiles, train_tiles
from nearfar.medical.samples import write_texture_slide, write_texture_tiles, write_tissue_tiles

app = typer.Typer(
    help="Classify histology: `train` on tiles, `predict` on tiles and whole slides with a heat map, `evaluate` by "
    "tile and by slide, `compare` networks. `sample` writes data to try it with, `networks` lists what there is.\n\n"
    "Tiles come from a folder with one folder per class, or a CSV file of file, class, slide and patient. Slides are "
    "tiled pyramidal TIFF, OME-TIFF and SVS; other scanners' where OpenSlide is installed.",
    no_args_is_help=True,
)

Data = Annotated[Path, typer.Argument(help="Folder of class folders of tiles, or CSV of file, class, slide, patient.")]
SlidesOf = Annotated[
    str | None,
    typer.Option(
        "--slides",
        help="A pattern on a tile's path in its class's folder whose one group is the slide, or a CSV of file,slide. "
        "(default: the folder in it, else the name up to the first _)",
    ),
]
PatientsOf = Annotated[
    str | None,
    typer.Option(
        "--patients", help="A pattern on the slide's name whose one group is the patient, or a CSV of slide,patient."
    ),
]
Model = Annotated[Path, typer.Argument(help="Folder that `train` wrote.", parser=whole)]
Aggregate = Annotated[
    Literal["mean", "vote", "max"], typer.Option("--aggregate", help="From the tiles' probabilities to the slide's.")
]
Tissue = Annotated[
    float, typer.Option("--tissue", help="Share of a slide's tile that tissue must cover.", min=0, max=1)
]
TilePixels = Annotated[
    int | None,
    typer.Option("--tile", help="Pixels of a slide's tile, at the model's resolution. (default: the training's)"),
]
Microns = Annotated[
    float | None, typer.Option("--mpp", help="Microns per pixel of the slides' finest level, not as they tell.")
]
RecipeOption = Annotated[str, recipe_option(RECIPES)]


@app.command()
def sample(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for tiles/ and slide.tif.")],
    side: Annotated[int, typer.Option(help="Pixels a side of the slide.", min=1024)] = 2048,
    tissue: Annotated[
        bool, typer.Option("--tissue", help="Tiles of real tissue, one section of colon, and no slide.")
    ] = False,
) -> None:
    """Write tiles and a slide to try the tools with: textures in the colours of stained tissue, and no tissue.

    scikit-image carries the three photographs; nothing is downloaded. The slide shows parts that no tile is cut from.
    --tissue: tiles of an immunohistochemical section of colon that it carries, too; whether DAB stains a tile's centre
    is to be told by the haematoxylin alone.
    """
    if tissue:
        console.print(str(write_tissue_tiles(output / "tiles")), soft_wrap=True, highlight=False)
        return
    write_texture_tiles(output / "tiles")
    write_texture_slide(output / "slide.tif", side)
    console.print(f"{output / 'tiles'}, {output / 'slide.tif'}", soft_wrap=True, highlight=False)


@app.command()
def networks(as_json: Json = False) -> None:
    """List the networks that --set network=NAME and `compare` take."""
    show([{"network": name, "what": what} for name, what in network_names().items()], as_json)


@app.command()
def inspect(
    paths: Annotated[list[Path], typer.Argument(help="Slides, or folders or tables of tiles.")],
    slides: SlidesOf = None,
    patients: PatientsOf = None,
    size: Annotated[int, typer.Option(help="Pixels of the tiles that are counted on slides.", min=8)] = 224,
    as_json: Json = False,
) -> None:
    """Say what there is: of slides the levels, resolution and tissue, of tiles the classes, slides and patients."""

    def one(path: Path) -> dict[str, Any]:
        if path.is_dir() or path.suffix.lower() == ".csv":
            tiles, failures, sides = readable_tiles(find_tiles(path, slides, patients), lambda t: t)
            if failures:
                raise UserError(f"{path}: {len(failures)} tiles cannot be read\n  " + "\n  ".join(failures))
            counts = Counter(tile.label for tile in tiles)
            row: dict[str, Any] = {"path": str(path), "tiles": len(tiles)}
            row |= {"slides": len({t.slide for t in tiles}), "patients": len({t.group for t in tiles})}
            return row | {"pixels": "-".join(map(str, sorted(set(sides)))), "of each class": _counted(counts)}
        with open_slide(path) as slide:
            levels = " ".join(f"{width}x{height}" for height, width in slide.levels)
            mask, _ = slide.tissue()
            row = {
                "path": str(path),
                "levels": levels,
                "microns a pixel": "not told" if slide.mpp is None else slide.mpp,
            }
            return row | {"tissue": f"{mask.mean():.1%}", f"tiles of {size}": len(slide.places(size))}

    rows, failures = run_batch(paths, one, "looking")
    if as_json:
        show_json(rows)
    for row in rows if not as_json else ():
        console.print(table([row]))
    raise_failures(failures, len(paths))


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in sorted(counts.items()))


@app.command("train")
def train_command(
    data: Data,
    output: RunFolder,
    recipe: RecipeOption = "small",
    settings: Settings = None,
    slides: SlidesOf = None,
    patients: PatientsOf = None,
    folds: Annotated[int, typer.Option(help="Parts of the slides, of which one is held out and scored; 0: none.")] = 5,
    fold: Annotated[int, typer.Option(help="The part that is held out.")] = 0,
    held: Annotated[
        Path | None, typer.Option(help="Tiles of other slides that are scored in the place of a fold.")
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(help="Checkpoint to start from: of a whole network, a published DuoFormer's, a ResNet trunk's."),
    ] = None,
    device: Device = "auto",
    devices: Devices = 1,
    nodes: Nodes = 1,
    strategy: Strategy = "ddp",
    precision: Precision = "32-true",
    workers: Workers = 0,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Train on tiles; a part of the slides is held out, which nothing of the training sees, and scored.

    No slide and no patient is on both sides. Writes the model, splits.csv (which tile is in which part) and
    held_out.json. An interrupted run goes on.
    """
    chosen = read_recipe(TileRecipe, recipe, settings or (), RECIPES)
    tiles, failures, sides = readable_tiles(find_tiles(data, slides, patients), lambda t: track(t, "checking"))
    total = len(tiles) + len(failures)
    if held is not None:
        learn = tiles
        apart, more, _ = readable_tiles(find_tiles(held, slides, patients), lambda t: track(t, "checking"))
        failures, total = failures + more, total + len(apart) + len(more)
        check_sides_apart(learn, apart, (str(data), str(held)))
    elif folds:
        if not 0 <= fold < folds:
            raise UserError(f"--fold {fold}: must be one of 0 to {folds - 1}")
        learn, apart = split_by_slide(tiles, folds, chosen.seed)[fold]
        check_sides_apart(learn, apart, ("the training", "the slides held out"))
    else:
        learn, apart = tiles, []
    if unknown := sorted({tile.label for tile in apart} - {tile.label for tile in learn}):
        raise UserError(f"{held or data}: the training has no tiles of {some(unknown)}")
    classifier, history = train_tiles(
        learn, chosen, output, sides=sides, weights=weights, num_workers=workers, device=device, precision=precision,
        show_progress=messages.is_terminal, fresh=fresh,
    )  # fmt: skip
    parts = [(tile, "training") for tile in learn] + [(tile, "held out") for tile in apart]
    write_csv(output / "splits.csv", [table_of(tile) | {"part": part} for tile, part in parts])
    if apart:
        scores, more = classify_tiles(classifier, apart, device)
        failures += more
        rows, note = score_tiles(scores, apart, classifier.classes)
        write_json(output / "held_out.json", {"scores": rows, "note": note})
        show(rows if as_json else short(rows), as_json)
        _note(note)
    else:
        show([{"tiles": len(learn), "classes": len(classifier.classes), **history[-1]}], as_json)
    if not as_json:
        console.print(f"model: {output}", soft_wrap=True, highlight=False)
    raise_failures(failures, total)


@app.command()
def predict(
    model: Model,
    inputs: Annotated[
        list[Path], typer.Argument(help="Slides, tiles, or folders that are searched for both.", parser=anywhere)
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the tables and pictures.", parser=anywhere)
    ] = Path("predictions"),
    aggregate: Aggregate = "mean",
    tissue: Tissue = 0.5,
    tile: TilePixels = None,
    mpp: Microns = None,
    memory: Memory = None,
    device: Device = "auto",
    workers: Workers = 0,
    engine: Engine = "local",
    timeout: Timeout = None,
    as_json: Json = False,
) -> None:
    """Classify tiles and whole slides.

    Of tiles tiles.csv; of each slide NAME_tiles.csv (places in pixels of the finest level), NAME.geojson for QuPath,
    NAME_heatmap.png, and a row of slides.csv. What is done is not done again, unless input, model or options were
    others; failures.json tells what could not be done. A slide's tile that cannot be read is left empty and named; the
    slide's answer is then that of the others. --memory counts a slide's parts and the batches, not program and network.
    """
    once, of_model = Once(lambda: TileClassifier.load(model)), model_digest(model)
    classes = once().classes
    batch = batch_for(once(), None if memory is None else parse_memory(memory), device)
    jobs = _jobs(inputs, output)
    bases = Counter(base for _, base in jobs)
    options = {"how": aggregate, "least": tissue, "tile": tile, "mpp": mpp}
    kept = KeptRows(output / "tiles.csv", of_model, device=device)

    def made_from(path: Path, base: Path) -> MadeFrom:
        return MadeFrom(base.with_name(f"{base.name}.json"), [path], of_model, **options)

    def tiles_of(some_jobs: Sequence[tuple[Path, Path]]) -> list[list[float]]:
        if any(is_slide(path) for path, _ in some_jobs):
            raise UserError("slides are done one by one")
        pixels = [read_tile(path) for path, _ in some_jobs]
        for (path, _), tile_pixels in zip(some_jobs, pixels, strict=True):
            once().check_side(tile_pixels, path)
        parts = [pixels[i : i + batch] for i in range(0, len(pixels), batch)]
        return torch.cat([once().probabilities(part, device) for part in parts]).tolist()

    def one(job: tuple[Path, Path]) -> list[float]:
        """Of a tile the probabilities; a slide's results are written here."""
        path, base = job
        if not is_slide(path):
            return tiles_of([job])[0]
        if bases[base] > 1:
            raise UserError(f"{path}: another input has its name; give each an output of its own")
        made = made_from(path, base)
        if made.done() and all(file.exists() for file in slide_files(base)):
            row = read_json(made.target, "a slide's answer")
        else:
            answer = classify_slide(
                once(), path, batch=batch, device=device, track=lambda places: _told(path, places), **options
            )
            if answer.note:
                _note(answer.note)
            row = write_answer(answer, classes, base)
            made.write(mark(once().trained_on.seen([content_digest(path)], [base.name])))
        if row["broken"]:
            raise UserError(
                f"{path}: {row['broken']} of {row['tiles']} tiles cannot be read and are left empty; the first: "
                f"{row['first broken']}"
            )
        return []

    def keep(job: tuple[Path, Path], found: list[float]) -> None:
        if found:
            kept.add(job[0], found)
            known[job[0]] = found

    known = {path: row for path, _ in jobs if (row := kept.find(path)) is not None}
    _, failures = run_batch(
        [job for job in jobs if job[0] not in known], one, "classifying", name=lambda job: str(job[0]),
        places=Places(workers, engine, timeout), failed=output / "failures.json", each=keep, together=tiles_of,
    )  # fmt: skip
    tile_rows = []
    for path in (path for path, _ in jobs if path in known):
        values = known[path]
        row = {"file": str(path), "class": classes[max(range(len(values)), key=values.__getitem__)]}
        tile_rows.append(row | {f"p({name})": p for name, p in zip(classes, values, strict=True)})
    if tile_rows:
        write_csv(output / "tiles.csv", tile_rows)
    slide_rows = []
    for path, base in jobs:
        if path in known or bases[base] > 1 or not is_slide(path):
            continue
        made = made_from(path, base)
        with suppress(UserError):  # another's answer, or one changed by hand: among the failures
            if made.done():  # an older answer of another model or slide is none
                row = read_json(made.target, "a slide's answer")
                row = {name: value for name, value in row.items() if name not in ("note", "first broken")}
                seen = mark(once().trained_on.seen([content_digest(path)], [base.name]))
                slide_rows.append(row | {"marked": seen, "heat map": str(slide_files(base)[1])})
    if slide_rows:
        write_csv(output / "slides.csv", slide_rows)
    if as_json:
        show_json({"slides": slide_rows, "tiles": tile_rows})
    else:
        for rows, file in ((slide_rows, "slides.csv"), (tile_rows, "tiles.csv")):
            if rows:
                show([{k: v for k, v in row.items() if k != "heat map"} for row in rows[:20]], False)
                console.print(f"{len(rows)}: {output / file}", soft_wrap=True, highlight=False)
    raise_failures(failures, len(jobs))


def _jobs(inputs: Sequence[Path], output: Path) -> list[tuple[Path, Path]]:
    """(file, where its results go but for the ending) of every tile and slide in `inputs`."""
    jobs = []
    for path in inputs:
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
        known, own = {*READABLE, *TIFFS, *OTHERS}, output.absolute()
        found = sorted(p for p in path.rglob("*") if p.suffix.lower() in known and not p.name.startswith("."))
        inside = [p for p in found if p.is_file() and own not in p.absolute().parents] if path.is_dir() else [path]
        if not inside:
            raise UserError(f"{path}: holds neither tiles nor slides")
        for file in inside:
            below = file.relative_to(path) if path.is_dir() else Path(file.name)
            jobs.append((file, output / below.with_name(file.stem.removesuffix(".ome"))))
    if twice := [str(file) for file, number in Counter(file for file, _ in jobs).items() if number > 1]:
        raise UserError(f"{some(twice)}: given more than once")
    return jobs


def _told(path: Path, places: Sequence[Any]) -> Iterator[Any]:
    """`places`, of many of which every tenth part is said on a terminal."""
    tenth = max(500, len(places) // 10)
    for i, place in enumerate(places):
        if i and i % tenth == 0 and messages.is_terminal:
            messages.print(f"{path.name}: {i} of {len(places)} tiles", highlight=False)
        yield place


@app.command()
def evaluate(
    model: Model,
    data: Data,
    slides: SlidesOf = None,
    patients: PatientsOf = None,
    slide_labels: Annotated[
        Path | None, typer.Option(help="CSV of slide,class where a slide's class is not that of all its tiles.")
    ] = None,
    aggregate: Aggregate = "mean",
    held_out: Annotated[
        bool, typer.Option("--held-out", help="Leave out the slides that the model was trained on.")
    ] = False,
    training_slides: Annotated[
        bool, typer.Option("--training-slides", help="Score also slides that the model was trained on, and mark them.")
    ] = False,
    tissue: Tissue = 0.5,
    tile: TilePixels = None,
    mpp: Microns = None,
    memory: Memory = None,
    device: Device = "auto",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for scores.json, answers.csv and index.html.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Score a model on labelled tiles: accuracy, balanced accuracy and AUC of tiles and of slides.

    Where the files of a CSV file are whole slides, these are cut into tiles as in `predict`, and scored as slides.
    The 95 % intervals are over slides (patients, where they are known). A tile that cannot be read is a wrong answer.
    Tiles of slides, or patients, that the model was trained on are refused: --held-out leaves them out.
    """
    if held_out and training_slides:
        raise UserError("--held-out and --training-slides: give one")
    trained = TileClassifier.load(model)
    tiles = find_tiles(data, slides, patients)
    if unknown := sorted({tile.label for tile in tiles} - set(trained.classes)):
        raise UserError(f"{data}: the model in {model} does not know {some(unknown)}; it knows {some(trained.classes)}")
    digests = [content_digest(tile.path) if tile.path.is_file() else str(tile.path) for tile in tiles]
    of_slide = trained.trained_on.seen(digests, [tile.slide for tile in tiles])
    of_group = trained.trained_on.seen(digests, [tile.group for tile in tiles])
    seen = {tile.slide for tile, *known in zip(tiles, of_slide, of_group, strict=True) if any(known)}
    if seen and not training_slides:
        left = [tile for tile in tiles if tile.slide not in seen]
        if not held_out or not left:
            raise UserError(
                f"{some(sorted(seen))}: the model was trained on {len(seen)} of the {len({t.slide for t in tiles})} "
                "slides, on others of their patients, or on some of these names; leave them out with --held-out, or "
                "score them with --training-slides"
            )
        _note(f"{len(seen)} slides of the training are left out")
        tiles = left
    labels = None
    if slide_labels is not None:
        labels = read_pairs(slide_labels, ("slide", "class"))
    wholes = [is_slide(tile.path) for tile in tiles]
    if all(wholes):
        if labels is not None:
            raise UserError(f"--slide-labels: the files of {data} are slides, each with its class there")
        scores, failures = classify_slides(
            trained, tiles, lambda slides: track(slides, "classifying"), how=aggregate, least=tissue, tile=tile,
            mpp=mpp, device=device, batch=batch_for(trained, None if memory is None else parse_memory(memory), device),
        )  # fmt: skip
        rows, note = score_slides(scores, tiles, trained.classes), ""
    elif any(wholes):
        raise UserError(f"{data}: names {sum(wholes)} slides and {len(tiles) - sum(wholes)} tiles; score them apart")
    else:
        if tile is not None or mpp is not None or memory is not None:
            raise UserError(f"--tile, --mpp and --memory are for whole slides; {data} names tiles")
        scores, failures = classify_tiles(trained, tiles, device, track=lambda starts: track(starts, "classifying"))
        rows, note = score_tiles(scores, tiles, trained.classes, aggregate, labels)
    marked = mark([tile.slide in seen for tile in tiles])
    if marked:
        rows = [row | {"marked": marked} for row in rows]
    good = [i for i, row in enumerate(scores) if row[0] == row[0]]
    answers = [
        table_of(tile) | {f"p({name})": p for name, p in zip(trained.classes, row, strict=True)}
        for tile, row in zip(tiles, scores.tolist(), strict=True)
    ]
    if output is not None:
        write_json(output / "scores.json", {"scores": rows, "note": note, "failures": failures, "marked": marked})
        write_csv(output / "answers.csv", answers)
        truth = torch.tensor([trained.classes.index(tiles[i].label) for i in good]).numpy()
        report = Report(f"{trained.recipe.network} on {data.name}").table(short(rows), note)
        report.table(confusion(scores[good], truth, trained.classes), "What is of each class (row) and is given each.")
        report.write(output / "index.html")
    show(rows if as_json else short(rows), as_json)
    _note(note)
    raise_failures(failures, len(tiles))


@app.command()
def compare(
    data: Data,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the table, the page and the models.")],
    network: Annotated[
        list[str] | None, typer.Option(help="Network to compare, by its name in `networks`. Repeat.")
    ] = None,
    recipe: RecipeOption = "small",
    settings: Settings = None,
    slides: SlidesOf = None,
    patients: PatientsOf = None,
    folds: Annotated[
        int,
        typer.Option(help="Parts of the slides; every tile is scored by a model that has not seen its slide.", min=2),
    ] = 3,
    device: Device = "auto",
    workers: Workers = 0,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Train several networks on the same tiles, folds and number of steps, and say who wins.

    By default a small DuoFormer, its ablation, the same ResNet with a plain ViT, and that ResNet alone.
    """
    names = network or ["duoformer_small", "duoformer_small-identity", "resnet10t+vit_small", "resnet10t"]
    chosen = read_recipe(TileRecipe, recipe, settings or (), RECIPES)
    tiles, failures, sides = readable_tiles(find_tiles(data, slides, patients), lambda t: track(t, "checking"))
    rows, paired = compare_networks(
        names, tiles, chosen, output, folds=folds, sides=sides, num_workers=workers, device=device, fresh=fresh,
        track=track,
    )  # fmt: skip
    told = verdict(rows, paired)
    brief = [
        {
            **{name: row[name] for name in ("network", "parameters (M)", "training (s)", "balanced")},
            "95 %": short([row])[0]["balanced 95 %"],
            **{name: row[name] for name in ("accuracy", "AUC", "slide accuracy") if name in row},
        }
        for row in rows
    ]
    Report(f"Networks on {data.name}").text(told).table(brief).table(
        paired, "Share of a slide's tiles named rightly: the best against each, paired over slides, p by Holm."
    ).write(output / "index.html")
    if as_json:
        show_json({"networks": rows, "paired": paired, "verdict": told})
    else:
        console.print(table(brief))
        console.print(table(paired, "the best against each other network, paired over slides"))
        console.print(told, soft_wrap=True, highlight=False)
        console.print(f"page: {output / 'index.html'}", soft_wrap=True, highlight=False)
    raise_failures(failures, len(tiles) + len(failures))


def _note(text: str) -> None:
    if text:
        say("note", text, "yellow")
