"""The speaker models that come with the package."""

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import soundfile

from nearfar.audio.speakers.embedding import Embedder
from nearfar.audio.speakers.scoring.rates import eer
from nearfar.audio.speakers.shipped import DEFAULT_MODEL, shipped_model, shipped_models
from nearfar.audio.speakers.system import SpeakerSystem
from nearfar.core.errors import UserError

DATA = Path(__file__).parents[4] / "shared" / "data"


@pytest.mark.parametrize("name", shipped_models())
def test_each_is_whole_small_calibrated_and_has_a_card(name):
    folder = shipped_model(name)
    system = SpeakerSystem.load(folder)
    assert system.calibration is not None
    assert system.threshold(0.2).threshold > system.threshold(0.4).threshold
    assert sum(path.stat().st_size for path in folder.iterdir()) < 4 << 20
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"{system.model.sample_rate // 1000} kHz" in card
    assert "EER" in card


def test_the_default_is_there_and_other_names_are_refused():
    assert DEFAULT_MODEL in shipped_models()
    with pytest.raises(UserError, match=DEFAULT_MODEL):
        shipped_model("large")


@pytest.mark.parametrize("name", shipped_models())
def test_people_who_took_no_part_are_told_apart(name, tmp_path):
    """Two of fsdd, ten recordings of eight digits each; chance is 0.5."""
    digits = DATA / "fsdd" / "recordings"
    if not digits.is_dir():
        pytest.skip(f"{digits} is not there")
    system = SpeakerSystem.load(shipped_model(name))
    embed, x, speakers = Embedder(system.model), [], []
    for speaker in ("jackson", "nicolas", "yweweler"):
        for number in range(8):
            parts = [soundfile.read(digits / f"{d}_{speaker}_{number}.wav", dtype="float32")[0] for d in range(8)]
            soundfile.write(tmp_path / "a.wav", np.concatenate(parts), 8000)
            x.append(embed(tmp_path / "a.wav").embedding)
            speakers.append(speaker)
    left, right = map(np.array, zip(*combinations(range(len(x)), 2)))
    names = np.array(speakers)
    assert not any(system.trained_on.seen([""] * 3, ["fsdd-jackson", "fsdd-nicolas", "fsdd-yweweler"]))
    scores = system.score(np.stack(x), np.stack(x), left, right)
    assert eer(scores, (names[left] == names[right]).astype(int)).value < 0.2
