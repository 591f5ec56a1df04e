"""Corpora, lists, mixing, metrics and training of separation."""

import numpy as np
import pytest
import soundfile
import torch
from torchmetrics.functional.audio import scale_invariant_signal_distortion_ratio

from nearfar.audio.separation.metrics import score, summary
from nearfar.audio.separation.mixtures import (
    DrawnMixtures,
    Mixture,
    RecordedMixtures,
    check_mixtures,
    draw_mixture,
    find_mixtures,
    find_voices,
    pad_batch,
    refuse_shared_sources,
    split_voices,
    write_manifest,
)
from nearfar.audio.separation.mossformer import MossFormer, overlap_add
from nearfar.audio.separation.training import Recipe, train_separation
from nearfar.core.errors import UserError
from nearfar.core.recipes import read_recipe

RATE = 8000


def tone(pitch, seconds=1.0, seed=0):
    rng = np.random.default_rng(seed)
    t = np.arange(int(seconds * RATE)) / RATE
    envelope = np.interp(t, np.arange(0, seconds + 1, 0.1), rng.uniform(0, 1, len(np.arange(0, seconds + 1, 0.1))))
    return (0.2 * envelope * np.sign(np.sin(2 * np.pi * pitch * t + rng.uniform(0, 6)))).astype(np.float32)


def write(path, samples, rate=RATE):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, rate)


def corpus(folder, mixes=("mix",), targets=("s1", "s2"), names=("a", "b")):
    for k, name in enumerate(names):
        sources = [tone(100 + 50 * i, seed=k) for i in range(len(targets))]
        for target, source in zip(targets, sources):
            write(folder / target / f"{name}.wav", source)
        for mix in mixes:
            direct = [source for target, source in zip(targets, sources) if not target.endswith("_reverb")]
            write(folder / mix / f"{name}.wav", sum(direct))


def voices_folder(root, speakers=3, utterances=12):
    for s in range(speakers):
        for u in range(utterances):
            write(root / f"speaker{s}" / f"u{s}-{u}.wav", tone(90 * (s + 1), 0.6, seed=100 * s + u))


# ------------------------------------------------------------------------------------------------------------- finding


@pytest.mark.parametrize(
    ("tree", "split", "mixes", "targets", "expected"),
    [
        ("2speakers/wav8k/min/tr", "tr", ["mix"], ["s1", "s2"], ("mix", "s1")),
        ("Libri2Mix/wav8k/min/dev", "dev", ["mix_clean", "mix_both"], ["s1", "s2"], ("mix_clean", "s1")),
        ("Libri3Mix/wav8k/min/dev", "dev", ["mix_clean"], ["s1", "s2", "s3"], ("mix_clean", "s1")),
        ("wham/wav8k/min/tt", "tt", ["mix_clean", "mix_both", "mix_single"], ["s1", "s2"], ("mix_both", "s1")),
        (
            "whamr/wav8k/min/tt",
            "tt",
            ["mix_both_reverb", "mix_clean_anechoic"],
            ["s1_anechoic", "s2_anechoic", "s1_reverb", "s2_reverb"],
            ("mix_both_reverb", "s1_anechoic"),
        ),
        (".", None, ["mix"], ["s1", "s2"], ("mix", "s1")),
    ],
)
def test_trees_that_people_have(tmp_path, tree, split, mixes, targets, expected):
    corpus(tmp_path / tree, mixes, targets)
    found = find_mixtures(tmp_path, split)
    assert [m.name for m in found] == ["a", "b"]
    assert (found[0].mix.parent.name, found[0].sources[0].parent.name) == expected
    assert len(found[0].sources) == sum(not target.endswith("_reverb") for target in targets)
    mix, sources, rate = found[0].read()
    assert rate == RATE
    np.testing.assert_allclose(mix[:100], sources.sum(0)[:100], atol=1e-3)


