"""What a live decision costs on one core: causal steps, window, decoder, rule, log; against a hop of 40 ms.

    OMP_NUM_THREADS=1 python benchmarks/live.py [--seconds 60] [--json live.json]

Noise at each size comes in chunks of one hop (40 ms) and is decoded at every chunk, recorded and logged as in a
session. Times are processor time of this process, which other programs do not lengthen, and by the clock.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from nearfar.eeg.decoder import Decoder
from nearfar.eeg.decoding import CovarianceClassifier
from nearfar.eeg.live.session import Live, Recorder
from nearfar.eeg.live.stream import Rule
from nearfar.eeg.models import baselines
from nearfar.eeg.models.agtcnet import VARIANTS, AGTCNet
from nearfar.eeg.preprocessing import Preprocessing

HOP = 0.04
MONTAGES = {
    len(settings["chs_info"]): [channel["ch_name"] for channel in settings["chs_info"]]
    for settings in VARIANTS.values()
}
"""Names by number: 22 of BCI Competition IV 2a, 64 of EEGMMIDB."""


def decoder(name: str, channels: int, rate: float) -> Decoder:
    """An untrained network, or a decoder of noise, of 3 s windows at 160, 125 or 250 Hz."""
    wanted = rate if rate < 250 else rate / round(rate / 200)
    settings = Preprocessing(tmax=3.0, l_freq=4.0, h_freq=40.0, sfreq=wanted, causal=True)
    names, n_times = MONTAGES[channels], settings.n_times(rate)
    made = Decoder(torch.nn.Identity(), ["left_hand", "right_hand"], settings, names, {"sfreq": wanted})
    if name in ("TangentSpace", "MDM", "CSP+LDA"):
        X = np.random.default_rng(0).normal(0, 10, (40, channels, n_times)).astype(np.float32)
        made.network = CovarianceClassifier(name, wanted).fit(X, np.arange(40) % 2).network_
    elif name == "AGTCNet":
        made.network = AGTCNet(n_outputs=2, n_times=n_times, sfreq=wanted, chs_info=made.info["chs"]).eval()
    else:
        made.network = baselines.network(name, channels, 2, n_times, wanted, made.info["chs"]).eval()
    return made


def measure(name: str, channels: int, rate: float, seconds: float) -> dict[str, float]:
    """Seconds of processor and of the clock for each decision."""
    model = decoder(name, channels, rate)
    live = Live(model, model.ch_names, rate, "uV", max(1, round(HOP * model.sfreq)), Rule(threshold=0.6, smoothing=3))
    rng, size, spent = np.random.default_rng(0), round(HOP * rate), []
    with tempfile.TemporaryDirectory() as folder:
        recorder = Recorder(Path(folder) / "s", {"ch_names": model.ch_names, "rate": rate, "unit": "uV"})
        for number in range(round(seconds / HOP)):
            samples = rng.normal(0, 10, (channels, size)).astype(np.float32)
            begun = time.process_time(), time.perf_counter()
            recorder.append(samples, np.arange(size) / rate + number * HOP, number * HOP)
            made = live.push(samples.astype(float), False)
            for decision in made:
                recorder.log(**decision)
            if made:
                spent.append((time.process_time() - begun[0], time.perf_counter() - begun[1]))
        recorder.close()
    cpu, clock = np.array(spent[5:]).T * 1e3
    return {
        "decoder": name, "channels": channels, "Hz": rate, "decisions": len(cpu), "median ms": float(np.median(cpu)),
        "99 % ms": float(np.quantile(cpu, 0.99)), "by the clock, 99 % ms": float(np.quantile(clock, 0.99)),
        "below the hop": bool(np.quantile(cpu, 0.99) < HOP * 1e3),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30.0, help="of signal at each size")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [
        measure(name, channels, rate, arguments.seconds)
        for channels, rate in ((22, 250.0), (64, 160.0), (64, 1000.0))
        for name in ("AGTCNet", "EEGNet", "TangentSpace", "MDM", "CSP+LDA")
    ]
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(f"{value:.1f}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=120).print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
