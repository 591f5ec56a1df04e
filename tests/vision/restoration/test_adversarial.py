"""The adversarial stage: discriminator, perceptual loss from local weights, a short training that resumes exactly."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from skimage import data
from torchvision.models import vgg19

from nearfar.core.errors import CheckpointError, UserError
from nearfar.vision.restoration.adversarial import PerceptualLoss, UNetDiscriminator
from nearfar.vision.restoration.networks import load_restorer
from nearfar.vision.restoration.training import Recipe, train_restorer
from tests.vision.restoration.test_upscaling import TINY


def test_discriminator_sees_every_pixel_and_its_convolutions_are_bounded():
    net = UNetDiscriminator(8)
    assert sum(p.numel() for p in UNetDiscriminator().parameters()) == 4_376_897
    x = torch.rand(2, 3, 32, 40)
    for _ in range(20):
        assert net(x).shape == (2, 1, 32, 40)
    for conv in (*net.down, *net.up, *net.after):
        assert float(torch.linalg.matrix_norm(conv.weight.detach().flatten(1), 2)) < 1.1
    with pytest.raises(ValueError, match="multiples of 8"):
        net(x[..., :36])


@pytest.fixture(scope="module")
def vgg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    with torch.device("meta"):
        shapes = {f"features.{name}": value.shape for name, value in vgg19().features.state_dict().items()}
    state = {name: torch.randn(shape).mul_(0.03) for name, shape in shapes.items()}
    path = tmp_path_factory.mktemp("vgg") / "vgg19.pth"
    torch.save(state, path)
    return path


def test_perceptual_loss_before_the_activations(vgg: Path, tmp_path: Path):
    loss = PerceptualLoss(vgg)
    x, y = torch.rand(1, 3, 32, 32, requires_grad=True), torch.rand(1, 3, 32, 32)
    with torch.device("meta"):
        net = vgg19().features
    state = torch.load(vgg, weights_only=True)
    net.load_state_dict({name.removeprefix("features."): t for name, t in state.items()}, assign=True)
    mean, std = (torch.tensor(t).view(1, 3, 1, 1) for t in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    found: list[list[torch.Tensor]] = []
    for picture in (x, y):
        seen = []
        for place in (2, 7, 16, 25, 34):
            net[place].register_forward_hook(lambda _m, _i, out, seen=seen: seen.append(out.clone()))
        net((picture - mean) / std)
        found.append(seen[-5:])
        for layer in net:
            layer._forward_hooks.clear()
    expected = sum(w * (a - b).abs().mean() for w, a, b in zip((0.1, 0.1, 1, 1, 1), *found))
    torch.testing.assert_close(loss(x, y), expected, rtol=1e-4, atol=1e-6)
    loss(x, y).backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    assert float(loss(y, y)) == 0
    with pytest.raises(UserError, match=r"name that file \(--vgg FILE\)"):
        PerceptualLoss(None)
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError):
        PerceptualLoss(tmp_path / "other.pth")


def test_an_adversarial_stage_resumes_exactly(tmp_path: Path):
    picture = data.astronaut()
    files = []
    for name, part in (("a", picture[:128, :128]), ("b", picture[128:224, :96])):
        files.append(tmp_path / f"{name}.png")
        Image.fromarray(part).save(files[-1])
    recipe = Recipe(
        "catanet_x2", TINY, patch_size=12, batch_size=2, steps=2, epochs=3, learning_rate=1e-3, average=0.9,
        degradation="real", sharpen=True, adversarial=0.1, discriminator=4,
    )  # fmt: skip
    whole, history = train_restorer(files[:1], files[1:], recipe, tmp_path / "whole", device="cpu")
    assert {"train_loss", "adversarial_loss", "discriminator_loss", "psnr"} <= set(history[0])
    assert len({row["discriminator_loss"] for row in history}) == 3

    class Stop(Exception):
        pass

    from lightning.pytorch.callbacks import Callback

    class Stopping(Callback):
        def on_train_batch_start(self, trainer, *_args):
            if trainer.current_epoch == 2:
                raise Stop

    with pytest.raises(Stop):
        train_restorer(files[:1], files[1:], recipe, tmp_path / "cut", device="cpu", callbacks=[Stopping()])
    again, _ = train_restorer(files[:1], files[1:], recipe, tmp_path / "cut", device="cpu")
    for name, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    x = torch.rand(1, 3, 9, 9)
    assert torch.equal(load_restorer(tmp_path / "cut")(x), whole(x))
    with pytest.raises(UserError, match="takes multiples of 8"):
        train_restorer(files[:1], files[1:], Recipe("catanet_x3", TINY, patch_size=11, adversarial=0.1))
    with pytest.raises(UserError, match="--vgg FILE"):
        train_restorer(files[:1], files[1:], Recipe("catanet_x2", TINY, patch_size=12, perceptual=1.0))