def test_a_choice_is_listed_and_can_be_made(tmp_path):
    corpus(tmp_path / "wav8k/min/tr", ["mix_clean", "mix_both"])
    corpus(tmp_path / "wav16k/min/tr", ["mix_clean"])
    with pytest.raises(UserError, match=r"wav16k/min/tr, wav8k/min/tr"):
        find_mixtures(tmp_path, "tr")
    assert find_mixtures(tmp_path / "wav8k", "tr", mix="mix_clean")[0].mix.parent.name == "mix_clean"
    with pytest.raises(UserError, match="there is mix_both, mix_clean"):
        find_mixtures(tmp_path / "wav8k", "tr", mix="mix_single")
    with pytest.raises(UserError, match="no mixtures found with a split cv"):
        find_mixtures(tmp_path, "cv")


def test_lists_and_manifests(tmp_path):
    corpus(tmp_path / "c")
    found = find_mixtures(tmp_path / "c")
    assert find_mixtures(write_manifest(tmp_path / "manifest.csv", found)) == found
    (tmp_path / "speechbrain.csv").write_text(
        "ID, duration, mix_wav, s1_wav, s2_wav\n0, 1.0, c/mix/a.wav, c/s1/a.wav, c/s2/a.wav\n"
    )
    assert find_mixtures(tmp_path / "speechbrain.csv")[0].sources == found[0].sources
    (tmp_path / "list.scp").write_text("c/mix/b.wav c/s1/b.wav c/s2/b.wav\n")
    assert find_mixtures(tmp_path / "list.scp")[0].mix == found[1].mix
    (tmp_path / "list.scp").write_text("c/mix/b.wav c/s1/b.wav c/s2/missing.wav\n")
    with pytest.raises(UserError, match="1 files are missing"):
        find_mixtures(tmp_path / "list.scp")
    (tmp_path / "bad.csv").write_text("name,path\nx,y\n")
    with pytest.raises(UserError, match="needs columns mix"):
        find_mixtures(tmp_path / "bad.csv")


def test_lengths_and_rates_are_checked(tmp_path):
    corpus(tmp_path, names=("a", "b", "c"))
    write(tmp_path / "s2/b.wav", tone(100, 3.0))
    write(tmp_path / "s1/c.wav", tone(100), 16000)
    with pytest.raises(UserError, match=r"2 mixtures do not fit together:\n  b: lengths 1.00 to 3.00 s\n  c: rates"):
        check_mixtures(find_mixtures(tmp_path))


def test_a_source_on_both_sides_is_refused(tmp_path):
    corpus(tmp_path)
    found = find_mixtures(tmp_path)
    refuse_shared_sources(found[:1], found[1:])
    with pytest.raises(UserError, match=r"s1/b\.wav: lies in the mixtures for training and in those for validation"):
        refuse_shared_sources(found, found[1:])


def test_the_recordings_at_hand(shared_data):
    found = find_mixtures(shared_data("libri2mix"))
    assert len(found) == 24
    assert all(row["rate"] == 8000 for row in check_mixtures(found))
    mix, sources, _ = found[3].read()
    _, residual, _, _ = np.linalg.lstsq(sources.T, mix, rcond=None)  # the sources are stored at another level
    assert residual[0] < 1e-5 * np.square(mix).sum()


# -------------------------------------------------------------------------------------------------------------- mixing


def test_levels_follow_the_recipe():
    rng = np.random.default_rng(0)
    utterances = [tone(100, 2, 0), 0.01 * tone(200, 3, 1)]
    ratios = []
    for _ in range(400):
        mix, sources = draw_mixture(utterances, rng, 8000)
        assert mix.shape == (8000,)
        np.testing.assert_allclose(mix, sources.sum(0), atol=1e-6)
        assert max(np.abs(mix).max(), np.abs(sources).max()) == pytest.approx(0.9, abs=1e-5)
        first, second = np.abs(sources).mean(1)
        ratios.append(20 * np.log10(second / first))
    assert np.mean(ratios) == pytest.approx(-2.51, abs=0.5)
    assert np.std(ratios) == pytest.approx(2.66, abs=0.4)


def test_noise_is_looped_and_stays_out_of_the_sources():
    rng = np.random.default_rng(0)
    noise = np.random.default_rng(1).standard_normal(500).astype(np.float32)
    for _ in range(50):
        mix, sources = draw_mixture([tone(100, 1), tone(200, 1)], rng, noise=noise)
        rest = mix - sources.sum(0)
        snr = 10 * np.log10(np.square(sources).mean(1).max() / np.square(rest).mean())
        assert -6.5 < snr < 3.5
        np.testing.assert_allclose(rest[:500], rest[500:1000], atol=1e-5)


