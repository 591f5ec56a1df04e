"""How the weights that this app ships are made: `python -m nearfar.apps.super_resolution.small RUNS`.

Two small CATANets, for x2 and from it for x4, learn from the photographs that scikit-image, scikit-learn and matplotlib
carry; three others choose the epoch. No picture of a test set is among them. It takes about half an hour on one core.
The networks are then in RUNS/x2 and RUNS/x4.
"""

import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from nearfar.vision.restoration.training import Recipe, train_restorer

LEARNED = (
    "skimage/data/astronaut.png", "skimage/data/brick.png", "skimage/data/camera.png", "skimage/data/chelsea.png",
    "skimage/data/coffee.png", "skimage/data/coins.png", "skimage/data/grass.png", "skimage/data/gravel.png",
    "skimage/data/ihc.png", "skimage/data/moon.png", "skimage/data/motorcycle_left.png", "skimage/data/page.png",
    "skimage/data/rocket.jpg", "skimage/data/text.png", "sklearn/datasets/images/china.jpg",
    "matplotlib/mpl-data/sample_data/grace_hopper.jpg",
)  # fmt: skip
HELD = ("skimage/data/horse.png", "skimage/data/hubble_deep_field.jpg", "sklearn/datasets/images/flower.jpg")

RECIPE = Recipe(
    "catanet_x2",
    {
        "dim": 24, "qk_dim": 24, "hidden": 48, "num_heads": 3,
        "patch_sizes": (16, 20), "num_centres": (16, 32), "group_sizes": (256, 128),
    },
    patch_size=32,
    batch_size=8,
    steps=100,
    epochs=12,
    learning_rate=1e-3,
)  # fmt: skip


def pictures(names: tuple[str, ...]) -> list[Path]:
    """Where installed packages have the pictures of these names."""
    found = []
    for name in names:
        package, _, inside = name.partition("/")
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise SystemExit(f"{name}: install {package}, which carries this picture")
        found.append(Path(spec.origin).parent / inside)
    return found


def main(folder: Path) -> None:
    """Train both networks below `folder`; an interrupted run goes on."""
    for scale, weights, epochs in ((2, None, 12), (4, folder / "x2", 6)):
        recipe = replace(RECIPE, model=f"catanet_x{scale}", epochs=epochs)
        _, history = train_restorer(
            pictures(LEARNED), pictures(HELD), recipe, folder / f"x{scale}", weights=weights, device="cpu"
        )
        best = max(row["psnr"] for row in history)
        print(f"x{scale}: {best:.2f} dB on the three held pictures")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
