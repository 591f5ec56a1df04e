"""Contracts of Patch Mixing: pictures, labels and masks for given proportions and orders of the cells."""

import re
from collections.abc import Callable

from torch import Tensor

from nearfar.core.contracts import Contract
from nearfar.core.errors import UserError
from nearfar.ops.tokens.patch_mixing import mix_cells, mixed_labels, replaced_count, smallest_cells


def build_contract(contract: Contract) -> Callable[..., dict[str, Tensor]]:
    """A function of two batches of pictures, the order in which their cells are replaced, and their labels."""
    settings = contract.settings
    words = re.fullmatch(r"(\d+)x(\d+) patches of (\d+)x(\d+) pixels", settings["grid"])
    if words is None:
        raise UserError(f"{contract.path}: grid is {settings['grid']!r}; known is 'RxC patches of HxW pixels'")
    rows, columns, height, width = map(int, words.groups())
    size = tuple(contract.inputs[0]["shape"][2:])
    if size != (rows * height, columns * width):
        raise UserError(f"{contract.path}: grid is {settings['grid']!r}; pictures are {size[0]} x {size[1]}")
    proportions, classes = settings["proportions"], settings["classes"]
    label = re.search(r"smoothing: ([\d.]+)\*y \+ ([\d.]+)/(\d+)", settings["label"])
    if label is None or int(label[3]) != classes or abs(float(label[1]) + float(label[2]) - 1) > 1e-9:
        raise UserError(f"{contract.path}: label is {settings['label']!r}; known is '... (1-e)*y + e/{classes}'")
    contract.require_text(replaced=rf"floor\(r\*{rows * columns}\) patches.*stable sort.*")
    smoothing = float(label[2])

    def run(a: Tensor, b: Tensor, order: Tensor, label_a: Tensor, label_b: Tensor) -> dict[str, Tensor]:
        outputs = {}
        for proportion in proportions:
            cells = smallest_cells(order, replaced_count(proportion, rows * columns))
            name = f"r{round(100 * proportion):02d}"
            outputs[f"image_{name}"] = mix_cells(a, b, cells, (rows, columns))
            outputs[f"label_{name}"] = mixed_labels(label_a, label_b, cells.float().mean(1), classes, smoothing)
            outputs[f"mask_{name}"] = cells.float()
        return outputs

    return run
