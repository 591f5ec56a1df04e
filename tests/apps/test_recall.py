"""`nearfar recall` from its command line: a sweep that resumes, its table and figures, text slices, refusals."""

import json

import pytest
import torch
from typer.testing import CliRunner

from nearfar.apps.recall import cli
from nearfar.core.errors import UserError

TINY = """
vocab_size: 64
data:
  16x2:
    train: [{num_examples: 512, input_seq_len: 16, num_kv_pairs: 2, random_non_queries: false}]
    test: [{num_examples: 64, input_seq_len: 16, num_kv_pairs: 2, random_non_queries: false}]
models:
  attention: {mixers: [base-conv, attention]}
  base-conv: {mixers: [base-conv, base-conv]}
dims: [16]
learning_rates: [1.0e-4, 1.0e-2]
epochs: 2
"""


@pytest.fixture(name="recipe")
def _recipe(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


def run(*arguments):
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.stdout


def test_a_sweep_resumes_shows_and_plots(recipe, tmp_path):
    out = tmp_path / "out"
    first = json.loads(run("sweep", recipe, "--output", out, "--model", "attention", "--device", "cpu", "--json"))
    assert [row["model"] for row in first] == ["attention"]
    assert first[0]["rates"] == 2
    table = (out / "results.csv").read_text()
    everything = json.loads(run("sweep", recipe, "--output", out, "--device", "cpu", "--json"))
    assert (out / "results.csv").read_text().startswith(table)  # the finished runs stand, untrained again
    assert everything[0] == first[0]
    assert json.loads(run("show", out, "--json")) == everything
    for name in ("a.png", "a.html"):
        run("plot", out, "--output", tmp_path / name, "--against", "state_size")
        assert (tmp_path / name).stat().st_size > 5000
    assert not list(out.rglob("*.ckpt")) + list(out.rglob("*.safetensors"))  # numbers stay, weights do not


def test_other_settings_in_one_folder_are_shown_apart(recipe, tmp_path):
    arguments = ("--output", tmp_path, "--model", "base-conv", "--set", "learning_rates=[0.01]", "--device", "cpu")
    for epochs in (1, 2):
        run("sweep", recipe, *arguments, "--set", f"epochs={epochs}")
    rows = json.loads(run("show", tmp_path, "--json"))
    assert [(row["seeds"], row["settings"]) for row in rows] == [(1, "epochs=1"), (1, "epochs=2")]
    run("plot", tmp_path, "--output", tmp_path / "a.png")
    table = (tmp_path / "results.csv").read_text()
    (tmp_path / "results.csv").write_text(table.replace('""epochs""', "epochs"))
    with pytest.raises(UserError, match=r"settings is .*no JSON"):
        run("show", tmp_path)


def test_the_same_point_gives_the_same_row(recipe, tmp_path):
    arguments = (
        "sweep",
        recipe,
        "--model",
        "attention",
        "--set",
        "learning_rates=[0.01]",
        "--device",
        "cpu",
        "--json",
    )
    rows = [json.loads(run(*arguments, "--output", tmp_path / name))[0] for name in "ab"]
    assert rows[0] | {"seconds": 0} == rows[1] | {"seconds": 0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sweep", "nothing"], "no such recipe file"),
        (["sweep", "toy", "--model", "transformer"], "the recipe has attention"),
        (["sweep", "toy", "--set", "train_power_a=1"], "unknown setting train_power_a"),
        (["sweep", "toy", "--set", "dims=[]"], "dims is empty"),
        (["sweep", "toy", "--set", "models={a: {mixers: [atention]}}"], "unknown mixer 'atention'"),
        (["sweep", "toy", "--set", "models={a: {mixer: [attention]}}"], "unknown setting mixer"),
        (["sweep", "toy", "--set", "vocab_size=16"], "vocab_size=16 must be larger"),
        (["show", "nowhere"], "no results of a recall sweep"),
    ],
)
def test_mistakes_end_in_one_line_before_any_training(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        run(*arguments)
    assert not list(tmp_path.rglob("*.csv"))


def test_every_recipe_that_comes_along_can_be_built():
    for name in cli.shipped_recipes(cli.RECIPES):
        recipe = cli.read_recipe(cli.recall.Recipe, name, folder=cli.RECIPES)
        smallest = min(min(m.get("dims", recipe.dims)) for m in recipe.models.values())
        points = {p.model: p for p in recipe.points() if p.dim <= max(smallest, 128)}
        assert set(points) == set(recipe.models), name
        for point in points.values():
            model = point.build()
            assert model.state_size(64) > 0


def test_recall_in_real_text(tmp_path):
    from nearfar.language.configuration import MixerConfig
    from nearfar.language.modeling import MixerForCausalLM
    from nearfar.language.texts import byte_tokenizer

    torch.manual_seed(0)
    for name, mixers in (("a", ["attention"]), ("b", ["base-conv"])):
        MixerForCausalLM(MixerConfig(vocab_size=259, hidden_size=16, mixers=mixers)).save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
    book = tmp_path / "book.txt"
    book.write_text("the cat saw the dog and the dog saw the cat. " * 20)
    out = run("text", tmp_path / "b", book, "--against", tmp_path / "a", "--context", 100, "--json")
    result = json.loads(out)
    b, a = result["models"]
    assert b["tokens"] == a["tokens"] == 900 - 9
    assert 0.5 < b["hit_share"] < 1
    assert 0 <= result["gap_explained"] <= 1
    with pytest.raises(UserError, match=r"none\.txt: no such file"):
        run("text", tmp_path / "a", tmp_path / "none.txt")
