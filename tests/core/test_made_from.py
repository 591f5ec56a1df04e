"""Results count as done only where they were made from the same."""

import numpy as np
import pytest

from nearfar.core.errors import UserError
from nearfar.core.fingerprint import data_digest
from nearfar.core.made_from import MadeFrom, model_digest


@pytest.fixture
def made(tmp_path):
    source, target = tmp_path / "scan.nii", tmp_path / "out" / "scan_seg.nii"
    source.write_text("scan")

    def make(model="m", **options):
        return MadeFrom(target, [source], model, **{"overlap": 0.5} | options)

    target.parent.mkdir()
    target.write_text("labels")
    make().write()
    return source, target, make


def test_the_same_is_done(made):
    _, target, make = made
    assert make().done()
    target.unlink()
    assert not make().done()


def test_other_input_model_or_options_are_done_again(made):
    source, _, make = made
    assert not make("n").done()
    assert not make(overlap=0.25).done()
    source.write_text("another")
    assert not make().done()


def test_work_of_others_is_not_overwritten(made):
    _, target, make = made
    target.write_text("corrected by hand")
    assert make().done()
    with pytest.raises(UserError, match="was made from other model and changed by hand"):
        make("n").done()
    make().record.unlink()
    with pytest.raises(UserError, match="nothing tells what it was made from"):
        make().done()


def test_digest_of_a_model_follows_its_files(tmp_path):
    (tmp_path / "model.safetensors").write_text("a")
    (tmp_path / "report.html").write_text("a")
    first = model_digest(tmp_path)
    (tmp_path / "report.html").write_text("b")
    assert model_digest(tmp_path) == first
    (tmp_path / "model.safetensors").write_text("bb")
    assert model_digest(tmp_path) != first


def test_addresses_are_no_content() -> None:
    """Generators of random numbers show theirs in capital letters."""

    class Holds:
        def __init__(self) -> None:
            self.random, self.other = np.random.RandomState(0), object()

    first = Holds()
    assert data_digest(first) == data_digest(Holds())
    first.other = 1
    assert data_digest(first) != data_digest(Holds())
