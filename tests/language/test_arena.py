"""Long Range Arena: ListOps' distribution and values, readers, a short training."""

import json

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from nearfar.apps.language_model.cli import app
from nearfar.core.errors import UserError
from nearfar.language.arena import listops
from nearfar.language.arena.tasks import Part


def value_of(words):
    """The value of a list, by recursion over its words."""
    word = words.pop(0)
    if word.isdigit():
        return int(word)
    values = []
    while words[0] != "]":
        values.append(value_of(words))
    words.pop(0)
    assert 2 <= len(values) <= 10
    if word == "[MED":
        return int(np.median(values))
    return {"[MIN": min, "[MAX": max, "[SM": lambda v: sum(v) % 10}[word](values)


def depth_of(words):
    deepest = depth = 0
    for word in words:
        depth += (word[0] == "[") - (word == "]")
        deepest = max(deepest, depth)
    return deepest


def test_values_lengths_and_depths():
    found = list(listops.sequences(300, seed=3))
    assert len({ids.tobytes() for ids, _ in found}) == 300
    lengths = [len(ids) for ids, _ in found]
    assert min(lengths) > 500
    assert max(lengths) < 2000
    assert 950 < np.mean(lengths) < 1170  # about 1060 in the original
    for ids, value in found:
        words = listops.text_of(ids).split()
        assert depth_of(words) <= 9  # a tree of depth 10 ends in digits
        assert value_of(words) == value
        assert not words


def test_operators_and_children_are_uniform():
    found = np.concatenate([ids for ids, _ in listops.sequences(200, seed=1)])
    counts = np.bincount(found, minlength=len(listops.TOKENS))
    operators, digits = counts[1:5], counts[5:15]
    for part in (operators, digits):
        assert part.max() / part.min() < 1.1
    assert operators.sum() == counts[-1]


def test_small_trees_cover_every_length():
    found = list(listops.sequences(500, seed=0, min_length=0, max_length=9, max_depth=2))
    assert {len(ids) for ids, _ in found} == {4, 5, 6, 7, 8}
    assert all(value_of(listops.text_of(ids).split()) == value for ids, value in found)


def test_a_seed_gives_the_same_and_more_begins_alike():
    first, second = (list(listops.sequences(n, seed=5, batch=500)) for n in (5, 9))
    assert all(np.array_equal(a, b) and v == w for (a, v), (b, w) in zip(first, second))
    other = next(listops.sequences(1, seed=6, batch=500))[0]
    assert not np.array_equal(first[0][0], other)


@pytest.mark.parametrize("bad", [{"count": 0}, {"min_length": 10, "max_length": 11}, {"max_depth": 1}])
def test_impossible_sequences_are_refused(bad):
    with pytest.raises(ValueError, match="must be"):
        next(listops.sequences(**{"count": 1} | bad))
    with pytest.raises(ValueError, match="hardly any"):
        list(listops.sequences(2000, min_length=0, max_length=5, max_depth=2, batch=100))


@pytest.fixture(name="data")
def _data(tmp_path):
    listops.make(tmp_path, {"train": 6, "val": 4, "test": 3}, seed=0)
    return tmp_path


def test_listops_files_are_read_back(data):
    part = Part("listops", data, "val")
    assert len(part) == 4
    batch = part.collate([part[i] for i in range(4)])
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    (ids,), label = part[0]
    assert value_of(listops.text_of(ids).split()) == label
    path = data / "listops-1000" / "basic_val.tsv"
    lines = path.read_text().splitlines()
    original = "( ( ( [MAX 4 ) 3 ) ] )\t4"  # the original's parentheses
    path.write_text("\n".join([lines[0], original]) + "\n")
    assert listops.text_of(Part("listops", data, "val")[0][0][0]) == "[MAX 4 3 ]"


@pytest.mark.parametrize("wrong", ["[MAX 4 3 ]", "[MAX 4 3\t4", "[MAX 4 x ]\t4", "[MAX 4 3 ]\t44", "[MAX 4 3 ]\t4\t5"])
def test_files_that_are_cut_off_or_of_another_release_are_refused(data, wrong):
    path = data / "listops-1000" / "basic_test.tsv"
    path.write_text(path.read_text() + wrong)
    with pytest.raises(UserError, match=r"basic_test\.tsv: line 5.*another release"):
        Part("listops", data, "test")


