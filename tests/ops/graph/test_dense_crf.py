"""The fully connected CRF against the formula, its modes, shapes and gradients."""

import pytest
import torch
from torch import Tensor

from nearfar.ops.graph import dense_crf
from nearfar.ops.graph.dense_crf import DenseCRF, unary_from_labels, unary_from_softmax


def slow_mean_field(
    unary: Tensor, image: Tensor, crf: DenseCRF, spacing: tuple[float, ...], stds: tuple[float, float, float]
) -> Tensor:
    """Exact sums over all pairs for one item: unary (L, *S), image (C, *S)."""
    size = unary.shape[1:]
    grid = torch.stack(torch.meshgrid(*[torch.arange(n).double() * s for n, s in zip(size, spacing)], indexing="ij"))
    p, c, u = grid.flatten(1).T, image.flatten(1).T, unary.flatten(1).T
    feature_sets = [p / stds[0], torch.cat([p / stds[1], c / stds[2]], 1)]
    kernels = []
    for f in feature_sets:
        k = torch.exp(-((f[:, None] - f) ** 2).sum(-1) / 2)
        one = k.sum(1)
        kernels.append(
            {
                "symmetric": k / one.sqrt()[:, None] / one.sqrt(),
                "before": k / one,
                "after": k / one[:, None],
                "none": k * len(one) / one.sum(),
            }[crf.normalization]
        )
    q = torch.softmax(-u, 1)
    for _ in range(crf.iterations):
        score = -u
        for weight, k in zip(crf.weights, kernels):
            w = weight.double()
            if w.ndim == 0:
                w = -w * torch.eye(u.shape[1], dtype=torch.float64)
            elif w.ndim == 1:
                w = torch.diag(w)
            score = score - k @ q @ ((w + w.T) / 2)
        q = torch.softmax(score, 1)
    return q.T.reshape(unary.shape)


WEIGHTS = {
    "potts": 1.3,
    "vector": [-0.5, -1.0, -0.2],
    "matrix": [[0.0, 1.0, 0.4], [0.6, 0.0, 0.3], [0.1, 0.2, -0.5]],
}


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("normalization", ["symmetric", "before", "after", "none"])
@pytest.mark.parametrize(("size", "spacing"), [((6, 5), (1.0, 1.0)), ((3, 4, 5), (2.5, 1.0, 0.7)), ((9,), (1.0,))])
def test_exact_mode_equals_the_slow_form(
    weight: str, normalization: str, size: tuple[int, ...], spacing: tuple[float, ...]
) -> None:
    unary = torch.rand(2, 3, *size, dtype=torch.float64, requires_grad=True)
    image = torch.rand(2, 2, *size, dtype=torch.float64) * 20
    crf = DenseCRF(3, WEIGHTS[weight], 1.5, 0.8, 4.0, 6.0, normalization=normalization, mode="exact")
    found = crf(unary, image, spacing)
    expected = torch.stack([slow_mean_field(u, i, crf, spacing, (1.5, 4.0, 6.0)) for u, i in zip(unary, image)])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    direction = torch.randn_like(found)
    (ours,) = torch.autograd.grad((found * direction).sum(), unary)
    (slow,) = torch.autograd.grad((expected * direction).sum(), unary)
    torch.testing.assert_close(ours, slow, rtol=0, atol=1e-9)


def test_result_is_a_distribution_in_every_dtype() -> None:
    unary, image = torch.rand(1, 4, 12, 10), torch.rand(1, 3, 12, 10) * 255
    full = DenseCRF()(unary, image)
    torch.testing.assert_close(full.sum(1), torch.ones(1, 12, 10))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(DenseCRF()(unary, image), full)
    assert DenseCRF()(unary.half(), image).dtype == torch.float32
    assert DenseCRF()(unary.double(), image.double()).dtype == torch.float64


