"""The fully connected CRF against pydensecrf2: agreement, time, growth with pixels and labels.

    uv pip install --target /tmp/pydensecrf pydensecrf2      # needs a C++ compiler; takes minutes
    PYTHONPATH=/tmp/pydensecrf python benchmarks/crf.py

Without pydensecrf2 the comparison is left out, with the reason. Times are CPU seconds of one thread, best of `--runs`.
"""

import argparse
import functools
import time
from collections.abc import Callable

import numpy as np
import skimage.data
import torch
import torch.nn.functional as F
from torch import Tensor

from nearfar.ops.graph.dense_crf import DenseCRF, unary_from_softmax


def problem(height: int, width: int, labels: int) -> tuple[Tensor, np.ndarray]:
    """(energies (1, L, H, W), picture (H, W, 3)): a photograph with smooth random class scores."""
    picture = np.resize(skimage.data.astronaut(), (512, 512, 3))
    image = torch.from_numpy(picture).permute(2, 0, 1)[None].float()
    image = F.interpolate(image, (height, width), mode="bilinear", antialias=True)[0].permute(1, 2, 0)
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(1, labels, height // 8, width // 8, generator=generator)
    scores = 4 * F.interpolate(coarse, (height, width), mode="bilinear")
    return unary_from_softmax(scores.softmax(1)), np.ascontiguousarray(image.round().byte().numpy())


network = functools.cache(DenseCRF)
"""One module for all pictures: it keeps the table of a grid's positions."""


def ours(unary: Tensor, picture: np.ndarray, iterations: int) -> np.ndarray:
    image = torch.from_numpy(picture).permute(2, 0, 1)[None].float()
    return network(iterations)(unary, image)[0].numpy()


def theirs(unary: Tensor, picture: np.ndarray, iterations: int) -> np.ndarray:
    import pydensecrf.densecrf as reference

    _, labels, height, width = unary.shape
    crf = reference.DenseCRF2D(width, height, labels)
    crf.setUnaryEnergy(np.ascontiguousarray(unary[0].flatten(1).numpy()))
    crf.addPairwiseGaussian(sxy=1, compat=3)
    crf.addPairwiseBilateral(sxy=67, srgb=3, rgbim=picture, compat=4)
    return np.array(crf.inference(iterations)).reshape(labels, height, width)


def best_time(run: Callable[[], np.ndarray], runs: int) -> tuple[float, np.ndarray]:
    times = []
    for _ in range(runs):
        start = time.process_time()
        result = run()
        times.append(time.process_time() - start)
    return min(times), result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(1)
    try:
        import pydensecrf.densecrf  # noqa: F401

        compare = True
    except ImportError as error:
        print(f"pydensecrf2 is not there ({error}): no comparison")
        compare = False
    print(
        f"{'grid':>10} {'labels':>6} {'nearfar s':>10} {'pydensecrf2 s':>14} {'ratio':>6} {'same label':>10} max |dQ|"
    )
    for height, width, labels in ((321, 481, 21), (160, 240, 21), (642, 962, 21), (321, 481, 5), (321, 481, 84)):
        unary, picture = problem(height, width, labels)
        seconds, q = best_time(lambda u=unary, p=picture: ours(u, p, options.iterations), options.runs)
        line = f"{height:>5}x{width:<4} {labels:>6} {seconds:>10.2f}"
        if compare:
            other, r = best_time(lambda u=unary, p=picture: theirs(u, p, options.iterations), options.runs)
            agreement = float((q.argmax(0) == r.argmax(0)).mean())
            line += f" {other:>14.2f} {seconds / other:>6.2f} {agreement:>10.5f} {abs(q - r).max():.1e}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