def test_voices_may_overlap_in_part():
    rng, shares = np.random.default_rng(0), []
    for _ in range(200):
        _, (first, second) = draw_mixture([tone(100, 1, 0), tone(200, 1, 1)], rng, overlap=0.3)
        heard = np.flatnonzero(second)
        assert np.count_nonzero(first) > 0.99 * len(first)
        assert heard[0] < 5 or heard[-1] > len(second) - 5
        shares.append((heard[-1] - heard[0]) / len(second))
    assert min(shares) == pytest.approx(0.3, abs=0.03)
    assert np.mean(shares) == pytest.approx(0.65, abs=0.05)


def test_rooms_are_in_the_sources_and_hiss_is_not(tmp_path):
    voices_folder(tmp_path)
    voices = find_voices(tmp_path)
    plain, room, hiss = (
        DrawnMixtures(voices, 9, seconds=1.0, speeds=(), fixed=0, **how) for how in ({}, {"rooms": 1.0}, {"hiss": 1.0})
    )
    levels = []
    for i in range(9):
        assert torch.allclose(plain[i][0], plain[i][1].sum(0), atol=1e-5)
        assert torch.allclose(room[i][0], room[i][1].sum(0), atol=1e-5)
        assert not torch.allclose(room[i][1], plain[i][1], atol=0.01)
        mix, sources = hiss[i]
        rest = mix - sources.sum(0)
        levels.append(float(10 * torch.log10(sources.square().mean(1).max() / rest.square().mean())))
    assert 4.9 < min(levels) < max(levels) < 30.1


def test_drawn_mixtures_differ_unless_fixed_and_hold_different_speakers(tmp_path):
    voices_folder(tmp_path)
    voices = find_voices(tmp_path)
    assert sorted(voices) == ["speaker0", "speaker1", "speaker2"]
    drawn = DrawnMixtures(voices, 5, seconds=1.0, fill=True)
    mix, sources = drawn[0]
    assert mix.shape == (8000,)
    assert sources.shape == (2, 8000)
    assert not torch.equal(mix, drawn[0][0])
    fixed = DrawnMixtures(voices, 5, seconds=1.0, fixed=3)
    assert torch.equal(fixed[1][0], fixed[1][0])
    assert not torch.equal(fixed[0][0], fixed[1][0])
    assert find_voices(tmp_path, same=[["speaker0", "speaker2"]]).keys() == {"speaker0", "speaker1"}
    with pytest.raises(UserError, match="3 speakers are too few for mixtures of 4"):
        DrawnMixtures(voices, 5, num_speakers=4)


def test_shares_of_utterances_are_disjoint_and_stable(tmp_path):
    voices_folder(tmp_path, 2, 40)
    voices = find_voices(tmp_path)
    parts = [split_voices(voices, part, 0.2) for part in ("train", "valid", "test")]
    for name, paths in voices.items():
        shares = [set(part[name]) for part in parts]
        assert set.union(*shares) == set(paths)
        assert sum(map(len, shares)) == len(paths)
        assert len(shares[0]) > len(shares[1])
    with pytest.raises(ValueError, match="'dev'"):
        split_voices(voices, "dev")


def test_recorded_mixtures_crop_and_change_speed(tmp_path):
    corpus(tmp_path)
    found = find_mixtures(tmp_path)
    mix, sources = RecordedMixtures(found, RATE, 0.25)[0]
    assert mix.shape == (2000,)
    torch.testing.assert_close(mix, sources.sum(0), atol=1e-3, rtol=0)
    mix, sources = RecordedMixtures(found, RATE, None, speeds=(95,))[0]
    assert abs(len(mix) - 8000) <= 1  # the recorded rest sets the end
    with pytest.raises(UserError, match="is at 8000 Hz, the model needs 16000 Hz"):
        RecordedMixtures(found, 16000)[0]


def test_batches_are_padded_with_their_lengths():
    mix, sources, lengths = pad_batch([(torch.ones(5), torch.ones(2, 5)), (torch.ones(3), torch.ones(2, 3))])
    assert mix.tolist()[1] == [1, 1, 1, 0, 0]
    assert sources.shape == (2, 2, 5)
    assert lengths.tolist() == [5, 3]


