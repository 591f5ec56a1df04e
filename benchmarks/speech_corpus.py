"""All the speech that packages and `DATA` carry, as one corpus of labelled recordings to train speaker models on.

    uv run python benchmarks/speech_corpus.py DATA OUTPUT [--debian FOLDER]

OUTPUT gets `<speaker>/<recording>.wav` at 16 kHz, of

- the training people of `benchmarks/speakers.py` (every second one of fsdd and of voices; the others are its test and
  not here), all their recordings, joined or cut to about four seconds;
- the 48 sources of libri2mix, each as a speaker of its own (a person may be there twice);
- synthetic voices of eSpeak NG: variants at a pitch of their own, each in many languages;
- with `--debian`, recordings that Debian packages carry, fetched and unpacked into that folder (485 MB): letters and
  syllables in 20 languages (klettres-data, one person for each), words for children in 22 and 11 languages
  (ktuberling-data, tuxpaint-stamps-default), shouts of 14 characters (hedgewars-data), the two players of a game in
  Czech and in Dutch (fillets-ng-data-cs and -nl), telephone prompts of three people (asterisk-prompt-*). Who reads for
  two packages is there twice.

For a separator, `--without libri2mix` leaves out those on which it is measured.
"""

import argparse
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile
from speakers import people

from nearfar.audio.sound import SUFFIXES, read_samples, resample
from nearfar.audio.synthesis import synthesize
from nearfar.core.errors import UserError

RATE = 16000
SECONDS = 4.0
MOST = 60
"""Recordings of a speaker."""

PACKAGES = (
    "klettres-data", "fillets-ng-data-cs", "fillets-ng-data-nl", "asterisk-prompt-fr-armelle",
    "asterisk-prompt-it-menardi-wav", "asterisk-prompt-es-co", "ktuberling-data", "hedgewars-data",
    "tuxpaint-stamps-default",
)  # fmt: skip

VOICES = (
    "m1", "m2", "m3", "m4", "m5", "m6", "m7", "m8", "f1", "f2", "f3", "f4", "f5", "Andy", "Annie", "Diogo", "Gene",
    "Lee", "Alex", "Alicia", "Andrea", "Antonio", "Denis", "Gene2", "Hugo", "Jacky", "Marcelo", "Mario", "Michael",
    "Michel", "Mike", "Nguyen", "Steph", "Steph2", "Steph3", "Storm", "Tweaky", "adam", "anika", "annie", "aunty",
    "belinda", "benjamin", "boris", "caleb", "croak", "david", "ed", "edward", "iven", "iven2", "john", "kaukovalta",
    "linda", "marcel", "max", "miguel", "norbert", "pablo", "paul", "pedro", "quincy", "rob", "robert", "sandro",
    "shelby", "steph", "travis", "victor", "zac",
)  # fmt: skip
LANGUAGES = ("en", "de", "fr", "es", "it", "pl", "ru", "nl", "sv", "pt", "fi", "cs", "hu", "tr", "el", "hi")
TEXT = """
the north wind and the sun were disputing which was the stronger when a traveller came along wrapped in a warm cloak
they agreed that the one who first succeeded in making him take it off should be called stronger than the other then
the wind blew as hard as he could but the more he blew the closer did the traveller fold his cloak
"""


def pieces(recordings: list[np.ndarray], rng: np.random.Generator) -> list[np.ndarray]:
    """About four seconds each: short recordings joined in random order, long ones cut; at most `MOST`."""
    order = [recordings[n] for n in rng.permutation(len(recordings))]
    joined = np.concatenate(order)[: int(MOST * SECONDS * RATE)]
    return np.array_split(joined, max(1, round(len(joined) / RATE / SECONDS)))


def readable(paths: list[Path]) -> list[np.ndarray]:
    found = []
    for path in paths:
        try:
            samples = read_samples(path, RATE, channel=1 if soundfile.info(path).channels > 1 else None)
        except (UserError, soundfile.LibsndfileError):
            continue
        loud = np.flatnonzero(np.abs(samples) > 0.02 * np.abs(samples).max())
        found.append(samples[loud[0] : loud[-1] + 1])
    return found


