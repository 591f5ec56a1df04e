"""Super-resolution networks beside spandrel's on the same weights, and their growth with the size of the picture.

    uv run --group bench python benchmarks/super_resolution.py [--repeats 5] [--largest 512]

Process time of one thread, alternating; medians of paired ratios (spandrel / ours, above 1 is ours faster) with their
range. The exponent is fitted to seconds over pixels from a side of 64 on.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from nearfar.vision.cost import peak_memory
from nearfar.vision.restoration.catanet import CATANet
from nearfar.vision.restoration.drct import DRCT
from nearfar.vision.restoration.restorer import Restorer


def seconds(action: Callable[[], object]) -> float:
    start = time.process_time()
    action()
    return time.process_time() - start


@torch.inference_mode()
def growth(name: str, model: Restorer, largest: int) -> None:
    sides = [side for side in (64, 96, 128, 192, 256, 384, 512, 768, 1024) if side <= largest]
    times = []
    for side in sides:
        x = torch.rand(1, 3, side, side)
        times.append(min(seconds(lambda x=x: model(x)) for _ in range(2)))
        print(f"{name}  {side:4d} x {side:<4d}  {times[-1]:8.2f} s", flush=True)
    exponent = np.polyfit(np.log(np.array(sides, float) ** 2), np.log(times), 1)[0]
    print(f"{name}  seconds grow as pixels to the power {exponent:.3f}")


def published(model: DRCT) -> dict[str, torch.Tensor]:
    """The model's weights under the released names, with the tables that spandrel asks for."""
    state = {}
    for name, value in model.state_dict().items():
        parts = name.split(".")
        if parts[0] == "groups":
            place = f"layers.{parts[1]}."
            if parts[2] == "reduce":
                weight = value[..., None, None] if parts[4] == "weight" else value
                state[f"{place}adjust{int(parts[3]) + 1}.{parts[4]}"] = weight
                continue
            rest = ".".join(parts[4:])
            for ours, theirs in (
                ("attention.bias_table", "attn.relative_position_bias_table"), ("attention.out.", "attn.proj."),
                ("attention.", "attn."), ("mlp.0.", "mlp.fc1."), ("mlp.2.", "mlp.fc2."),
            ):  # fmt: skip
                rest = rest.replace(ours, theirs) if rest.startswith(ours) else rest
            state[f"{place}swin{int(parts[3]) + 1}.{rest}"] = value
        else:
            for ours, theirs in (
                ("stem_norm.", "patch_embed.norm."), ("stem.", "conv_first."), ("body.", "conv_after_body."),
                ("before.", "conv_before_upsample.0."), ("enlarge.", "upsample."), ("last.", "conv_last."),
            ):  # fmt: skip
                if name.startswith(ours):
                    name = theirs + name.removeprefix(ours)
                    break
            state[name] = value
    return state


@torch.inference_mode()
def beside_spandrel(repeats: int) -> None:
    from spandrel.architectures.DRCT.__arch.drct_arch import DRCT as Theirs

    ours = DRCT(4).eval()
    theirs = Theirs(
        img_size=64, window_size=16, upscale=4, embed_dim=180, depths=(6,) * 6, num_heads=(6,) * 6, gc=32, mlp_ratio=2,
        img_range=1.0, upsampler="pixelshuffle", resi_connection="1conv",
    ).eval()  # fmt: skip
    left = theirs.load_state_dict(published(ours), strict=False)
    missing = [name for name in left.missing_keys if "relative_position_index" not in name and "attn_mask" not in name]
    if missing or left.unexpected_keys:
        raise SystemExit(f"the weights do not fit: {missing[:3]}, {left.unexpected_keys[:3]}")
    x = torch.rand(1, 3, 64, 64)
    print(f"largest difference {float((ours(x) - theirs(x)).abs().max()):.2g}")
    ratios = []
    for _ in range(repeats):
        mine, other = seconds(lambda: ours(x)), seconds(lambda: theirs(x))
        ratios.append(other / mine)
        print(f"DRCT x4, 64 x 64: ours {mine:.2f} s, spandrel {other:.2f} s", flush=True)
    memory = peak_memory(lambda: theirs(x)) / peak_memory(lambda: ours(x))
    print(
        f"DRCT x4, 64 x 64: spandrel / ours {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}), "
        f"memory {memory:.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--largest", type=int, default=512, help="side of the largest picture")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, one thread")
    try:
        beside_spandrel(options.repeats)
    except ImportError as error:
        print(f"spandrel is not installed ({error})")
    growth("CATANet x2", CATANet(2).eval(), options.largest)
    growth("DRCT x4, one group", DRCT(4, groups=1).eval(), min(options.largest, 512))


if __name__ == "__main__":
    main()
