"""Tokens inside tokens: small "words" within every patch, and what the patches ("sentences") take from them."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nearfar.ops.common.dims import CONVOLUTIONS, check_dims


class WordEmbedding(nn.Module):
    """Cuts a grid into patches and convolves each alone, with zeros at its own border, to `words` cells an axis.

    Han et al., "Transformer in Transformer" (2021), in the published code's order: cut first, then a 7^dims convolution
    of stride patch_size / words. With `isolated=False` (timm's first port) the convolution runs over the whole grid and
    the patches are cut from its result. (B, C_in, *S) to words (B N, M, C), M = words^dims, patches and words
    row-major; sides that are no multiple of the patch are refused. Cost O(N M 7^dims C_in C).

    Raises ValueError for words that do not divide the patch.
    """

    def __init__(
        self, in_chans: int, dim: int, patch_size: int = 16, words: int = 4, *, isolated: bool = True, dims: int = 2
    ) -> None:
        super().__init__()
        check_dims(dims)
        if words < 1 or patch_size % words:
            raise ValueError(f"words is {words}; it must divide patch_size={patch_size}")
        self.patch_size, self.words, self.isolated = patch_size, words, isolated
        self.proj = CONVOLUTIONS[dims](in_chans, dim, 7, patch_size // words, padding=3)

    def forward(self, x: Float[Tensor, "b c *s"]) -> Float[Tensor, "n m e"]:
        if any(n % self.patch_size for n in x.shape[2:]):
            raise ValueError(f"the grid is {tuple(x.shape[2:])}; its sides must be multiples of {self.patch_size}")
        if self.isolated:
            return self.proj(cut(x, self.patch_size)).flatten(2).mT
        return cut(self.proj(x), self.words).flatten(2).mT


def cut(x: Float[Tensor, "b c *s"], side: int) -> Float[Tensor, "n c *t"]:
    """Patches of `side` cells an axis as samples of their own, row-major within each sample."""
    dims = x.ndim - 2
    for axis in range(dims):
        x = x.unflatten(2 + 2 * axis, (-1, side))
    counts, sides = range(2, 2 + 2 * dims, 2), range(3, 3 + 2 * dims, 2)
    return x.permute(0, *counts, 1, *sides).flatten(0, dims)


class WordsToSentences(nn.Module):
    """S + LN(W LN(w)): every sentence gains a projection of its words, laid end to end (word slow, channel fast).

    Han et al. (2021). The first norm is over the whole vector, or with `norm_each` over each word (timm's first port,
    which also has a bias and no second norm: `bias=True, norm_out=False`). Words (B N, M, c) and sentences
    (B, P + N, C), of which the first P = `prefix` gain nothing, to sentences. Cost O(N M c C).
    """

    def __init__(
        self,
        dim: int,
        word_dim: int,
        words: int = 16,
        *,
        norm_each: bool = False,
        bias: bool = False,
        norm_out: bool = True,
    ) -> None:
        super().__init__()
        self.norm_each = norm_each
        self.norm1 = nn.LayerNorm(word_dim if norm_each else words * word_dim)
        self.proj = nn.Linear(words * word_dim, dim, bias=bias)
        self.norm2 = nn.LayerNorm(dim) if norm_out else nn.Identity()

    def gain(self, words: Float[Tensor, "n m c"], batch: int) -> Float[Tensor, "b s e"]:
        """What each sentence gains."""
        flat = self.norm1(words).flatten(1) if self.norm_each else self.norm1(words.flatten(1))
        return self.norm2(self.proj(flat.unflatten(0, (batch, -1))))

    def forward(
        self, words: Float[Tensor, "n m c"], sentences: Float[Tensor, "b s e"], prefix: int = 0
    ) -> Float[Tensor, "b s e"]:
        gain = self.gain(words, sentences.shape[0])
        return sentences + (F.pad(gain, (0, 0, prefix, 0)) if prefix else gain)


class WordMerging(nn.Module):
    """Words of 2^dims neighbouring sentences side by side, then a strided 3^dims convolution back to as many words.

    Han et al., "PyramidTNT" (2022). LN over channels; the words of each group of sentences form a grid of twice the
    side; convolution of stride 2. An odd grid gains zero sentences at its end, after the norm. Words (B N, M, c) of a
    grid of sentences `size` to (B N', M, e), N' = prod(ceil(size / 2)). Cost O(N M c e).
    """

    def __init__(self, dim: int, out_dim: int, words: int = 4, *, dims: int = 2) -> None:
        super().__init__()
        check_dims(dims)
        self.words, self.dims = words, dims
        self.norm = nn.LayerNorm(dim)
        self.conv = CONVOLUTIONS[dims](dim, out_dim, 3, 2, padding=1)

    def forward(self, x: Float[Tensor, "n m c"], size: tuple[int, ...]) -> Float[Tensor, "p m e"]:
        dims, halves = self.dims, [(n - 1) // 2 + 1 for n in size]  # as the strided convolution of sentences counts
        x = self.norm(x).unflatten(1, (self.words,) * dims).unflatten(0, (x.shape[0] // math.prod(size), *size))
        odd = [2 * half - n for half, n in zip(halves, size, strict=True)]
        if torch.compiler.is_compiling() or any(odd):  # a graph serves odd and even
            x = F.pad(x, (0, 0) * (dims + 1) + tuple(p for n in reversed(odd) for p in (0, n)))
        for axis, half in enumerate(halves):
            x = x.unflatten(1 + 2 * axis, (half, 2))
        # (b, s1, 2, s2, 2, ..., w1, w2, ..., c) to groups of sentences, then their words side by side
        groups = range(1, 2 * dims, 2)
        sides = [i for axis in range(dims) for i in (2 + 2 * axis, 1 + 2 * dims + axis)]
        x = x.permute(0, *groups, x.ndim - 1, *sides).flatten(0, dims)
        for axis in range(dims):
            x = x.flatten(2 + axis, 3 + axis)
        return self.conv(x).flatten(2).mT