def packaged(folder: Path) -> Iterator[tuple[str, list[Path]]]:
    """Speakers and their recordings in Debian's packages."""
    folder.mkdir(parents=True, exist_ok=True)
    for package in PACKAGES:
        place = folder / package
        if not place.exists():
            subprocess.run(["apt-get", "download", package], cwd=folder, check=True, stdout=subprocess.DEVNULL)
            (archive,) = folder.glob(f"{package}_*.deb")
            subprocess.run(["dpkg-deb", "-x", archive, place], check=True)
    for language in sorted((folder / "klettres-data" / "usr/share/klettres").iterdir()):
        if paths := sorted(language.rglob("*.ogg")):
            yield f"letters-{language.name}", paths
    for language in sorted((folder / "ktuberling-data" / "usr/share/ktuberling/sounds").iterdir()):
        if language.is_dir() and "@" not in language.name:  # the same in another script
            yield f"words-{language.name}", sorted(p for p in language.rglob("*") if p.suffix in SUFFIXES)
    stamps: dict[str, list[Path]] = {}
    for path in sorted((folder / "tuxpaint-stamps-default").rglob("*_desc*")):
        if (found := re.search(r"_desc_?(\w*)$", path.stem)) and path.suffix in SUFFIXES:
            stamps.setdefault(found[1] or "en", []).append(path)
    for language, paths in stamps.items():
        yield f"stamps-{language}", paths
    for character in sorted((folder / "hedgewars-data").glob("usr/share/games/hedgewars/Data/Sounds/voices/*")):
        if character.name != "Robot":
            yield f"shouts-{character.name}", sorted(character.glob("*.ogg"))
    for language in ("cs", "nl"):
        paths = sorted((folder / f"fillets-ng-data-{language}").rglob("*.ogg"))
        for player in "mv":
            yield f"game-{language}-{player}", [path for path in paths if path.stem.split("-")[1:2] == [player]]
    for name in ("fr-armelle", "it-menardi-wav", "es-co"):
        paths = sorted((folder / f"asterisk-prompt-{name}").rglob("*"))
        yield f"prompts-{name}", [path for path in paths if path.suffix in (".wav", ".gsm")]


def spoken(voice: str, rng: np.random.Generator, count: int = 6) -> list[np.ndarray]:
    pitch = int(rng.integers(20, 80))
    found = []
    for _ in range(count):
        words = " ".join(rng.choice(TEXT.split(), 9)) + f" {rng.integers(1000)}"
        language, wpm = str(rng.choice(LANGUAGES)), int(rng.integers(140, 200))
        samples, rate = synthesize(words, voice, language, int(np.clip(pitch + rng.integers(-8, 9), 0, 99)), wpm)
        found.append(resample(samples, rate, RATE))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--debian", type=Path)
    parser.add_argument("--without", choices=["libri2mix"])
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    counts: dict[str, int] = {}

    def write(speaker: str, recordings: list[np.ndarray]) -> None:
        folder = options.output / speaker
        folder.mkdir(parents=True, exist_ok=True)
        for number, samples in enumerate(recordings):
            soundfile.write(folder / f"{number:03}.wav", samples, RATE)
        kind = speaker.split("-")[0]
        counts[kind] = counts.get(kind, 0) + 1

    for collection, recordings in people(options.data, MOST).items():
        for number, person in enumerate(sorted(recordings)):
            if number % 2 == 0:
                everything = [resample(samples, 8000, RATE) for samples in recordings[person]]
                write(f"{collection}-{person}", pieces(everything, rng))
    for path in () if options.without else sorted((options.data / "libri2mix").glob("*_source*.wav")):
        samples = read_samples(path, RATE)
        write(f"libri-{path.stem}", np.array_split(samples, max(2, round(len(samples) / RATE / 2))))
    for speaker, paths in packaged(options.debian) if options.debian else ():
        write(speaker, pieces(readable(paths), rng))
    for voice in VOICES:
        try:
            write(f"espeak-{voice}", spoken(voice, rng))
        except UserError:  # this eSpeak has no such voice
            continue
    for kind, count in counts.items():
        total = sum(soundfile.info(path).duration for path in options.output.glob(f"{kind}-*/*.wav"))
        print(f"{kind}: {count} speakers, {total / 60:.1f} minutes")


if __name__ == "__main__":
    main()