def test_no_iteration_or_no_weight_is_the_softmax() -> None:
    unary, image = torch.rand(1, 4, 6, 6), torch.rand(1, 3, 6, 6)
    softmax = torch.softmax(-unary, 1)
    torch.testing.assert_close(DenseCRF(iterations=0)(unary, image), softmax)
    torch.testing.assert_close(DenseCRF(spatial_weight=0, bilateral_weight=0)(unary), softmax)


def test_labels_are_equivariant_and_axes_have_names() -> None:
    crf = DenseCRF(4, 1.0, (2.0, 1.0), 2.0, (8.0, 4.0), 10.0, mode="exact")
    unary, image = torch.rand(1, 3, 7, 9, dtype=torch.float64), torch.rand(1, 1, 7, 9, dtype=torch.float64) * 50
    q = crf(unary, image)
    order = [2, 0, 1]
    torch.testing.assert_close(crf(unary[:, order], image), q[:, order])
    turned = DenseCRF(4, 1.0, (1.0, 2.0), 2.0, (4.0, 8.0), 10.0, mode="exact")
    torch.testing.assert_close(turned(unary.mT, image.mT), q.mT)
    spaced = DenseCRF(4, 1.0, 2.0, 2.0, 8.0, 10.0, mode="exact")
    torch.testing.assert_close(spaced(unary, image, spacing=(1.0, 2.0)), q)


def test_cleans_a_noisy_labelling_along_the_edges_of_the_image() -> None:
    generator = torch.Generator().manual_seed(1)
    y, x = torch.meshgrid(torch.arange(48.0), torch.arange(48.0), indexing="ij")
    truth = ((y - 24) ** 2 + (x - 22) ** 2 < 200).long()
    image = (truth * 80 + 60 + 5 * torch.randn(48, 48, generator=generator))[None, None]
    wrong = torch.rand(48, 48, generator=generator) < 0.25
    noisy = torch.where(wrong, 1 - truth, truth)
    unary = unary_from_labels(noisy[None], 2, 0.6, zero_unsure=False)
    for mode in ("lattice", "exact"):
        q = DenseCRF(5, 1.0, 2.0, 5.0, 20.0, 15.0, mode=mode)(unary, image)
        assert (q.argmax(1)[0] == truth).float().mean() > 0.98 > (noisy == truth).float().mean() + 0.2


def test_a_volume_of_one_slice_is_that_slice() -> None:
    unary, image = torch.rand(1, 3, 8, 9), torch.rand(1, 1, 8, 9) * 30
    crf = DenseCRF(3, 1.0, 1.5, 2.0, 6.0, 8.0, mode="exact")
    flat, deep = crf(unary, image), crf(unary[:, :, None], image[:, :, None], spacing=(3.0, 1.0, 1.0))
    torch.testing.assert_close(deep[:, :, 0], flat)


@pytest.mark.parametrize("mode", ["lattice", "exact"])
def test_trainable_weights_learn(mode: str) -> None:
    crf = DenseCRF(3, 0.1, 1.5, 0.1, 6.0, 8.0, mode=mode, trainable=True)
    truth = (torch.arange(64).view(8, 8) % 8 > 3).long()
    image = truth[None, None] * 40.0
    unary = unary_from_softmax(torch.rand(1, 2, 8, 8).softmax(1))
    optimizer = torch.optim.Adam(crf.parameters(), 0.3)
    losses = []
    for _ in range(20):
        loss = torch.nn.functional.nll_loss(crf(unary, image).clamp_min(1e-6).log(), truth[None])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_label_unaries() -> None:
    labels = torch.tensor([[0, 1, 3]])
    u = unary_from_labels(labels, 3, 0.5)
    torch.testing.assert_close(torch.softmax(-u, 1)[0, :, 0], torch.full((3,), 1 / 3))
    torch.testing.assert_close(torch.softmax(-u, 1)[0, :, 1], torch.tensor([0.5, 0.25, 0.25]))
    torch.testing.assert_close(torch.softmax(-u, 1)[0, :, 2], torch.tensor([0.25, 0.25, 0.5]))
    sure = unary_from_labels(torch.tensor([[0, 2]]), 3, 0.8, zero_unsure=False)
    torch.testing.assert_close(torch.softmax(-sure, 1)[0, :, 0], torch.tensor([0.8, 0.1, 0.1]))
    assert unary_from_softmax(torch.tensor([[0.0, 1.0]]))[0, 0] == pytest.approx(11.5129, abs=1e-3)


