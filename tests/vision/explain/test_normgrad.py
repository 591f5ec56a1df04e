"""Closed forms against the products that they stand for, layers' own gradients by autograd, and the paper's phases."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.layers import BatchNormAct2d, Conv2dSame, GroupNormAct
from timm.layers.std_conv import StdConv2dSame
from torch import Tensor, nn

from nearfar.core.contracts import Contract
from nearfar.core.errors import UserError
from nearfar.vision.contracts.normgrad import build_contract, published_map
from nearfar.vision.explain.gradients import Pass, Point, candidate_layers, gradients, smooth, weights_of
from nearfar.vision.explain.normgrad import (
    AGGREGATIONS,
    COMBINATIONS,
    combine,
    competitive_gradient,
    identity_map,
    layer_map,
    layer_maps,
    stepped_weights,
)


def aggregated(vectors: Tensor, aggregation: str) -> Tensor:
    """The definition, of contributions (B, numbers, *S)."""
    if aggregation == "sum":
        return vectors.sum(1, keepdim=True)
    if aggregation == "max":
        return vectors.amax(1, keepdim=True)
    return (vectors if aggregation == "norm" else vectors.clamp(min=0)).norm(dim=1, keepdim=True)


def by_autograd(layer: nn.Module, x: Tensor, g: Tensor) -> Tensor:
    """Each position's contribution to the weight's gradient: (B, weights, *S'), one backward pass for each."""
    y = layer(x)
    found = torch.zeros(len(x), layer.weight.numel(), *y.shape[2:], dtype=x.dtype)
    for at in torch.cartesian_prod(*(torch.arange(n) for n in (len(x), *y.shape[2:]))).tolist():
        place = (at[0], slice(None), *at[1:])
        (gradient,) = torch.autograd.grad((y[place] * g[place]).sum(), layer.weight, retain_graph=True)
        found[place] = gradient.flatten()
    return found


def pair(*shape: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(*shape, dtype=torch.float64), torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("identity", ["bias", "scaling", "conv1x1", "conv3x3", "conv5x5", "depthwise3x3"])
def test_virtual_identities_are_layers_that_autograd_sees(identity: str, aggregation: str) -> None:
    x, g = pair(2, 3, 4, 3)
    if identity == "bias":
        want = g
    else:
        k = 1 if identity == "scaling" else int(identity[-1])
        groups = 3 if identity in ("scaling", "depthwise3x3") else 1
        layer = nn.Conv2d(3, 3, k, padding=k // 2, groups=groups, bias=False, dtype=torch.float64)
        want = by_autograd(layer, x, g)
    torch.testing.assert_close(
        identity_map(x, g, identity, aggregation), aggregated(want, aggregation), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize(
    ("kind", "settings", "size"),
    [
        (nn.Conv1d, {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "padding": 2, "dilation": 2}, (7,)),
        (nn.Conv2d, {"in_channels": 4, "out_channels": 6, "kernel_size": (3, 2), "stride": 2, "groups": 2}, (6, 5)),
        (nn.Conv2d, {"in_channels": 4, "out_channels": 4, "kernel_size": 3, "padding": "same", "groups": 4}, (4, 5)),
        (
            nn.Conv2d,
            {"in_channels": 4, "out_channels": 2, "kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
            (4, 5),
        ),
        (nn.Conv3d, {"in_channels": 4, "out_channels": 2, "kernel_size": 3, "stride": 2, "padding": 1}, (3, 4, 3)),
    ],
)
def test_convolutions_of_any_kind(kind: type, settings: dict, size: tuple[int, ...], aggregation: str) -> None:
    torch.manual_seed(0)
    layer = kind(**settings, dtype=torch.float64)
    x = torch.randn(2, 4, *size, dtype=torch.float64)
    g = torch.randn_like(layer(x))
    want = aggregated(by_autograd(layer, x, g), aggregation)
    torch.testing.assert_close(layer_map(layer, x, g, aggregation), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_linear_layers_and_norms(aggregation: str) -> None:
    torch.manual_seed(0)
    x, g = torch.randn(2, 5, 4, dtype=torch.float64), torch.randn(2, 5, 3, dtype=torch.float64)
    linear = nn.Linear(4, 3, dtype=torch.float64)
    want = aggregated(torch.einsum("bni,bno->boin", x, g).flatten(1, 2), aggregation)
    torch.testing.assert_close(layer_map(linear, x, g, aggregation), want, rtol=1e-9, atol=1e-9)
    norm, g = nn.LayerNorm(4, dtype=torch.float64), torch.randn(2, 5, 4, dtype=torch.float64)
    nn.init.normal_(norm.weight)  # the map is that of the normalized input, whatever the weight
    want = aggregated((F.layer_norm(x, (4,)) * g).mT, aggregation)
    torch.testing.assert_close(layer_map(norm, x, g, aggregation), want, rtol=1e-9, atol=1e-9)
    image, g = pair(2, 4, 3, 3)
    batch = nn.BatchNorm2d(4, dtype=torch.float64).eval()
    batch.running_mean.normal_()
    want = aggregated((image - batch.running_mean.reshape(-1, 1, 1)) * (1 + batch.eps) ** -0.5 * g, aggregation)
    torch.testing.assert_close(layer_map(batch, image, g, aggregation), want, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="GELU: has no weight that"):
        layer_map(nn.GELU(), image, g)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_layers_of_timm_s_own(aggregation: str) -> None:
    """Padding by the picture's size, as TensorFlow has it, and norms with an activation: what autograd sees."""
    torch.manual_seed(0)
    x = torch.randn(2, 4, 7, 6, dtype=torch.float64)
    for layer in (Conv2dSame(4, 6, 3, 2, groups=2), StdConv2dSame(4, 6, 3, 2)):
        layer = layer.double()
        g = torch.randn_like(layer(x))
        if isinstance(layer, Conv2dSame):
            want = by_autograd(layer, x, g)
        else:  # of the standardized weight, not of what it is made from
            plain = Conv2dSame(4, 6, 3, 2).double()
            want = by_autograd(plain, x, g)
        torch.testing.assert_close(
            layer_map(layer, x, g, aggregation), aggregated(want, aggregation), rtol=1e-9, atol=1e-9
        )
    for norm in (BatchNormAct2d(4).double().eval(), GroupNormAct(4, 2).double()):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        g = torch.randn_like(x)
        want = by_autograd(norm, x, g)
        torch.testing.assert_close(
            layer_map(norm, x, g, aggregation), aggregated(want, aggregation), rtol=1e-9, atol=1e-9
        )


def test_three_dimensions_and_one() -> None:
    x, g = pair(1, 3, 4, 3, 1)
    flat = identity_map(x[..., 0], g[..., 0], "conv3x3", "norm")
    torch.testing.assert_close(identity_map(x, g, "conv3x3", "norm")[..., 0], flat)
    assert identity_map(x[..., 0, 0], g[..., 0, 0], "conv3x3", "max").shape == (1, 1, 4)


def test_refusals_of_maps() -> None:
    x, g = pair(1, 3, 4, 4)
    for identity in ("conv2x2", "conv3x5", "dense"):
        with pytest.raises(ValueError, match="identity is"):
            identity_map(x, g, identity)
    with pytest.raises(ValueError, match="aggregation is 'mean'"):
        identity_map(x, g, "bias", "mean")
    with pytest.raises(ValueError, match="must agree"):
        identity_map(x, g[:, :2])


def test_the_published_order_of_sums_is_the_same_map() -> None:
    x, g = (t.float() for t in pair(2, 5, 4, 3))
    for identity in ("conv1x1", "conv3x3"):
        for aggregation in ("norm", "filter_norm"):
            got = published_map(x, g, identity, aggregation)
            torch.testing.assert_close(got, identity_map(x, g, identity, aggregation))


class Net(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 5, 3, 2, 1),
            nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4),
        )  # fmt: skip


def net() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Net().double().train(), torch.randn(3, 3, 8, 8, dtype=torch.float64)


def test_a_batch_is_its_pictures_and_the_model_stays() -> None:
    model, x = net()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    found = gradients(model, x, None, ["1", "4"])
    for i in range(3):
        alone = gradients(model, x[i : i + 1], None, ["1", "4"])
        for name in ("1", "4"):
            torch.testing.assert_close(alone.layers[name].gradient[0], found.layers[name].gradient[i])
    assert model.training
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    # what comes after works in place, on a copy
    assert (found.layers["1"].output < 0).any()
    with torch.inference_mode():
        assert torch.equal(gradients(model, x, None, ["4"]).layers["4"].output, found.layers["4"].output)


def test_own_weights_of_a_layer_add_up_to_its_gradient() -> None:
    """Phase one summed over positions is the gradient that training sees."""
    model, x = net()
    found = gradients(model, x, 1, ["3"])
    model.eval()
    model(x)[:, 1].sum().backward()
    total = layer_maps(found, model, ["3"], "own", "sum")["3"].sum()
    torch.testing.assert_close(total, model[3].weight.grad.sum())


def test_meta_saliency_is_one_step_of_descent() -> None:
    model, x = net()
    moved = stepped_weights(model, x, 2, 0.1)
    model.eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = weights_of(model)
    before = {name: t.clone() for name, t in before.items()}
    F.cross_entropy(model(x), torch.full((3,), 2)).backward()
    optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(moved[name], p.detach())
        model.get_parameter(name).data.copy_(before[name])
    away = stepped_weights(model, x, 2, 0.1, negate=True)
    for name, _ in model.named_parameters():
        torch.testing.assert_close(away[name] - before[name], before[name] - moved[name])


def test_competitive_gradients() -> None:
    model, x = net()
    products = torch.stack([
        p.output * p.gradient for c in range(4) for p in [gradients(model, x, c, ["4"]).layers["4"]]
    ])  # fmt: skip
    best = int(products.flatten(1).amax(1).argmax())
    features, g = competitive_gradient(model, x, "4", best)
    own = products[best]
    kept = ((own > 0) & (own == products.amax(0))) | ((own < 0) & (own == products.amin(0)))
    torch.testing.assert_close(features * g, torch.where(kept, own, 0.0))
    assert 0 < kept.sum() < kept.numel()


def test_combinations() -> None:
    maps = {"a": torch.rand(2, 1, 4, 4), "b": torch.rand(2, 1, 2, 2)}
    product = combine(maps, (8, 8))
    torch.testing.assert_close(product, combine(maps, (8, 8), "weighted_product") ** 2)
    for combination in COMBINATIONS:
        same = combine({"a": maps["a"], "c": maps["a"]}, (4, 4), combination, [3.0, 1.0])
        assert torch.isfinite(same).all()
    linear = combine(maps, (8, 8), "weighted_sum", "linear")
    torch.testing.assert_close(linear, combine(maps, (8, 8), "weighted_sum", [1.0, 2.0]))
    assert torch.equal(combine({"a": torch.ones(1, 1, 2, 2)}, (4, 4)), torch.zeros(1, 1, 4, 4))  # constant: nothing
    spread = combine(maps, (8, 8), "weighted_sum", "spread", {n: m.expand(-1, 3, -1, -1) for n, m in maps.items()})
    assert spread.shape == (2, 1, 8, 8)
    for wrong in ("steep", [1.0], [-1.0, 2.0]):
        with pytest.raises(ValueError, match="weights is"):
            combine(maps, (8, 8), "weighted_sum", wrong)
    with pytest.raises(ValueError, match="combination is"):
        combine(maps, (8, 8), "mean")


def test_smoothing_keeps_a_constant_and_spreads_a_point() -> None:
    torch.testing.assert_close(smooth(torch.full((1, 1, 20, 30), 2.0), 0.1), torch.full((1, 1, 20, 30), 2.0))
    point = torch.zeros(1, 1, 41, 41)
    point[..., 20, 20] = 1
    blurred = smooth(point, 2 / 41)[0, 0]
    assert math.isclose(float(blurred.sum()), 1, rel_tol=1e-4)
    assert float(blurred[20, 22] / blurred[20, 20]) == pytest.approx(math.exp(-0.5), rel=1e-4)


@pytest.mark.parametrize(
    ("name", "settings", "size", "want"),
    [
        ("resnet18", {}, 64, {"layer1": 16, "layer2": 8, "layer3": 4, "layer4": 2}),
        ("convnext_atto", {}, 64, {"stages.0": 16, "stages.1": 8, "stages.2": 4, "norm_pre": 2}),
        ("vit_tiny_patch16_224", {"img_size": 64, "depth": 2}, 64, {"blocks.0": 4, "blocks": 4}),
        ("nearfar_convnext_atto", {}, 64, {"stages.0": 16, "stages.1": 8, "stages.2": 4}),
    ],
)
def test_layers_that_come_into_question(name: str, settings: dict, size: int, want: dict[str, int]) -> None:
    model = timm.create_model(name, **settings)
    found = candidate_layers(model, torch.randn(1, 3, size, size), weights_of(model))
    assert {n: s for n, s in found.items() if n in want} == {n: (s, s) for n, s in want.items()}
    assert not any("conv1" in n for n in found if name == "resnet18" and n != "conv1")


def described(outputs: list[str], model: nn.Module, **settings: object) -> Contract:
    state = [{"name": n, "shape": list(t.shape), "kind": "parameter" if t.is_floating_point() else "constant"}
             for n, t in model.state_dict().items()]  # fmt: skip
    content = {
        "system": "normgrad", "variant": "test", "settings": settings, "state": state,
        "inputs": [{"name": "image", "shape": [1, 3, 64, 64], "dist": "normal"}],
        "outputs": [{"name": f"out.{name}", "shape": []} for name in outputs],
    }  # fmt: skip
    return Contract(__file__, content)  # type: ignore[arg-type]


def test_contracts_of_other_networks_layers_and_methods() -> None:
    names = [
        "features.3/conv3x3_depthwise/norm", "features.8/conv1x1/max", "norm_grad_selective/features.8",
        "meta/norm_grad/features.8/lr0.01", "gradient_max_abs/input",
    ]  # fmt: skip
    alexnet = torchvision.models.squeezenet1_1(num_classes=6)
    contract = described(names, alexnet, network="torchvision squeezenet1_1, 6 classes", target=2, score="logit")
    found = build_contract(contract)(torch.randn(1, 3, 64, 64))
    assert list(found) == names
    assert all(torch.isfinite(m).all() and m.std() > 0 for m in found.values())
    for other in ({"target": 2, "score": "probability"}, {"network": "torchvision squeezenet1_0, 6 classes"}):
        with pytest.raises(UserError):
            build_contract(described(names, alexnet, **other))


def test_a_pass_without_gradient_gives_zeros() -> None:
    x = torch.randn(1, 2, 4, 4)
    found = Pass(None, None, torch.zeros(1), {"a": Point(x, x)}, Point(x, x))
    assert not layer_maps(found, nn.Identity(), ["a"])["a"].any()
