"""Accuracy and slices, against their definitions."""

import itertools

import numpy as np
import pytest
import torch

from nearfar.core.errors import UserError
from nearfar.core.files import write_csv
from nearfar.language.configuration import MixerConfig
from nearfar.language.modeling import MixerForCausalLM
from nearfar.language.recall.ar_slices import BigramCounts, ar_hits, gap_explained, slice_scores
from nearfar.language.recall.bench import Point, RecallModule, Recipe, best_results, read_results, sweep


def test_ar_hits_by_looking_back():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 6, 200)
    seen, expected = set(), []
    for pair in itertools.pairwise(tokens.tolist()):
        expected.append(pair in seen)
        seen.add(pair)
    assert ar_hits(tokens, 6).tolist() == expected
    counts = BigramCounts.of(torch.from_numpy(np.tile([1, 2, 3], 30)), 6)
    frequent = {(1, 2): 30, (2, 3): 30, (3, 1): 29}
    kept = [e and frequent.get(pair, 0) <= 29 for e, pair in zip(expected, itertools.pairwise(tokens.tolist()))]
    assert ar_hits(tokens, 6, counts, frequent=29).tolist() == kept


def test_bigrams_are_counted_over_the_parts_of_a_long_text():
    tokens = torch.randint(7, (2**24 + 5,), dtype=torch.int32)
    counts = BigramCounts.of(tokens, 7)
    codes, expected = np.unique(tokens.numpy()[:-1] * 7 + tokens.numpy()[1:], return_counts=True)
    assert counts(codes).tolist() == expected.tolist()


def test_slice_scores_are_means_over_their_tokens():
    model = MixerForCausalLM(MixerConfig(vocab_size=10, hidden_size=8)).eval()
    tokens = torch.randint(10, (250,))
    scores = slice_scores(model, tokens, context=100)
    assert scores["tokens"] == 247
    share = scores["hit_share"]
    mixed = share * np.log(scores["hits"]) + (1 - share) * np.log(scores["others"])
    assert mixed == pytest.approx(np.log(scores["perplexity"]))
    with pytest.raises(UserError, match="at least 3"):
        slice_scores(model, tokens[:2])


def test_gap_explained():
    reference = {"tokens": 10, "hit_share": 0.25, "perplexity": np.e, "hits": np.e}
    model = {"tokens": 10, "hit_share": 0.25, "perplexity": np.e**2, "hits": np.e**3}
    assert gap_explained(model, reference) == pytest.approx(0.25 * 2 / 1)
    with pytest.raises(UserError, match="different tokens"):
        gap_explained(model | {"tokens": 9}, reference)


def recipe(**more):
    segment = {"input_seq_len": 16, "num_kv_pairs": 2, "num_examples": 40}
    data = {"d": {"train": [segment], "test": [segment, segment | {"num_kv_pairs": 4}]}}
    return Recipe(data=data, models={"m": {"mixers": ["attention"]}}, dims=[8], vocab_size=64, **more)


def test_the_loss_and_accuracy_at_labelled_positions_are_those_of_all_logits():
    point = Point(recipe(), "d", "m", 8, 1e-3, 0)
    model = point.build()
    train_data, tests, names = point.loaders()
    module = RecallModule(model, 1e-3, 0.1, 2, names)
    module.log = lambda name, value, **_: logged.__setitem__(name, float(value.detach()))
    logged = {}
    inputs, labels = next(iter(train_data))
    logits = model(inputs).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    loss = module.training_step((inputs, labels))
    torch.testing.assert_close(loss, expected)
    module.on_validation_epoch_start()
    shares = []
    for index, loader in enumerate(tests):
        for batch in loader:
            module.validation_step(batch, 0, index)
            right = (model(batch[0]).logits.argmax(-1) == batch[1]).float()
            shares += [r[m].mean().item() for r, m in zip(right, batch[1] != -100)]
    module.on_validation_epoch_end()
    assert names == ["mqar 16x2", "mqar 16x4"]
    assert logged["accuracy"] == pytest.approx(np.mean(shares))


