"""`nearfar language-model`: train, evaluate, generate, audit; EnWik8 preparation."""

import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import Annotated

import torch
import typer

from nearfar.apps.language_model import lra
from nearfar.core.cli.console import console, messages, show_json, table
from nearfar.core.cli.options import (
    Device,
    Devices,
    Fresh,
    Json,
    Nodes,
    Precision,
    RunFolder,
    Seed,
    Settings,
    Strategy,
    recipe_option,
)
from nearfar.core.errors import UserError
from nearfar.core.files import write_csv
from nearfar.core.hub import HUB
from nearfar.core.model_folder import mark_seen
from nearfar.core.recipes import read_recipe
from nearfar.core.report import Report
from nearfar.language import evaluation, texts
from nearfar.language.audit import audit as audit_model
from nearfar.language.cache import MixerCache
from nearfar.language.modeling import MixerForCausalLM
from nearfar.language.options import imports
from nearfar.language.texts import quiet_transformers
from nearfar.language.training import Recipe, text_marks, train_language_model

quiet_transformers()

app = typer.Typer(
    help="Causal language models with exchangeable mixers. `train TEXT -o FOLDER` makes one, `evaluate` gives bits "
    "per byte, `generate` writes on, `audit` checks what padding, pieces and saved states do to a model's numbers.\n\n"
    "A MODEL is a folder, or hub:NAME for one that is fetched. A TEXT is a file, a folder, a .jsonl or .parquet table "
    "with a column `text`, or `hub:NAME[:CONFIG[:SPLIT]]`, a datasets corpus that is streamed.",
    no_args_is_help=True,
)

app.add_typer(lra.app, name="lra")


app.callback()(imports)


Model = Annotated[str, typer.Argument(help="Folder of a causal language model, or hub:NAME.")]
Texts = Annotated[list[str], typer.Argument(help="Text files, folders, tables, or hub:NAME[:CONFIG[:SPLIT]].")]
MaxTokens = Annotated[int | None, typer.Option(help="Read at most so many tokens.")]


@app.command()
def train(
    sources: Texts,
    output: RunFolder,
    recipe: Annotated[str | None, recipe_option()] = None,
    settings: Settings = None,
    max_tokens: MaxTokens = None,
    device: Device = "auto",
    devices: Devices = 1,
    nodes: Nodes = 1,
    strategy: Strategy = "ddp",
    precision: Precision = "32-true",
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Train a model on text, bytes by default; the last part of the text is held out and chooses the best epoch."""
    chosen = read_recipe(Recipe, recipe, settings or ())
    tokenizer = texts.load_tokenizer(chosen.tokenizer)
    tokens = texts.read_tokens(sources, tokenizer, max_tokens)
    model, history = train_language_model(
        chosen, tokens, tokenizer, output, sources, device, precision, show_progress=messages.is_terminal, fresh=fresh
    )
    write_csv(output / "metrics.csv", history)
    result = {
        "model": str(output),
        "parameters": model.num_parameters(),
        "tokens": len(tokens),
        "epochs": len(history),
        "validation_loss": min(row["validation_loss"] for row in history),
        "tokens_per_second": history[-1]["tokens_per_second"],
    }
    result["bits_per_token"] = result["validation_loss"] / 0.6931471805599453
    if as_json:
        show_json(result | {"history": history})
    else:
        console.print(table(history))
        console.print(table([result]))


@app.command()
def evaluate(
    model: Model,
    sources: Annotated[list[str] | None, typer.Argument(help="Texts to score.")] = None,
    piece: Annotated[int, typer.Option(help="Tokens that are read at a time.")] = 1024,
    carry: Annotated[bool, typer.Option(help="Carry the state from piece to piece.")] = True,
    ngram: Annotated[
        list[str] | None, typer.Option(help="Also score a byte 5-gram counted on these texts (the training texts).")
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="A task of lm-evaluation-harness, whose data are fetched: hub:NAME (repeatable)."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only so many examples of each task.")] = None,
    max_tokens: MaxTokens = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Bits per byte and perplexity of texts, and lm-evaluation-harness tasks."""
    if not sources and not task:
        raise UserError("evaluate: name texts to score, or a --task")
    if piece < 1:
        raise UserError(f"--piece {piece}: must be at least 1")
    if local := [name for name in task or () if not name.startswith(HUB)]:
        raise UserError(f"--task {local[0]}: its data come from the network; write --task hub:{local[0]} for it")
    lm, tokenizer = texts.load_causal_lm(model, device)
    result: dict[str, object] = {"model": model}
    if sources:
        tokens, size, first = texts.read_counted(sources, tokenizer, max_tokens)
        result |= evaluation.score(lm, tokens, tokenizer, piece, carry, size - first)
        if mark := mark_seen(model, text_marks(tokens)):
            result["pieces of this text"] = mark
        if ngram:
            counted = texts.read_bytes(ngram)
            scored = texts.read_bytes(sources, size)
            result["5-gram_bits_per_byte"] = evaluation.ngram_bits(counted, scored, 256)
    if task:
        for name, scores in evaluation.run_tasks(
            lm, tokenizer, [name.removeprefix(HUB) for name in task], limit, max_length=piece
        ).items():
            for metric, value in scores.items():
                if isinstance(value, int | float):
                    result[f"{name} {metric.removesuffix(',none')}"] = value
    if as_json:
        show_json(result)
    else:
        console.print(table([{"": name, "value": value} for name, value in result.items()]))


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="Text to go on from.")] = "",
    read: Annotated[list[str] | None, typer.Option(help="Read these texts before the prompt.")] = None,
    load_state: Annotated[Path | None, typer.Option(help="Start from a state saved with --save-state.")] = None,
    save_state: Annotated[Path | None, typer.Option(help="Save the state after reading, before the prompt.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write; 0: only read.")] = 200,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.")] = 0.8,
    top_p: Annotated[float, typer.Option(help="Choose among the likeliest tokens that reach this probability.")] = 0.95,
    seed: Seed = 0,
    piece: Annotated[int, typer.Option(help="Tokens that are read at a time.")] = 1024,
    device: Device = "auto",
) -> None:
    """Write on from a prompt. A long text is read once, its state saved, and asked many times."""
    if temperature < 0 or not 0 < top_p <= 1:
        raise UserError(f"--temperature {temperature} must not be negative and --top-p {top_p} must lie in (0, 1]")
    lm, tokenizer = texts.load_causal_lm(model, device)
    state = None
    if load_state is not None:
        if not isinstance(lm, MixerForCausalLM):
            raise UserError(f"--load-state: {model} is no model of nearfar")
        state = MixerCache.load(load_state, device, lm)
    if read:
        with torch.inference_mode():
            for part in texts.read_tokens(read, tokenizer).split(piece):
                _, state = evaluation.read_on(lm, part[None].long().to(lm.device), state)
    if save_state is not None:
        if not (isinstance(lm, MixerForCausalLM) and isinstance(state, MixerCache)):
            raise UserError("--save-state: needs a text to --read and a model of nearfar")
        state.save(save_state, lm)
    if max_new_tokens == 0:
        return
    ids = torch.from_numpy(texts.encode(prompt, tokenizer))[None].to(lm.device)
    if not ids.shape[1]:
        raise UserError("generate: give a prompt of at least one token")
    written: list[int] = []
    shown = ""
    sys.stdout.write(prompt)
    end = tokenizer.eos_token_id
    for token, _ in evaluation.write_on(lm, ids, state, max_new_tokens, temperature, top_p, seed, end):
        written.append(token)
        text = tokenizer.decode(written, skip_special_tokens=True)
        if not text.endswith("\ufffd"):  # half a character waits for its other half
            sys.stdout.write(text[len(shown) :])
            sys.stdout.flush()
            shown = text
    sys.stdout.write("\n")


