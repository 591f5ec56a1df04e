import mne
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.signal import butter, sosfiltfilt
from sklearn.base import clone

from nearfar.core.errors import UserError
from nearfar.eeg.conventions import BCICIV2A_CHANNELS
from nearfar.eeg.evaluation import evaluate
from nearfar.eeg.models import baselines

SFREQ = 128.0


def imagery(n=60, channels=10, times=256, classes=2, seed=0):
    """Trials in which each class weakens its own source of 11 Hz, after an average reference."""
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.arange(n) % classes)
    sources = rng.normal(size=(n, classes, times))
    sos = butter(4, (9, 13), "bandpass", fs=SFREQ, output="sos")
    sources = 3 * sosfiltfilt(sos, sources, axis=-1)
    sources[np.arange(n), y] *= 0.3
    X = rng.normal(size=(channels, classes)) @ sources + rng.normal(size=(n, channels, times))
    X -= X.mean(1, keepdims=True)
    return (10 * X).astype(np.float32), y


@pytest.fixture(scope="module", params=[2, 3])
def trials(request):
    return imagery(classes=request.param)


@pytest.mark.parametrize("name", baselines.classical(SFREQ))
def test_classical_decoders_learn_from_rank_deficient_trials(name, trials):
    X, y = trials
    assert np.linalg.matrix_rank(np.concatenate([*X.astype(float)], axis=1)) >= 9
    assert np.abs(X.mean(1)).max() < 1e-4
    decoder = baselines.classical(SFREQ)[name](0).fit(X[:40], y[:40])
    assert decoder["fullrank"].basis_.shape == (10, 9)
    probabilities = decoder.predict_proba(X[40:])
    assert probabilities.shape == (20, len(np.unique(y)))
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-6)
    assert np.mean(probabilities.argmax(1) == y[40:]) > 0.75
    again = baselines.classical(SFREQ)[name](0).fit(X[:40], y[:40])
    np.testing.assert_array_equal(again.predict_proba(X[40:]), probabilities)


@pytest.mark.parametrize("name", baselines.classical(SFREQ))
def test_classical_decoders_do_not_depend_on_units_and_copies_of_channels(name, trials):
    X, y = trials
    reference = baselines.classical(SFREQ)[name](0).fit(X[:40], y[:40]).predict_proba(X[40:])
    volts = X.astype(float) * 1e-6
    found = baselines.classical(SFREQ)[name](0).fit(volts[:40], y[:40]).predict_proba(volts[40:])
    np.testing.assert_allclose(found, reference, atol=0.02)
    interpolated = np.concatenate([X, X[:, :2].mean(1, keepdims=True)], axis=1)
    decoder = baselines.classical(SFREQ)[name](0).fit(interpolated[:40], y[:40])
    assert decoder["fullrank"].basis_.shape == (11, 9)
    assert np.mean(decoder.predict_proba(interpolated[40:]).argmax(1) == reference.argmax(1)) > 0.85


def test_decoders_can_be_cloned(trials):
    X, y = trials
    for make in baselines.classical(SFREQ).values():
        decoder = clone(make(0))
        assert decoder.fit(X, y).predict(X).shape == y.shape


def test_full_rank_keeps_inner_products():
    X, _ = imagery()
    kept = baselines.FullRank().fit(X).transform(X)
    assert kept.dtype == np.float32
    products = kept.transpose(0, 2, 1) @ kept
    np.testing.assert_allclose(products, X.transpose(0, 2, 1) @ X, rtol=1e-3, atol=0.2)
    with pytest.raises(UserError, match="flat in every channel"):
        baselines.FullRank().fit(np.zeros((3, 4, 50)))


def test_bandpass_keeps_its_band_and_refuses_one_above_the_rate():
    time = np.arange(512) / SFREQ
    X = np.stack([np.sin(2 * np.pi * f * time) for f in (3, 15, 45)])[None]
    power = baselines.Bandpass(SFREQ, 8, 30).fit(X).transform(X)[..., 128:-128].var(-1)[0]
    np.testing.assert_allclose(power, [0, 0.5, 0], atol=0.01)
    with pytest.raises(UserError, match="does not fit below half"):
        baselines.Bandpass(50.0, 8, 30).fit(X)


def test_short_trials_are_filtered_too():
    X, y = imagery()
    X = X[..., :20]
    assert np.isfinite(baselines.csp_lda(SFREQ).fit(X, y).predict_proba(X)).all()