def test_save_and_load(tmp_path) -> None:
    crf = DenseCRF(2, [0.1, 0.2, 0.3], trainable=True)
    torch.save(crf.state_dict(), tmp_path / "crf.pt")
    other = DenseCRF(2, [0.0, 0.0, 0.0], trainable=True)
    other.load_state_dict(torch.load(tmp_path / "crf.pt", weights_only=True))
    unary, image = torch.rand(1, 3, 5, 5), torch.rand(1, 3, 5, 5)
    torch.testing.assert_close(other(unary, image), crf(unary, image))


def test_bad_input() -> None:
    unary, image = torch.rand(1, 3, 5, 6), torch.rand(1, 1, 5, 6)
    for arguments, match in (
        ({"mode": "fast"}, "'exact'"),
        ({"normalization": "l2"}, "symmetric"),
        ({"iterations": -1}, "negative"),
        ({"color_std": 0.0}, "positive"),
        ({"spatial_weight": [[1.0, 2.0]]}, "shape"),
    ):
        with pytest.raises(ValueError, match=match):
            DenseCRF(**arguments)
    with pytest.raises(ValueError, match="needs an image"):
        DenseCRF()(unary)
    with pytest.raises(ValueError, match="batch or grid"):
        DenseCRF()(unary, torch.rand(1, 1, 6, 5))
    with pytest.raises(ValueError, match="spacing"):
        DenseCRF()(unary, image, spacing=(1.0, 1.0, 1.0))
    with pytest.raises(ValueError, match="spatial_std holds 3"):
        DenseCRF(spatial_std=(1.0, 1.0, 1.0))(unary, image)
    with pytest.raises(ValueError, match="3 labels"):
        DenseCRF(spatial_weight=[1.0, 2.0])(unary, image)
    with pytest.raises(ValueError, match="NaN"):
        DenseCRF()(unary, image * float("nan"))
    with pytest.raises(ValueError, match="allowed are 0"):
        unary_from_labels(torch.tensor([[4]]), 3)


def test_a_module_serves_grids_of_several_sizes():
    crf = DenseCRF(2)
    for size in ((9, 11), (11, 9), (9, 11)):
        unary, image = torch.rand(1, 3, *size), 255 * torch.rand(1, 3, *size)
        torch.testing.assert_close(crf(unary, image), DenseCRF(2)(unary, image))
    torch.testing.assert_close(crf(unary, image, (2.0, 1.0)), DenseCRF(2)(unary, image, (2.0, 1.0)))


def test_a_kept_spatial_kernel_is_that_of_the_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after inference, whose tensors no gradient may use; a grid above the limit is not kept."""
    crf = DenseCRF(iterations=2, bilateral_weight=0, trainable=True)
    unaries = [torch.randn(1, 3, *size) for size in ((6, 7), (6, 7), (8, 5))]
    with torch.inference_mode():
        first = [crf.infer(u, [crf.kernels(u, u)[0], None]) for u in unaries]
    for unary, known in zip(unaries, first):
        again = crf.infer(unary.requires_grad_(), [crf.kernels(unary, unary)[0], None])
        again.sum().backward()
        torch.testing.assert_close(again.detach(), known.clone())
    assert crf._spatial is not None
    monkeypatch.setattr(dense_crf, "KEPT", 10)
    crf.kernels(torch.randn(1, 3, 4, 4), torch.randn(1, 3, 4, 4))
    assert crf._spatial is None
