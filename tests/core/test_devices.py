"""Devices by name, and bfloat16 that is refused or told of where a processor needs it."""

import logging

import pytest

from nearfar.core import devices
from nearfar.core.errors import UserError


def test_devices_are_found_by_name():
    assert devices.choose_device("cpu") == "cpu"
    assert devices.choose_device("auto") in ("cpu", "cuda", "mps")
    with pytest.raises(UserError, match="--device gpu: not here; this machine has"):
        devices.choose_device("gpu")


def test_wrong_bfloat16_is_refused_and_a_guarded_one_told_once(monkeypatch, caplog):
    def wrong():
        raise RuntimeError("convolutions are off by 90 %")

    monkeypatch.setattr(devices, "check_bfloat16", wrong)
    devices.check_precision("32-true", "cpu")
    for precision in ("bf16-mixed", "bfloat16"):
        with pytest.raises(UserError, match=f"precision {precision}: convolutions are off by 90 %"):
            devices.check_precision(precision, "cpu")
    monkeypatch.setattr(devices, "check_bfloat16", lambda: None)
    devices._say_guarded.cache_clear()
    with caplog.at_level(logging.WARNING, "nearfar"):
        monkeypatch.setattr(devices, "BFLOAT16_GUARDED", False)
        devices.check_precision("bf16-mixed", "cpu")
        assert not caplog.messages
        monkeypatch.setattr(devices, "BFLOAT16_GUARDED", True)
        for _ in range(2):
            devices.check_precision("bf16-mixed", "cpu")
    assert len(caplog.messages) == 1
    assert "AMX is not used" in caplog.messages[0]
    devices._say_guarded.cache_clear()
