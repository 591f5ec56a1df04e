"""Super-resolution networks beside spandrel's and the published form, and their growth with the size of the picture.

    uv run --group bench python benchmarks/super_resolution.py [--repeats 5] [--largest 1024]

Process time of one thread, alternating; medians of paired ratios (theirs / ours, above 1 is ours faster) with their
range. CATANet stands in no library: its published form is written here, with the order of operations of the released
code: patches cut and put back one by one, tokens normalized before they are compared with the centres, groups unfolded.
The exponent is fitted to seconds over pixels from a side of 64 on, once each.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    sides = [side for side in (64, 128, 256, 512, 1024) if side <= largest]
    model(torch.rand(1, 3, 64, 64))
    times = []
    for side in sides:
        x = torch.rand(1, 3, side, side)
        times.append(seconds(lambda x=x: model(x)))
        print(f"{name}  {side:4d} x {side:<4d}  {times[-1]:8.2f} s", flush=True)
    if len(sides) > 1:
        exponent = np.polyfit(np.log(np.array(sides, float) ** 2), np.log(times), 1)[0]
        print(f"{name}  seconds grow as pixels to the power {exponent:.3f}", flush=True)


def as_published(model: CATANet, x: Tensor) -> Tensor:
    """CATANet's output by the order of operations of the released code, on the weights of `model`."""
    picture, x = x, model.stem(x)
    first = x
    for aggregation, region, conv in model.stages:
        y = published_aggregation(aggregation, x)
        x = x + conv(published_ffn(region.ffn, published_regions(region.attention, y)))
    return model.last(model.enlarge(x + first)) + F.interpolate(
        picture, scale_factor=model.scale, mode="bilinear", align_corners=False
    )


def split(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2)


def merge(x: Tensor) -> Tensor:
    return x.transpose(-3, -2).flatten(-2)


def published_aggregation(block: nn.Module, x: Tensor) -> Tensor:
    layer, (height, width) = block.attention, x.shape[2:]
    tokens = x.flatten(2).transpose(1, 2).contiguous()
    z = F.layer_norm(tokens, tokens.shape[-1:], block.norm.weight, block.norm.bias, block.norm.eps)
    centre_k, centre_v = (
        split(linear(layer.centres)[None], layer.num_heads) for linear in (layer.centre_k, layer.centre_v)
    )
    likeness = F.normalize(z, dim=-1) @ F.normalize(layer.centres, dim=-1).mT
    order = likeness.argmax(-1).sort(stable=True).indices
    n, size = z.shape[1], min(z.shape[1], layer.group_size)
    groups = -(-n // size)
    left = groups * size - n
    index = order[..., None].expand(-1, -1, z.shape[-1])
    q, k, v = (
        linear(z).gather(1, order[..., None].expand(-1, -1, linear.out_features))
        for linear in (layer.q, layer.k, layer.v)
    )
    q = torch.cat([q, q[:, n - left :].flip(1)], 1).unflatten(1, (groups, size))
    k, v = (
        torch.cat([t, t[:, n - left - size :].flip(1)], 1).unfold(1, 2 * size, size).transpose(2, 3) for t in (k, v)
    )
    q, k, v = (split(t, layer.num_heads) for t in (q, k, v))
    near = F.scaled_dot_product_attention(q, k, v)
    far = F.scaled_dot_product_attention(
        q, *(t[:, None].expand(len(q), groups, -1, -1, -1) for t in (centre_k, centre_v))
    )
    y = merge(near + far).flatten(1, 2)[:, :n]
    y = layer.out(torch.zeros_like(z).scatter(1, index, y)).transpose(1, 2).unflatten(2, (height, width)).contiguous()
    return published_ffn(block.ffn, x + F.conv2d(y, block.mix.weight[..., None, None]))


def published_regions(layer: nn.Module, x: Tensor) -> Tensor:
    size, (height, width) = layer.patch_size, x.shape[2:]
    step = size - layer.overlap
    tops, lefts = ([*range(0, side - size, step), side - size] for side in (height, width))
    patches = torch.stack([x[..., top : top + size, left : left + size] for top in tops for left in lefts], 1)
    tokens = patches.flatten(0, 1).flatten(2).transpose(1, 2)
    z = F.layer_norm(tokens, tokens.shape[-1:], layer.norm.weight, layer.norm.bias, layer.norm.eps)
    y = F.scaled_dot_product_attention(*(split(linear(z), layer.num_heads) for linear in (layer.q, layer.k, layer.v)))
    tokens = tokens + layer.out(merge(y))
    patches = tokens.transpose(1, 2).reshape(len(x), len(tops) * len(lefts), -1, size, size)
    total = torch.zeros_like(x)
    for i, (top, left) in enumerate((top, left) for top in tops for left in lefts):
        total[..., top : top + size, left : left + size] += patches[:, i]
    for i, top in enumerate(tops[1:], 1):
        total[..., top : i * step + layer.overlap, :] /= 2
    for i, left in enumerate(lefts[1:], 1):
        total[..., left : i * step + layer.overlap] /= 2
    return total


def published_ffn(layer: nn.Module, x: Tensor) -> Tensor:
    tokens = x.flatten(2).transpose(1, 2)
    z = F.layer_norm(tokens, tokens.shape[-1:], layer.norm.weight, layer.norm.bias, layer.norm.eps)
    z = F.gelu(layer.fc1(z))
    deep = z.transpose(1, 2).unflatten(2, x.shape[2:]).contiguous()
    deep = F.conv2d(deep, layer.depthwise.weight, layer.depthwise.bias, padding=2, groups=deep.shape[1])
    tokens = tokens + layer.fc2(z + F.gelu(deep).flatten(2).transpose(1, 2))
    return tokens.transpose(1, 2).unflatten(2, x.shape[2:]).contiguous()


@torch.inference_mode()
def beside(
    name: str, rival: str, ours: Callable[[Tensor], Tensor], theirs: Callable[[Tensor], Tensor], repeats: int
) -> None:
    """Both on one picture of 64 x 64, alternating."""
    x = torch.rand(1, 3, 64, 64)
    print(f"{name}, 64 x 64: largest difference from {rival} {float((ours(x) - theirs(x)).abs().max()):.2g}")
    ratios = []
    for _ in range(repeats):
        mine, other = seconds(lambda: ours(x)), seconds(lambda: theirs(x))
        ratios.append(other / mine)
        print(f"{name}, 64 x 64: ours {mine:.2f} s, {rival} {other:.2f} s", flush=True)
    memory = peak_memory(lambda: theirs(x)) / peak_memory(lambda: ours(x))
    print(
        f"{name}, 64 x 64: {rival} / ours {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}), "
        f"memory {memory:.2f}",
        flush=True,
    )


def published(model: DRCT) -> dict[str, Tensor]:
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
    beside("DRCT x4", "spandrel", ours, theirs, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--largest", type=int, default=1024, help="side of the largest picture")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, one thread")
    try:
        beside_spandrel(options.repeats)
    except ImportError as error:
        print(f"spandrel is not installed ({error})")
    model = CATANet(2).eval()
    for module in model.modules():
        if hasattr(module, "initialized"):
            module.initialized.fill_(True)
    beside("CATANet x2", "published form", model, partial(as_published, model), options.repeats)
    growth("CATANet x2", model, options.largest)
    growth("DRCT x4, one group of six", DRCT(4, groups=1).eval(), options.largest)


if __name__ == "__main__":
    main()
