"""The survey's table says what is there, and the calls in it run."""

import ast
import re
from pathlib import Path

import pytest
import torch

from nearfar.medical.state_space_survey import AXES, TAXONOMY, page
from nearfar.ops.recurrence.directional_mamba import SS2D

README = Path(__file__).parents[2] / "packages" / "medical" / "README.md"


def test_every_row_is_said_once_and_the_page_is_the_data():
    assert len({row.name for row in TAXONOMY}) == len(TAXONOMY)
    assert {row.status for row in TAXONOMY} == {"implemented", "composable", "absent"}
    assert all(bool(row.how) == (row.status != "absent") for row in TAXONOMY)
    assert page() in README.read_text(encoding="utf-8")
    assert len(AXES) == 7


def test_modules_in_the_table_exist():
    for row in TAXONOMY:
        if row.how.startswith("nearfar."):
            module, _, rest = row.how.split("(")[0].rpartition(".")
            assert hasattr(__import__(module, fromlist=[rest]), rest), row


@pytest.mark.parametrize("how", [row.how for row in TAXONOMY if row.how.startswith("SS2D(")])
@torch.no_grad()
def test_compositions_run(how):
    text = re.match(r"SS2D\((?:[^()]|\([^()]*\))*\)", how)[0]
    call = ast.parse(text, mode="eval").body
    options = {k.arg: 2 if (v := ast.literal_eval(k.value)) is ... else v for k in call.keywords}
    x = torch.randn(1, 8, *(4,) * options.get("dims", 2))
    assert SS2D(8, **options)(x).shape == x.shape
