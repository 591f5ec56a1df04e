"""The speech-separation chapter of `nearfar tour`."""

from pathlib import Path

import numpy as np
import soundfile
import torch

from nearfar.apps.speech_separation import pages
from nearfar.audio.separation.metrics import evaluate_mixture
from nearfar.audio.separation.mixtures import DrawnMixtures
from nearfar.audio.separation.training import Recipe, train_separation
from nearfar.audio.separation.windows import model_separator, separate_samples
from nearfar.audio.sound import resample
from nearfar.audio.synthesis import synthesize
from nearfar.core.report import Report

RATE = 8000
SENTENCES = (
    "The window was open and the rain came in over the table.",
    "Nobody asked the captain why the ship had turned north.",
    "Seven small boats lay on the sand below the old harbour.",
    "She counted the letters twice and put them in the drawer.",
    "A long road leads from the mill to the edge of the forest.",
    "Every morning the baker opened his door before the sun rose.",
)
HELD_OUT = (
    "In the evening the lamps were lit one after another.",
    "We should have taken the other train to the coast.",
)


def chapter(report: Report, folder: Path) -> None:
    """Train a tiny MossFormer for a minute on two synthetic voices and separate sentences that it has not heard."""
    voices: dict[str, list[Path]] = {}
    unheard = []
    for name, pitch, held_out in (("m1", 30, HELD_OUT[0]), ("f2", 65, HELD_OUT[1])):
        for k, sentence in enumerate((*SENTENCES, held_out)):
            samples, rate = synthesize(sentence, name, pitch=pitch)
            path = folder / "voices" / name / f"{k}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, resample(samples, rate, RATE), RATE)
            if k < len(SENTENCES):
                voices.setdefault(name, []).append(path)
            else:
                unheard.append(resample(samples, rate, RATE))
    recipe = Recipe(
        variant="mossformer-s",
        model={"num_filters": 48, "dim": 32, "depth": 2, "group_size": 128, "query_key_dim": 24},
        epochs=8,
        batch_size=2,
        accumulate=1,
        learning_rate=4e-3,
    )
    drawn = DrawnMixtures(voices, 50, RATE, seconds=1.0, speeds=())
    torch.manual_seed(0)
    model, _ = train_separation(recipe, drawn, DrawnMixtures(voices, 10, RATE, seconds=2.0, fixed=1), device="cpu")
    length = min(map(len, unheard))
    sources = np.stack([sound[:length] / (np.abs(sound[:length]).mean() + 1e-9) * 0.02 for sound in unheard])
    mix = sources.sum(0)
    separator = model_separator(model)
    scores = evaluate_mixture(mix, sources.astype(np.float32), RATE, separator, ["si_sdri"])
    tracks, found = separate_samples(mix, RATE, separator, RATE, speakers=2, consistency=True)
    parts = {"the mixture": folder / "mixture.wav"}
    soundfile.write(parts["the mixture"], mix, RATE)
    for k, track in enumerate(tracks):
        parts[f"voice {k + 1}"] = folder / f"voice{k + 1}.wav"
        soundfile.write(parts[f"voice {k + 1}"], track, RATE)
    report.section("Speech separation: two voices at once")
    report.text(
        "Two synthetic voices (eSpeak NG) speak sentences at the same time that the network has not heard. A tiny "
        f"MossFormer ({sum(p.numel() for p in model.parameters()) / 1e3:.0f} thousand weights) was trained for a few "
        "hundred mixtures of other sentences of the same voices; a real model needs days, and real speakers."
    )
    report.table([{"SI-SDR over the mixture, dB": scores["si_sdri"], "voices": found.speakers}])
    for name, path in parts.items():
        report.audio(pages.player(path), name)
    report.figure(pages.spectrograms(parts), "Spectrograms of the mixture and of both voices")
