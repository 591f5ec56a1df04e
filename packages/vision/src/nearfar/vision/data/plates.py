"""Pictures and masks made of what comes with scikit-learn, in which context decides for half of the classes."""

import numpy as np
import torch
from torch import Tensor

from nearfar.core.errors import UserError

SIZE = (16, 32)
"""Height and width."""

CLASSES = ("8 beside a 1", "8 beside a 4", "0", "6")
AMBIGUOUS = (0, 1)
"""The classes that the region alone does not tell apart."""


def plates(number: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures (B, 3, 16, 32), masks (B, 1, 16, 32) and classes (B,).

    Two of scikit-learn's handwritten digits in colours of chance on a piece of one of its two photographs, which is no
    help. The region is the ink of the left one. The first two classes are an 8, beside a 1 or beside a 4; the others a
    0 and a 6, beside either. Even and odd seeds share no digit.
    """
    try:
        from sklearn.datasets import load_digits, load_sample_images
    except ImportError as error:
        raise UserError("plates: needs scikit-learn; pip install 'nearfar-vision[regions]'") from error
    data, generator = load_digits(), np.random.default_rng(seed)
    photographs = [p.astype(np.float32) / 255 for p in load_sample_images().images]
    half = [np.flatnonzero(data.target == d)[seed % 2 :: 2] for d in range(10)]
    height, width = SIZE
    pictures, masks = np.zeros((number, 3, *SIZE), np.float32), np.zeros((number, 1, *SIZE), np.float32)
    labels = generator.integers(len(CLASSES), size=number)
    for i, label in enumerate(labels):
        photograph = photographs[generator.integers(len(photographs))]
        row, column = (generator.integers(n - m) for n, m in zip(photograph.shape, SIZE, strict=False))
        pictures[i] = 0.4 * photograph[row : row + height, column : column + width].transpose(2, 0, 1)
        beside = (1, 4)[label] if label in AMBIGUOUS else generator.choice([1, 4])
        for digit, left in (((8, 8, 0, 6)[label], 0), (beside, width // 2)):
            ink = np.kron(data.images[generator.choice(half[digit])] / 16, np.ones((2, 2)))
            colour = generator.uniform(0.6, 1, (3, 1, 1))
            place = pictures[i, :, :, left : left + width // 2]
            place[:] = place * (1 - ink) + colour * ink
            if not left:
                masks[i, 0, :, : width // 2] = ink > 0.25
    return torch.from_numpy(pictures), torch.from_numpy(masks), torch.from_numpy(labels)
