"""A conversation composed of real recordings, with the RTTM of who speaks when, for `speaker-verification diarize`.

    uv run python benchmarks/conversation.py CORPUS OUTPUT [--minutes 3] [--overlap 0.0]

CORPUS is what `benchmarks/speakers.py` writes: the people of its test take turns of one to three recordings, with
pauses of 0.2 to 1 s; with `--overlap` so many of the turns begin before the last one ends, by up to 2 s. A floor of
noise lies under all. OUTPUT gets `conversation.wav` and `conversation.rttm`, whose turns are those of the recordings.
"""

import argparse
from pathlib import Path

import numpy as np
import soundfile

from nearfar.audio.speakers.diarization import Turn, merge_turns, write_rttm


def compose(
    people: dict[str, list[Path]], rng: np.random.Generator, minutes: float, overlap: float = 0.0
) -> tuple[np.ndarray, int, list[Turn]]:
    """The sound, its rate and the turns of a conversation between people, whose recordings have one rate."""
    rate = soundfile.info(next(iter(people.values()))[0]).samplerate
    sound = 3e-4 * rng.standard_normal(int((60 * minutes + 20) * rate)).astype(np.float32)
    turns, now, last = list[Turn](), 0.5, ""
    while now < 60 * minutes:
        person = str(rng.choice([name for name in people if name != last]))
        first = now - rng.uniform(0.5, 2) if last and rng.random() < overlap else now + rng.uniform(0.2, 1)
        place = max(first, 0.0)
        for path in rng.choice(people[person], min(int(rng.integers(1, 4)), len(people[person])), replace=False):
            samples = soundfile.read(path, dtype="float32")[0]
            heard = np.flatnonzero(np.abs(samples) > 0.02 * np.abs(samples).max())
            samples = samples[heard[0] : heard[-1] + 1] * np.float32(0.1 / np.std(samples))
            start = int(place * rate)
            samples = samples[: len(sound) - start]
            sound[start : start + len(samples)] += samples
            turns.append(Turn(place, place + len(samples) / rate, person))
            place += len(samples) / rate + 0.1
        now, last = max(now, place), person
    sound = sound[: int((now + 0.5) * rate)]
    return sound / max(1.0, float(np.abs(sound).max())), rate, turns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--overlap", type=float, default=0.0)
    options = parser.parse_args()
    people = {folder.name: sorted(folder.glob("*.wav")) for folder in sorted((options.corpus / "test").iterdir())}
    sound, rate, turns = compose(people, np.random.default_rng(0), options.minutes, options.overlap)
    options.output.mkdir(parents=True, exist_ok=True)
    soundfile.write(options.output / "conversation.wav", sound, rate)
    write_rttm(options.output / "conversation.rttm", merge_turns(turns), "conversation")
    print(f"{len(sound) / rate:.1f} s, {len({turn.speaker for turn in turns})} people, {len(turns)} recordings")


if __name__ == "__main__":
    main()
