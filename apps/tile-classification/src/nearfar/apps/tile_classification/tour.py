"""The chapter of `nearfar tour` on histology tiles and slides."""

from pathlib import Path

from nearfar.core.report import Report
from nearfar.medical.data.slides import open_slide
from nearfar.medical.data.tiles import find_tiles, split_by_slide
from nearfar.medical.histology.classifier import TileRecipe
from nearfar.medical.histology.scores import classify_tiles, score_tiles, short
from nearfar.medical.histology.slides import classify_slide, heat_map
from nearfar.medical.histology.training import train_tiles
from nearfar.medical.samples import write_texture_slide, write_texture_tiles


def chapter(report: Report, folder: Path) -> None:
    """Train a small DuoFormer on texture tiles, score it by slide, and draw its heat map over a slide of textures."""
    tiles = find_tiles(write_texture_tiles(folder / "tiles"))
    learn, held = split_by_slide(tiles, 3)[0]
    recipe = TileRecipe(
        settings={"backbone": "test_resnet", "dim": 64}, size=64, epochs=8, batch_size=16, learning_rate=2e-3, mpp=0.5
    )
    classifier, _ = train_tiles(learn, recipe, folder / "model", device="cpu")
    rows, _ = score_tiles(classify_tiles(classifier, held)[0], held, classifier.classes)
    path = write_texture_slide(folder / "slide.tif")
    answer = classify_slide(classifier, path)
    report.section("Histology: tiles and a whole slide")
    report.text(
        "No tissue: photographs of brick, grass and gravel that scikit-image carries, in the colours of stains. Blocks "
        "of the photographs, each of a stain of its own, stand for slides. A small DuoFormer learns two thirds of the "
        "blocks and is scored on the others, with intervals over blocks; blocks of one photograph are more alike than "
        "slides of patients."
    )
    report.table(short(rows))
    with open_slide(path) as slide:
        report.figure(
            heat_map(slide, answer, classifier.classes),
            "A slide of 2048 x 2048 pixels with a piece of each texture, from parts of the photographs that no tile "
            f"shows: {len(answer.places)} tiles where the mask finds tissue, and the probability of each class.",
        )
