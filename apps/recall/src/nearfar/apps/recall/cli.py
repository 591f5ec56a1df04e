"""`nearfar recall`: train small models on recall tasks over a grid, show and plot the results, slice real text."""

from pathlib import Path
from typing import Annotated, Any

import typer

from nearfar.core.cli.console import console, messages, progress, show_json, table
from nearfar.core.cli.options import Device, Json, RunFolder, Settings
from nearfar.core.errors import UserError
from nearfar.core.files import atomic_path, write_json
from nearfar.core.model_folder import mark_seen
from nearfar.core.recipes import read_recipe, shipped_recipes
from nearfar.core.report import Report
from nearfar.language.options import imports
from nearfar.language.recall import bench as recall
from nearfar.language.recall.ar_slices import BigramCounts, gap_explained, slice_scores
from nearfar.language.texts import load_causal_lm, quiet_transformers, read_tokens
from nearfar.language.training import text_marks

quiet_transformers()

RECIPES = Path(__file__).parent / "recipes"

app = typer.Typer(
    help="Measure how well sequence mixers recall. `sweep toy --output FOLDER` prints a table in minutes on a CPU; "
    "`plot FOLDER` and `show FOLDER` read the results; `text MODEL FILES` measures recall in real text.",
    no_args_is_help=True,
)

Folder = Annotated[Path, typer.Argument(help="Folder of a sweep.")]


app.callback()(imports)


@app.command()
def sweep(
    recipe: Annotated[
        str, typer.Argument(help=f"One of {', '.join(shipped_recipes(RECIPES))}, or a YAML file.")
    ] = "toy",
    output: RunFolder = Path("recall"),
    settings: Settings = None,
    model: Annotated[list[str] | None, typer.Option(help="Only this model (repeatable).")] = None,
    data: Annotated[list[str] | None, typer.Option(help="Only these data (repeatable).")] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Train every combination of data, model, width, learning rate and seed of a recipe, and print the best of each."""
    chosen = read_recipe(recall.Recipe, recipe, settings or (), RECIPES)
    for given, known, what in ((model, chosen.models, "model"), (data, chosen.data, "data")):
        if unknown := [name for name in given or () if name not in known]:
            raise UserError(f"--{what} {unknown[0]}: the recipe has {', '.join(known)}")

    def wanted(point: recall.Point) -> bool:
        return (not model or point.model in model) and (not data or point.data in data)

    with progress() as bar:
        task = bar.add_task("runs", total=sum(wanted(p) for p in chosen.points()))

        def report(point: recall.Point, row: dict[str, Any], number: int, total: int) -> None:
            bar.update(task, completed=number)
            messages.print(
                f"{number}/{total}  {point.data}  {point.model}  d {point.dim}  rate {point.learning_rate:g}  "
                f"seed {point.seed}  accuracy {row['accuracy']:.3f}  {row['epochs']} epochs, {row['seconds']:.0f} s",
                highlight=False,
            )

        rows = recall.sweep(chosen, output, device, wanted, report)
    print_best(rows, as_json)


def print_best(rows: list[dict[str, Any]], as_json: bool) -> None:
    best = recall.best_results(rows)
    if as_json:
        show_json(best)
    else:
        console.print(table(best))


@app.command()
def show(folder: Folder, as_json: Json = False) -> None:
    """Print the best learning rate's result of every data, model and width."""
    print_best(recall.read_results(folder), as_json)


@app.command()
def plot(
    folder: Folder,
    against: Annotated[str, typer.Option(help="dim or state_size.")] = "dim",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help=".png, .svg, .pdf or .html; else FOLDER/AGAINST.html.")
    ] = None,
) -> None:
    """Plot accuracy against the width or the state size, as a picture or as a page with the table."""
    rows = recall.read_results(folder)
    figure = recall.plot_results(rows, against)
    output = output or folder / f"{against}.html"
    if output.suffix == ".html":
        page = Report("Recall", f"{len(rows)} runs of {folder}: the best learning rate of each model, mean over seeds.")
        page.figure(figure, f"Accuracy against {recall.AXES[against]}; bars: standard deviation over seeds")
        page.table(recall.best_results(rows)).write(output)
    elif output.suffix in (".png", ".svg", ".pdf"):
        with atomic_path(output) as temporary:
            figure.savefig(temporary, dpi=150)
    else:
        raise UserError(f"{output}: the picture's name must end in .png, .svg, .pdf or .html")
    console.print(f"{output}", soft_wrap=True, highlight=False)


@app.command()
def text(
    model: Annotated[str, typer.Argument(help="Folder of a causal language model, or hub:NAME.")],
    files: Annotated[list[str], typer.Argument(help="Text files, folders, tables, or hub:NAME[:CONFIG[:SPLIT]].")],
    against: Annotated[
        str | None, typer.Option(help="A second model (attention, say): how much of the gap recall explains.")
    ] = None,
    train: Annotated[
        list[str] | None,
        typer.Option(help="Training texts: bigrams frequent in them are known by heart and count as other tokens."),
    ] = None,
    frequent: Annotated[
        int, typer.Option(help="A bigram in the training texts more often than this is frequent.")
    ] = 1250,
    context: Annotated[int, typer.Option(help="Tokens per context.")] = 1024,
    limit: Annotated[int | None, typer.Option(help="Score only so many contexts.")] = None,
    device: Device = "auto",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also write the numbers to this JSON file.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Perplexity of real text on recalled tokens and on the others.

    A token is an AR hit if it ends a bigram seen earlier in its context (and not frequent in the training texts).
    """
    rows = []
    for name in (model, *([against] if against else [])):
        lm, tokenizer = load_causal_lm(name, device)
        counts = BigramCounts.of(read_tokens(train, tokenizer), len(tokenizer)) if train else None
        tokens = read_tokens(files, tokenizer, None if limit is None else limit * context)
        scores = slice_scores(lm, tokens, context, counts, frequent)
        rows.append({"model": name, **scores, "marked": mark_seen(name, text_marks(tokens))})
    result: dict[str, Any] = {"models": rows}
    if against:
        result["gap_explained"] = gap_explained(*rows)
    if output is not None:
        write_json(output, result)
    if as_json:
        show_json(result)
        return
    console.print(table(rows))
    if against:
        console.print(f"AR hits explain {result['gap_explained']:.0%} of the gap between the two models")


def tour(report: Report, folder: Path) -> None:
    """The chapter of `nearfar tour`: a smaller point of the toy table."""
    recipe = read_recipe(
        recall.Recipe,
        "toy",
        ["dims=[16]", "epochs=5", "learning_rates=[0.008]", "stop_above=0.97"],
        RECIPES,
    )
    names = ("attention", "base-conv")
    rows = recall.sweep(recipe, folder, "cpu", lambda point: point.model in names)
    report.section("Recall: what attention can that a convolution cannot")
    report.text(
        "Four pairs of tokens, then the first of each again: which was the second? Two layers of width 16 learn it "
        "with attention; with convolutions alone they guess among the four values seen."
    )
    report.table(recall.best_results(rows))
    report.figure(recall.plot_results(rows), "Accuracy of recall")
    console.print(table(recall.best_results(rows)))
