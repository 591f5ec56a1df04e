"""Throughput of batches in worker processes: `uv run python benchmarks/batch.py [--files 400] [--json FILE]`.

`image-classification predict` on pictures of 256 x 256 with an untrained ConvNeXt-T, and `speaker-verification embed` on
four seconds of noise with an untrained L-TDNN, as commands, with one process, of one thread and of as many as there are
cores, and with as many processes as cores. What a command takes to start and to load its model is measured with one file
and taken off. Prints files a second, what the processes gain, and what a million such files take.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from PIL import Image
from rich.console import Console

from nearfar.audio.speakers.ltdnn import LTDNN
from nearfar.audio.speakers.system import SpeakerSystem
from nearfar.core.cli.console import table
from nearfar.core.files import write_json
from nearfar.vision.classification.classifier import Classifier, create_model


def pictures(folder: Path, count: int) -> list[str]:
    rng = np.random.default_rng(0)
    for i in range(count):
        rough = Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).resize(
            (256, 256), Image.Resampling.BICUBIC
        )
        rough.save(folder / f"{i:06}.jpg")
    name = "nearfar_convnext_tiny"
    classes = [f"class {i}" for i in range(10)]
    Classifier(create_model(name, 10, 224), name, classes, 224, 0.875).save(folder.parent / "classifier")
    return ["image-classification", "predict", str(folder.parent / "classifier")]
