"""Time transformers with fewer tokens against their dense form, in one run.

    python benchmarks/tokens.py [--device cuda] [--repeats 9] [--batches 1 8] [--csv results.csv]

EViT's DeiT-S at keep rates 0.7 and 0.5 against 1; Sparsifiner-S (with and without token pruning) against its dense
teacher, DeiT-S; and token merging as ToMe has it, written here for timm's blocks, with the number of tokens merged in
every block chosen for EViT's multiply-accumulates at 0.7. Every model takes its turn beside the dense one within every
repeat, on process time, so that a slow moment of the machine falls on both; the median of the ratios counts.

Last, Sparsifiner's attention alone: a dense kernel with a mask, as the model has it, against products with the gathered
keys of every query, at several numbers of tokens; and of the masks the share of 16 x 16 blocks that hold no pair, which
block-sparse kernels could skip.
"""

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nearfar.vision.cost import macs
from nearfar.vision.models.evit import EViT
from nearfar.vision.models.sparsifiner import Sparsifiner


class MergingBlock(nn.Module):
    """A block of timm that merges `count` pairs of like tokens between its attention and its MLP.

    Bolya et al., "Token Merging" (ICLR 2023): tokens are split in two by turns, every one of the first half finds its
    most similar key in the second, and the most similar `count` are averaged into it, by the number of patches that
    they hold; attention weighs keys by the logarithm of that number.
    """

    def __init__(self, block: nn.Module, count: int) -> None:
        super().__init__()
        self.block, self.count = block, count

    def forward(self, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, held = state
        attn = self.block.attn
        q, k, v = attn.qkv(self.block.norm1(x)).unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, held.log()[:, None, None, :, 0])
        x = x + attn.proj(y.transpose(1, 2).flatten(2))
        x, held = self.merge(x, held, k.mean(1))
        return x + self.block.mlp(self.block.norm2(x)), held

    def merge(self, x: Tensor, held: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        keys = F.normalize(keys, dim=-1)
        likeness = keys[:, ::2] @ keys[:, 1::2].mT
        likeness[:, 0] = -torch.inf  # the class token stays
        best, partner = likeness.max(-1)
        order = best.argsort(dim=1, descending=True)
        gone, stay = order[:, : self.count], order[:, self.count :].sort(1).values
        partner = partner.gather(1, gone)
        width = x.shape[-1]
        first, second = (torch.cat((x * held, held), -1)[:, start::2] for start in (0, 1))
        pick = lambda t, index: t.gather(1, index[..., None].expand(-1, -1, width + 1))  # noqa: E731
        second = second.scatter_add(1, partner[..., None].expand(-1, -1, width + 1), pick(first, gone))
        both = torch.cat((pick(first, stay), second), 1)
        return both[..., :width] / both[..., width:], both[..., width:]


class Merging(nn.Module):
    """timm's DeiT with merging blocks."""

    def __init__(self, model: nn.Module, count: int) -> None:
        super().__init__()
        self.model = model
        self.merging = nn.ModuleList(MergingBlock(block, count) for block in model.blocks)

    def forward(self, x: Tensor) -> Tensor:
        model = self.model
        tokens = model.norm_pre(model._pos_embed(model.patch_embed(x)))
        state = tokens, torch.ones_like(tokens[..., :1])
        for block in self.merging:
            state = block(state)
        return model.forward_head(model.norm(state[0]))


def models(name: str = "deit_small_patch16_224") -> dict[str, nn.Module]:
    """The dense model first; all hold the same weights."""
    torch.manual_seed(0)
    dense = timm.create_model(name).eval()
    state = dense.state_dict()
    found: dict[str, nn.Module] = {"DeiT-S (timm)": dense}
    for keep in (1.0, 0.7, 0.5):
        found[f"EViT, keep {keep}"] = EViT.from_published(state, keep_rate=keep, reduce_at=(3, 6, 9), fuse=True)
    for label, settings in (("Sparsifiner", {}), ("Sparsifiner, tokens 0.7", {"token_keep_rate": 0.7})):
        sparse = Sparsifiner(**settings)
        own = sparse.state_dict()
        sparse.load_state_dict({**own, **{k: v for k, v in EViT.published_state(state).items() if k in own}})
        found[label] = sparse.eval()
    wanted = macs(found["EViT, keep 0.7"], 224)
    count = min(range(17), key=lambda c: abs(macs(Merging(dense, c), 224) - wanted))
    found[f"token merging, {count} a block"] = Merging(dense, count).eval()
    return found


def gathered(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, count: int) -> Tensor:
    """Attention of every query over its own `count` keys alone: truly sparse products."""
    kept = mask.to(q.dtype).topk(count, dim=-1, sorted=False).indices
    index = kept.flatten(2)[..., None].expand(-1, -1, -1, q.shape[3])
    near_k, near_v = (t.gather(2, index).unflatten(2, (-1, count)) for t in (k, v))
    weights = (q[..., None, :] @ near_k.mT * q.shape[3] ** -0.5).softmax(-1)
    return (weights @ near_v)[..., 0, :]


def attention_rows(device: str, repeats: int, sizes: Iterable[int] = (224, 384, 512)) -> list[dict[str, float]]:
    """Times of both forms of attention for the masks of a fresh predictor, of pictures of these sizes."""
    rows = []
    for size in sizes:
        model = Sparsifiner(depth=1, img_size=size).to(device).eval()
        attn, tokens = model.blocks[0].attn, model.embed(torch.randn(1, 3, size, size, device=device))[0]
        q, k, v = attn.heads(model.blocks[0].norm1(tokens))
        mask = attn.predictor(q, k).mask[:, :, 1:]
        count = int(mask[0, 0, 0].sum())
        q = q[:, :, 1:]
        masked = partial(F.scaled_dot_product_attention, q, k, v, mask)
        sparse = partial(gathered, q, k, v, mask, count)
        assert torch.allclose(masked(), sparse(), atol=1e-4)
        pairs = [(clock(masked, device), clock(sparse, device)) for _ in range(repeats)]
        blocks = F.max_pool2d(mask[0].float(), 16, 16)
        rows.append(
            {
                "tokens": k.shape[2],
                "masked (ms)": round(1e3 * statistics.median(a for a, _ in pairs), 2),
                "gathered (ms)": round(1e3 * statistics.median(b for _, b in pairs), 2),
                "gathered over masked": round(statistics.median(b / a for a, b in pairs), 1),
                "empty blocks": round(float((blocks == 0).float().mean()), 3),
            }
        )
    return rows


def clock(action: Callable[[], object], device: str) -> float:
    """Seconds of one call: of this process on a CPU, of the clock on a GPU."""
    read = time.perf_counter if device == "cuda" else time.process_time
    start = read()
    action()
    if device == "cuda":
        torch.cuda.synchronize()
    return read() - start


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--batches", type=int, nargs="+", default=(1, 8))
    parser.add_argument("--csv", help="file for the table")
    options = parser.parse_args()
    found = {name: model.to(options.device) for name, model in models().items()}
    dense, *others = found
    rows = []
    for batch in options.batches:
        x = torch.randn(batch, 3, 224, 224, device=options.device)
        base: list[float] = []
        for name in others:
            ratios, times = [], []
            for _ in range(options.repeats):
                for model in (found[dense], found[name]):
                    model(x)  # a model in use finds its weights in the caches
                pair = [clock(partial(found[n], x), options.device) for n in (dense, name)]
                base.append(pair[0])
                times.append(pair[1])
                ratios.append(pair[0] / pair[1])
            rows.append(
                {
                    "model": name,
                    "batch": batch,
                    "GMACs": round(macs(found[name], 224) / 1e9, 2),
                    "ms": round(1e3 * statistics.median(times), 1),
                    "speed": round(statistics.median(ratios), 2),
                }
            )
            print(rows[-1], file=sys.stderr)
        gmacs, ms = round(macs(found[dense], 224) / 1e9, 2), round(1e3 * statistics.median(base), 1)
        rows.append({"model": dense, "batch": batch, "GMACs": gmacs, "ms": ms, "speed": 1.0})
    with open(options.csv, "w", newline="") if options.csv else nullcontext(sys.stdout) as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    for row in attention_rows(options.device, options.repeats):
        print(row)


if __name__ == "__main__":
    main()
