"""State hygiene of a causal language model: do padding, batching, pieces and copies of the state change its numbers,
do documents that share a row, gradient checkpointing, generating from a state and compiling?

Works on any causal language model of transformers. Every check compares with the plainest way to compute the same
logits: one text alone, unpadded, in one piece, in float32.
"""

import copy
import inspect
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nearfar.core.devices import check_precision
from nearfar.core.finite import check_finite
from nearfar.language.cache import MixerCache
from nearfar.language.evaluation import cache_argument, read_on

LIMIT = 1e-4
HALF_LIMIT = 0.05


def audit(model: PreTrainedModel, texts: list[Tensor], device: str = "cpu") -> list[dict[str, Any]]:
    """One row per check: its name, the relative error of the logits, "ok", "FAIL" or why it could not run.

    Args:
        model: put in eval mode and float32.
        texts: at least three token sequences of different lengths, each of 8 tokens or more.
    """
    if len(texts) < 3 or len({len(t) for t in texts}) < 3 or min(len(t) for t in texts) < 8:
        raise ValueError("an audit needs at least three texts of different lengths, each of 8 tokens or more")
    model = model.to(device).float().eval()  # type: ignore[arg-type]
    bench = Bench(model, [t.to(device) for t in texts])
    for reference in bench.reference:
        check_finite(reference, "the model's logits")
    rows = []
    for name, check in CHECKS.items():
        limit = HALF_LIMIT if "precision" in name else LIMIT
        try:
            with torch.inference_mode():
                error = check(bench)
            rows.append({"check": name, "error": error, "verdict": "ok" if error < limit else "FAIL"})
        except Exception as problem:  # any model may refuse any way to be called: say so and go on
            reason = (str(problem).strip().split("\n")[0] or type(problem).__name__)[:90]
            rows.append({"check": name, "error": float("nan"), "verdict": f"refused: {reason}"})
        finally:
            model.float()
    return rows


class Bench:
    """Reference logits of each text alone, and ways to call the model otherwise."""

    def __init__(self, model: PreTrainedModel, texts: list[Tensor]) -> None:
        self.model, self.texts = model, texts
        with torch.inference_mode():
            self.reference = [model(t[None]).logits[0].float() for t in texts]
        self.takes_positions = "position_ids" in inspect.signature(model.forward).parameters

    def padded(self, side: str, lengths: list[int]) -> tuple[Tensor, Tensor]:
        """The first tokens of each text in one batch, and its mask."""
        width = max(lengths)
        ids = torch.zeros(len(lengths), width, dtype=torch.long, device=self.model.device)
        mask = torch.zeros_like(ids)
        for row, (text, n) in enumerate(zip(self.texts, lengths)):
            place = slice(width - n, width) if side == "left" else slice(0, n)
            ids[row, place], mask[row, place] = text[:n], 1
        return ids, mask

    def more(self, mask: Tensor, new: int) -> dict[str, Tensor]:
        """Mask and, where the model takes them, positions for the last `new` columns."""
        if cache_argument(self.model) == "cache_params":  # such models take the mask of the new columns alone
            mask = mask[:, -new:]
        given = {"attention_mask": mask}
        if self.takes_positions:
            given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -new:]
        return given

    def error(self, ours: list[Tensor], starts: list[int] | None = None) -> float:
        """Largest relative error over the texts; `starts`: from which token on `ours` stands for each."""
        errors = []
        for row, logits in enumerate(ours):
            start = starts[row] if starts else 0
            reference = self.reference[row][start : start + len(logits)]
            errors.append(((logits.float() - reference).norm() / reference.norm()).item())
        return max(errors) if all(map(math.isfinite, errors)) else math.nan  # which max() would pass over


def padding(side: str) -> Callable[[Bench], float]:
    def check(bench: Bench) -> float:
        lengths = [len(t) for t in bench.texts]
        ids, mask = bench.padded(side, lengths)
        logits = bench.model(ids, **bench.more(mask, ids.shape[1])).logits
        return bench.error([logits[row][mask[row].bool()] for row in range(len(lengths))])

    return check


def padded_prefill(side: str) -> Callable[[Bench], float]:
    """Read all but the last four tokens of each text as one padded batch, then the four with the state."""

    def check(bench: Bench) -> float:
        lengths = [len(t) - 4 for t in bench.texts]
        ids, mask = bench.padded(side, lengths)
        _, state = read_on(bench.model, ids, **bench.more(mask, ids.shape[1]))
        last = torch.stack([t[-4:] for t in bench.texts])
        out = []
        for i in range(4):
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            logits, state = read_on(bench.model, last[:, i : i + 1], state, **bench.more(mask, 1))
            out.append(logits)
        return bench.error(list(torch.cat(out, 1)), lengths)

    return check


def batch_order(bench: Bench) -> float:
    shortest = min(len(t) for t in bench.texts)
    ids = torch.stack([t[:shortest] for t in bench.texts]).flip(0)
    return bench.error(list(bench.model(ids).logits.flip(0)))


def pieces(sizes: Callable[[int], list[int]]) -> Callable[[Bench], float]:
    def check(bench: Bench) -> float:
        out = []
        for text in bench.texts:
            state, parts = None, []
            for piece in text.split(sizes(len(text))):
                logits, state = read_on(bench.model, piece[None], state)
                parts.append(logits[0])
            out.append(torch.cat(parts))
        return bench.error(out)

    return check


