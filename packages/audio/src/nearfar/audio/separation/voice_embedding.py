"""A trained speaker model as what tells voices apart while they are tracked through a recording."""

import numpy as np
from numpy.typing import NDArray

from nearfar.audio.sound import resample
from nearfar.audio.speakers.embedding import Embedder as SpeakerModel
from nearfar.audio.speakers.encoders import ForeignEncoder
from nearfar.audio.speakers.ltdnn import SpeakerEncoder
from nearfar.audio.speakers.scoring.backend import unit
from nearfar.audio.speakers.system import SpeakerSystem


class SpeakerPrint:
    """Embeddings of a speaker model, centred and of length 1: an `Embedder` for `nearfar.audio.separation.tracking`.

    `threshold` is the distance at the equal error rate: of the calibration's trials where these are plain cosines, else
    of the cohort's rows, which the model was trained on, so that it is a little low. None where there is neither; the
    number of voices is then not estimated from the embeddings.
    """

    def __init__(self, system: SpeakerSystem):
        if not isinstance(system.model, SpeakerEncoder | ForeignEncoder):
            raise ValueError("voices are told apart by a model that hears them, not by a table of embeddings")
        self.mean, self.model = system.mean, SpeakerModel(system.model)
        self.rate = system.model.sample_rate
        self.threshold: float | None = None
        scores, labels = system.scores, system.labels == 1
        if system.backend != "cosine" or system.norm != "none":
            scores, labels = np.empty(0), np.empty(0, bool)
            if system.cohort is not None:
                rows, names = unit(system.cohort, system.mean), np.array(system.cohort_speakers)
                upper = np.triu_indices(len(rows), 1)
                scores, labels = (rows @ rows.T)[upper], (names[:, None] == names)[upper]
        if labels.any() and not labels.all():
            order = np.argsort(scores)
            missed, passed = np.cumsum(labels[order]) / labels.sum(), 1 - np.cumsum(~labels[order]) / (~labels).sum()
            place = int(np.argmin(np.abs(missed - passed)))
            cosine = scores[order][place : place + 2].mean()
            self.threshold = float(np.sqrt(2 - 2 * min(cosine, 1.0)))

    def __call__(self, samples: NDArray[np.float32], rate: int) -> NDArray[np.floating]:
        return unit(self.model.embed_samples(resample(samples, rate, self.rate))[None], self.mean)[0]
