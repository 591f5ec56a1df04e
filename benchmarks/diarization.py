"""What the window and the likeness of `diarize` were chosen by: conversations of people a model was not trained on.

    uv run python benchmarks/diarization.py SPEECH [--model small-8k] [--windows 1.5 2 2.5] [--likeness 0.6 0.7]

SPEECH is the corpus of `benchmarks/speech_corpus.py` that the model is from. Its people who are not in the model's
cohort, which is of the training, talk in eight conversations of three minutes, three to six of them in each; those
with fewer than three recordings stay away. Printed is the confusion in percent, the mean over the conversations, and
how many talkers too many or too few were counted in each; "given" is with their number given. A minute of one core.
"""

import argparse
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from conversation import compose

from nearfar.audio.shipped import speaker_folder
from nearfar.audio.sound import resample
from nearfar.audio.speakers import diarization
from nearfar.audio.speakers.system import SpeakerSystem


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("speech", type=Path)
    parser.add_argument("--model", default="small-8k")
    parser.add_argument("--windows", type=float, nargs="+", default=[diarization.WINDOW])
    parser.add_argument("--likeness", type=float, nargs="+", default=[diarization.LIKENESS])
    options = parser.parse_args()
    torch.set_num_threads(1)
    system = SpeakerSystem.load(speaker_folder(options.model))
    names = sorted({folder.name for folder in options.speech.iterdir()} - set(system.cohort_speakers))
    people = {name: sorted((options.speech / name).glob("*.wav")) for name in names if not name.startswith("espeak")}
    people = {name: files for name, files in people.items() if len(files) > 2}
    print(f"{len(people)} people: {', '.join(people)}")
    talks = []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        chosen = rng.choice(list(people), int(rng.integers(3, 7)), replace=False)
        sound, rate, turns = compose({str(name): people[name] for name in chosen}, rng, 3)
        talks.append((resample(sound, rate, system.model.sample_rate), turns))
    for window in options.windows:
        diarization.WINDOW = window
        for likeness in [*options.likeness, None]:
            confusion, off = [], []
            for sound, turns in talks:
                count = len({turn.speaker for turn in turns})
                how = {"speakers": count} if likeness is None else {"likeness": likeness}
                found = diarization.diarize(lambda sound=sound: iter(np.array_split(sound, 20)), system, **how)
                error = diarization.error_rate(turns, found.turns, found.seconds)
                confusion.append(100 * error["confusion"])
                off.append(len(found.voices) - count)
            print(f"window {window} s, likeness {likeness or 'given'}: {mean(confusion):5.1f}  {off}", flush=True)


if __name__ == "__main__":
    main()
