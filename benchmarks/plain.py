"""The published formulations of our operators in plain PyTorch, on the same parameters, for comparisons.

Each class takes the place of its base (`PLAIN`) and computes what the released code computes, in the steps of the
formula: matrices of all pairs, windows copied out, tables made anew, a loop over positions where the code has one.
Released CUDA kernels (LSNet, OverLoCK) have windows copied out in their place.
"""

import copy
import math

import torch
import torch.nn.functional as F
from mixers import H3Plain, RWKVLoop
from torch import Tensor, nn

from nearfar.ops.aggregation.layer_attention import LayerAttentionPool, LayerGate
from nearfar.ops.aggregation.statistics import AttentiveStatisticsPool, masked_moments
from nearfar.ops.attention.bilevel_routing import BiLevelRoutingAttention, _grid, _regions
from nearfar.ops.attention.causal import CausalAttention
from nearfar.ops.attention.manhattan import ManhattanAttention
from nearfar.ops.attention.places import coordinates
from nearfar.ops.attention.position_channel import PositionAttention
from nearfar.ops.common.dims import Conv2d
from nearfar.ops.common.layers import GELU, ChannelNorm
from nearfar.ops.convolution.atconv import ATConv, GatedConvMLP, TokenATConv
from nearfar.ops.convolution.causal import ShortConv
from nearfar.ops.convolution.contmix import window_index
from nearfar.ops.convolution.dmixer import IDConv, OverlappingReductionAttention, resize_table
from nearfar.ops.convolution.hyena import Hyena
from nearfar.ops.convolution.lsconv import LSConv
from nearfar.ops.convolution.sequence import ConvProjection
from nearfar.ops.recurrence.based import Based, taylor_features
from nearfar.ops.recurrence.fsmn import DilatedDenseFSMN
from nearfar.ops.recurrence.retnet import Retention
from nearfar.ops.spectral.global_filter import GlobalLocalFilter
from nearfar.vision.models.overlock import FocusBlock
from nearfar.vision.models.pyramid import PictureConv2d


class PlainNorm(ChannelNorm):
    """Mean and variance over the channel axis as they stand in the formula."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).square().mean(1, keepdim=True)
        return self.weight[:, None, None] * ((x - mean) / torch.sqrt(variance + self.eps)) + self.bias[:, None, None]


class PlainConv2d(Conv2d):
    """torch's own."""

    forward = nn.Conv2d.forward


class PlainPictureConv2d(PictureConv2d):
    """torch's own."""

    forward = nn.Conv2d.forward


class PlainGELU(GELU):
    """torch's own."""

    forward = nn.GELU.forward


class PlainGatedConvMLP(GatedConvMLP):
    """Every step a map of its own, the norm channels last."""

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.fc1(x).chunk(2, dim=1)
        return self.fc2(self.norm_layer(F.gelu(self.dwconv(gate)) * value))


