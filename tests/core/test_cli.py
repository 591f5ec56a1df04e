"""The root command: apps, errors, exit statuses, batches, the tour."""

import io
import json
import os
import re
import signal
import sys
import time

import pytest
import typer

from nearfar.core.cli import console as console_module
from nearfar.core.cli import doctor as doctoring
from nearfar.core.cli import root as cli
from nearfar.core.cli import tour as tours
from nearfar.core.cli.batch import BatchError, raise_failures, run_batch
from nearfar.core.cli.console import PlainConsole, progress, say, table
from nearfar.core.errors import UserError
from nearfar.core.report import Report


class Distribution:
    metadata = {"Summary": "Do a thing."}


class Point:
    def __init__(self, name, target):
        self.name, self.target, self.dist = name, target, Distribution()

    def load(self):
        if isinstance(self.target, Exception):
            raise self.target
        return self.target


@pytest.fixture
def install(monkeypatch):
    """Install entry points for one test: `install({"nearfar.apps": {name: typer app}})`."""

    def do(groups):
        points = {group: [Point(*item) for item in content.items()] for group, content in groups.items()}
        for module in (cli, tours):
            monkeypatch.setattr(module, "entry_points", lambda group: points.get(group, []))

    return do


def make_app(action):
    app = typer.Typer()
    app.callback()(lambda: None)
    app.command("go")(action)
    return app


def test_version_and_help_list_apps_without_importing_them(install, capsys):
    install({"nearfar.apps": {"thing": ImportError("must not be imported")}})
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("nearfar ")
    assert cli.run(["--help"]) == 0
    out = capsys.readouterr().out
    assert "thing" in out
    assert "Do a thing." in out