@app.command()
def audit(
    model: Model,
    text: Annotated[Path | None, typer.Option(help="A text to take the sequences from; else they are random.")] = None,
    length: Annotated[int, typer.Option(help="Tokens of the longest of three sequences.")] = 48,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Do padding, batching, pieces, saved or reordered states and half precision change the model's numbers?

    Prints the relative error of the logits per check; exit status 1 if any check fails.
    """
    if length < 16:
        raise UserError(f"--length {length}: must be at least 16")
    lm, tokenizer = texts.load_causal_lm(model, device)
    if text is not None:
        tokens = texts.read_tokens(text, tokenizer, 3 * length).long()
    else:
        tokens = torch.randint(lm.config.vocab_size, (3 * length,), generator=torch.Generator().manual_seed(0))
    if len(tokens) < 3 * length:
        raise UserError(f"{text}: has {len(tokens)} tokens, {3 * length} are needed")
    sequences = [tokens[:length], tokens[length : length + length // 2], tokens[-(length * 3 // 4) :]]
    rows = audit_model(lm, sequences, device)
    if as_json:
        show_json(rows)
    else:
        console.print(table([row | {"error": f"{row['error']:.1e}"} for row in rows]))
    if any(row["verdict"] == "FAIL" for row in rows):
        raise typer.Exit(1)


@app.command()
def prepare_enwik8(
    path: Annotated[Path, typer.Argument(help="The file enwik8, or enwik8.zip.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the three parts.")] = Path("enwik8"),
) -> None:
    """Cut EnWik8 into its usual parts: 90, 5 and 5 million bytes."""
    for written in texts.split_enwik8(path, output):
        console.print(f"{written}", soft_wrap=True, highlight=False)


def tour(report: Report, folder: Path) -> None:
    """The chapter of `nearfar tour`: a small model of Python's own help pages, its score, a sample and its audit."""
    pages = "\n".join(topics.values()).encode()
    cut = len(pages) * 9 // 10
    train_text, test_text = folder / "train.txt", folder / "test.txt"
    train_text.write_bytes(pages[:cut])
    test_text.write_bytes(pages[cut:])
    small = Recipe(hidden_size=64, num_hidden_layers=2, context=128, epochs=1)
    tokenizer = texts.load_tokenizer("bytes")
    fit, test = (texts.read_tokens(path, tokenizer) for path in (train_text, test_text))
    model, _ = train_language_model(small, fit, tokenizer, folder / "model", device="cpu")
    model.eval()
    scores = evaluation.score(model, test, tokenizer)
    counted, scored = (texts.read_bytes(path) for path in (train_text, test_text))
    rows = [
        {"predictor": "this model, state carried over", "bits per byte": scores["bits_per_byte"]},
        {"predictor": "byte 5-gram (Kneser-Ney)", "bits per byte": evaluation.ngram_bits(counted, scored, 256)},
        {"predictor": "uniform", "bits per byte": 8.0},
    ]
    prompt = torch.from_numpy(texts.encode("The ", tokenizer))[None]
    written = [token for token, _ in evaluation.write_on(model, prompt, max_new_tokens=200, temperature=0.7)]
    checks = audit_model(model, [test[:48].long(), test[48:72].long(), test[72:108].long()])
    report.section("A language model of Python's help pages")
    report.text("One pass over 420 kB, predicting each byte from those before it. The n-gram has counted all of them.")
    report.table(rows)
    report.code("The " + tokenizer.decode(written))
    report.text("Relative errors of its logits when padding, pieces and copied states should change nothing:")
    report.table(checks)
    console.print(table(rows))
