"""One call for every method and kind of network, and the tests of maps, on cues whose place is known."""

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from nearfar.core.errors import UserError
from nearfar.vision.explain.attention import attention_maps
from nearfar.vision.explain.checks import (
    area,
    boxes_mask,
    class_sensitivity,
    completeness,
    edges,
    energy_inside,
    insertion_deletion,
    judge,
    pointing,
    randomization,
    rank_correlation,
    ranks,
)
from nearfar.vision.explain.context_aware import ContextAware
from nearfar.vision.explain.gradients import gradients, resize
from nearfar.vision.explain.methods import METHODS, attention_rollout, explain, methods_for
from nearfar.vision.explain.normgrad import AGGREGATIONS, identity_map, layer_map
from nearfar.vision.explain.planted import cue_network, cues, planted_evidence
from nearfar.vision.explain.relevance import relevance
from nearfar.vision.models.rvernet import RveRNet
from tests.vision.base import randomize

SMALL = {"salient_relevance": {"parameters": ContextAware(longer_side=32, neighbours=16)}}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_a_map_for_each_picture(method: str) -> None:
    torch.manual_seed(0)
    if method == "attention_rollout":
        model = randomize(timm.create_model("vit_tiny_patch16_224", depth=2, img_size=64, num_classes=5))
    else:
        model = randomize(timm.create_model("resnet10t", num_classes=5))
    x = torch.randn(3, 3, 64, 64)
    found = explain(model.train(), x, [0, 2, 4], method, **SMALL.get(method, {}))
    assert model.training
    assert found.maps.shape == (3, 64, 64)
    assert found.target.tolist() == [0, 2, 4]
    assert (found.maps.flatten(1).std(1) > 0).any()  # Grad-CAM's positive part may be empty
    alone = explain(model, x[1:2], 2, method, **SMALL.get(method, {}))
    layers = {"layers": found.layers} if found.layers else {}
    again = explain(model, x[1:2], 2, method, **layers, **SMALL.get(method, {}))
    assert alone.layers == found.layers
    torch.testing.assert_close(again.maps[0], found.maps[1], rtol=1e-3, atol=1e-5)
    if found.attributions is not None and method != "gradient_x_input":
        assert float(completeness(model, x, found).max()) < 0.05


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("vit_tiny_patch16_224", {"depth": 3, "img_size": 64}),
        ("swin_tiny_patch4_window7_224", {"depths": (1, 1), "num_heads": (2, 4), "embed_dim": 16, "img_size": 56}),
        ("nearfar_convit_tiny", {"depth": 3, "local_layers": 1, "img_size": 64}),
        ("evit_deit_tiny", {"depth": 3, "img_size": 64, "reduce_at": (1,)}),
        ("cvt_13", {"depths": (1, 1, 1)}),
        ("attnet_xxs", {}),
    ],
)
def test_transformers_and_hybrids(name: str, settings: dict) -> None:
    torch.manual_seed(0)
    model = randomize(timm.create_model(name, num_classes=5, **settings))
    size = settings.get("img_size", 64)
    found = explain(model, torch.randn(2, 3, size, size))
    assert found.maps.shape == (2, size, size)
    assert found.layers
    assert (found.maps.flatten(1).std(1) > 0).all()