def test_files_of_one_mixture_must_share_their_rate(tmp_path):
    write(tmp_path / "m.wav", tone(100))
    write(tmp_path / "s.wav", tone(100), 16000)
    with pytest.raises(UserError, match="different rates"):
        Mixture("m", tmp_path / "m.wav", (tmp_path / "s.wav",)).read()


# ------------------------------------------------------------------------------------------------------------- metrics


def speech(shared_data):
    mix, sources, _ = find_mixtures(shared_data("libri2mix"))[0].read()
    return torch.from_numpy(mix), torch.from_numpy(sources)


def test_scores_of_real_speech(shared_data):
    mix, targets = speech(shared_data)
    noise = 0.02 * targets.std() * torch.randn_like(targets)
    good = score(targets.flip(0) + noise, targets, mix, RATE)
    plain = scale_invariant_signal_distortion_ratio(mix.expand_as(targets), targets, zero_mean=True).mean()
    assert good["si_sdri"] == pytest.approx(good["si_sdr"] - float(plain), abs=1e-3)
    assert good["si_sdr"] > 25
    assert good["sdri"] > 15
    assert 2 < good["pesq"] < 4.6
    assert good["stoi"] > 0.95
    nothing = score(mix.expand_as(targets), targets, mix, RATE)
    assert nothing["si_sdri"] == pytest.approx(0, abs=1e-4)
    assert nothing["sdri"] == pytest.approx(0, abs=1e-4)
    assert nothing["stoi"] < good["stoi"]


def test_a_missing_or_silent_voice_counts_as_the_worst(shared_data):
    mix, targets = speech(shared_data)
    whole = score(targets, targets, mix, RATE)
    for estimates in (targets[1:], torch.stack([0 * targets[0], targets[1]])):
        half = score(estimates, targets, mix, RATE)
        assert half["stoi"] == pytest.approx(whole["stoi"] / 2, abs=1e-3)
        assert half["pesq"] == pytest.approx((whole["pesq"] + 1) / 2, abs=0.01)
        assert half["si_sdri"] < whole["si_sdri"] - 30
    spare = score(torch.cat([torch.randn(1, len(mix)), targets.flip(0)]), targets, mix, RATE, ["stoi"])
    assert spare["stoi"] == pytest.approx(whole["stoi"], abs=1e-3)


def test_summary_has_an_interval_and_counts_every_file():
    rows = summary([{"si_sdri": float(x)} for x in range(50)])
    assert rows[0]["mean"] == 24.5
    assert 18 < rows[0]["low"] < 24.5 < rows[0]["high"] < 31
    assert rows[0]["files"] == 50


def test_metrics_say_what_they_cannot():
    x = torch.randn(2, 800)
    with pytest.raises(UserError, match="44100 Hz"):
        score(x, x, x[0], 44100, ["pesq"])
    with pytest.raises(ValueError, match="unknown metrics wer"):
        score(x, x, x[0], RATE, ["wer"])
    with pytest.raises(ValueError, match="lengths differ"):
        score(x[:, :700], x, x[0], RATE)


# ------------------------------------------------------------------------------------------------------------ training

SMALL = {"num_filters": 32, "dim": 24, "depth": 2, "group_size": 64, "query_key_dim": 16}


def recipe(**changes):
    settings = {
        "variant": "mossformer-s", "model": SMALL, "epochs": 10, "mixtures_per_epoch": 24, "batch_size": 4,
        "accumulate": 1, "seconds": 0.6, "learning_rate": 4e-3, "threshold": -30.0,
    }  # fmt: skip
    return Recipe(**{**settings, **changes})


def run(tmp_path, folder, **changes):
    voices = find_voices(tmp_path / "voices")
    settings = recipe(**changes)
    train_set = DrawnMixtures(split_voices(voices, "train", 0.2), 24, seconds=0.6)
    held_out = DrawnMixtures(split_voices(voices, "test", 0.2), 12, seconds=0.6, fixed=0)
    return train_separation(settings, train_set, held_out, folder, device="cpu")


