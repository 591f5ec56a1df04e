"""CvT: what every token model has, and transformers' model with the same weights."""

import pytest
import segmentation_models_pytorch as smp
import torch
from transformers import CvtConfig, CvtForImageClassification

from nearfar.vision.models.cvt import CvT
from tests.vision.base import TokenTester, close


class TestCvT(TokenTester):
    model, name = CvT, "cvt_13"
    tiny = {"depths": (1, 1, 2), "dims": (16, 24, 48), "num_heads": (1, 3, 6)}
    sizes = ((32, 32), (45, 33), (64, 96))
    refusal = "at least"

    test_padding = None  # any size is legal

    @torch.no_grad()
    def test_encoder_of_segmentation_models(self) -> None:
        settings = {"encoder_depth": 4, "decoder_channels": (32, 16, 8, 8), **self.tiny}
        net = smp.Unet("tu-cvt_13", encoder_weights=None, classes=2, in_channels=4, **settings)
        assert net.eval()(self.input(1, 4)).shape == (1, 2, 64, 64)

    @torch.no_grad()
    def test_is_transformers(self) -> None:
        config = CvtConfig(depth=[1, 2, 3], num_labels=5)
        theirs = CvtForImageClassification(config).eval()
        state = {name: torch.randn_like(v) * 0.1 if v.ndim > 1 else v for name, v in theirs.state_dict().items()}
        theirs.load_state_dict(state)
        x = self.input(size=(64, 80))
        ours = CvT.from_published(theirs.state_dict(), activation="gelu")
        close(ours(x), theirs(x).logits, 1e-5)
        # the weights were trained with another activation
        trained = CvT.from_published(theirs.state_dict())
        assert (trained(x) - ours(x)).abs().amax() > 1e-4

    @torch.no_grad()
    def test_mean_without_class_token(self) -> None:
        model, x = self.create(class_token=False), self.input()
        features = model.forward_features(x)
        assert features.shape == (2, 16, 48)
        close(model(x), model.head.fc(features.mean(1)), 1e-6)
        assert self.model.published_settings(model.state_dict())["class_token"] is False

    def test_drop_path_is_the_last_stages(self) -> None:
        model = self.create(drop_path_rate=0.1, depths=(1, 2, 3))
        rates = [block.drop_path.p for stage in model.stages for block in stage.blocks]
        assert rates == pytest.approx([0, 0, 0, 0, 0.05, 0.1])

    def test_bad_arguments(self) -> None:
        with pytest.raises(ValueError, match="activation is 'relu'"):
            CvT(activation="relu")
        with pytest.raises(ValueError, match="as many stages"):
            CvT(depths=(1, 2))