def test_other_tasks_are_read(tmp_path):
    for part in ("train", "test"):
        for name, text in (("neg", "bad"), ("pos", "good")):
            folder = tmp_path / "aclImdb" / part / name
            folder.mkdir(parents=True)
            (folder / "0_1.txt").write_text(text)
    text = Part("text", tmp_path, "train")
    assert [(parts[0].tolist(), label) for parts, label in text] == [
        ([ord(c) + 1 for c in "bad"], 0),
        ([ord(c) + 1 for c in "good"], 1),
    ]
    (tmp_path / "tsv_data").mkdir()
    (tmp_path / "tsv_data" / "new_aan_pairs.eval.tsv").write_text("1.0\ta\tb\tone\ttwo words\n0.0\ta\tc\tone\tx\n")
    pairs = Part("retrieval", tmp_path, "val")
    batch = pairs.collate([pairs[0], pairs[1]])
    assert batch["second_ids"].shape == (2, 9)
    assert batch["labels"].tolist() == [1, 0]
    (tmp_path / "cifar-10-batches-bin").mkdir()
    rng = np.random.default_rng(0)
    for i in range(1, 6):
        rows = rng.integers(0, 256, (4, 3073), dtype=np.uint8)
        rows[:, 0] %= 10
        rows.tofile(tmp_path / "cifar-10-batches-bin" / f"data_batch_{i}.bin")
    images = [Part("image", tmp_path, part) for part in ("train", "val")]
    assert [len(part) for part in images] == [18, 2]
    batch = images[0].collate([images[0][0]])
    assert batch["input_ids"].shape == (1, 1024)
    assert "attention_mask" not in batch
    base = tmp_path / "pathfinder32" / "curv_contour_length_14"
    (base / "imgs" / "0").mkdir(parents=True)
    (base / "metadata").mkdir()
    rows = []
    for i in range(10):
        Image.fromarray(rng.integers(0, 256, (32, 32), dtype=np.uint8)).save(base / "imgs" / "0" / f"sample_{i}.png")
        rows.append(f"imgs/0 sample_{i}.png {i} {i % 2} 1 2 3")
    (base / "metadata" / "0.npy").write_text("\n".join(rows))
    assert [len(Part("pathfinder", tmp_path, part)) for part in ("train", "val", "test")] == [8, 1, 1]
    (base / "imgs" / "0" / "sample_3.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"sample_3\.png: is missing or empty"):
        for part in ("train", "val", "test"):
            Part("pathfinder", tmp_path, part)


def test_missing_files_say_what_to_do(tmp_path):
    for task in ("listops", "text", "retrieval", "image", "pathfinder", "pathx"):
        with pytest.raises(UserError, match=r"missing|no reviews"):
            Part(task, tmp_path, "train")


@pytest.mark.slow
def test_short_lists_are_learned_in_a_minute(tmp_path):
    """Ten points above the commonest class, on lists that took no part; 40 s of one core."""
    run = CliRunner().invoke
    sizes = ["--train", "20000", "--val", "1000", "--test", "1000"]
    made = run(
        app, ["lra", "make", str(tmp_path), *sizes, "--min-length", "10", "--max-length", "60", "--max-depth", "4"]
    )
    assert made.exit_code == 0, made.output
    arguments = ["--output", str(tmp_path / "m"), "--set", "model={hidden_size: 64, num_hidden_layers: 2}"]
    arguments += ["--set", "steps=600", "--set", "batch_size=32", "--set", "learning_rate=0.003", "--device", "cpu"]
    trained = run(app, ["lra", "train", str(tmp_path), *arguments])
    assert trained.exit_code == 0, trained.output
    scored = run(app, ["lra", "evaluate", str(tmp_path / "m"), str(tmp_path), "--json"])
    result = json.loads(scored.output[scored.output.index("{") :])
    assert result["accuracy"] > result["majority"] + 10


def test_lists_that_cannot_be_are_refused(tmp_path):
    shape = ["--min-length", "3000", "--max-length", "2000"]
    made = CliRunner().invoke(app, ["lra", "make", str(tmp_path), *shape])
    assert made.exit_code != 0
    assert "--min-length 3000" in str(made.exception)


def test_commands_make_train_and_evaluate(tmp_path):
    run = CliRunner().invoke
    made = run(app, ["lra", "make", str(tmp_path), "--train", "8", "--val", "4", "--test", "4"])
    assert made.exit_code == 0, made.output
    small = "model={hidden_size: 8, num_hidden_layers: 1}"
    arguments = ["--output", str(tmp_path / "m"), "--set", small, "--set", "steps=2", "--set", "batch_size=4"]
    trained = run(app, ["lra", "train", str(tmp_path), *arguments, "--device", "cpu", "--json"])
    assert trained.exit_code == 0, trained.output
    scored = run(app, ["lra", "evaluate", str(tmp_path / "m"), str(tmp_path), "--json"])
    assert scored.exit_code == 0, scored.output
    result = json.loads(scored.output[scored.output.index("{") :])
    assert result["examples"] == 4
    assert 0 <= result["accuracy"] <= 100
