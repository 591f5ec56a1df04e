"""A separator of two voices at 8 kHz, trained on what packages carry and scored on people whom it does not know.

    uv run python benchmarks/two_voices.py DATA OUTPUT [--debian FOLDER] [--seed 0]

OUTPUT gets the corpus of `benchmarks/speech_corpus.py --without libri2mix`, the training, and the scores on the
mixtures of DATA/libri2mix, whose people took no part in it. The training takes some hundred minutes of one core; called
again, finished work is not repeated.
"""

import argparse
import sys
from pathlib import Path

from shipped_speakers import run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--debian", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    corpus, training = options.output / "speech", options.output / f"training-{options.seed}"
    separation = [str(Path(sys.executable).with_name("nearfar")), "speech-separation"]
    if not corpus.exists():
        more = ["--debian", options.debian] if options.debian else []
        script = Path(__file__).with_name("speech_corpus.py")
        run(sys.executable, script, options.data, corpus, "--without", "libri2mix", *more)
    train = ["--recipe", "two-voices", "--set", f"seed={options.seed}", "--layout", "folder"]
    run(*separation, "train", corpus, "-o", training, *train)
    score = ["--metrics", "si_sdri", "-o", options.output / f"libri2mix-{options.seed}.csv"]
    run(*separation, "evaluate", options.data / "libri2mix", "--model", training / "model", *score)


if __name__ == "__main__":
    main()
