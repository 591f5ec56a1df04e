"""Recipes: what is read, and what is refused by file, line and name."""

import dataclasses
import time
from typing import Any, Literal

import pytest

from nearfar.core.errors import UserError
from nearfar.core.recipes import find_recipe, read_recipe


@dataclasses.dataclass
class Crop:
    size: int = 32


@dataclasses.dataclass
class Recipe:
    lr: float = 1e-3
    epochs: int = 10
    roi: tuple[int, ...] = (64, 64)
    window: tuple[float, float] | None = None
    schedule: str | dict[str, Any] = "cosine"
    head: Literal["linear", "mlp"] = "linear"
    flip: bool = False
    tune: int | str = 0
    crop: Crop = dataclasses.field(default_factory=Crop)
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.epochs < 1:
            raise ValueError(f"epochs must be at least 1, got {self.epochs}")


def test_file_overrides_and_defaults(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("lr: 1e-2\nepochs: 5\nroi: [3, 4]\nwindow: [1, 2.5]\nschedule: {step: 3}\ncrop: {size: 8}\n")
    found = read_recipe(Recipe, path, ["epochs=7", "options={x: 1e-3}", "tune=all", "flip=true"])
    assert found == Recipe(0.01, 7, (3, 4), (1.0, 2.5), {"step": 3}, "linear", True, "all", Crop(8), {"x": 0.001})
    assert isinstance(found.window[0], float)
    assert read_recipe(Recipe, None, ["lr=1", "lr=5e-4"]) == Recipe(5e-4)  # the last counts
    assert read_recipe(Recipe) == Recipe()
    path.write_text("")
    assert read_recipe(Recipe, path) == Recipe()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: 1\n# more\nlr: 2", r"recipe.yaml, line 3, lr: is there twice"),
        ("options:\n  a: 1\n  a: 2", r"line 3, options.a: is there twice"),
        ("\nlr: fast", r"line 2, lr: must be a number, got 'fast'"),
        ("epochs: 1.5", r"line 1, epochs: must be a whole number, got 1.5"),
        ("epochs: true", r"epochs: must be a whole number, got true"),
        ("flip: 1", r"flip: must be true or false, got 1"),
        ("roi:\n- 1\n- x", r"line 3, roi\[1\]: must be a whole number, got 'x'"),
        ("roi: 3", r"roi: must be a list"),
        ("window: [1, 2, 3]", r"window: must be a list of 2 values"),
        ("window: [1, .inf]", r"window\[1\]: must be a finite number"),
        ("lr: .nan", r"lr: must be a finite number"),
        ("lr: 1" + "0" * 400, r"lr: must be a finite number"),
        ("options:\n  a:\n  - 1\n  - -.inf", r"line 4, options.a\[1\]: must be a finite number"),
        ("head: tree", r"head: must be linear or mlp, got 'tree'"),
        ("schedule: 3", r"schedule: must be text or a mapping"),
        ("tune:", r"tune: must be a whole number or text, got nothing"),
        ("crop: {siz: 3}", r"line 1, crop.siz: unknown setting siz; near are size"),
        ("crop: {size: big}", r"crop.size: must be a whole number"),
        ("epoch: 1", r"line 1, epoch: unknown setting epoch; near are epochs; known are lr, epochs"),
        ("lr: 1\nepochs: 0", r"line 2, epochs: epochs must be at least 1, got 0"),
        ("epochs: 010", r"epochs: 010 is read in another base"),
        ("epochs: 1:30", r"epochs: 1:30 is read in another base"),
        ("options: {day: 2020-01-01}", r"options.day: .*no plain value"),
        ("lr: !!python/object:os.system x", r"line 1, lr: .*no plain value"),
        ("- 1", r"recipe.yaml: a recipe is a list of `name: value`"),
        ("lr: 1\nroi: [", r"line 2: cannot be read as a YAML recipe"),
        ("lr: 1\n---\nlr: 2", r"cannot be read as a YAML recipe"),
        ("options: &a [*a]", r"are there aliases"),
        ("[" * 5000, r"nested too deeply"),
        ("x" * (1 << 19), r"has more than 256 kB"),
    ],
)
def test_what_is_wrong_in_a_file_is_named_with_its_line(tmp_path, text, message):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        read_recipe(Recipe, tmp_path / "recipe.yaml")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["epochs"], r"^--set epochs: an override is written name=value"),
        (["epochs=0"], r"^--set epochs=0: epochs must be at least 1"),
        (["lr=x"], r"^--set lr=x: must be a number, got 'x'"),
        (["options={a: {b: .nan}}"], r"^--set options={a: {b: .nan}}: a.b: must be a finite number"),
        (["roi=[1"], r"^--set roi=\[1: the value cannot be read as YAML"),
        (["epocs=1"], r"^--set epocs=1: unknown setting epocs; near are epochs"),
    ],
)
def test_what_is_wrong_in_an_override_is_named_as_such(tmp_path, overrides, message):
    (tmp_path / "recipe.yaml").write_text("epochs: 3")
    with pytest.raises(UserError, match=message):
        read_recipe(Recipe, tmp_path / "recipe.yaml", overrides)


def test_aliases_that_multiply_are_bounded(tmp_path):
    lines = ["a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]" for old, new in zip("abcdefgh", "bcdefghi")]
    (tmp_path / "recipe.yaml").write_text("\n".join(lines))
    started = time.monotonic()
    with pytest.raises(UserError, match="are there aliases"):
        read_recipe(Recipe, tmp_path / "recipe.yaml")
    assert time.monotonic() - started < 30  # ten thousand million values would take hours


def test_bytes_that_are_no_text_and_missing_settings(tmp_path):
    (tmp_path / "recipe.yaml").write_bytes(b"lr: \xff\xfe")
    with pytest.raises(UserError, match=r"recipe.yaml: cannot be read"):
        read_recipe(Recipe, tmp_path / "recipe.yaml")

    @dataclasses.dataclass
    class Needs:
        data: str
        model: str

    with pytest.raises(UserError, match="lacks data"):
        read_recipe(Needs, None, ["model=a"])


def test_recipes_are_found_by_name_or_path(tmp_path, monkeypatch):
    folder = tmp_path / "shipped"
    folder.mkdir()
    (folder / "small.yaml").write_text("epochs: 2")
    (tmp_path / "small").write_text("epochs: 3")
    monkeypatch.chdir(tmp_path)
    assert read_recipe(Recipe, "small", folder=folder).epochs == 2
    assert read_recipe(Recipe, "./small", folder=folder).epochs == 3
    assert find_recipe(None, folder) is None
    with pytest.raises(UserError, match=r"smal: no such recipe file, and none that comes along; those are small"):
        find_recipe("smal", folder)
    with pytest.raises(UserError, match="name a YAML file"):
        find_recipe("small.yaml")
    with pytest.raises(UserError, match="is a folder"):
        find_recipe("shipped", folder)
