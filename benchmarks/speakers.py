"""A small corpus for speaker verification without a backbone, from recordings of few people.

    uv run python benchmarks/speakers.py DATA OUTPUT

DATA holds `fsdd/recordings` (spoken digits of 6 speakers), `voices` (telephone prompts; en-f and es-f are one person)
and `libri2mix` (48 separate sources). OUTPUT gets `train`, `test` and `trials.txt` for `nearfar speaker-verification`:

- In alphabetical order, every second person of fsdd and of voices is for training, the others for the test.
- Training has beside them the 48 sources of libri2mix, each as a speaker of its own (a person may be there twice).
- Digits are joined by eight, sources are cut at 1.5 s. Of each person there are at most `--most` recordings (30), a
  third of it in training, where they shall not outnumber the sources.
- Trials are all pairs of test recordings of the same collection: others would be told apart by their channel.
"""

import argparse
from itertools import combinations
from pathlib import Path

import numpy as np
import soundfile

from nearfar.audio.speakers.scoring.trials import Trials, write_trials

RATE = 8000


def people(data: Path, most: int) -> dict[str, dict[str, list[np.ndarray]]]:
    """Recordings by collection and person."""
    digits: dict[str, list[np.ndarray]] = {}
    for path in sorted((data / "fsdd" / "recordings").glob("*.wav")):
        digits.setdefault(path.stem.split("_")[1], []).append(read(path))
    rng = np.random.default_rng(0)
    for name, singles in digits.items():
        order = rng.permutation(len(singles))[: 8 * most].reshape(-1, 8)
        digits[name] = [np.concatenate([singles[n] for n in row]) for row in order]
    voices: dict[str, list[np.ndarray]] = {}
    for folder in sorted((data / "voices").iterdir()):
        prompts = [
            x for path in sorted(folder.glob("*.wav")) if np.abs(x := read(path)).max() > 0.01
        ]  # some are silence
        voices.setdefault("en-es-f" if folder.name in ("en-f", "es-f") else folder.name, []).extend(prompts)
    for name, prompts in voices.items():
        voices[name] = [prompts[n] for n in rng.permutation(len(prompts))[:most]]
    return {"fsdd": digits, "voices": voices}


def read(path: Path) -> np.ndarray:
    samples, rate = soundfile.read(path, dtype="float32")
    assert rate == RATE, path
    return samples


def write(folder: Path, recordings: list[np.ndarray]) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    for number, samples in enumerate(recordings):
        soundfile.write(folder / f"{number:02}.wav", samples, RATE)
    return [f"{folder.name}/{number:02}.wav" for number in range(len(recordings))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--most", type=int, default=30)
    options = parser.parse_args()
    learn, test = options.output / "train", options.output / "test"

    trials: list[tuple[str, str, int]] = []
    for collection, recordings in people(options.data, options.most).items():
        names = []
        for number, person in enumerate(sorted(recordings)):
            if number % 2 == 0:
                write(learn / f"{collection}-{person}", recordings[person][: options.most // 3])
            else:
                names += write(test / f"{collection}-{person}", recordings[person])
        trials += [(a, b, int(a.split("/")[0] == b.split("/")[0])) for a, b in combinations(names, 2)]
    enroll, other, labels = map(np.array, zip(*trials))
    write_trials(options.output / "trials.txt", Trials(enroll, other, labels))

    for path in sorted((options.data / "libri2mix").glob("*_source*.wav")):
        samples = read(path)
        write(learn / f"libri-{path.stem}", np.array_split(samples, round(len(samples) / (1.5 * RATE))))
    for folder in (learn, test):
        count = sum(1 for _ in folder.rglob("*.wav"))
        print(f"{folder}: {count} recordings of {len(list(folder.iterdir()))} speakers")
    print(f"{options.output / 'trials.txt'}: {len(trials)} trials, {labels.sum()} of them targets")


if __name__ == "__main__":
    main()
