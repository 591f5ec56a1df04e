"""Recall in real text: the perplexity of tokens that repeat an earlier bigram of their context, and of the others.

Zoology (Arora et al. 2024, arXiv 2312.04927), section 3.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from nearfar.core.cli.console import track
from nearfar.core.errors import UserError


@dataclass
class BigramCounts:
    """How often each bigram occurs in a text: sorted codes first * vocabulary + second, and their counts."""

    codes: np.ndarray
    counts: np.ndarray
    vocabulary: int

    @classmethod
    def of(cls, tokens: Tensor, vocabulary: int) -> "BigramCounts":
        counted = cls(np.zeros(0, np.int64), np.zeros(0, np.int64), vocabulary)
        for start in range(0, len(tokens), 2**24):  # so that memory grows with the different bigrams alone
            part = tokens[start : start + 2**24 + 1].numpy()
            codes, counts = np.unique(bigram_codes(part, vocabulary), return_counts=True)
            both = np.union1d(counted.codes, codes)
            total = counted(both) + cls(codes, counts, vocabulary)(both)
            counted = cls(both, total, vocabulary)
        return counted

    def __call__(self, codes: np.ndarray) -> np.ndarray:
        """The counts of `codes`."""
        if not len(self.codes):
            return np.zeros(len(codes), np.int64)
        place = np.searchsorted(self.codes, codes).clip(max=len(self.codes) - 1)
        return np.where(self.codes[place] == codes, self.counts[place], 0)


def bigram_codes(tokens: np.ndarray, vocabulary: int) -> np.ndarray:
    return tokens[:-1].astype(np.int64) * vocabulary + tokens[1:]


def ar_hits(
    tokens: np.ndarray, vocabulary: int, counts: BigramCounts | None = None, frequent: int = 1250
) -> np.ndarray:
    """For tokens 1 .. N - 1 of one context: does it end a bigram that occurred earlier in the context?

    With `counts` of the training text, bigrams that occur there more than `frequent` times are no hits: a model knows
    them by heart.
    """
    codes = bigram_codes(tokens, vocabulary)
    _, first, inverse = np.unique(codes, return_index=True, return_inverse=True)
    hits = np.arange(len(codes)) > first[inverse]
    return hits & (counts(codes) <= frequent) if counts is not None else hits


@torch.no_grad()
def slice_scores(
    model: PreTrainedModel,
    tokens: Tensor,
    context: int = 1024,
    counts: BigramCounts | None = None,
    frequent: int = 1250,
) -> dict[str, Any]:
    """Score `tokens` in separate contexts; the first token of each is given, not predicted.

    Returns the number of tokens, the share of hits, and perplexity = exp(mean negative log-likelihood) of all tokens,
    of the AR hits and of the others (None where there are none).
    """
    if context < 3:
        raise UserError(f"--context {context}: needs at least 3 tokens to see a bigram again")
    pieces = [p for p in tokens.split(context) if len(p) > 2]
    if not pieces:
        raise UserError(f"the text has {len(tokens)} tokens; at least 3 are needed")
    loss, hit = [], []
    for ids in track(pieces, "scoring"):
        piece = ids.long()
        logits = model(piece[None].to(model.device)).logits[0, :-1].float()
        loss.append(torch.nn.functional.cross_entropy(logits, piece[1:].to(logits.device), reduction="none").cpu())
        hit.append(torch.from_numpy(ar_hits(piece.numpy(), logits.shape[-1], counts, frequent)))
    loss_all, hits = torch.cat(loss).double(), torch.cat(hit)

    def perplexity(chosen: Tensor) -> float | None:
        return chosen.mean().exp().item() if len(chosen) else None

    return {
        "tokens": len(loss_all),
        "hit_share": hits.double().mean().item(),
        "perplexity": perplexity(loss_all),
        "hits": perplexity(loss_all[hits]),
        "others": perplexity(loss_all[~hits]),
    }


def gap_explained(model: Mapping[str, Any], reference: Mapping[str, Any]) -> float:
    """The share of the loss gap between two models that lies on the AR hits, within 0 .. 1.

    share(hits) (NLL_model - NLL_reference on hits) / (NLL_model - NLL_reference overall).
    """
    if model["tokens"] != reference["tokens"] or model["hit_share"] != reference["hit_share"]:
        raise UserError("the two models have different tokens, so their losses cannot be compared")
    if model["hits"] is None:
        return 0.0
    on_hits, overall = (np.log(model[part]) - np.log(reference[part]) for part in ("hits", "perplexity"))
    return float(np.clip(model["hit_share"] * on_hits / overall, 0, 1)) if overall else 0.0
