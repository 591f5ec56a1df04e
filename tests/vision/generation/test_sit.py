"""The diffusion transformer: sizes, labels, guidance, samplers, checkpoints, and that it learns."""

import math
from pathlib import Path

import pytest
import torch

from nearfar.vision.explain.attention import attention_maps
from nearfar.vision.generation.sit import MIXERS, SiT, _dopri5, position_table, sit
from tests.vision.base import close, randomize

SMALL = {"input_size": 8, "depth": 2, "dim": 16, "num_heads": 2, "num_classes": 4}


@pytest.mark.parametrize(
    ("mixer", "millions"), [("attention", (32.9, 130.3, 457.8, 674.8)), ("atconv", (31.1, 123.2, 432.7, 637.7))]
)
def test_trainable_parameters(mixer: str, millions: tuple[float, ...]) -> None:
    for size, expected in zip(["s", "b", "l", "xl"], millions, strict=True):
        with torch.device("meta"):
            model = sit(size, mixer)
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert abs(trainable / 1e6 - expected) < 0.06, (size, trainable)


def test_position_table_is_its_formula() -> None:
    table = position_table(16, 3)
    for row in range(3):
        for column in range(3):
            rates = [10000 ** -(j / 4) for j in range(4)]
            wanted = [f(place * rate) for place in (column, row) for f in (math.sin, math.cos) for rate in rates]
            torch.testing.assert_close(table[3 * row + column], torch.tensor(wanted))


@torch.no_grad()
@pytest.mark.parametrize("mixer", MIXERS)
def test_checkpoints(mixer: str, tmp_path: Path) -> None:
    model = randomize(SiT(**SMALL, mixer=mixer))
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([0.2, 0.7]), torch.tensor([1, 3])
    want = model(x, t, y)
    assert want.shape == x.shape
    state = {name: v[..., None, None] if name.endswith("_proj.weight") else v for name, v in model.state_dict().items()}
    state["projectors.0.0.weight"] = torch.zeros(3, 3)
    loaded = SiT.from_published(state, num_heads=2, activation="gelu_tanh")
    close(loaded(x, t, y), want, 1e-6)
    assert loaded.num_classes == 4
    model.save_pretrained(tmp_path)
    close(SiT.from_pretrained(tmp_path).eval()(x, t, y), want, 1e-6)
    maps = attention_maps(model, x, t, y)
    assert len(maps) == {"atconv": 0, "attention": 2, "hybrid": 1}[mixer]
    for weights in maps.values():
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 16))


@torch.no_grad()
def test_guidance() -> None:
    model = randomize(SiT(**SMALL))
    x, t, y = torch.randn(2, 4, 8, 8), torch.full((4,), 0.3), torch.tensor([1, 2, 4, 4])
    plain = model(torch.cat((x, x)), t, y)
    guided = model.guided(torch.cat((x, torch.zeros_like(x))), t, y, guidance=2.5)
    want = plain[2:, :3] + 2.5 * (plain[:2, :3] - plain[2:, :3])
    close(guided[:2, :3], want, 1e-6)
    close(guided[2:, :3], want, 1e-6)
    close(guided[:, 3:], plain[:, 3:], 1e-6)


def test_label_dropout_uses_the_extra_row() -> None:
    model = SiT(**SMALL, label_dropout=0.5).train()
    model.y_embedder.embedding_table.weight.data[4] = 7
    torch.manual_seed(0)
    share = (model.y_embedder(torch.zeros(2000, dtype=torch.long))[:, 0] == 7).float().mean()
    assert 0.45 < share < 0.55
    without = SiT(**SMALL, label_dropout=0)
    assert without.y_embedder.embedding_table.num_embeddings == 4
    with pytest.raises(ValueError, match="label_dropout"):
        without.sample(torch.zeros(1, 4, 8, 8), torch.zeros(1, dtype=torch.long), guidance=2.0)


def test_the_adaptive_solver_on_a_known_path() -> None:
    start = torch.tensor([1.0, -2.0], dtype=torch.float64)
    end = _dopri5(lambda x, t: -3 * x + math.cos(5 * t), start, 1e-9, 1e-9)
    exact = torch.exp(torch.tensor(-3.0)).double() * (start - 3 / 34) + (3 * math.cos(5) + 5 * math.sin(5)) / 34
    torch.testing.assert_close(end, exact, atol=1e-7, rtol=1e-7)


class Exact(SiT):
    """Velocity of the path to pictures that are normal with mean 2 and deviation 0.5, in closed form."""

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        t = t[:, None, None, None].to(x.dtype)
        variance = 0.25 * t**2 + (1 - t) ** 2
        return 2 + (0.25 * t - (1 - t)) / variance * (x - 2 * t)


@pytest.mark.parametrize("method", ["dopri5", "heun", "euler", "sde"])
@pytest.mark.parametrize("reverse", [False, True])
def test_samplers_reach_a_known_distribution(method: str, reverse: bool) -> None:
    torch.manual_seed(0)
    model = Exact(**SMALL).double()
    if reverse:
        model.forward = lambda x, t, y: -Exact.forward(model, x, 1 - t, y)
    noise = torch.randn(64, 4, 8, 8)
    generator = torch.Generator().manual_seed(1)
    x = model.sample(
        noise, torch.zeros(64, dtype=torch.long), method, steps=100, reverse_time=reverse, generator=generator
    )
    assert x.dtype == noise.dtype
    assert x.mean().item() == pytest.approx(2, abs=0.02)
    assert x.std().item() == pytest.approx(0.5, abs=0.02)
    if method != "sde":
        close(x, 2 + 0.5 * noise, 0.01)


def test_it_learns_and_its_samples_follow_the_label() -> None:
    torch.manual_seed(0)
    model = SiT(8, 2, 32, 2, "hybrid", num_classes=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0)
    for _ in range(150):
        labels = torch.randint(2, (32,))
        pictures = (2.0 * labels - 1)[:, None, None, None] + 0.1 * torch.randn(32, 4, 8, 8)
        loss = model.loss(pictures, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    labels = torch.tensor([0, 1] * 8)
    means = model.sample(torch.randn(16, 4, 8, 8), labels, "heun", steps=8).mean((1, 2, 3))
    assert (means[labels == 1] > 0.5).all()
    assert (means[labels == 0] < -0.5).all()


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="mixer is 'mamba'"):
        SiT(**SMALL, mixer="mamba")
    with pytest.raises(ValueError, match="num_heads=3"):
        SiT(**{**SMALL, "num_heads": 3}, mixer="attention")
    with pytest.raises(ValueError, match="multiple of 4"):
        SiT(**{**SMALL, "dim": 18})
    with pytest.raises(ValueError, match="size is 'm'"):
        sit("m")
    with pytest.raises(ValueError, match="method is 'rk'"):
        SiT(**SMALL).sample(torch.zeros(1, 4, 8, 8), torch.zeros(1, dtype=torch.long), "rk")