OTHERS = [
    "resnet10t", "regnety_002", "mobilenetv3_small_050", "efficientnet_b0", "pvt_v2_b0", "levit_128s",
    "edgenext_xx_small", "mobilevit_xxs", "poolformerv2_s12", "fastvit_t8", "efficientformer_l1",
    "xcit_nano_12_p16_224", "crossvit_tiny_240", "deit_tiny_distilled_patch16_224", "eva02_tiny_patch14_224",
    "cait_xxs24_224", "tnt_s_patch16_224", "coat_lite_tiny", "maxvit_nano_rw_256", "nest_tiny",
    "coatnet_nano_rw_224", "visformer_tiny", "densenet121", "inception_next_tiny", "gcvit_xxtiny",
    "twins_svt_small", "hgnetv2_b0", "repvgg_a0", "ghostnet_100", "davit_tiny", "focalnet_tiny_srf",
    "mvitv2_tiny", "swinv2_cr_tiny_ns_224", "torchvision:googlenet", "torchvision:shufflenet_v2_x0_5",
    "torchvision:mnasnet0_5", "torchvision:vit_b_32", "torchvision:swin_t", "torchvision:densenet121",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_families_of_timm_and_torchvision(name: str) -> None:
    """Layers are found, maps say something, and relevance adds up, with random weights."""
    torch.manual_seed(0)
    place, _, own = name.rpartition(":")
    model = (torchvision.models.get_model(own) if place else timm.create_model(own)).eval()
    size = 224 if place else model.pretrained_cfg["input_size"][-1]
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(0.2 * torch.randn_like(p))
            elif not p.any():  # torchvision's transformers begin with a classifier of zeros
                nn.init.normal_(p, std=0.02)
    x = torch.randn(1, 3, size, size)
    found = explain(model, x)
    assert found.layers
    assert found.maps.std() > 0
    assert float(relevance(model, x).lost) < 0.01


def test_networks_that_change_their_activations_in_place_and_half_precision() -> None:
    torch.manual_seed(0)
    model = randomize(torchvision.models.squeezenet1_1(num_classes=5))
    x = torch.randn(1, 3, 64, 64)
    target = model(x).argmax(1)  # its classes end in a ReLU, so others may be dead
    want = explain(model, x, target, "selective_normgrad", layers=["features.5", "features.9"])
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    got = explain(model, x, target, "selective_normgrad", layers=["features.5", "features.9"])
    torch.testing.assert_close(got.maps, want.maps)
    low = explain(model.half(), x.half(), target, "selective_normgrad", layers=["features.5", "features.9"])
    assert low.maps.dtype == torch.float32
    assert float(rank_correlation(low.maps, want.maps)) > 0.9
    assert next(model.parameters()).dtype == torch.float16


@pytest.mark.parametrize("method", ["normgrad", "gradient", "attention_rollout", "relevance", "integrated_gradients"])
def test_half_precision_of_a_transformer(method: str) -> None:
    torch.manual_seed(0)
    model = randomize(timm.create_model("vit_tiny_patch16_224", depth=2, img_size=64, num_classes=5))
    x = torch.randn(1, 3, 64, 64)
    want = explain(model, x, 1, method).maps
    got = explain(model.half(), x.half(), 1, method).maps
    assert got.dtype == torch.float32
    assert float(rank_correlation(got, want)) > 0.9
    assert next(model.parameters()).dtype == torch.float16


class Detector(nn.Module):
    def forward(self, x: Tensor) -> list[dict[str, Tensor]]:
        return [{"boxes": x.new_zeros(0, 4)} for _ in x]


class Segmenter(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def test_what_cannot_be_explained() -> None:
    model, x = randomize(timm.create_model("resnet10t", num_classes=5)), torch.randn(1, 3, 64, 64)
    for target, message in ((5, "class 5 is outside"), (-1, "outside"), ([1, 2], "names 2 classes"), (1.5, "whole")):
        with pytest.raises(UserError, match=message):
            explain(model, x, target)
    with pytest.raises(UserError, match="Detector: gives a list, so it is no classifier"):
        explain(Detector(), x)
    with pytest.raises(UserError, match=r"Segmenter: gives .*no classifier's"):
        explain(Segmenter(), x)
    with pytest.raises(ValueError, match="method is 'magic'"):
        explain(model, x, method="magic")
    with pytest.raises(ValueError, match=r"has no layer9"):
        explain(model, x, layers=["layer9"])
    with pytest.raises(ValueError, match="taken at the pixels"):
        explain(model, x, method="gradient", layers=["layer1"])
    with pytest.raises(UserError, match="not finite"):
        explain(model, x * float("nan"))
    convnext = timm.create_model("convnext_atto", num_classes=5)
    with pytest.raises(UserError, match="of which it has none"):
        explain(convnext, x, method="guided_backpropagation")
    with pytest.raises(UserError, match="attention rollout needs"):
        explain(convnext, x, method="attention_rollout")
    reasons = methods_for(convnext, x)
    assert {name for name, why in reasons.items() if why} == {"guided_backpropagation", "attention_rollout"}


def test_rollout_is_the_product_of_its_layers() -> None:
    torch.manual_seed(0)
    model, x = randomize(timm.create_model("vit_tiny_patch16_224", depth=2, img_size=64)), torch.randn(1, 3, 64, 64)
    first, second = (m.mean(1)[0] for m in attention_maps(model, x).values())
    one = torch.eye(17)
    want = ((second + one) / 2 @ ((first + one) / 2))[0, 1:].reshape(4, 4)
    torch.testing.assert_close(attention_rollout(model, x)[0, 0], want)


def test_insertion_and_deletion_by_hand() -> None:
    """A model that counts bright pixels of the left half, and maps that know or not."""

    class Left(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            left = x[:, 0, :, :4].mean((1, 2))
            return torch.stack((4 * left, torch.zeros_like(left)), 1)

    x, target = torch.ones(1, 1, 8, 8), torch.tensor([0])
    right = torch.zeros(1, 8, 8)
    right[..., 4:] = 1
    good = insertion_deletion(Left(), x, 1 - right, target, steps=4)
    bad = insertion_deletion(Left(), x, right, target, steps=4)
    expected = torch.tensor([[1, 0.5, 0, 0, 0]])
    torch.testing.assert_close(good.deletion, torch.sigmoid(4 * expected))
    torch.testing.assert_close(bad.deletion, torch.sigmoid(4 * torch.tensor([[1.0, 1, 1, 0.5, 0]])))
    assert good.insertion_area > bad.insertion_area
    torch.testing.assert_close(area(torch.tensor([[0.0, 1, 1]])), torch.tensor([0.75]))
    with pytest.raises(ValueError, match="must agree"):
        insertion_deletion(Left(), x, right[:, :4], target)


def test_pointing_game() -> None:
    maps, mask = torch.zeros(2, 40, 40), torch.zeros(2, 40, 40)
    maps[0, 10, 30], maps[1, 0, 0] = 1, 1  # row 10, column 30
    mask[:, 10:15, 10:20] = 1
    assert pointing(maps, mask, 15).tolist() == [True, True]
    assert pointing(maps, mask, 11).tolist() == [False, False]
    assert pointing(maps, mask, 0).tolist() == [False, False]
    assert pointing(mask, mask, 0).tolist() == [True, True]
    assert boxes_mask([(10, 10, 20, 15)], (40, 40)).sum() == 50
    torch.testing.assert_close(energy_inside(mask, mask), torch.ones(2))
    with pytest.raises(ValueError, match="a mask is empty"):
        pointing(maps, torch.zeros(2, 40, 40))
    with pytest.raises(ValueError, match="must agree"):
        pointing(maps, mask[:, :20])
    with pytest.raises(ValueError, match="outside 40 x 40"):
        boxes_mask([(10, 10, 50, 15)], (40, 40))


def test_ranks_share_ties() -> None:
    rows = ranks({"a": [3.0] * 6, "b": [1.0] * 6, "c": [1.0] * 6})
    assert [(row["method"], row["mean rank"]) for row in rows] == [("a", 1.0), ("b", 2.5), ("c", 2.5)]
    assert [row["ties"] for row in rows] == [0, 6, 6]
    with pytest.raises(ValueError, match="finite"):
        ranks({"a": [float("nan")]})


def test_planted_evidence_is_found_and_lost_with_the_weights() -> None:
    """NormGrad and salient relevance point at the cue that the classes hang on; the same weights in disorder do not."""
    methods = ("normgrad", "salient_relevance")
    accuracy, rows = planted_evidence(0, methods, 64)
    assert accuracy > 0.9
    found = {row["method"]: row for row in rows}
    chance = max(found[name]["trained"] for name in ("noise", "edges"))
    for name in methods:
        assert found[name]["trained"] > chance + 0.25, (name, found)
        assert found[name]["shuffled"] < found[name]["trained"] - 0.25, (name, found)


def test_maps_are_judged() -> None:
    net = cue_network(0, pictures=0)
    x, y, _ = cues(4, 100)
    verdict = judge(net, x, explain(net, x, y).maps, y, steps=8)
    assert verdict.score.shape == (4,)
    torch.testing.assert_close(verdict.beats_random, verdict.score > verdict.random)

    def maps_of(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
        return explain(model, images, target, "gradient_x_input").maps

    rows = randomization(net, x, y, maps_of, groups=3)
    assert len(rows) == 3
    assert rows[-1]["correlation"] < 0.6
    assert float(class_sensitivity(net, x, maps_of).mean()) < 0.9
    same = class_sensitivity(net, x, lambda model, images, target: edges(images))
    np.testing.assert_allclose(same, 1)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("identity", ["bias", "scaling", "conv3x3", "depthwise3x3", "own"])
def test_every_virtual_identity_by_name(identity: str, aggregation: str) -> None:
    """As the functions of NormGrad give them; `own` is of the layers' own weights."""
    net = cue_network(1, pictures=0)
    x, y, _ = cues(2, 1)
    found = explain(net, x, y, layers=["3"], identity=identity, aggregation=aggregation)
    point = gradients(net, x, y, ["3"]).layers["3"]
    if identity == "own":
        want = layer_map(net[3], point.input, point.gradient, aggregation)
    else:
        want = identity_map(point.output, point.gradient, identity, aggregation)
    torch.testing.assert_close(found.maps, resize(want, (40, 40))[:, 0])
    torch.testing.assert_close(found.scores, net(x).gather(1, y[:, None])[:, 0].detach())


def test_settings_that_fit_nothing() -> None:
    net = cue_network(1, pictures=0)
    x, y, _ = cues(1, 1)
    for settings, message in (
        ({"identity": "conv2x2"}, "identity is 'conv2x2'"),
        ({"aggregation": "mean"}, "aggregation is 'mean'"),
        ({"negate": True}, "turns meta-saliency's step around"),
    ):
        with pytest.raises(ValueError, match=message):
            explain(net, x, y, **settings)
    there, away = (explain(net, x, y, "meta_normgrad", step=0.5, negate=n).maps for n in (False, True))
    assert not torch.equal(there, away)


def test_a_network_of_two_views_is_explained_view_by_view() -> None:
    """`score` takes what any model gives: RveRNet's region, the context held still."""

    class View(nn.Module):
        def __init__(self, model: RveRNet, extra: Tensor) -> None:
            super().__init__()
            self.model, self.extra = model, extra

        def forward(self, roi: Tensor) -> Tensor:
            return self.model(roi, self.extra)

    backbones = [timm.create_model("resnet10t", num_classes=7) for _ in range(2)]
    model = randomize(RveRNet(*backbones, num_classes=3, hidden=8))
    roi, extra = torch.randn(2, 1, 3, 64, 64)
    assert explain(View(model, extra), roi, 1).maps.shape == (1, 64, 64)
