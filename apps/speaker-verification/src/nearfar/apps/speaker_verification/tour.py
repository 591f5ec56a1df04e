"""The speaker chapter of `nearfar tour`: synthetic voices, because nothing may be downloaded."""

from pathlib import Path

import numpy as np
import soundfile
from scipy.signal import resample_poly

from nearfar.apps.speaker_verification import pages
from nearfar.audio.corpora import Utterance, find_utterances
from nearfar.audio.speakers import scoring
from nearfar.audio.speakers.embedding import Embedder
from nearfar.audio.speakers.system import SpeakerSystem
from nearfar.audio.speakers.training import Recipe, build_model, train_speaker_model
from nearfar.audio.synthesis import VARIANTS, synthesize
from nearfar.core.report import Report

SENTENCES = (
    "The north wind and the sun were disputing which was the stronger.",
    "A traveller came along wrapped in a warm cloak.",
    "They agreed that the one who first made him take it off should be called stronger.",
    "Then the wind blew as hard as he could, but the more he blew, the closer he held his cloak.",
    "At last the sun shone out warmly, and the traveller took it off at once.",
    "Please call again tomorrow between nine and eleven in the morning.",
)
RATE = 8000
RECIPE = Recipe(
    channels=32,
    num_mels=40,
    sample_rate=RATE,
    embedding_dim=32,
    crop_seconds=1.0,
    crops_per_utterance=4,
    batch_size=32,
    epochs=16,
    learning_rate=5e-3,
    scale=20.0,
    margin=0.1,
    margin_epochs=8,
    speeds=(1.0, 0.9, 1.1),
)


def write_voices(folder: Path) -> list[Utterance]:
    """Every voice speaks every sentence at its own pitch, in white noise at a level drawn for each recording."""
    rng = np.random.default_rng(0)
    for voice in VARIANTS:
        for number, sentence in enumerate(SENTENCES):
            path = folder / voice / f"{number}.wav"
            if path.exists():
                continue
            samples, rate = synthesize(sentence, voice, pitch=int(rng.integers(30, 70)))
            common = int(np.gcd(rate, RATE))
            samples = resample_poly(samples, RATE // common, rate // common)
            noise = 10 ** rng.uniform(-2.5, -1.5) * rng.standard_normal(len(samples))
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, (0.5 * samples + noise).clip(-1, 1), RATE)
    return find_utterances(folder, "folder")


def chapter(report: Report, folder: Path) -> None:
    """Train on ten synthetic voices, verify six others, against the same network untrained."""
    utterances = write_voices(folder / "voices")
    strangers = set(VARIANTS[::3])
    learn = [u for u in utterances if u.speaker not in strangers]
    test = [u for u in utterances if u.speaker in strangers]
    speakers = np.array([u.speaker for u in test])
    left, right = np.triu_indices(len(test), 1)
    labels = (speakers[left] == speakers[right]).astype(int)
    names = np.array([u.name for u in test])
    trials = scoring.Trials(names[left], names[right], labels, source="all pairs of the six voices")
    sides = (speakers[left].tolist(), speakers[right].tolist())

    def scores() -> np.ndarray:
        embed = Embedder(model)
        known = np.stack([embed(u.path).embedding for u in learn])
        system = SpeakerSystem.build(model, known, [str(u.speaker) for u in learn])
        system.norm = "none"
        x = np.stack([embed(u.path).embedding for u in test])
        return system.score(x, x, left, right)

    model = build_model(RECIPE)
    before = scores()
    train_speaker_model(model, learn, [], RECIPE, folder / "training", device="cpu")
    after = scores()
    report.section("Speaker verification: is it the same voice?")
    report.text(
        f"Synthetic voices of eSpeak NG, in noise: {len(VARIANTS) - len(strangers)} train a small network on filter "
        f"banks from nothing for {RECIPE.epochs} epochs, {len(strangers)} others make {len(labels)} trials. Ten voices "
        "teach little and synthetic ones nothing about people: this shows how the tools work, not how well."
    )
    unscored = np.zeros(len(trials), bool)
    pages.write_evaluation(folder, trials, after, False, sides, 200, [0.05], folder / "voices", unscored)
    rows = []
    for title, values in (("untrained", before), ("trained", after)):
        found = scoring.evaluate(values, labels, False, *sides, draws=200)
        rows.append(
            {
                "network": title,
                "EER": f"{found['eer_nist']:.1%}",
                "95 % interval": f"{found['eer_nist_low']:.1%} to {found['eer_nist_high']:.1%}",
                "minDCF (p 0.05)": found["min_dcf_voxsrc"],
            }
        )
    report.table(rows, "Intervals from resampling speakers.")
    report.figure(scoring.plot_det({"untrained": (before, labels), "trained": (after, labels)}), "DET curves")
    report.figure(scoring.plot_scores(after, labels), "Scores of the trained network")
    worst = pages.worst_errors(trials, after, 1)
    for row in worst:
        report.text(f"{row['kind']}: {row['enrol']} and {row['test']}")
        for name in (row["enrol"], row["test"]):
            report.audio((folder / "voices" / name).read_bytes(), name)