@pytest.mark.ci
def test_a_short_training_separates_and_is_found_again(tmp_path):
    voices_folder(tmp_path / "voices", 3, 30)
    model, history = run(tmp_path, tmp_path / "run")
    assert max(row["si_sdri"] for row in history) > 2  # dB over the mixture, on utterances that were not trained on
    back = MossFormer.from_pretrained(tmp_path / "run/model").eval()
    mix = torch.randn(1, 500)
    torch.testing.assert_close(back(mix), model(mix))
    _, again = run(tmp_path, tmp_path / "run")
    assert again == history  # a finished run is not repeated
    with pytest.raises(UserError, match="other settings"):
        run(tmp_path, tmp_path / "run", learning_rate=1e-3)


@pytest.mark.parametrize(("filters", "size"), [(128, 64), (256, 64), (100, 16)])
def test_fourier_filters_give_the_signal_back(filters, size):
    model = Recipe("mossformer-s", {**SMALL, "num_filters": filters, "kernel_size": size}, filters="fourier").build()
    x = torch.randn(1, 20 * size)
    frames = torch.relu(model.encoder(x.unfold(-1, size, size // 2)))
    whole = overlap_add(model.decoder(frames))
    torch.testing.assert_close(whole[:, size:-size], x[:, size:-size], atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="at least 256"):
        Recipe("mossformer-s", {**SMALL, "kernel_size": 128}, filters="fourier").build()


@pytest.mark.ci
def test_compiled_steps_learn_the_same(tmp_path):
    voices_folder(tmp_path / "voices")
    drawn = DrawnMixtures(find_voices(tmp_path / "voices"), 4, seconds=0.5, fill=True, fixed=0)
    losses = []
    for compiled in (False, True):
        net = SMALL | {"dropout": 0.0}  # whose draws are others when compiled
        recipe = Recipe("mossformer-s", net, epochs=2, batch_size=2, accumulate=1, compile=compiled)
        _, history = train_separation(recipe, drawn, drawn, tmp_path / str(compiled), device="cpu")
        losses.append([row["loss"] for row in history])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    kept = torch.load(tmp_path / "True/last.ckpt", weights_only=True)["state_dict"]
    assert {name.split(".")[0] for name in kept} == {"model"}


def test_a_cosine_warms_up_and_ends_at_zero(tmp_path):
    voices_folder(tmp_path / "voices")
    drawn = DrawnMixtures(find_voices(tmp_path / "voices"), 8, seconds=0.5)
    recipe = Recipe(
        variant="mossformer-s", model=SMALL, epochs=3, batch_size=1, accumulate=2, schedule="cosine", learning_rate=0.01
    )
    _, history = train_separation(recipe, drawn, drawn, device="cpu")
    rates = [row["lr"] for row in history]
    assert 0.01 > rates[0] > rates[1] > rates[2]
    assert rates[2] < 1e-4
    with pytest.raises(ValueError, match="schedule"):
        Recipe(schedule="linear")
    with pytest.raises(ValueError, match="overlap"):
        Recipe(overlap=0)


def test_recipes_are_read_from_yaml(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("variant: mossformer2\nmodel: {dim: 32}\nlearning_rate: 0.001\n")
    settings = read_recipe(Recipe, path, ["epochs=3"])
    assert (settings.variant, settings.learning_rate, settings.epochs) == ("mossformer2", 0.001, 3)
    with pytest.raises(UserError, match="unknown setting rate_of_learning"):
        read_recipe(Recipe, None, ["rate_of_learning=1"])
    with pytest.raises(UserError, match=r"model: .*num_filter"):
        read_recipe(Recipe, None, ["model={num_filter: 8}"]).build()
    with pytest.raises(UserError, match="epochs is 0"):
        read_recipe(Recipe, None, ["epochs=0"])


def test_channels_of_a_corpus_are_never_averaged(tmp_path):
    for name in ("a_mix", "a_source1", "a_source2"):
        samples = np.random.default_rng(0).standard_normal((800, 2 if name == "a_source2" else 1)).clip(-1, 1)
        soundfile.write(tmp_path / f"{name}.wav", samples, 8000)
    (mixture,) = find_mixtures(tmp_path)
    with pytest.raises(UserError, match=r"a_source2\.wav: has 2 channels"):
        mixture.read()
