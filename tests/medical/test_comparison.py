"""The comparison of networks: what is compared with what, on which items."""

import numpy as np
import pytest

from nearfar.core.errors import UserError
from nearfar.medical.comparison import _by_item, compare_networks, verdict, with_ablations
from nearfar.medical.data.cases import Collection
from nearfar.medical.recipe import Recipe


def test_others_lend_network_settings_and_learning_rate_alone():
    base = Recipe(roi=(32, 32), epochs=3, learning_rate=5e-3)
    mamba = Recipe(network="vmunet", settings={"d_state": 2}, learning_rate=1e-4, epochs=99)
    jobs = with_ablations("base", base, {"mamba": mamba, "unet": Recipe(network="smp.Unet")})
    assert list(jobs) == ["base", "mamba", "mamba-identity", "unet"]
    assert {(job.epochs, job.roi) for job in jobs.values()} == {(3, (32, 32))}
    assert [job.learning_rate for job in jobs.values()] == [5e-3, 1e-4, 1e-4, 1e-3]
    assert jobs["mamba-identity"].settings == {"d_state": 2, "scan": False}
    assert list(with_ablations("mamba", mamba, {})) == ["mamba", "mamba-identity"]
    with pytest.raises(UserError, match="nothing to compare"):
        with_ablations("base", base, {})


def test_unequal_budgets_are_refused(tmp_path):
    recipes = {"a": Recipe(epochs=2), "b": Recipe(epochs=3)}
    with pytest.raises(ValueError, match="budgets are not equal"):
        compare_networks(Collection("x", []), [], recipes, tmp_path)
    with pytest.raises(ValueError, match="slabs is 0"):
        compare_networks(Collection("x", []), [], recipes, tmp_path, slabs=0)


def test_items_are_those_of_all_networks_and_nothing_found_in_nothing_is_right():
    nan = np.nan
    scores = {
        "a": {"p": np.array([0.5, 0.7]), "q": np.array([nan]), "r": np.array([nan])},
        "b": {"p": np.array([0.4, 0.4]), "q": np.array([0.0]), "r": np.array([nan])},
    }
    found = _by_item(scores)
    np.testing.assert_allclose(found["a"], [0.6, 1.0])
    np.testing.assert_allclose(found["b"], [0.4, 0.0])


def test_verdict():
    rows = [{"network": "a", "Dice": 0.9}, {"network": "b", "Dice": 0.8}, {"network": "c", "Dice": 0.7}]
    paired = [
        {"network": "b", "against": "a", "difference": -0.1, "p": 0.01, "items": 9},
        {"network": "a", "against": "c", "difference": 0.2, "p": 0.2, "items": 9},
    ]
    assert verdict(rows, paired, "a") == "a is best, Dice 0.900; it and b differ (difference 0.100, p 0.01)"
    assert verdict(rows, paired, "c").endswith("it and c cannot be told apart (difference 0.200, p 0.2)")
    paired[0]["p"] = np.nan
    assert verdict(rows, paired, "a").endswith("9 items are too few to tell it from b")
