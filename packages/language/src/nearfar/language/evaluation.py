"""How well a causal language model predicts a text, and what an n-gram of the same text would."""

import inspect
import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nearfar.core.cli.console import track
from nearfar.core.errors import UserError
from nearfar.core.finite import check_finite
from nearfar.language.texts import token_bytes


def cache_argument(model: PreTrainedModel) -> str:
    """The name under which the model takes and returns its state."""
    names = inspect.signature(model.forward).parameters
    return next((name for name in ("past_key_values", "cache_params", "state") if name in names), "past_key_values")


def read_on(model: PreTrainedModel, ids: Tensor, state: Any = None, **more: Any) -> tuple[Tensor, Any]:
    """Logits of `ids` after what `state` remembers, and the state after them."""
    name = cache_argument(model)
    given = {name: state} if state is not None else {}
    try:
        out = model(ids, use_cache=True, **given, **more)
    except (ValueError, IndexError) as error:
        if "longer than" in str(error) or "out of range" in str(error):
            raise UserError(f"the text is longer than the model can carry its state over ({error})") from error
        raise
    return out.logits, getattr(out, name, None)


@torch.inference_mode()
def score(
    model: PreTrainedModel,
    tokens: Tensor,
    tokenizer: PreTrainedTokenizerBase,
    piece: int = 1024,
    carry: bool = True,
    size: int | None = None,
) -> dict[str, Any]:
    """Predict every token but the first from those before it, in pieces of `piece`.

    With `carry` the state goes from piece to piece, so each token is predicted from all of the text; without, from its
    own piece alone. `size`: bytes that all tokens but the first stand for; None: as the tokens tell them. Returns
    tokens, bytes, perplexity per token, bits per token and per byte, tokens per second.
    """
    if len(tokens) < 2:
        raise UserError(f"the text has {len(tokens)} tokens; at least 2 are needed")
    total, state, started = 0.0, None, time.perf_counter()
    for start in track(range(0, len(tokens) - 1, piece), "scoring"):
        part = tokens[start : start + piece + 1].long().to(model.device)
        if carry:
            logits, state = read_on(model, part[None, :-1], state)
            if state is None:
                raise UserError(f"{type(model).__name__} gives no state back to carry over; score its pieces alone")
        else:
            logits = model(part[None, :-1]).logits
        total += torch.nn.functional.cross_entropy(logits[0].float(), part[1:], reduction="sum").item()
    check_finite(total, "the model's loss on the text")
    count = len(tokens) - 1
    size = max(1, sum(token_bytes(part, tokenizer) for part in tokens[1:].split(2**22)) if size is None else size)
    return {
        "tokens": count,
        "bytes": size,
        "perplexity": math.exp(total / count) if total / count < 700 else math.inf,
        "bits_per_token": total / count / math.log(2),
        "bits_per_byte": total / size / math.log(2),
        "context": "all of the text, state carried" if carry else f"pieces of {piece} tokens",
        "tokens_per_second": count / (time.perf_counter() - started),
    }


@torch.inference_mode()
def write_on(
    model: PreTrainedModel,
    ids: Tensor,
    state: Any = None,
    max_new_tokens: int = 200,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    end: int | None = None,
) -> Iterator[tuple[int, Any]]:
    """Yield one new token at a time after `ids` `(1, N)`, with the state that has read all before it.

    temperature 0 takes the likeliest token; else from the smallest set of tokens whose probability reaches `top_p`.
    """
    generator = torch.Generator(ids.device).manual_seed(seed)
    for _ in range(max_new_tokens):
        logits, state = read_on(model, ids, state)
        logits = check_finite(logits[0, -1].float(), "the model's next token")
        if temperature == 0:
            token = logits.argmax()
        else:
            p, order = (logits / temperature).softmax(-1).sort(descending=True)
            p = torch.where(p.cumsum(-1) - p < top_p, p, 0)
            token = order[torch.multinomial(p, 1, generator=generator)[0]]
        ids = token.view(1, 1)
        if token == end:
            return
        yield int(token), state


def ngram_bits(train: np.ndarray, test: np.ndarray, vocabulary: int, order: int = 5) -> float:
    """Bits per token of an interpolated Kneser-Ney n-gram counted on `train`, for `test` without its first token.

        P(c | h) = (max(N(h c) - D, 0) + D T(h) P(c | h')) / N(h)

    h' is h without its oldest token, T(h) the different tokens seen after h, D = n1 / (n1 + 2 n2) with n1, n2 the
    n-grams of count 1 and 2 (1/2 where there are none). N counts occurrences at the highest order, below it the
    different tokens seen before. Under the unigram stands the uniform distribution. Chen & Goodman (1999), section 2.7.
    """
    if vocabulary**order > 2**62:
        raise UserError(f"an {order}-gram over {vocabulary} tokens is too large; use bytes or a lower order")
    p = np.full(len(test) - 1, 1 / vocabulary)
    for n in range(1, order + 1):
        seen = windows(train, n, vocabulary)
        if n < order:
            seen = np.unique(windows(train, n + 1, vocabulary)) % vocabulary**n
        grams, counts = np.unique(seen, return_counts=True)
        ones, twos = (counts == 1).sum(), (counts == 2).sum()
        discount = ones / (ones + 2 * twos) if ones else 0.5
        histories, first = np.unique(grams // vocabulary, return_index=True)
        totals, kinds = np.add.reduceat(counts, first), np.diff([*first, len(grams)])
        start = max(0, n - 2)  # the earliest tokens lack a full history: they keep the shorter one's estimate
        wanted = windows(test[max(0, 2 - n) :], n, vocabulary)
        count, total, kind = (
            find(wanted, grams, counts),
            find(wanted // vocabulary, histories, totals),
            find(wanted // vocabulary, histories, kinds),
        )
        lower = p[start:]
        mixed = (np.maximum(count - discount, 0) + discount * kind * lower) / np.maximum(total, 1)
        p[start:] = np.where(total > 0, mixed, lower)
    return float(-np.log2(p).mean())


def windows(tokens: np.ndarray, n: int, vocabulary: int) -> np.ndarray:
    """Every n neighbouring tokens as one number."""
    code = np.zeros(len(tokens) - n + 1, np.int64)
    for i in range(n):
        code = code * vocabulary + tokens[i : len(tokens) - n + 1 + i]
    return code


def find(wanted: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The value of each wanted key, 0 where there is none."""
    place = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: list[str],
    limit: int | None = None,
    batch_size: int = 8,
    max_length: int = 1024,
) -> dict[str, dict[str, Any]]:
    """Scores of lm-evaluation-harness tasks, by its own library (extra `evaluate`)."""
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise UserError(f"tasks need {error.name}: pip install 'lm-eval[hf]'") from error
    # a tokenizer that ends every text with its end token (as byte tokenizers do) would have the end scored too
    ends = tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id
    harness = HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=batch_size,
        max_length=max_length,
        add_bos_token=False if ends else None,
    )
    try:
        found = lm_eval.simple_evaluate(harness, tasks=list(tasks), limit=limit)
    except (KeyError, ValueError, OSError, ConnectionError) as error:
        raise UserError(f"{', '.join(tasks)}: {str(error).splitlines()[0]}") from error
    return found["results"]
