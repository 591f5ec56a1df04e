"""Segmenting by windows against `monai.inferers.sliding_window_inference` and argmax: time and peak memory.

    python benchmarks/sliding_window.py

A volume of (1, 1, 192, 192, 160), windows of 64^3 with overlap 0.5 and Gaussian weights, a light network of 14 and 104
classes. Each measurement runs in a process of its own; the peak is that process's largest resident memory less what
it held before (network, volume, libraries). Ours runs with its default budget for partial sums (384 MB) and with none.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time

import torch
from monai.inferers import sliding_window_inference

from nearfar.medical.inference import segment

SIZE, ROI = (192, 192, 160), (64, 64, 64)


def network(classes: int) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv3d(1, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv3d(8, classes, 1)
    ).eval()


@torch.no_grad()
def measure(method: str, classes: int) -> dict[str, float]:
    torch.set_num_threads(1)
    model, volume = network(classes), torch.randn(1, *SIZE)
    model(volume[None, :, :64, :64, :64])  # libraries allocate on the first call
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    if method == "monai":
        labels = sliding_window_inference(volume[None], ROI, 1, model, 0.5, "gaussian")[0].argmax(0)
    else:
        options = {"memory": None} if method == "nearfar, no budget" else {}
        labels = segment(volume, model, ROI, overlap=0.5, **options)
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "megabytes": (peak - before) / 1024, "sum": int(labels.long().sum())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--runs", type=int, default=2)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one[0], int(options.one[1]))))
        return
    print(f"{'classes':>7} {'method':>18} {'CPU s':>7} {'x MONAI':>8} {'peak MB':>8} {'x MONAI':>8}")
    for classes in (14, 104):
        reference: dict[str, float] = {}
        for method in ("monai", "nearfar", "nearfar, no budget"):
            command = [sys.executable, __file__, "--one", method, str(classes)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_TRIM_THRESHOLD_": "0"}
            results = [
                json.loads(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
                for _ in range(options.runs)
            ]
            best = {key: min(r[key] for r in results) for key in ("seconds", "megabytes")}
            reference = reference or best
            seconds, peak = best["seconds"], best["megabytes"]
            ratios = seconds / reference["seconds"], peak / reference["megabytes"]
            print(
                f"{classes:>7} {method:>18} {seconds:>7.1f} {ratios[0]:>8.2f} {peak:>8.0f} {ratios[1]:>8.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