class PlainATConv(ATConv):
    """A kernel map at every position, then pooled; one group per sample and channel."""

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, *size = x.shape
        taps = math.prod(self.window)
        pooled = F.adaptive_avg_pool1d(self.kernel_proj(x).flatten(2), taps)
        kernel = self.kernel_gen(self.activation(pooled))
        kernel = kernel - torch.sigmoid(self.difference_control)[:, None] * kernel.mean(-1, keepdim=True)
        kernel = kernel.reshape(batch * channels, 1, *self.window)
        values = self.x_proj(x).reshape(1, batch * channels, *size)
        y = F.conv2d(values, kernel, padding=self.window[0] // 2, groups=batch * channels)
        return self.proj(y.reshape(x.shape))


class PlainShortConv(ShortConv):
    """A padded convolution over (B, d, N), cut at N."""

    def convolve(self, x: Tensor, before: int) -> Tensor:
        y = F.conv1d(x.mT, self.weight, self.bias, padding=before, groups=self.dim)
        return y[..., : x.shape[1] + before - self.kernel_size + 1].mT


class PlainHyena(Hyena):
    """All on (B, d, N), the filter made anew, transforms of 2 N."""

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        x1, x2, v = self.short(self.in_proj(x)).mT.chunk(3, 1)
        v = v * x1
        spectrum = torch.fft.rfft(v, n=2 * n) * torch.fft.rfft(self.filter.taps(n), n=2 * n)
        y = torch.fft.irfft(spectrum, n=2 * n)[..., :n] + self.filter.bias[:, None] * v
        return self.out_proj((y * x2).mT)


class PlainTokenATConv(TokenATConv):
    """`PlainATConv` on tokens."""

    def forward(self, x: Tensor) -> Tensor:
        size = self.size or (math.isqrt(x.shape[1]),) * 2
        return PlainATConv.forward(self, x.mT.unflatten(2, size)).flatten(2).mT


class PlainLSConv(LSConv):
    """Windows copied out, times the kernels of their positions."""

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.lkp(x)
        windows = F.unfold(x, math.isqrt(kernel.shape[2]), padding=math.isqrt(kernel.shape[2]) // 2)
        windows = windows.view(x.shape[0], -1, *kernel.shape[1:])
        return self.bn((windows * kernel[:, None]).sum(3).flatten(1, 2)) + x


class PlainIDConv(IDConv):
    """Adaptive pooling, and one group per sample and channel."""

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, *size = x.shape
        taps = self.weight.shape[-1]

        def shares(pooled: Tensor) -> Tensor:
            return self.proj(pooled).unflatten(1, (self.groups, -1)).softmax(1)

        kernel = (shares(F.adaptive_avg_pool2d(x, taps)) * self.weight).sum(1)
        bias = (shares(x.mean((2, 3), keepdim=True)).flatten(2) * self.bias).sum(1)
        kernel = kernel.reshape(-1, 1, taps, taps)
        y = F.conv2d(x.reshape(1, -1, *size), kernel, bias.flatten(), padding=taps // 2, groups=batch * channels)
        return y.view(x.shape)


class PlainReductionAttention(OverlappingReductionAttention):
    """All weights of all positions."""

    def forward(self, x: Tensor, position: Tensor | None = None) -> Tensor:
        query, key, value, reduced = self.heads(x)
        logits = query * query.shape[-1] ** -0.5 @ key.mT
        if position is not None:
            logits = logits + resize_table(position, tuple(x.shape[-2:]), reduced, self.table)
        return (logits.softmax(-1) @ value).mT.reshape(x.shape)


class PlainFocusBlock(FocusBlock):
    """Windows copied out, times the kernels of their positions."""

    def mix(self, source: Tensor, context: Tensor, value: Tensor) -> Tensor:
        size = tuple(value.shape[-2:])
        source, context, value = self.enlarge(source, context, value)
        halves = value.unflatten(1, (2, self.heads, -1)).unbind(1)
        mixed = []
        for weights, half in zip(self.kernels(source, context), halves, strict=True):
            rows, columns = (window_index(n, weights.shape[-1], value.device) for n in value.shape[-2:])
            windows = half[..., rows[:, :, None, None], columns]  # b g c h k w k
            mixed.append((windows * weights[:, :, None]).sum((4, 6)).flatten(1, 2))
        return F.adaptive_avg_pool2d(torch.cat(mixed, 1), size)


class PlainManhattan(ManhattanAttention):
    """All weights of all positions, the bias made anew."""

    def full(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        size = tuple(query.shape[1:-2])
        query, key, value = (part.flatten(1, -3).transpose(1, 2) for part in (query, key, value))
        at = coordinates(size, query.device).float()
        head = torch.arange(self.num_heads) / self.num_heads
        pace = torch.log(1 - 2.0 ** -(self.decay_initial + self.decay_range * head))
        bias = pace[:, None, None] * (at[:, None] - at).abs().sum(-1)
        weights = (query * self.head_dim**-0.5 @ key.mT + bias).softmax(-1)
        return (weights @ value).transpose(1, 2).unflatten(1, size)


class PlainBiLevel(BiLevelRoutingAttention):
    """Keys and values of the chosen regions copied together for every region."""

    def attend(self, qkv: Tensor, chosen: Tensor | None, region: tuple[int, ...]) -> Tensor:
        size, dim = tuple(qkv.shape[1:-1]), self.dim
        query, kv = _regions(qkv[..., :dim], region), _regions(qkv[..., dim:], region)
        count, members = kv.shape[1:3]
        if chosen is None:
            chosen = torch.arange(count).expand(len(qkv), count, -1)
        every = kv[:, None].expand(-1, count, -1, -1, -1)
        kv = every.gather(2, chosen[..., None, None].expand(-1, -1, -1, members, 2 * dim)).flatten(2, 3)
        heads = lambda t: t.unflatten(-1, (self.num_heads, -1)).transpose(2, 3)  # noqa: E731
        query, key, value = heads(query), heads(kv[..., :dim]), heads(kv[..., dim:])
        y = (query * dim**-0.5 @ key.mT).softmax(-1) @ value
        return _grid(y.transpose(2, 3).flatten(-2), size, region)


class PlainGlobalFilter(GlobalLocalFilter):
    """The kernel resized at every call."""

    def filter(self, height: int, width: int) -> Tensor:
        return self.complex_weight if self.complex_weight.shape[1:3] == (height, width) else self._resize(height, width)


class PlainPositionAttention(PositionAttention):
    """All weights of all positions, in single precision."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).flatten(2) for layer in (self.query, self.key, self.value))
        return self.gamma * (v @ (q.mT @ k).softmax(-1).mT).view(x.shape) + x


class PlainCausalAttention(CausalAttention):
    """All weights of all positions under a mask made anew."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        n = x.shape[1]
        mask = torch.full((n, n), -10000.0).triu(1)
        y = (q * q.shape[-1] ** -0.5 @ k.mT + mask).softmax(-1) @ v
        return self.out_proj(y.transpose(1, 2).flatten(2))


class PlainBased(Based):
    """The quadratic view on the features."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, _ = self.heads(x)
        q, k = taylor_features(q), taylor_features(k)
        total = (q * k.cumsum(2)).sum(-1, keepdim=True) + self.eps
        return self.output((q @ k.mT).tril() @ v / total, x)


class PlainRetention(Retention):
    """The parallel form: all decays of all pairs."""

    def retain(self, q: Tensor, k: Tensor, v: Tensor, memory: Tensor, rate: Tensor) -> Tensor:
        at = torch.arange(q.shape[2])
        decay = torch.exp(rate[:, None, None] * (at[:, None] - at).clamp(min=0)).tril()
        return (q @ k.mT * decay) @ v

    @staticmethod
    def remember(k: Tensor, v: Tensor, memory: Tensor, rate: Tensor, lengths: Tensor | None) -> Tensor:
        return memory  # the parallel form leaves none


class PlainLayerGate(LayerGate):
    """Mean and maximum through the network one after the other."""

    def gates(self, x: Tensor) -> Tensor:
        heads = x.unflatten(1, (self.num_heads, -1)).permute(0, 1, 4, 2, 3)  # b h t k l
        logits = 0
        for pooled in (heads.mean(3), heads.amax(3)):
            logits = logits + torch.relu(pooled @ self.w1 + self.b1) @ self.w2 + self.b2
        return torch.sigmoid(logits).mT


class PlainLayerPool(LayerAttentionPool):
    """No norm folded."""

    def forward(self, x: Tensor) -> Tensor:
        return self.norm_out(self.proj_out(self.gate(self.proj_in(self.norm_in(x)))))


class PlainStatistics(AttentiveStatisticsPool):
    """Mean and deviation repeated along time beside the frames."""

    def forward(self, x: Tensor, mask: Tensor | None = None, correction: int | None = None) -> Tensor:
        mean, variance = masked_moments(x, None, 1 if correction is None else correction)
        context = torch.cat([x, mean.expand_as(x), variance.clamp(min=1e-12).sqrt().expand_as(x)], 1)
        logits = self.expand(self.attention_norm(torch.relu(self.reduce(context))))
        if self.training and self.drop_frames:
            dropped = torch.rand(len(x), 1, x.shape[2]) < self.dropout.p
            logits = logits.masked_fill(dropped, -math.inf)
        weights = torch.softmax(logits, -1)
        if not self.drop_frames:
            weights = self.dropout(weights)
        mean = (weights * x).sum(-1)
        std = ((weights * x.square()).sum(-1) - mean.square()).clamp(min=1e-4).sqrt()
        return self.out_norm(self.linear(self.norm(torch.cat([mean, std], 1))))


class PlainConvProjection(ConvProjection):
    """A convolution over (B, d, N), the shortcut added."""

    def convolve(self, h: Tensor, left: int, right: int) -> Tensor:
        y = F.conv1d(F.pad(h.mT, (left, right)), self.depthwise[:, None], groups=len(self.depthwise))
        return self.dropout(h + y.mT)


class PlainDenseFSMN(DilatedDenseFSMN):
    """Grouped convolutions over (B, d, N)."""

    def forward(self, x: Tensor, mask: Tensor | None = None, state: dict | None = None) -> Tensor:
        stack = x.mT
        for i, (weight, norm, slope) in enumerate(zip(self.convs, self.norms, self.slopes)):
            reach = (weight.shape[2] - 1) * 2**i // 2
            out = F.conv1d(F.pad(stack, (reach, reach)), weight, dilation=2**i, groups=len(weight))
            out = F.prelu(norm(out.mT).mT, slope)
            stack = torch.cat([out, stack], 1)
        return out.mT


PLAIN = {
    cls.__base__: cls
    for cls in (
        PlainNorm,
        PlainConv2d,
        PlainPictureConv2d,
        PlainGELU,
        PlainGatedConvMLP,
        PlainATConv,
        PlainTokenATConv,
        PlainLSConv,
        PlainIDConv,
        PlainReductionAttention,
        PlainFocusBlock,
        PlainManhattan,
        PlainBiLevel,
        PlainGlobalFilter,
        PlainPositionAttention,
        PlainCausalAttention,
        PlainBased,
        PlainRetention,
        PlainLayerGate,
        PlainLayerPool,
        PlainStatistics,
        PlainConvProjection,
        PlainDenseFSMN,
        PlainShortConv,
        PlainHyena,
        H3Plain,
        RWKVLoop,
    )
}
"""Our operator -> its published formulation on the same parameters."""


def plain(model: nn.Module) -> nn.Module:
    """A copy of `model` whose operators are those of `PLAIN`."""
    model = copy.deepcopy(model)
    for module in model.modules():
        module.__class__ = PLAIN.get(type(module), type(module))
    return model
