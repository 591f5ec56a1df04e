"""A gallery of enrolled speakers in one file."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nearfar.audio.speakers.encoders import Encoder
from nearfar.audio.speakers.scoring.backend import enroll_models, unit
from nearfar.audio.speakers.system import SpeakerSystem
from nearfar.core.errors import UserError, some
from nearfar.core.files import atomic_path
from nearfar.core.reading import read_arrays, reading


@dataclass
class Gallery:
    """Speakers and all their embeddings, of one model. `owners[n]`: the row in `names` of embedding n."""

    digest: str
    names: list[str]
    embeddings: np.ndarray
    owners: np.ndarray

    @classmethod
    def new(cls, model: Encoder) -> "Gallery":
        return cls(model.digest, [], np.empty((0, model.embedding_dim), np.float32), np.empty(0, np.int64))

    @classmethod
    def load(cls, path: Path, model: Encoder) -> "Gallery":
        """Raises UserError where the file is no gallery, or was made with another model."""
        with reading(path, "is no gallery", "enrol the speakers again"):
            arrays = read_arrays(path, "a gallery")
            found = cls(str(arrays["digest"]), arrays["names"].tolist(), arrays["embeddings"], arrays["owners"])
            found._check(model.embedding_dim)
        if found.digest != model.digest:
            raise UserError(f"{path}: was made with another model; enrol the speakers again with this one")
        return found

    def _check(self, dim: int) -> None:
        """Raise ValueError where the parts do not go together."""
        shape, owners = self.embeddings.shape, self.owners
        if not all(isinstance(name, str) and name for name in self.names) or len(set(self.names)) != len(self.names):
            raise ValueError("a name is empty or there twice")
        if shape != (len(owners), dim) or not np.isfinite(self.embeddings).all():
            raise ValueError(f"embeddings {shape} of {len(owners)} recordings, or some that are not finite")
        if owners.dtype.kind not in "iu" or set(owners.tolist()) != set(range(len(self.names))):
            raise ValueError(f"{len(self.names)} names, and recordings of others")

    def save(self, path: Path) -> None:
        with atomic_path(path) as temporary, temporary.open("wb") as stream:
            np.savez(
                stream, digest=self.digest, names=np.array(self.names), embeddings=self.embeddings, owners=self.owners
            )

    def add(self, name: str, embeddings: np.ndarray, replace: bool = False, append: bool = False) -> None:
        """Enrol a speaker; of one who is there, `replace` the recordings or `append` to them, else raises UserError."""
        if name in self.names and not (replace or append):
            raise UserError(
                f"{name}: is in the gallery already; --replace enrols them again, --append adds these recordings"
            )
        if name not in self.names:
            self.names.append(name)
        number = self.names.index(name)
        keep = (self.owners != number) | append
        self.embeddings = np.concatenate([self.embeddings[keep], embeddings])
        self.owners = np.concatenate([self.owners[keep], np.full(len(embeddings), number)])

    def remove(self, name: str) -> None:
        """Forget a speaker. Raises UserError where there is no such one."""
        if name not in self.names:
            raise UserError(f"{name}: is not in the gallery; {some(self.names)} are")
        number = self.names.index(name)
        keep = self.owners != number
        self.names.remove(name)
        self.embeddings, owners = self.embeddings[keep], self.owners[keep]
        self.owners = owners - (owners > number)

    @property
    def counts(self) -> dict[str, int]:
        """Recordings of each speaker."""
        return {name: int((self.owners == number).sum()) for number, name in enumerate(self.names)}

    def models(self, mean: np.ndarray | None) -> np.ndarray:
        """One vector per speaker, from which the system will subtract `mean`."""
        groups = [np.flatnonzero(self.owners == number).tolist() for number in range(len(self.names))]
        return enroll_before_mean(self.embeddings, groups, mean)

    def scores(self, system: SpeakerSystem, models: np.ndarray, embedding: np.ndarray) -> np.ndarray:
        """Scores of one recording against every speaker."""
        everyone = np.arange(len(models))
        return system.score(models, embedding[None], everyone, np.zeros(len(models), int))


def enroll_before_mean(x: np.ndarray, groups: Sequence[Sequence[int]], mean: np.ndarray | None) -> np.ndarray:
    """Enrolled models as embeddings whose direction after subtracting `mean` is that of `enroll_models`.

    A single recording keeps its embedding, so it scores as it does alone.
    """
    models = enroll_models(x, groups, mean)
    length = float(np.mean(np.linalg.norm(x - (0 if mean is None else mean), axis=1)))
    models = unit(models) * length
    return models if mean is None else models + np.asarray(mean, models.dtype)
