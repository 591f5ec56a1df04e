"""Making a decoder from trials: which choose the epoch, what it starts from, and its one look at test trials."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from mne import BaseEpochs
from torch import Tensor, nn

from nearfar.core.checkpoints import identify, load_state_dict, read_state_dict
from nearfar.core.errors import UserError
from nearfar.core.model_folder import TrainedOn, mark, trained_on
from nearfar.eeg import metrics
from nearfar.eeg.decoder import Decoder, predict_logits
from nearfar.eeg.decoding import CovarianceClassifier, NetworkClassifier, Recipe
from nearfar.eeg.leakage import check_split, trial_digests
from nearfar.eeg.models.agtcnet import AGTCNet
from nearfar.eeg.models.baselines import network, reorder_outputs
from nearfar.eeg.models.covariances import DECODERS, CovarianceDecoder
from nearfar.eeg.preprocessing import Preprocessing
from nearfar.eeg.protocols import Split, validation_split
from nearfar.eeg.trials import trials_array

logger = logging.getLogger("nearfar.eeg")


def train_decoder(
    epochs: BaseEpochs,
    preprocessing: Preprocessing,
    recipe: Recipe,
    folder: str | Path,
    *,
    test: BaseEpochs | None = None,
    start: str | Path | None = None,
    validation: float = 0.2,
    device: str = "auto",
    show_progress: bool = False,
    fresh: bool = False,
    tell: Callable[[str], None] = lambda _: None,
) -> Decoder:
    """Train a decoder on `epochs`, which `preprocessing` made, in `folder`, which holds it afterwards.

    A share `validation` of the trials (whole subjects where there are several, else the latest of each class) chooses
    the epoch; the `test` trials, of the same channels, are looked at once, at the end. `start` is a decoder folder or
    published AGTCNet weights to fine-tune; test trials that it has seen are told in the score. `tell` hears what is
    done. Decoders of covariances choose nothing: they are fitted on all trials, and their validation figures come from
    fits that leave out one of five successive parts of the trials each.

    With `start`, `metrics["before"]` is its accuracy on the validation trials before it learns from any of these.
    What was not learnt from also gives `metrics["threshold"]`, see `metrics.choose_threshold`; `metrics["gate"]` is
    three times what all but 5 % of the trials swing at most, from lowest to highest; live windows beyond it abstain.

    Raises LeakageError where test trials stand among what is learnt from, UserError for a `start` that does not fit.
    """
    folder = Path(folder)
    X, y, names = trials_array(epochs)
    learn, choose = validation_split(epochs.metadata, y, np.arange(len(y)), validation, recipe.seed)
    digests, before = trial_digests(X), TrainedOn() if start is None else trained_on(start)
    if test is not None:
        if test.ch_names != epochs.ch_names or test.info["sfreq"] != epochs.info["sfreq"]:
            raise UserError("the test trials have other channels, another order or another rate than the training's")
        X_test, y_test, _ = trials_array(test, names)
        tested = trial_digests(X_test)
        check_split(
            Split("train", "the test recordings", learn, choose, np.arange(len(y_test)) + len(y), (), ()),
            pd.concat([epochs.metadata, test.metadata], ignore_index=True),
            trial_seconds=X.shape[2] / epochs.info["sfreq"],
            digests=[*digests, *tested],
        )
    classifier: NetworkClassifier | CovarianceClassifier
    begun = None if start is None else starting_network(start, epochs, names, recipe)
    if start is not None and Path(start).is_dir() and (others := _differences(Decoder.load(start), preprocessing)):
        tell(f"{start} was trained on signals that were preprocessed otherwise: {others}")
    rows = np.arange(len(y)) if recipe.network in DECODERS else choose
    untouched = {} if begun is None else _before(begun, X[rows], y[rows], [digests[row].hex() for row in rows], before)
    if recipe.network in DECODERS:
        tell(f"fitting {recipe.network} on {len(y)} trials, and on four of five parts of them five times ...")
        classifier, scores = _covariance_decoder(recipe, epochs.info["sfreq"], X, y, begun)
    else:
        classifier = NetworkClassifier(
            recipe, epochs.info, folder / "training", device=device, show_progress=show_progress, fresh=fresh
        )
        tell(f"training {recipe.network} on {len(learn)} trials, {len(choose)} choose the epoch ...")
        fit = classifier.fit
        if begun is not None:
            classifier.classes_, classifier.network_ = np.unique(y), begun
            fit = classifier.fine_tune
        fit(X[learn], y[learn], X[choose], y[choose])
        best = max(range(len(classifier.history_)), key=lambda epoch: classifier.history_[epoch]["val_accuracy"])
        scores = {
            "trials": {"train": len(learn), "validation": len(choose)},
            "epochs": len(classifier.history_),
            "best_epoch": best,
            "validation_accuracy": classifier.history_[best]["val_accuracy"],
        }
        if set(y[choose]) <= set(classifier.classes_) and len(choose) and len(classifier.classes_) == len(names):
            scores["threshold"] = metrics.choose_threshold(y[choose], classifier.predict_proba(X[choose]))
    scores |= untouched
    scores["gate"] = 3 * float(np.quantile(np.ptp(X[learn], axis=2).max(1), 0.95))
    if test is not None:
        scores["test"] = _test_score(classifier, X_test, y_test, len(names))
        scores["trials"]["test"] = len(y_test)
        if any(seen := before.seen(digest.hex() for digest in tested)):
            scores["test"]["marked"] = mark(seen)  # by the decoder that it began from
    about = {
        "sfreq": float(epochs.info["sfreq"]),
        "recipe": vars(recipe),
        "files": sorted(set(epochs.metadata["file"])),
        "start": None if start is None else str(start),
        "history": classifier.history_,
    }
    seen_here = TrainedOn.of(digest.hex() for digest in digests)
    decoder = Decoder(classifier.network_, names, preprocessing, epochs.ch_names, about, scores, before | seen_here)
    decoder.save(folder)
    return decoder


def _covariance_decoder(
    recipe: Recipe, sfreq: float, X: np.ndarray, y: np.ndarray, start: nn.Module | None
) -> tuple[CovarianceClassifier, dict[str, Any]]:
    """Fitted on, or adapted to, all trials, and what fits on parts of them say."""

    def fitted(rows: np.ndarray) -> CovarianceClassifier:
        made = CovarianceClassifier(recipe.network, sfreq, recipe.seed)
        if start is None:
            return made.fit(X[rows], y[rows])
        made.classes_, made.network_, made.history_ = np.arange(start.n_outputs), start, []
        return made.fine_tune(X[rows], y[rows])

    parts = np.array_split(np.arange(len(y)), 5)
    probabilities = np.zeros((len(y), len(np.unique(y))))
    for part in parts:
        rest = np.setdiff1d(np.arange(len(y)), part)
        if len(part) and set(y[rest]) != set(y):
            raise UserError(f"a class has trials in one part of {len(parts)} alone; record the classes in turns")
        if len(part):
            probabilities[part] = fitted(rest).predict_proba(X[part])
    accuracy = metrics.accuracy(y, probabilities.argmax(1))
    scores = {"trials": {"train": len(y), "validation": len(y)}, "validation_accuracy": accuracy}
    return fitted(np.arange(len(y))), scores | {"threshold": metrics.choose_threshold(y, probabilities)}


def _differences(decoder: Decoder, preprocessing: Preprocessing) -> str:
    theirs, ours = decoder.preprocessing.to_dict(), preprocessing.to_dict()
    return ", ".join(f"{name} {theirs[name]} (here {ours[name]})" for name in ours if theirs[name] != ours[name])


def _before(
    network: nn.Module, X: np.ndarray, y: np.ndarray, digests: list[str], learnt: TrainedOn
) -> dict[str, dict[str, Any]]:
    """What the network that is adapted makes of the validation trials before it learns from any; those that it has
    learnt from earlier do not count."""
    new = ~np.asarray(learnt.seen(digests), bool)
    if not new.any():
        return {}
    right = predict_logits(network, X[new]).argmax(1) == y[new]
    return {"before": {"accuracy": float(right.mean()), "trials": int(new.sum())}}


def _test_score(
    classifier: NetworkClassifier | CovarianceClassifier, X: np.ndarray, y: np.ndarray, n_classes: int
) -> dict[str, Any]:
    probabilities = classifier.predict_proba(X)
    return metrics.score(y, classifier.classes_[probabilities.argmax(1)], n_classes, probabilities)


def starting_network(path: str | Path, epochs: BaseEpochs, classes: list[str], recipe: Recipe) -> nn.Module:
    """The network to fine-tune, its outputs in the order of `classes`, checked against the trials.

    path: a decoder folder, or a weight file of the recipe's network: AGTCNet's as published, or a state dict. The file
    must account for every tensor of exactly one of these.
    """
    path, chs_info = Path(path), epochs.info["chs"]
    if path.is_dir():
        decoder = Decoder.load(path)
        if decoder.ch_names != epochs.ch_names:
            raise UserError(
                f"{path}: was trained on {', '.join(decoder.ch_names)}, these recordings have "
                f"{', '.join(epochs.ch_names)}; choose them with --channels {','.join(decoder.ch_names)}"
            )
        if sorted(decoder.classes) != sorted(classes) or decoder.network.n_times != len(epochs.times):
            raise UserError(
                f"{path}: decodes {', '.join(decoder.classes)} from {decoder.network.n_times} samples, these trials "
                f"are {', '.join(classes)} of {len(epochs.times)} samples; choose the same --classes, --window and "
                "--resample"
            )
        if decoder.sfreq != epochs.info["sfreq"]:
            raise UserError(
                f"{path}: was trained at {decoder.sfreq:g} Hz, these trials have {epochs.info['sfreq']:g} Hz; "
                f"choose --resample {decoder.sfreq:g}"
            )
        wanted = DECODERS.get(recipe.network)
        if isinstance(decoder.network, CovarianceDecoder) and type(decoder.network) is not wanted:
            raise UserError(f"{path}: is a {type(decoder.network).__name__}; adapt it with the same --set network=")
        if wanted and type(decoder.network) is not wanted:
            raise UserError(f"{path}: holds a {type(decoder.network).__name__}, which is no {recipe.network}")
        return _in_order(decoder.network, decoder.classes, classes)
    if recipe.network in DECODERS:
        raise UserError(f"{path}: {recipe.network} is adapted from a decoder folder alone")
    state = read_state_dict(path)
    sizes = {"n_chans": len(chs_info), "n_outputs": len(classes), "n_times": len(epochs.times)}

    def own(name: str) -> nn.Module:
        model = network(name, **sizes, sfreq=epochs.info["sfreq"], chs_info=chs_info, **_named(state, name))
        load_state_dict(model, state)
        return model.eval()

    def published() -> nn.Module:
        return AGTCNet.from_published(state, chs_info=chs_info, class_names=classes, n_times=len(epochs.times))

    found, model = identify(
        {"published AGTCNet": published} | {n: partial(own, n) for n in ("AGTCNet", recipe.network)}, str(path)
    )
    if found.removeprefix("published ") != recipe.network:
        raise UserError(f"{path}: holds weights of {found}, the recipe's network is {recipe.network}")
    named = getattr(model, "class_names", None)
    if named is None:
        logger.warning("%s: does not name its classes; taken to be %s, in this order", path, ", ".join(classes))
        return model
    if sorted(named) != sorted(classes):
        raise UserError(f"{path}: tells {', '.join(named)} apart, these trials are {', '.join(classes)}")
    return _in_order(model, named, classes)


def _in_order(model: nn.Module, theirs: Sequence[str], classes: Sequence[str]) -> nn.Module:
    if getattr(model, "class_names", None) is not None:
        model.reorder_classes(classes)
    elif isinstance(model, CovarianceDecoder):
        model.reorder([theirs.index(name) for name in classes])
    else:
        reorder_outputs(model, [theirs.index(name) for name in classes])
    return model


def _named(state: Mapping[str, Tensor], name: str) -> dict[str, Any]:
    """The classes that AGTCNet's own state dict tells, as a setting to build it with."""
    if name != "AGTCNet" or "_extra_state" not in state:
        return {}
    told = json.loads(bytes(state["_extra_state"].tolist()))
    return {"class_names": told["classes"]} if told.get("classes") else {}
