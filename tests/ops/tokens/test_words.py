"""Words within sentences: embedding, what sentences gain, merging, against loops over patches."""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nearfar.ops.tokens.words import WordEmbedding, WordMerging, WordsToSentences


def agree(fast: torch.Tensor, slow: torch.Tensor, inputs: list[torch.Tensor]) -> None:
    torch.testing.assert_close(fast, slow, atol=1e-9, rtol=0)
    probe = torch.randn_like(fast)
    for a, b in zip(
        torch.autograd.grad((fast * probe).sum(), inputs, retain_graph=True),
        torch.autograd.grad((slow * probe).sum(), inputs, retain_graph=True),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def doubles(*size: int) -> torch.Tensor:
    return torch.randn(*size, dtype=torch.float64, requires_grad=True)


def randomized(operator: nn.Module) -> Any:
    for parameter in operator.parameters():
        nn.init.normal_(parameter, std=0.4)
    return operator.double()


@pytest.mark.parametrize("size", [(16,), (8, 12), (4, 8, 4)])
@pytest.mark.parametrize("isolated", [True, False])
def test_word_embedding_is_its_formula(size: tuple[int, ...], isolated: bool) -> None:
    dims = len(size)
    operator, x = randomized(WordEmbedding(2, 3, 4, 2, isolated=isolated, dims=dims)), doubles(2, 2, *size)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    weight, bias = operator.proj.weight, operator.proj.bias
    side = 4 if isolated else 2
    whole = x if isolated else convolve(x, weight, bias, stride=2, padding=3)
    words = []
    for sample in whole:
        for corner in itertools.product(*(range(n // 4) for n in size)):
            patch = sample
            for axis, i in enumerate(corner):
                patch = patch.narrow(1 + axis, i * side, side)
            if isolated:
                patch = convolve(patch[None], weight, bias, stride=2, padding=3)[0]
            words.append(patch.flatten(1).mT)
    agree(operator(x), torch.stack(words), [x, weight, bias])
    with pytest.raises(ValueError, match="multiples of 4"):
        operator(F.pad(x, (0, 1)))


@pytest.mark.parametrize("legacy", [False, True])
def test_sentences_gain_what_their_words_say(legacy: bool) -> None:
    settings = {"norm_each": True, "bias": True, "norm_out": False} if legacy else {}
    operator = randomized(WordsToSentences(8, 3, 4, **settings))
    words, sentences = doubles(6, 4, 3), doubles(2, 4, 8)
    rows = []
    for sample in range(2):
        rows.append(sentences[sample, 0])
        for i in range(3):
            w = words[3 * sample + i]
            w = operator.norm1(w) if legacy else operator.norm1(torch.cat(list(w)))
            rows.append(sentences[sample, 1 + i] + operator.norm2(operator.proj(w.flatten())))
    slow = torch.stack(rows).unflatten(0, (2, 4))
    agree(operator(words, sentences, prefix=1), slow, [words, sentences, *operator.parameters()])
    sentences = sentences.detach()
    torch.testing.assert_close(operator(words, sentences[:, 1:]), slow[:, 1:])


@pytest.mark.parametrize("size", [(4,), (3,), (4, 6), (3, 4), (5, 3), (2, 3, 2)])
def test_merging_is_a_convolution_within_groups_of_sentences(size: tuple[int, ...]) -> None:
    dims, words = len(size), 2
    operator = randomized(WordMerging(3, 5, words, dims=dims))
    x = doubles(2 * math.prod(size), words**dims, 3)
    normed = operator.norm(x).unflatten(0, (2, *size))
    groups = []
    for sample in range(2):
        for corner in itertools.product(*(range(-(-n // 2)) for n in size)):
            grid = torch.zeros(*(2 * words,) * dims, 3, dtype=x.dtype)
            for member in itertools.product(range(2), repeat=dims):
                at = tuple(2 * c + m for c, m in zip(corner, member, strict=True))
                if all(i < n for i, n in zip(at, size, strict=True)):
                    place = tuple(slice(m * words, (m + 1) * words) for m in member)
                    grid[place] = normed[(sample, *at)].unflatten(0, (words,) * dims)
            groups.append(operator.conv(grid.movedim(-1, 0)[None])[0].flatten(1).mT)
    agree(operator(x, size), torch.stack(groups), [x, *operator.parameters()])


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="words is 3"):
        WordEmbedding(3, 8, 16, 3)
