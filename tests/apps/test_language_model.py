"""`nearfar language-model` from its command line."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from nearfar.apps.language_model import cli
from nearfar.apps.recall.cli import app as recall_app
from nearfar.core.errors import UserError
from nearfar.core.report import Report
from nearfar.language import registry
from nearfar.language.evaluation import ngram_bits


def run(*arguments, status=0):
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status
    return result.stdout


@pytest.fixture(scope="module", name="trained")
def _trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm")
    (folder / "book.txt").write_text("she sells sea shells by the sea shore. " * 120)
    arguments = ["train", folder / "book.txt", "--output", folder / "model", "--device", "cpu", "--json"]
    for setting in (
        "mixers=[base-conv,based]",
        "hidden_size=32",
        "num_hidden_layers=2",
        "context=48",
        "epochs=2",
        "batch_size=1",
        "warmup=10",
    ):
        arguments += ["--set", setting]
    return folder, arguments, json.loads(run(*arguments))


def test_training_reports_and_a_second_call_trains_nothing(trained):
    _, arguments, result = trained
    assert result["epochs"] == 2
    assert result["bits_per_token"] < 4
    assert json.loads(run(*arguments))["history"] == result["history"]


def test_evaluate_with_a_5_gram(trained):
    folder, _, _ = trained
    result = json.loads(
        run("evaluate", folder / "model", folder / "book.txt", "--ngram", folder / "book.txt", "--json")
    )
    assert result["bytes"] == 39 * 120 - 1
    assert 0 < result["5-gram_bits_per_byte"] < result["bits_per_byte"] < 4
    part = ("evaluate", folder / "model", folder / "book.txt", "--ngram", folder / "book.txt", "--max-tokens", 50)
    ends = json.loads(run(*part, "--json"))  # the n-gram is scored on the same bytes
    first = np.frombuffer((folder / "book.txt").read_bytes(), np.uint8).astype(np.int64)
    assert ends["5-gram_bits_per_byte"] == pytest.approx(ngram_bits(first, first[:50], 256))
    alone = json.loads(run("evaluate", folder / "model", folder / "book.txt", "--no-carry", "--piece", 20, "--json"))
    assert alone["bits_per_byte"] > result["bits_per_byte"]


def test_a_text_read_once_is_asked_many_times(trained):
    folder, _, _ = trained
    model, book, state = folder / "model", folder / "book.txt", folder / "state.safetensors"
    run("generate", model, "--read", book, "--save-state", state, "--max-new-tokens", 0)
    ask = ("generate", model, "she ", "--max-new-tokens", 30, "--temperature", 0)
    once = run(*ask, "--read", book)
    assert once.startswith("she ")
    assert run(*ask, "--load-state", state) == run(*ask, "--load-state", state) == once


def test_the_state_of_another_model_is_refused(trained, tmp_path):
    folder, arguments, _ = trained
    run(
        "generate",
        folder / "model",
        "--read",
        folder / "book.txt",
        "--save-state",
        tmp_path / "s",
        "--max-new-tokens",
        0,
    )
    other = [str(a).replace(str(folder / "model"), str(tmp_path / "other")) for a in arguments]
    run(*other, "--set", "seed=1", "--set", "epochs=1")
    with pytest.raises(UserError, match="state of another model"):
        run("generate", tmp_path / "other", "she ", "--load-state", tmp_path / "s")


def test_audit_of_ours_passes(trained):
    folder, _, _ = trained
    rows = json.loads(run("audit", folder / "model", "--json"))
    assert {row["verdict"] for row in rows if "compile" not in row["check"]} == {"ok"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "none.txt", "--output", "x"], "no such file"),
        (["train", "book.txt", "--output", "x", "--set", "mixers=[atention]"], "unknown mixer 'atention'"),
        (["train", "book.txt", "--output", "x", "--set", "width=3"], "unknown setting width"),
        (["train", "book.txt", "--output", "x", "--set", "context=100000"], "use more text"),
        (["evaluate", "no/such/model", "book.txt"], "no/such/model: no such file or folder"),
        (["evaluate", "model"], "name texts to score"),
        (["generate", "model"], "prompt"),
        (["generate", "model", "a", "--load-state", "book.txt"], "no saved state"),
        (["generate", "model", "a", "--top-p", "0"], "--top-p"),
    ],
)
def test_mistakes_end_in_one_line(trained, arguments, message, monkeypatch):
    monkeypatch.chdir(trained[0])
    with pytest.raises(UserError, match=message) as error:
        run(*arguments)
    assert "\n" not in str(error.value)


OWN = """
import torch
from torch import nn
from nearfar.language.cards import Mixer
from nearfar.ops.common.streaming import StreamingMixer

class Late(StreamingMixer):
    def __init__(self, dim):
        super().__init__()
        self.map = nn.Linear(2 * dim, dim)

    def forward(self, x):
        return self.extend(x)[0]

    def extend(self, x, state=None, lengths=None):
        late = torch.cat([x.new_zeros(len(x), 1, x.shape[2]) if state is None else state[0], x], 1)
        return self.map(torch.cat([late[:, :-1], x], 2)), (late[:, -1:],)

    def state_size(self, length):
        return self.map.out_features

MIXERS = {"late": Mixer(Late, "d")}
"""


def test_a_mixer_of_ones_own(tmp_path):
    own, book = tmp_path / "own.py", tmp_path / "book.txt"
    own.write_text(OWN)
    book.write_text("she sells sea shells by the sea shore. " * 60)
    arguments = ["train", book, "--output", tmp_path / "model", "--device", "cpu"]
    for setting in ("mixers=[late]", "hidden_size=8", "num_hidden_layers=1", "context=32", "epochs=1"):
        arguments += ["--set", setting]
    with pytest.raises(UserError, match="unknown mixer 'late'"):
        run(*arguments)
    try:
        run("--import", own, *arguments)
        assert "bits_per_byte" in run("--import", own, "evaluate", tmp_path / "model", book, "--json")
        swept = ["sweep", "toy", "--output", tmp_path / "r", "--device", "cpu"]
        for setting in ("models={late: {mixers: [late]}}", "epochs=1", "dims=[8]"):
            swept += ["--set", setting]
        result = CliRunner().invoke(recall_app, [str(word) for word in ("--import", own, *swept)])
        assert result.exit_code == 0, result.output
    finally:
        registry.MIXERS.pop("late", None)
        registry.IMPORTED.clear()
    for content, message in (
        ("MIXERS = 3 +", "cannot be imported"),
        ("a = 1", "no table"),
        ("MIXERS = {1: 2}", "no nearfar"),
    ):
        own.write_text(content)
        with pytest.raises(UserError, match=message):
            run("--import", own, *arguments)


def test_a_mixer_of_an_installed_package(tmp_path):
    """In a process of its own: packages are looked for once."""
    (tmp_path / "own.py").write_text(OWN)
    info = tmp_path / "own-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: own\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[nearfar.mixers]\nown = own\n")
    code = "from nearfar.language.registry import MIXERS; print(MIXERS['late'].operator.__module__)"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "own", done.stderr


def test_the_chapter_of_the_tour(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "topics", {"a": "she sells sea shells by the sea shore. " * 300})
    report = Report("tour")
    cli.tour(report, tmp_path)
    page = report.write(tmp_path / "page.html").read_text()
    assert "byte 5-gram (Kneser-Ney)" in page
    assert "right-padded prefill, then steps" in page
    assert "FAIL" not in page
