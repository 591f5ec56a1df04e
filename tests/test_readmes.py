"""What the READMEs show works: Python runs on small data, commands and options exist, tables follow the cards."""

import importlib.util
import re
import shlex
from importlib.metadata import entry_points
from pathlib import Path

import nibabel
import numpy as np
import pytest
import soundfile
import torch
import typer.main
from transformers import Wav2Vec2FeatureExtractor, WavLMConfig, WavLMModel

REPOSITORY = Path(__file__).parents[1]
READMES = [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md")]
READMES += [*REPOSITORY.glob("*/README.md"), *REPOSITORY.glob("*/*/README.md")]

SMALLER = {
    '"eegmmidb/S001", preprocessing=Preprocessing.preset("eegmmidb")': '"finger-movements", preprocessing='
    'Preprocessing.preset("finger-movements")',
    "Recipe(roi=(64, 64, 64))": "Recipe(roi=(32, 32, 32), epochs=1, patches_per_epoch=2, "
    "settings={'features': [4, 4, 8, 8, 8, 4]})",
    "cases[:30]": "cases[:3]",
    "cases[30:41]": "cases[3:4]",
    'MossFormer.from_published("MossFormer2_SS_16K", sample_rate=16000)': "MossFormer(num_filters=24, dim=16, depth=1, "
    "group_size=32, query_key_dim=8, sample_rate=16000).eval()",
}
"""What a README says for real data -> the same for small data."""


def blocks(language):
    """(file, number, text) of every block of code in `language`."""
    for path in READMES:
        found = re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
        for i, text in enumerate(found):
            yield pytest.param(text, id=f"{path.parent.name}-{i}")


@pytest.fixture
def small_data(tmp_path, monkeypatch):
    """The files and names that the READMEs speak of."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    return {
        "waveforms": torch.randn(2, 16000),
        "lengths": torch.tensor([16000, 12000]),
        "mixtures": torch.randn(2, 16000),
        "samples": rng.standard_normal(22050).astype(np.float32),
        "microphone": rng.standard_normal((4, 8192)).astype(np.float32),
        "play": lambda block: block,
        "ids": torch.tensor([[5, 6, 7, 8]]),
        "more": torch.tensor([[9, 10]]),
        "names": [f"{speaker}/{i}.wav" for speaker in "abcdef" for i in range(4)],
        "x": rng.standard_normal((24, 8)) + np.repeat(3 * rng.standard_normal((6, 8)), 4, axis=0),
        "mean": np.zeros(8),
        "cohort": rng.standard_normal((300, 8)),
        "x_train": rng.standard_normal((40, 8)) + np.repeat(3 * rng.standard_normal((10, 8)), 4, axis=0),
        "speakers": np.repeat(np.arange(10), 4),
        "metric": lambda scores, labels, weights=None: float(np.average(scores[labels], weights=None)),
    }


def prepare(text, names):
    """Write the files that a block reads."""
    if "wavlm" in text:
        sizes = {"hidden_size": 32, "num_hidden_layers": 12, "num_attention_heads": 2, "intermediate_size": 48}
        WavLMModel(WavLMConfig(**sizes, num_conv_pos_embeddings=16)).save_pretrained("microsoft/wavlm-base-plus")
        Wav2Vec2FeatureExtractor().save_pretrained("microsoft/wavlm-base-plus")
    if "convnext_tiny" in text:
        from nearfar.vision import ConvNeXt

        state = ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)).state_dict()
        for name in ("convnext_tiny_1k_224_ema.pth", "checkpoint.pth"):
            torch.save({"model": state}, name)
    if "veri_test2" in text:
        each = names["names"]
        pairs = [(a, b) for i, a in enumerate(each) for b in each[i + 1 :]]
        Path("veri_test2.txt").write_text("".join(f"{int(a[0] == b[0])} {a} {b}\n" for a, b in pairs))
        names["enrol_speakers"] = np.array([a[0] for a, _ in pairs])
        names["test_speakers"] = np.array([b[0] for _, b in pairs])
    if "encoder.onnx" in text:
        from tests.audio.speakers.test_encoders import Bands

        sound = {"input_names": ["samples"], "dynamic_axes": {"samples": {1: "n"}}}
        torch.onnx.export(Bands(), (torch.zeros(1, 16000),), "encoder.onnx", dynamo=False, **sound)
        rng = np.random.default_rng(0)
        names["embeddings"] = rng.standard_normal((40, 16)) + 3 * names["speakers"][:, None] * np.eye(16)[3]
        syllables = np.clip(np.sin(np.arange(80000) * 0.002), 0, None)
        soundfile.write("meeting.wav", 0.1 * syllables * rng.standard_normal(80000), 8000)
    if "Task09" in text:
        rng = np.random.default_rng(0)
        for part in ("imagesTr", "labelsTr"):
            (Path("Task09_Spleen") / part).mkdir(parents=True)
        for i in range(4):
            image = rng.standard_normal((20, 20, 20)).astype(np.float32)
            image[5:12, 5:12, 5:12] += 3
            for part, values in (("imagesTr", image), ("labelsTr", (image > 2).astype(np.uint8))):
                nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), f"Task09_Spleen/{part}/spleen_{i}.nii.gz")
        Path("Task09_Spleen/dataset.json").write_text(
            '{"name": "Spleen", "labels": {"0": "background", "1": "spleen"}, "modality": {"0": "CT"}, "training": ['
            + ", ".join(
                f'{{"image": "./imagesTr/spleen_{i}.nii.gz", "label": "./labelsTr/spleen_{i}.nii.gz"}}'
                for i in range(4)
            )
            + "]}"
        )
        nibabel.save(nibabel.Nifti1Image(image, np.eye(4)), "patient.nii.gz")


@pytest.mark.parametrize("text", blocks("python"))
def test_python_runs(text, small_data):
    for whole, small in SMALLER.items():
        text = text.replace(whole, small)
    prepare(text, small_data)
    exec(compile(text, "README.md", "exec"), small_data)


def commands():
    for path in READMES:
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        for block in re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            for line in block.splitlines():
                start = r"\s*(\$ |[A-Z_]+=\S+ |torchrun .*--no-python |srun .* )?"
                if found := re.match(rf"{start}(nearfar [a-z-]+ [a-z].*)", line):
                    yield pytest.param(found[2], id=line.strip()[:60])


@pytest.mark.parametrize("line", commands())
def test_commands_and_options_exist(line):
    words = shlex.split(re.split(r"\s{2,}|\s#", re.sub(r"^(nearfar [a-z-]+ [a-z]+)\s+", r"\1 ", line))[0])
    app = {point.name: point for point in entry_points(group="nearfar.apps")}[words[1]].load()
    command, rest = typer.main.get_command(app).commands[words[2]], words[3:]
    while hasattr(command, "commands"):
        command, *rest = command.commands[rest[0]], *rest[1:]
    options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    asked = {word for word in rest if re.match(r"--?[a-z]", word)}
    assert asked <= options, f"{asked - options} of {line}"


def test_tables_are_made_from_the_cards():
    spec = importlib.util.spec_from_file_location("tables", REPOSITORY / ".ci/tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    seen = 0
    for path in tables.readmes():
        text = path.read_text(encoding="utf-8")
        seen += text.count("<!-- table ")
        assert tables.rewritten(text) == text, f"{path}: run `python .ci/tables.py`"
    assert seen == len(tables.TABLES)
