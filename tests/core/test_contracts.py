"""Contracts: the files, the errors, `nearfar verify`."""

import json
import math
from importlib.metadata import entry_points

import numpy as np
import pytest
import torch

from nearfar.core.cli import root as cli
from nearfar.core.cli import verify
from nearfar.core.contracts import Contract, _positions, fill, relative_errors, shipped
from nearfar.core.errors import UserError


def write(folder, system="agtcnet", variant="v", **changes):
    """A contract of the function y = (x w, x) with one published weight."""
    content = {
        "system": system,
        "variant": variant,
        "settings": {},
        "inputs": [{"name": "x", "shape": [2, 3], "dist": "normal", "scale": 2.0}],
        "outputs": [{"name": "out.0", "shape": [2, 4]}, {"name": "out.1", "shape": [2, 3]}],
        "state": [
            {"name": "w.weight", "shape": [3, 4], "kind": "parameter"},
            {"name": "table", "shape": [5], "kind": "constant"},
        ],
    } | changes
    path = folder / f"{system}--{variant}.json"
    path.write_text(json.dumps(content))
    np.savez(path.with_suffix(".npz"))
    contract = Contract.load(path)
    x = contract.input_tensors()[0]
    outputs = {"out.0": x @ contract.state()["w.weight"], "out.1": x}
    np.savez(path.with_suffix(".npz"), **{k: v.double().flatten().numpy() for k, v in outputs.items()})
    return path


class Product(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x), x


def build(contract):
    model = Product(3, 4, bias=False)
    model.weight.data = contract.state()["w.weight"].T.contiguous()
    return model


def test_fill_depends_on_name_and_shape_alone():
    assert torch.equal(fill("a.weight", (3, 4)), fill("a.weight", (3, 4)))
    assert not torch.equal(fill("a.weight", (3, 4)), fill("b.weight", (3, 4)))
    assert (fill("bn.running_var", (100,)) > 0.5).all()
    assert fill("scale", ()).shape == ()


def test_agreement_and_each_kind_of_disagreement(tmp_path):
    contract = Contract.load(write(tmp_path))
    x = contract.input_tensors()
    good = build(contract)(*x)
    assert max(relative_errors(contract, good).values()) < 1e-6
    assert relative_errors(contract, (good[0] * 1.01, good[1]))["out.0"] == pytest.approx(0.01, rel=1e-3)
    assert relative_errors(contract, good[0])["out.0"] == math.inf, "an output is missing"
    assert relative_errors(contract, (good[0].T, good[1]))["out.0"] == math.inf, "the wrong shape"
    assert relative_errors(contract, (good[0] * float("nan"), good[1]))["out.0"] == math.inf
    assert "table" in contract.shapes
    assert "table" not in contract.state()


def test_a_setting_that_is_not_built_is_refused(tmp_path):
    contract = Contract.load(write(tmp_path, settings={"norm_eps": 1e-5}))
    contract.require(norm_eps=1e-5, bn_eps=1e-3)
    with pytest.raises(UserError, match=r"agtcnet--v\.json: norm_eps is 1e-05; agtcnet is built with 1e-06"):
        contract.require(norm_eps=1e-6)


def run_verify(monkeypatch, capsys, paths, builders, *options):
    points = {name: type("Point", (), {"name": name, "load": lambda self, b=b: b})() for name, b in builders.items()}
    original = entry_points
    monkeypatch.setattr(
        verify, "entry_points", lambda group: points.values() if group == "nearfar.contracts" else original(group=group)
    )
    status = cli.run(["verify", *map(str, paths), *options])
    return status, capsys.readouterr().out.splitlines()


def test_verify_prints_a_line_per_contract_and_a_sum(tmp_path, monkeypatch, capsys):
    good, unknown = write(tmp_path, "good"), write(tmp_path, "unknown")
    wrong, broken = write(tmp_path, "wrong"), write(tmp_path, "broken")

    def fail(contract):
        raise RuntimeError("does not build")

    builders = {"good": build, "wrong": lambda c: lambda x: (build(c)(x)[0] * 1.1, x), "broken": fail}
    status, lines = run_verify(monkeypatch, capsys, [good], builders)
    assert status == 0
    assert lines[0].startswith("good  v  out.")
    assert lines[0].endswith("  ok")
    assert lines[-1] == "1 ok, 0 failed, 0 unknown"
    status, lines = run_verify(monkeypatch, capsys, [good, wrong, broken, unknown], builders)
    assert status == 1
    assert [line.split()[-1] for line in lines[:-1]] == ["ok", "FAIL", "FAIL", "unknown"]
    assert "out.0  1.0e-01" in lines[1]
    assert "does not build" in lines[2]
    assert lines[-1] == "1 ok, 2 failed, 1 unknown"
    assert run_verify(monkeypatch, capsys, [wrong], builders, "--tolerance", "0.2")[0] == 0
    assert run_verify(monkeypatch, capsys, [good], builders, "--dtype", "float64")[0] == 0


def test_a_contract_may_bring_its_own_tolerance(tmp_path, monkeypatch, capsys):
    path = write(tmp_path, "wrong", tolerance=0.2)
    builders = {"wrong": lambda c: lambda x: (build(c)(x)[0] * 1.1, x)}
    assert run_verify(monkeypatch, capsys, [path], builders)[0] == 0


def test_bad_files_and_options_are_named(tmp_path, capsys):
    (tmp_path / "x.json").write_text("{}")
    (tmp_path / "y.json").write_text("no json")
    for path, message in [("x.json", "is no contract"), ("y.json", "cannot be read"), ("z.json", "cannot be read")]:
        with pytest.raises(UserError, match=message):
            Contract.load(tmp_path / path)
    write(tmp_path).with_suffix(".npz").unlink()
    with pytest.raises(UserError, match="recorded outputs are missing"):
        Contract.load(tmp_path / "agtcnet--v.json")
    assert cli.run(["verify", "--dtype", "int8"]) == 2
    assert "must be one of float32" in capsys.readouterr().err


def test_every_shipped_contract_has_a_builder():
    systems = {path.name.split("--")[0] for path in shipped()}
    assert len(systems) > 12
    assert systems <= {point.name for point in entry_points(group="nearfar.contracts")}


@pytest.mark.parametrize("count", [4097, 65536, 150528, 1204224])
def test_values_are_kept_at_the_same_places_on_every_processor(count: int) -> None:
    kept = _positions(count)
    assert (len(kept), kept[0], kept[-1]) == (4096, 0, count - 1)
    assert (np.diff(kept) >= 0).all()
    if torch.backends.cpu.get_cpu_capability() != "DEFAULT":
        np.testing.assert_array_equal(kept, torch.linspace(0, count - 1, 4096).round().long())
