"""The speaker models that come with the package: trained, scored and stressed by one command.

    uv run python benchmarks/shipped_speakers.py DATA OUTPUT [--debian FOLDER] [--models small-8k small-16k] [--seed 5]

OUTPUT gets the corpus of `benchmarks/speech_corpus.py`, the trials of `benchmarks/speakers.py`, whose people take no
part in training, and for each model its folder, scores, evaluation and stress. What of a folder is copied to
`packages/audio/src/nearfar/audio/speakers/weights/NAME` is what `nearfar.audio.shipped` offers. The training
takes some fifteen minutes of one core for each; called again, finished work is not repeated. Without `--seed` it is
the recipe's.
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

RECIPES = {"small-16k": "shipped-16k", "small-8k": "shipped-8k"}


def run(*words: object) -> None:
    print("$", shlex.join(map(str, words)), flush=True)
    subprocess.run(list(map(str, words)), check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--debian", type=Path)
    parser.add_argument("--models", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--seed", type=int)
    options = parser.parse_args()
    here, corpus, trials = Path(__file__).parent, options.output / "speech", options.output / "trials"
    speakers = [str(Path(sys.executable).with_name("nearfar")), "speaker-verification"]
    if not trials.exists():
        run(sys.executable, here / "speakers.py", options.data, trials)
    if not corpus.exists():
        more = ["--debian", options.debian] if options.debian else []
        run(sys.executable, here / "speech_corpus.py", options.data, corpus, *more)
    listed = [trials / "trials.txt", "--root", trials / "test"]
    for name in options.models:
        suffix = "" if options.seed is None else f"-{options.seed}"
        model = options.output / f"{name}{suffix}"
        train = ["--recipe", RECIPES[name], "--layout", "folder"]
        if suffix:
            train += ["--set", f"seed={options.seed}"]
        run(*speakers, "train", corpus, "-o", model, *train)
        run(*speakers, "score", *listed, "-o", f"{model}.txt", "-m", model)
        run(*speakers, "evaluate", f"{model}.txt", "-o", f"{model}-evaluation", "--draws", 0)
        run(*speakers, "stress", *listed, "-o", f"{model}-stress", "-m", model, "--draws", 0)
        found = json.loads(Path(f"{model}-evaluation", "evaluation.json").read_text(encoding="utf-8"))
        print(f"{name}{suffix}: EER {found['eer_nist']:.2%}")


if __name__ == "__main__":
    main()
