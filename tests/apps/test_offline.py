"""No command opens a connection unless it is asked to: each app trains and is used in a process without network."""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from nearfar.core.cli import root as cli
from nearfar.core.errors import UserError
from tests.apps.jobs import JOBS

BLOCKED = """
import json, socket, sys, time

asked = []

def refuse(what):
    def call(*arguments, **_):
        asked.append(f"{what} {arguments[-1] if what != 'getaddrinfo' else arguments[0]}")
        raise OSError("the network is blocked")
    return call

def guard(what):
    real = getattr(socket.socket, what)
    def call(self, address):
        local = self.family == getattr(socket, "AF_UNIX", None) or str(address[0]).startswith(("127.", "::1"))
        return real(self, address) if local else refuse(what)(address)
    return call

for name in ("connect", "connect_ex"):
    setattr(socket.socket, name, guard(name))
for name in ("getaddrinfo", "gethostbyname", "create_connection"):
    setattr(socket, name, refuse(name))

from nearfar.core.cli.root import run

for command in json.loads(sys.argv[1]):
    asked.clear()
    started = time.monotonic()
    status = run(command)
    print(json.dumps([status, asked, time.monotonic() - started, command]), file=sys.stderr, flush=True)
"""
REPOSITORY = Path(__file__).parents[2]
QUICK = ("language-model", "lra", "recall")


def run_blocked(commands: list[list[str]], folder: Path) -> list[tuple[int, list[str], list[str]]]:
    """Status, connections asked for and command of each, run one after the other in one process."""
    variables = {name: value for name, value in os.environ.items() if "OFFLINE" not in name}
    variables |= {"HF_HOME": str(folder / "hf"), "MNE_DATA": str(folder / "mne"), "TORCH_HOME": str(folder / "torch")}
    process = subprocess.run(
        [sys.executable, "-c", BLOCKED, json.dumps(commands)],
        capture_output=True,
        text=True,
        env=variables,
        timeout=900,
    )
    rows = [json.loads(line) for line in process.stderr.splitlines() if line.startswith("[")]
    assert len(rows) == len(commands), process.stderr[-3000:]
    for status, asked, seconds, command in rows:
        print(f"{seconds:5.1f} s, status {status}, {asked}: {' '.join(command)[:100]}")
    return [(status, asked, process.stderr) for status, asked, *_ in rows]


@pytest.mark.ci
@pytest.mark.parametrize(
    "names",
    [pytest.param(QUICK, id="quick"), *(pytest.param((n,), id=n) for n in JOBS if n not in QUICK)],
)
def test_training_and_use_ask_for_no_connection(names, tmp_path):
    commands = []
    for name in names:
        job, data, out = JOBS[name], tmp_path / name / "data", tmp_path / name / "out"
        if job.app not in entry_points(group="nearfar.apps").names:
            pytest.skip(f"{job.app} is not installed")
        data.parent.mkdir()
        commands += [job.train(job.make(data), out, 1), *job.use(data, out)]
    for (status, asked, said), command in zip(run_blocked(commands, tmp_path), commands, strict=True):
        assert asked == [], command
        assert status == 0, f"{command}\n{said[-3000:]}"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("evaluate gpt2 TEXT", "gpt2: no such file or folder; to take a model of the Hugging Face hub write hub:gpt2"),
        ("train TEXT -o OUT --set tokenizer=gpt2", "to take a tokenizer of the Hugging Face hub write hub:gpt2"),
        ("evaluate MODEL my/corpus", "to take a corpus of the Hugging Face hub write hub:my/corpus"),
        ("evaluate ./nowhere TEXT", "./nowhere: no such file or folder"),
        ("evaluate hub:../secrets TEXT", "hub:../secrets: is no name of the hub"),
        ("evaluate MODEL --task lambada_openai", "write --task hub:lambada_openai"),
        ("evaluate hub:some/model TEXT", "HF_HUB_OFFLINE is set, so only what was fetched before can be had"),
    ],
)
def test_what_is_no_path_must_be_asked_for(command, message, tmp_path, monkeypatch, capsys):
    import huggingface_hub.constants

    from nearfar.language import MixerConfig, MixerForCausalLM

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "text.txt").write_text("one two three " * 100)
    places = {"TEXT": tmp_path / "text.txt", "OUT": tmp_path / "out", "MODEL": tmp_path / "model"}
    if "MODEL" in command:
        MixerForCausalLM(MixerConfig(vocab_size=259, hidden_size=8, mixers=["base-conv"])).save_pretrained(
            places["MODEL"]
        )
    assert cli.run(["language-model", *(str(places.get(word, word)) for word in command.split())]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert message in said
    assert "hub:./" not in said


def test_weights_of_networks_must_be_asked_for():
    from nearfar.medical.networks import create_network

    for name, settings in (("macmd", {"pretrained": True}), ("smp.Unet", {"encoder_weights": "imagenet"})):
        with pytest.raises(UserError, match=r"would fetch weights .* write .*=hub:"):
            create_network(name, 2, 3, 2, settings)
    create_network("smp.Unet", 2, 3, 2, {"encoder_name": "resnet18", "encoder_weights": "hub:imagenet"}, fetch=False)


def test_no_code_of_others_is_run():
    sources = [p for part in ("shared", "packages", "apps") for p in (REPOSITORY / part).rglob("*.py")]
    assert len(sources) > 100
    for path in sources:
        assert not re.search(r"trust_remote_code\W+(?!=?False)\w", path.read_text(encoding="utf-8")), path
