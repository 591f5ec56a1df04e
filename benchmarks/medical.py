"""Our segmentation networks beside SMP's and MONAI's at the same input: time, peak memory, parameters.

    python benchmarks/medical.py [--size 128] [--depth 64]

One forward pass in eval mode on one CPU thread, best of `--runs`, each network in a process of its own; the peak is the
resident memory beyond what the process held before the pass. Multi-scale inputs of DeepLab v2 are left out, so all see
the image once.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from nearfar.medical.networks import create_network
from nearfar.ops.common.conv_norm_act import fuse

NETWORKS = {
    "deeplab_v2": (2, {"scales": []}),
    "deeplab_v3": (2, {}),
    "deeplab_v3plus": (2, {}),
    "guided_attention": (2, {}),
    "macmd": (2, {}),
    "smp.DeepLabV3Plus": (2, {"encoder_name": "resnet101"}),
    "smp.Unet": (2, {"encoder_name": "resnet101"}),
    "monai.SwinUNETR": (3, {}),
    "monai.DynUNet": (3, {}),
    "deeplab_v3plus 3-D": (3, {}),
}


def peak_memory() -> int:
    """Largest resident memory of this process in KB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


@torch.no_grad()
def measure(name: str, size: int, depth: int, runs: int) -> dict[str, float]:
    torch.set_num_threads(1)
    dims, settings = NETWORKS[name]
    network = fuse(create_network(name.split()[0], 9, 1, dims, settings))
    x = torch.randn(1, 1, *([size] * 2 if dims == 2 else [depth] * 3))
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts again from what is held now
    before, times = peak_memory(), []
    for _ in range(runs):
        start = time.process_time()
        network(x)
        times.append(time.process_time() - start)
    peak = peak_memory() - before
    parameters = sum(p.numel() for p in network.parameters())
    return {"seconds": min(times), "megabytes": peak / 1024, "parameters": parameters / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=128, help="side of the picture for 2-D networks")
    parser.add_argument("--depth", type=int, default=64, help="side of the volume for 3-D networks")
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.size, options.depth, options.runs)))
        return
    print(f"{'network':>20} {'axes':>4} {'CPU s':>7} {'peak MB':>8} {'params M':>9}")
    for name, (dims, _) in NETWORKS.items():
        command = [sys.executable, __file__, "--one", name, "--runs", str(options.runs)]
        command += ["--size", str(options.size), "--depth", str(options.depth)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        row = json.loads(done.stdout.splitlines()[-1])
        print(
            f"{name:>20} {dims:>4} {row['seconds']:>7.2f} {row['megabytes']:>8.0f} {row['parameters']:>9.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