def test_filter_bank_leaves_out_bands_above_the_rate():
    X, _ = imagery(n=6)
    assert baselines.FilterBankCovariances(SFREQ).fit_transform(X).shape == (6, 9, 10, 10)
    slow = baselines.FilterBankCovariances(50.0)
    covariances = slow.fit_transform(X)
    assert slow.bands_[-1] == (20.0, 24.0)
    assert covariances.shape == (6, 5, 10, 10)
    np.testing.assert_allclose(np.trace(covariances, axis1=2, axis2=3), 1)
    assert (np.linalg.eigvalsh(covariances) > 0).all()
    with pytest.raises(UserError, match="none of the bands"):
        baselines.FilterBankCovariances(8.0).fit(X)


def test_csp_patterns_find_the_sources():
    rng = np.random.default_rng(3)
    X, y = imagery(n=80, channels=12, seed=3)
    decoder = baselines.csp_lda(SFREQ).fit(X, y)
    patterns = baselines.csp_patterns(decoder)
    assert patterns.shape == (6, 12)
    rng = np.random.default_rng(3)
    rng.permutation(80), rng.normal(size=(80, 2, 256))
    mixing = rng.normal(size=(12, 2))
    mixing -= mixing.mean(0)
    found = np.abs(np.corrcoef(patterns[:2], mixing.T)[:2, 2:])
    assert found.max(0).min() > 0.9


def test_mutual_information_keeps_what_tells_the_classes_apart():
    rng = np.random.default_rng(0)
    y = np.arange(60) % 2
    X = rng.normal(size=(60, 10))
    X[:, [2, 7]] += 3 * y[:, None]
    chosen = baselines.MutualInformation(2).fit(X, y)
    np.testing.assert_array_equal(chosen.transform(X), X[:, [2, 7]])
    assert baselines.MutualInformation(99).fit(X, y).transform(X).shape == (60, 10)


MONTAGES = {22: BCICIV2A_CHANNELS[:22], 64: mne.channels.make_standard_montage("biosemi64").ch_names}


@pytest.mark.filterwarnings("ignore:n_times:UserWarning", "ignore:Modifying chs_info:UserWarning")
@pytest.mark.parametrize("name", baselines.NETWORKS)
@pytest.mark.parametrize(("channels", "times", "sfreq", "classes"), [(22, 375, 125.0, 4), (64, 640, 160.0, 2)])
def test_networks_are_built_by_name(name, channels, times, sfreq, classes):
    info = mne.create_info(MONTAGES[channels], sfreq, "eeg")
    model = baselines.network(name, channels, classes, times, sfreq, info["chs"]).eval()
    assert type(model).__name__ == name
    with torch.no_grad():
        assert model(torch.randn(3, channels, times)).shape == (3, classes)
    again = baselines.network_class(name).from_config(model.get_config())
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}


def test_network_says_what_is_wrong():
    with pytest.raises(UserError, match=r"no network 'EEGnet'; choose one of AGTCNet, .*EEGNet"):
        baselines.network("EEGnet", 22, 4, 375, 125.0)
    with pytest.raises(UserError, match="EEGNet has no setting depth"):
        baselines.network("EEGNet", 22, 4, 375, 125.0, depth=3)
    with pytest.raises(UserError, match="EEGConformer cannot be built for 28 channels x 50 samples"):
        baselines.network("EEGConformer", 28, 2, 50, 100.0)
    assert baselines.network("EEGNet", 22, 4, 375, 125.0, F1=4).F1 == 4


def test_real_imagery_of_one_subject(shared_data):
    """Runs 4 and 8 train, run 12 tests. No figure is promised; what must hold is that every decoder gives an answer."""
    folder = shared_data("eegmmidb/S001")
    X, y, rows = [], [], []
    for run in (4, 8, 12):
        raw = mne.io.read_raw_edf(folder / f"S001R{run:02d}.edf", preload=True, verbose="ERROR")
        raw.set_eeg_reference("average", projection=False, verbose="ERROR")
        for sample, _, label in mne.events_from_annotations(raw, {"T1": 0, "T2": 1}, verbose="ERROR")[0]:
            X.append(raw.get_data(start=sample, stop=sample + 640) * 1e6)
            y.append(label)
            rows.append({"subject": 1, "session": run, "run": run, "file": f"R{run}", "onset": sample / 160})
    X, y, metadata = np.array(X, np.float32), np.array(y), pd.DataFrame(rows)
    assert X.shape == (45, 64, 640)
    estimators = baselines.classical(160.0)
    run = evaluate(estimators, X, y, metadata, "cross-session", sfreq=160.0, test=[12])
    assert run.rows["model"].tolist() == list(estimators)
    assert (run.rows["n_train"] + run.rows["n_validation"]).tolist() == [30] * 4
    assert run.rows["n_test"].tolist() == [15] * 4
    assert run.failures.empty
    assert np.isfinite(run.predictions[["p_0", "p_1"]].to_numpy()).all()
    assert (run.comparison()["outcome"] == "too few subjects").all()