def restored(bench: Bench) -> float:
    """Save the state in mid-document, read something else with it, then go on from the saved one."""
    out, starts = [], []
    for text in bench.texts:
        half = len(text) // 2
        _, state = read_on(bench.model, text[None, :half])
        if isinstance(state, MixerCache):
            with tempfile.TemporaryDirectory() as folder:
                saved = MixerCache.load(state.save(Path(folder) / "state.safetensors"), text.device)
        else:
            saved = copy.deepcopy(state)
        read_on(bench.model, text[None, :half].flip(1), state)
        out.append(step_by_step(bench.model, text[None, half:], saved)[0])
        starts.append(half)
    return bench.error(out, starts)


def reordered(bench: Bench) -> float:
    """Reorder the state as a beam search does; each row must go on as the text it now holds."""
    half = min(len(t) for t in bench.texts) // 2
    _, state = read_on(bench.model, torch.stack([t[:half] for t in bench.texts]))
    order = torch.arange(len(bench.texts), device=bench.model.device).roll(1)
    order[0] = order[1]  # a beam that is taken twice
    state.reorder_cache(order)
    rest = torch.stack([bench.texts[i][half : half + 4] for i in order.tolist()])
    logits = step_by_step(bench.model, rest, state)
    errors = []
    for row, source in enumerate(order.tolist()):
        reference = bench.reference[source][half : half + 4]
        errors.append(((logits[row].float() - reference).norm() / reference.norm()).item())
    return max(errors)


def step_by_step(model: PreTrainedModel, ids: Tensor, state: Any) -> Tensor:
    out = []
    for token in ids.split(1, 1):
        logits, state = read_on(model, token, state)
        out.append(logits)
    return torch.cat(out, 1)


def half_precision(bench: Bench) -> float:
    """The whole text and, with the state, step by step in bfloat16."""
    check_precision("bfloat16", bench.model.device.type)
    bench.model.bfloat16()
    out = []
    for text in bench.texts:
        _, state = read_on(bench.model, text[None, :-4])
        out.append(step_by_step(bench.model, text[None, -4:], state)[0])
    return bench.error(out, [len(t) - 4 for t in bench.texts])


def packed(bench: Bench) -> float:
    """All texts in one row, told apart by positions that restart."""
    if not bench.takes_positions:
        raise ValueError("takes no position_ids, so documents cannot share a row")
    positions = torch.cat([torch.arange(len(t), device=t.device) for t in bench.texts])
    logits = bench.model(torch.cat(bench.texts)[None], position_ids=positions[None], use_cache=False).logits[0]
    return bench.error(list(logits.split([len(t) for t in bench.texts])))


def checkpointed(bench: Bench) -> float:
    """The gradient of a text that is read in two pieces, with and without gradient checkpointing."""
    model, text, gradients = bench.model, bench.texts[0], []
    try:
        for checkpointing in (False, True):
            if checkpointing:
                model.gradient_checkpointing_enable()
            with torch.inference_mode(False), torch.enable_grad():
                model.train().zero_grad()
                torch.manual_seed(0)  # of dropout
                half = len(text) // 2
                first, state = read_on(model, text[None, :half])
                if state is None:
                    raise ValueError("keeps no state in training")
                second, _ = read_on(model, text[None, half:], state)
                (first.float().square().mean() + second.float().square().mean()).backward()
                gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    finally:
        model.gradient_checkpointing_disable()
        model.eval().zero_grad()
    plain, other = gradients
    return ((other - plain).norm() / plain.norm()).item()


def generated(bench: Bench) -> float:
    """Tokens that differ when a text is generated on from a state that has read its first half."""
    model: Any = bench.model
    text = bench.texts[0][None]
    how: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    mask = torch.ones_like(text)
    whole = model.generate(text, attention_mask=mask, **how)
    _, state = read_on(model, text[:, : text.shape[1] // 2])
    asked = model.generate(text, attention_mask=mask, **{cache_argument(model): state}, **how)
    return (asked[:, -8:] != whole[:, -8:]).float().mean().item()


def compiled(bench: Bench) -> float:
    """The model as one graph of torch.compile, not optimized."""
    torch._dynamo.reset()
    model = torch.compile(bench.model, backend="eager", fullgraph=True)
    return bench.error([model(t[None], use_cache=False).logits[0] for t in bench.texts[:1]])


CHECKS: dict[str, Callable[[Bench], float]] = {
    "left padding": padding("left"),
    "right padding": padding("right"),
    "left-padded prefill, then steps": padded_prefill("left"),
    "right-padded prefill, then steps": padded_prefill("right"),
    "batch order": batch_order,
    "token by token": pieces(lambda n: [1] * n),
    "prefill in two pieces": pieces(lambda n: [n // 2, n - n // 2]),
    "prefill in odd pieces": pieces(lambda n: [3, 1, n - 4]),
    "state saved and restored": restored,
    "state reordered (beams)": reordered,
    "documents in one row": packed,
    "gradient checkpointing with a state": checkpointed,
    "generating from a state": generated,
    "one graph of torch.compile": compiled,
    "half precision": half_precision,
}
