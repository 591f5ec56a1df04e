"""Decoders compared under one protocol: tables, pictures and settings in a folder."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mne
import numpy as np
from matplotlib.figure import Figure
from sklearn.pipeline import Pipeline

from nearfar.core.errors import UserError
from nearfar.core.files import atomic_path, write_json
from nearfar.eeg import plots
from nearfar.eeg.decoding import NetworkClassifier, Recipe
from nearfar.eeg.evaluation import Results, evaluate
from nearfar.eeg.models import baselines
from nearfar.eeg.models.agtcnet import AGTCNet
from nearfar.eeg.trials import trials_array


def compare(
    epochs: mne.BaseEpochs,
    output: str | Path,
    protocol: str,
    models: Sequence[str],
    recipe: Recipe | None = None,
    *,
    seeds: Sequence[int] = (0,),
    device: str = "auto",
    wide: mne.BaseEpochs | None = None,
    progress: Callable[[int, int, str], None] | None = None,
    **options: Any,
) -> Results:
    """Run a protocol on trials with several decoders; write tables, pictures and settings to the folder `output`.

    Finished fits are kept in its folder `cache`, so that an interrupted comparison goes on where it was.

    Args:
        protocol: a name in `nearfar.eeg.protocols.PROTOCOLS`.
        models: `CSP+LDA`, `FBCSP` ... as in `nearfar.eeg.models.baselines`, or any network of braindecode.
        wide: the trials from before the cue on, for the maps of desynchronization.
        progress: called with fits done, of all, and what is next.
        options: as in `nearfar.eeg.evaluation.evaluate`.
    """
    output, recipe = Path(output), recipe or Recipe()
    if options.get("published"):
        recipe = replace(recipe, objective="published")
    X, y, names = trials_array(epochs)
    classical = baselines.classical(epochs.info["sfreq"])
    fitted: dict[str, Any] = {}

    def make(name: str, seed: int) -> Any:
        if name in classical:
            fitted[name] = classical[name](seed)
        else:
            settings = replace(recipe, network=name, seed=seed)
            fitted[name] = NetworkClassifier(settings, epochs.info, device=device)
        return fitted[name]

    for name in models:
        if name not in classical:
            baselines.network_class(name)  # refuse an unknown name before the first training
    results = evaluate(
        {name: partial(make, name) for name in models},
        X,
        y,
        epochs.metadata,
        protocol,
        sfreq=epochs.info["sfreq"],
        seeds=list(seeds),
        classes=names,
        cache_dir=output / "cache",
        progress=progress,
        **options,
    )
    results.write(output)
    draw(results, epochs, wide, fitted, output / "figures")
    about = {"protocol": protocol, "classes": names, "trials": len(y), "seeds": list(seeds), "recipe": vars(recipe)}
    write_json(output / "evaluation.json", about | options)
    return results


def draw(
    results: Results, epochs: mne.BaseEpochs, wide: mne.BaseEpochs | None, fitted: Mapping[str, Any], folder: Path
) -> None:
    """Write the pictures of an evaluation as PNG files.

    wide: trials that begin before the cue, for the maps of desynchronization. fitted: the last estimator of each
    decoder, where it was fitted in this run (not taken from the cache).
    """
    _save(plots.subject_accuracies(results.rows), folder / "subjects.png")
    for model in results.rows["model"].unique():
        _save(plots.confusion(results.confusion(model), results.classes, model), folder / f"confusion-{model}.png")
        if not results.history.empty and (history := results.history[results.history["model"] == model]).size:
            _save(plots.training_curves(history), folder / f"training-{model}.png")
        weights, label = spatial_weights(fitted.get(model))
        if weights is not None:
            _save_if_possible(
                partial(plots.topographic_maps, weights, epochs.info, label=label), folder, f"spatial-{model}"
            )
    if wide is not None and (names := _over_motor_cortex(wide)):
        _save_if_possible(partial(plots.desynchronization, wide, names), folder, "desynchronization")


def spatial_weights(estimator: Any) -> tuple[np.ndarray | None, str]:
    """(maps, channels) of a fitted estimator, at most 12, the strongest first; None where it has no such weights."""
    try:
        if isinstance(estimator, Pipeline):
            return baselines.csp_patterns(estimator), "CSP pattern"
        if isinstance(estimator, NetworkClassifier) and isinstance(estimator.network_, AGTCNet):
            weights = estimator.network_.gcap.weight.detach().flatten(0, -2).numpy()
            return weights[np.argsort(-np.linalg.norm(weights, axis=1))[:12]], "GCAP weight"
    except (AttributeError, KeyError):  # not fitted here, or a pipeline without CSP
        pass
    return None, ""


def _over_motor_cortex(epochs: mne.BaseEpochs) -> list[str]:
    return [name for name in ("C3", "C4") if name in epochs.ch_names]


def _save(figure: Figure, path: Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, bbox_inches="tight")


def _save_if_possible(make: Callable[[], Figure], folder: Path, name: str) -> None:
    """Draw a picture for which positions or time before the cue may be missing; then a text says so."""
    try:
        _save(make(), folder / f"{name}.png")
    except UserError as error:
        with atomic_path(folder / f"{name}.txt") as temporary:
            temporary.write_text(str(error), encoding="utf-8")