def test_batches_never_mix_segments():
    segments = [{"input_seq_len": n, "num_kv_pairs": 2, "num_examples": 70} for n in (16, 32)]
    r = recipe()
    r.data["d"]["train"] = segments
    train_data, _, _ = Point(r, "d", "m", 8, 1e-3, 0).loaders()
    assert [tuple(x.shape) for x, _ in train_data] == [(64, 16), (6, 16), (64, 32), (6, 32)]


def test_keys_tell_settings_apart():
    points = list(recipe(learning_rates=[1e-3, 1e-2], seeds=[0, 1]).points())
    assert len({p.key for p in points}) == 4
    assert points[0].key == Point(recipe(), "d", "m", 8, 1e-3, 0).key
    assert points[0].key != Point(recipe(epochs=3), "d", "m", 8, 1e-3, 0).key


def test_best_results_take_the_best_rate_by_its_mean():
    def row(rate, seed, accuracy):
        return {
            "data": "d", "model": "m", "dim": 8, "learning_rate": rate, "seed": seed, "accuracy": accuracy,
            "state_size": 5, "parameters": 7, "epochs": 2, "seconds": 1.0, "settings": '{"epochs": 2, "exact": false}',
        }  # fmt: skip

    rows = [row(0.1, 0, 1.0), row(0.1, 1, 0.0), row(0.2, 0, 0.6), row(0.2, 1, 0.8)]
    other = row(0.1, 0, 0.9) | {"settings": '{"epochs": 9, "exact": false}'}
    apart = best_results([*rows, other])
    assert [(b["accuracy"], b["seeds"], b["settings"]) for b in apart] == [(0.7, 2, "epochs=2"), (0.9, 1, "epochs=9")]
    best = best_results(rows)
    assert len(best) == 1
    assert "settings" not in best[0]
    assert best[0]["learning_rate"] == 0.2
    assert best[0]["accuracy"] == pytest.approx(0.7)
    assert best[0]["spread"] == pytest.approx(0.02**0.5)
    assert best[0]["seeds"] == 2


def test_the_rate_is_chosen_on_examples_of_their_own(tmp_path):
    r = recipe(learning_rates=[1e-3, 1e-2], epochs=1)
    segment = r.data["d"]["test"][0]
    plain = Point(r, "d", "m", 8, 1e-3, 0).loaders()[1]
    r.data["d"]["choose"] = [segment | {"input_seq_len": 32}]
    assert Point(r, "d", "m", 8, 1e-3, 0).build().config.max_position_embeddings == 32
    _, loaders, names = Point(r, "d", "m", 8, 1e-3, 0).loaders()
    assert names == ["mqar 16x2", "mqar 16x4", "choose mqar 32x2"]
    first, _, third = (next(iter(loader))[0] for loader in loaders)
    assert torch.equal(first, next(iter(plain[0]))[0])  # the test's examples stay what they are
    assert third.shape[1] == 32
    rows = sweep(r, tmp_path, "cpu")
    assert {"accuracy", "choice", "accuracy choose mqar 32x2"} <= set(rows[0])
    write_csv(tmp_path / "results.csv", [row | {"choice": "much"} for row in rows])
    with pytest.raises(UserError, match="choice is 'much', no number"):
        read_results(tmp_path)
    rows[0] |= {"choice": 0.9, "accuracy": 0.2}
    rows[1] |= {"choice": 0.8, "accuracy": 0.7}
    (best,) = best_results(rows)
    assert (best["learning_rate"], best["accuracy"], best["marked"]) == (1e-3, 0.2, "")


def test_results_of_something_else_are_refused(tmp_path):
    (tmp_path / "results.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="no results of a recall sweep"):
        read_results(tmp_path)
