"""VOLO: what every token model has, timm's model with the same weights, and training with token labels."""

from typing import Any

import pytest
import timm
import torch

from nearfar.vision.classification.token_labels import TokenLabelLoss
from nearfar.vision.models.token_mixing import random_box, swap
from nearfar.vision.models.volo import VOLO
from tests.vision.base import TokenTester, close


class TestVOLO(TokenTester):
    model, name = VOLO, "nearfar_volo_d1_224"
    tiny = {"depths": (1, 1, 1), "dims": (24, 48), "num_heads": (2, 4), "stem_dim": 8, "img_size": 64}
    default_levels = 2

    def saved_macs(self, model: VOLO, size: int) -> float:
        """The paper's counts of D5 fit a stem of 64 channels, as the other sizes have it; its weights have 128."""
        wide, dim = model.patch_embed.proj.in_channels, model.patch_embed.proj.out_channels
        stem = lambda n: (size // 2) ** 2 * (3 * 49 * n + 2 * 9 * n * n) + (size // 8) ** 2 * 16 * n * dim  # noqa: E731
        return stem(64) - stem(wide) if wide == 128 else 0

    def segmentation(self) -> dict[str, Any]:
        return {"encoder_depth": 4, **self.tiny, "depths": (1, 1, 1, 1, 1), "encoder_output_indices": [1, 2, 3, 4]}

    @torch.no_grad()
    def test_is_timms(self) -> None:
        settings = {"layers": (1, 1, 1, 1), "embed_dims": (192, 384, 384, 384), "num_heads": (6, 12, 12, 12)}
        theirs = timm.models.volo.VOLO(img_size=96, **settings).eval()
        ours = VOLO.from_published(theirs.state_dict())
        x = self.input(size=(96, 96))
        close(ours(x), theirs(x), 1e-5)
        close(ours.forward_features(x), theirs.forward_features(x), 1e-5)

    @torch.no_grad()
    def test_without_the_patches_classifier(self) -> None:
        model, x = self.create(), self.input()
        features = model.forward_features(x)
        largest = model.aux_head(features[:, 1:]).amax(1)
        close(model(x), model.head(features) + 0.5 * largest, 1e-6)
        bare = self.create(aux_head=False)
        bare.load_state_dict(bare.state_dict() | {n: v for n, v in model.state_dict().items() if "aux" not in n})
        close(bare(x), model.head(features), 1e-6)
        with pytest.raises(ValueError, match="aux_head=True"):
            self.create(aux_head=False, token_labels=True)

    def test_training_with_token_labels(self) -> None:
        model, x = self.create(token_labels=True).train(), self.input(4)
        logits, dense, box = model(x)
        assert logits.shape == (4, 5)
        assert dense.shape == (4, 16, 5)
        target = torch.rand(4, 5, 18).softmax(1)
        TokenLabelLoss()((logits, dense, box), target).backward()
        assert all(p.grad is not None for p in model.parameters())
        assert model.eval()(x).shape == (4, 5)

    @torch.no_grad()
    def test_mixing_changes_places_and_puts_logits_back(self) -> None:
        model = self.create(depths=(1, 1), class_layers=0, outlook_kernel=1, outlook_stride=1, token_labels=True)
        x = self.input(2)
        apart, dense, _ = model.forward_train(x, (0, 0, 0, 0))
        close(apart, model.head(model.forward_features(x)), 1e-6)
        _, swapped, _ = model.forward_train(x, (0, 0, 4, 4))
        close(swapped, dense, 1e-5)  # the whole picture moved and came back
        _, mixed, _ = model.forward_train(x, (1, 1, 3, 4))
        assert (mixed - dense).abs().amax() > 1e-3  # attention sees the other picture

    def test_boxes(self) -> None:
        torch.manual_seed(0)
        areas = []
        for _ in range(300):
            top, left, bottom, right = random_box(14, 10)
            assert 0 <= top <= bottom <= 14
            assert 0 <= left <= right <= 10
            areas.append((bottom - top) * (right - left))
        assert min(areas) == 0
        assert max(areas) > 80
        x = torch.arange(3.0)[:, None, None, None].expand(3, 4, 5, 1)
        y = swap(x, (1, 2, 3, 5))
        assert y[0, 1, 2] == 2
        assert y[2, 2, 4] == 0
        assert y[0, 0, 2] == 0
        assert (y[1] == 1).all()
        torch.testing.assert_close(swap(y, (1, 2, 3, 5)), x)

    def test_outlookers_have_no_drop_path(self) -> None:
        model = self.create(drop_path_rate=0.3, depths=(2, 2, 2))
        assert [block.drop_path.p for stage in model.stages for block in stage] == pytest.approx(
            [0, 0, 0.12, 0.18, 0.24, 0.3]
        )


def test_loss_is_its_formula() -> None:
    torch.manual_seed(0)
    logits, dense, target = torch.randn(2, 3), torch.randn(2, 4, 3), torch.rand(2, 3, 6).softmax(1)
    box = (0, 0, 1, 1)

    def slow(truth: bool) -> float:
        total = 0.0
        soft = []
        for i in range(2):
            t = target[i, :, 1]
            if truth:
                weight = 0.5 if t.argmax() == target[i, :, 0].argmax() else 0.9
                t = weight * t + (1 - weight) * target[i, :, 0]
            soft.append(t)
        for i in range(2):
            t = 0.75 * soft[i] + 0.25 * soft[1 - i]
            total -= float((t * logits[i].log_softmax(0)).sum()) / 2
            for j in range(4):
                total -= 0.5 * float((target[i, :, 2 + j] * dense[i, j].log_softmax(0)).sum()) / 8
        return total

    for truth in (False, True):
        loss = TokenLabelLoss(ground_truth=truth)((logits, dense, box), target)
        assert float(loss) == pytest.approx(slow(truth), rel=1e-5)
    whole = torch.rand(2, 3).softmax(1)
    every = whole[:, :, None].expand(-1, -1, 6)
    torch.testing.assert_close(
        TokenLabelLoss()((logits, dense, (0, 0, 0, 0)), whole), TokenLabelLoss()((logits, dense, (0, 0, 0, 0)), every)
    )
    with pytest.raises(ValueError, match="of 3 patches, the model has 4"):
        TokenLabelLoss()((logits, dense, box), target[..., :5])
    with pytest.raises(ValueError, match="must not be negative"):
        TokenLabelLoss(-1)