def test_app_that_cannot_be_imported_is_one_line(install, capsys):
    install({"nearfar.apps": {"thing": OSError("libcudart.so.13: cannot open\nmore")}})
    assert cli.run(["thing", "go"]) == 2
    assert "thing: cannot be imported here (libcudart.so.13: cannot open)" in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (UserError("a.edf: truncated; copy it again"), 2, "error: a.edf: truncated; copy it again"),
        (BatchError("1 of 2 failed"), 1, "error: 1 of 2 failed"),
        (RuntimeError("boom"), 1, "unexpected error: RuntimeError: boom (--debug shows where)"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_become_a_line_and_a_status(install, capsys, error, status, text):
    def go():
        raise error

    install({"nearfar.apps": {"thing": make_app(go)}})
    assert cli.run(["thing", "go"]) == status
    assert text in capsys.readouterr().err
    if isinstance(error, Exception):
        with pytest.raises(type(error)):
            cli.run(["thing", "go", "--debug"])


def test_wrong_usage_is_status_2(install, capsys):
    install({"nearfar.apps": {"thing": make_app(lambda: None)}})
    assert cli.run(["thing", "stay"]) == 2
    assert cli.run(["nothing"]) == 2
    assert cli.run(["thing", "go"]) == 0


def test_batch_goes_on_and_lists_failures():
    def action(item):
        if item % 2:
            raise UserError(f"item {item}: odd")
        return item * 10

    results, failures = run_batch(range(4), action, "numbers", name=lambda item: f"item {item}")
    assert results == [0, 20]
    assert failures == ["item 1: odd", "item 3: odd"]
    raise_failures([], 4)
    with pytest.raises(BatchError, match=r"2 of 4 failed:\n  item 1: odd\n  item 3: odd"):
        raise_failures(failures, 4)
    with pytest.raises(UserError, match=r"^item 1: odd$") as error:
        raise_failures(failures[:1], 1)
    assert not isinstance(error.value, BatchError)


class Odd(Exception):
    pass


def fail(text):
    raise UserError(text)


@pytest.mark.parametrize(
    "error", [OSError("no"), MemoryError("big"), KeyError("a"), RecursionError("deep"), Odd("[/]")]
)
def test_a_batch_goes_on_past_any_failure_and_puts_the_name_first(error):
    def action(item):
        if item == "b.wav":
            raise error
        return item

    results, failures = run_batch(["a.wav", "b.wav", "c.wav"], action, "files")
    assert results == ["a.wav", "c.wav"]
    assert len(failures) == 1
    assert failures[0].startswith(f"b.wav: {type(error).__name__}: ")


def test_the_name_stands_first_though_the_message_has_it():
    def action(item):
        raise UserError(f"the file {item} is odd\nand so on")

    assert run_batch(["x.wav"], action, "files")[1] == ["x.wav: the file x.wav is odd\\nand so on"]


@pytest.mark.parametrize("text", ["[/]", "[red]x[/red]", ":smile:", "[link=http://a]b[/link]", "[bold", "a[/b]c"])
def test_no_console_reads_markup(text, monkeypatch, install, capsys):
    for shown, what in [
        (lambda c: c.print(text), text),
        (lambda c: c.print(table([{text: text}], title=text)), text),
        (lambda c: say("left out:", text), text),
    ]:
        stream = io.StringIO()
        plain = PlainConsole(file=stream, width=80)
        monkeypatch.setattr(console_module, "errors", plain)
        shown(plain)
        assert what in stream.getvalue()
    install({"nearfar.apps": {"thing": make_app(lambda: fail(f"{text}: odd"))}})
    assert cli.run(["thing", "go"]) == 2
    assert text in stream.getvalue()


def test_control_characters_reach_no_terminal(install, capsys):
    nasty = "a\x1b[31mred\x1b]0;title\x07\x9b2J\x08\r\u202eb"
    stream = io.StringIO()
    PlainConsole(file=stream, width=200, force_terminal=True, color_system=None).print(nasty, table([{"n": nasty}]))
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", stream.getvalue())
    with progress() as bar:
        bar.add_task("[/]")  # would raise if it were read as markup
    assert "a[31mred]0;title2Jb" in stream.getvalue()
    install({"nearfar.apps": {"thing": make_app(lambda: fail(nasty))}})
    assert cli.run(["thing", "go"]) == 2
    assert "\x1b" not in capsys.readouterr().err


def test_tour_runs_chapters_and_writes_one_page(install, tmp_path, capsys):
    def chapter(report: Report, folder):
        (folder / "a.txt").write_text("a")
        report.section("A chapter").text("a < b")

    install({"nearfar.tour": {"one": chapter, "two": chapter}})
    assert cli.run(["tour", "--output", str(tmp_path / "t")]) == 0
    page = (tmp_path / "t" / "index.html").read_text()
    assert page.count(">A chapter</h2>") == 2
    assert "a &lt; b" in page
    assert cli.run(["tour", "--only", "three"]) == 2
    assert "installed are one, two" in capsys.readouterr().err


def test_tour_goes_on_past_a_chapter_that_fails(install, tmp_path, capsys):
    def broken(report: Report, folder):
        report.section("Broken")
        raise RuntimeError("out of luck")

    def good(report: Report, folder):
        report.section("Good")

    install({"nearfar.tour": {"a-broken": broken, "good": good}})
    assert cli.run(["tour", "--output", str(tmp_path)]) == 1
    assert "a-broken: RuntimeError: out of luck" in capsys.readouterr().err
    page = (tmp_path / "index.html").read_text()
    assert "This chapter did not finish: out of luck" in page
    assert ">Good</h2>" in page
    assert cli.run(["tour", "--output", str(tmp_path), "--only", "a-broken"]) == 2


def test_main_ends_with_the_status(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["nearfar", "verify", "/nonexistent"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_a_signal_ends_a_command_in_order(install, capsys, tmp_path, request, number, status):
    usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    was = signal.signal(number, usual)  # what runs in the background, or by nohup, ignores some of them
    request.addfinalizer(lambda: signal.signal(number, was))

    def go():
        try:
            os.kill(os.getpid(), number)
            time.sleep(10)
        finally:
            (tmp_path / "tidied").touch()

    install({"nearfar.apps": {"thing": make_app(go)}})
    assert cli.run(["thing", "go"]) == status
    assert (tmp_path / "tidied").exists()
    assert "interrupted" in capsys.readouterr().err
    assert signal.getsignal(number) == usual


def test_doctor_tells_of_the_machine_and_its_checks(install, capsys, monkeypatch):
    install({})
    monkeypatch.setattr(doctoring, "entry_points", lambda group: [Point("broken", ImportError("no wheels"))])
    assert cli.run(["doctor", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert {"python", "torch", "oneDNN"} <= set(found["environment"])
    assert "cpu" in found["devices"]
    assert found["memory"]["this process"].endswith("GB")
    assert found["batches"]["memory://"] == "fsspec"
    assert {"--engine ray", "s3://", "gs://"} <= set(found["batches"])
    results = {row["check"]: row["result"] for row in found["checks"]}
    assert results["bfloat16 convolutions on the CPU"].startswith("ok, error ")
    assert results["broken imports"].startswith("FAIL")
    monkeypatch.setattr(doctoring, "entry_points", lambda group: [])
    assert cli.run(["doctor"]) == 0
    assert "Fourier transforms" in capsys.readouterr().out
