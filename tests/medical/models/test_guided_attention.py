"""Multi-scale guided attention: contracts, counts, the loss, other encoders, three axes, training."""

import pytest
import torch
import torch.nn.functional as F

from nearfar.core.contracts import Contract, shipped
from nearfar.core.errors import CheckpointError
from nearfar.medical.models.deeplab import ResNet
from nearfar.medical.models.guided_attention import GuidedAttention, guided_loss, published_state

CONTRACTS = shipped("multi-scale-guided-attention")


def test_parameter_count() -> None:
    unused = 955_412
    with torch.device("meta"):
        assert sum(p.numel() for p in GuidedAttention().parameters()) == 104_511_475 - unused


@pytest.fixture
def small() -> GuidedAttention:
    return GuidedAttention(3, 2, "resnet18", dim=16)


def test_loss_is_the_published_sum(small: GuidedAttention) -> None:
    x, target = torch.randn(2, 2, 32, 32), torch.randint(0, 3, (2, 32, 32))
    out = small.train()(x)
    expected = 0
    for s in range(4):
        for stack in range(2):
            expected += F.cross_entropy(out.logits[stack][s], target)
            expected += 0.1 * ((out.inputs[stack][s] - out.reconstructions[stack][s]) ** 2).mean()
        expected += 0.25 * ((out.codes[0][s] - out.codes[1][s]) ** 2).mean()
    loss = guided_loss(out, target)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert not [name for name, parameter in small.named_parameters() if parameter.grad is None]


@torch.no_grad()
def test_result_is_the_mean_of_the_second_stack(small: GuidedAttention) -> None:
    x = torch.randn(1, 2, 32, 48)
    small.eval()
    torch.testing.assert_close(small(x), torch.stack(small.every(x).logits[1]).mean(0))
    assert small(x).shape == (1, 3, 32, 48)


@torch.no_grad()
def test_another_published_state_round_trips() -> None:
    """ResNeXt-50, two channels, four classes, 32 wide, under the published names."""
    path = next(p for p in CONTRACTS if p.stem.endswith("chaos5"))
    names = {next(iter(published_state({k: v})), None): k for k, v in Contract.load(path).state().items()}
    model = GuidedAttention(4, 2, "resnext50_32x4d", dim=32).eval()
    state = {names[k]: v for k, v in model.state_dict().items() if not k.endswith("tracked")}
    found = GuidedAttention.from_published({f"module.{k}": v for k, v in state.items()})
    x = torch.randn(1, 2, 32, 64)
    torch.testing.assert_close(found(x), model(x), rtol=0, atol=0)


@torch.no_grad()
def test_three_axes() -> None:
    encoder = ResNet((1, 1, 1, 1), (1, 2, 2, 2), (1, 1, 1, 1), in_channels=1, width=4, dims=3)
    model = GuidedAttention(2, 1, encoder, (16, 32, 64, 128), dim=8, dims=3).eval()
    assert model(torch.randn(1, 1, 30, 30, 14)).shape == (1, 2, 30, 30, 14)


def test_bad_input(small: GuidedAttention) -> None:
    with pytest.raises(ValueError, match="multiples of 4"):
        small(torch.randn(1, 2, 40, 40))
    with pytest.raises(ValueError, match="2-D"):
        GuidedAttention(dims=3)
    with pytest.raises(ValueError, match="encoder_channels"):
        GuidedAttention(encoder=torch.nn.Identity())
    with pytest.raises(CheckpointError, match="missing"):
        GuidedAttention.from_published({"weight": torch.zeros(1)})
