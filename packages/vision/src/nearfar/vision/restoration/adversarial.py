"""What the adversarial stage of a training adds: a U-Net discriminator and the perceptual loss of VGG19."""

from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torchvision.models import vgg19

from nearfar.core.checkpoints import load_state_dict, read
from nearfar.core.errors import UserError

LAYERS = {2: 0.1, 7: 0.1, 16: 1.0, 25: 1.0, 34: 1.0}
"""Weights of the outputs of conv1_2, conv2_2, conv3_4, conv4_4 and conv5_4, before their ReLU, by place in VGG19."""


class UNetDiscriminator(nn.Module):
    """Real or not, pixel by pixel: (B, 3, H, W) -> (B, 1, H, W) logits, sides multiples of 8.

    Three halvings and three bilinear doublings, whose results are added to the maps of the same size on the way down;
    every convolution but the first and the last has a spectral norm (Wang et al., Real-ESRGAN, 2021). `features`:
    channels of the first map.
    """

    def __init__(self, features: int = 64) -> None:
        super().__init__()
        if features < 1:
            raise ValueError(f"features is {features}; it must be at least 1")

        def normed(dim: int, out: int, kernel_size: int, stride: int) -> nn.Module:
            return spectral_norm(nn.Conv2d(dim, out, kernel_size, stride, 1, bias=False))

        widths = [features * 2**i for i in range(4)]
        self.first = nn.Conv2d(3, features, 3, padding=1)
        self.down = nn.ModuleList(normed(a, b, 4, 2) for a, b in pairwise(widths))
        self.up = nn.ModuleList(normed(b, a, 3, 1) for a, b in reversed([*pairwise(widths)]))
        self.after = nn.ModuleList(normed(features, features, 3, 1) for _ in range(2))
        self.last = nn.Conv2d(features, 1, 3, padding=1)

    def forward(self, x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 1 h w"]:
        if x.shape[2] % 8 or x.shape[3] % 8:
            raise ValueError(f"pictures are {x.shape[2]} x {x.shape[3]}; sides must be multiples of 8")
        maps = [F.leaky_relu(self.first(x), 0.2)]
        for conv in self.down:
            maps.append(F.leaky_relu(conv(maps[-1]), 0.2))
        x = maps.pop()
        for conv in self.up:
            larger = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
            x = F.leaky_relu(conv(larger), 0.2) + maps.pop()
        for conv in self.after:
            x = F.leaky_relu(conv(x), 0.2)
        return self.last(x)


class PerceptualLoss(nn.Module):
    """sum_l w_l mean |f_l(x) - f_l(y)| over the features f_l of VGG19 before its ReLUs, see `LAYERS`.

    `weights`: torchvision's VGG19 for ImageNet, a local file. Pictures are in [0, 1].

    Raises UserError without a file, CheckpointError for one that holds something else.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, weights: str | Path | None) -> None:
        super().__init__()
        if weights is None:
            raise UserError(
                "the perceptual loss needs torchvision's VGG19 for ImageNet, vgg19-dcbb9e9d.pth: name that file "
                "(--vgg FILE); where there is a network, torchvision.models.vgg19(weights='DEFAULT') fetches it into "
                "~/.cache/torch/hub/checkpoints. To train without it, --set perceptual=0"
            )
        state = {name: value for name, value in read(weights).items() if not name.startswith("classifier.")}
        with torch.device("meta"):
            net = vgg19().features
        inside = {name.removeprefix("features."): value for name, value in state.items()}
        load_state_dict(net.to_empty(device="cpu"), inside)
        self.layers = net[: max(LAYERS) + 1].requires_grad_(False).eval()
        for layer in self.layers:
            if isinstance(layer, nn.ReLU):
                layer.inplace = False
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))

    def forward(self, x: Float[Tensor, "b 3 h w"], y: Float[Tensor, "b 3 h w"]) -> Float[Tensor, ""]:
        loss = torch.zeros((), device=x.device)
        x, y = (x - self.mean) / self.std, (y - self.mean) / self.std
        for i, layer in enumerate(self.layers):
            x = layer(x)
            with torch.no_grad():
                y = layer(y)
            if i in LAYERS:
                loss = loss + LAYERS[i] * F.l1_loss(x, y)
        return loss


def logistic(logits: Tensor, real: bool) -> Tensor:
    """Binary cross-entropy of a discriminator's logits."""
    return F.softplus(-logits if real else logits).mean()
