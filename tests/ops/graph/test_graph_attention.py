"""Graph attention over the edges that exist, against the dense form with masks."""

import math

import jaxtyping
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from nearfar.ops.graph.attention import GraphConvAttention, NeighbourAttention


@pytest.fixture
def without_shape_checks():
    """torch.compile cannot trace the run-time checks of shapes, which production does not have."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def oracle(source, target, values, slope, adjacency):
    """Every pair of nodes, those without an edge masked with -inf; adjacency (N, N) or (B, N, N)."""
    n = source.shape[2]
    scores = source[:, :, :, None] + target[:, :, None]
    alpha = slope.permute(2, 0, 1)[..., None]
    scores = torch.where(scores > 0, scores, alpha * scores)
    edges = (adjacency.view(-1, n, n) == 1) | torch.eye(n, dtype=torch.bool)
    weights = scores.masked_fill(~edges[:, None, :, :, None], -math.inf).softmax(2)
    return torch.einsum("bhijt,bhcit->bcjt", weights, values) / source.shape[1]


def ring(n: int) -> torch.Tensor:
    edges = torch.zeros(n, n)
    edges[torch.arange(n), (torch.arange(n) + 1) % n] = 1
    return edges + edges.T


def directed(n: int, share: float) -> torch.Tensor:
    return (torch.rand(n, n) < share).float()


GRAPHS = {
    "ring": lambda: ring(9),
    "directed": lambda: directed(12, 0.15),
    "no edges": lambda: torch.zeros(5, 5),
    "one node": lambda: torch.zeros(1, 1),
    "star": lambda: torch.zeros(7, 7).index_fill_(1, torch.tensor([3]), 1),  # one target of all: dense
    "complete": lambda: torch.ones(6, 6),
}


def inputs(n: int, heads: int = 2, channels: int = 3, steps: int = 5, batch: int = 2) -> list[torch.Tensor]:
    shapes = [(batch, heads, n, steps), (batch, heads, n, steps), (batch, heads, channels, n, steps)]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("form", ["as chosen", "sparse", "dense", "with the call"])
@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
def test_equals_the_masked_dense_form(graph, form):
    adjacency = graph()
    n = len(adjacency)
    layer = NeighbourAttention(adjacency, 2).double()
    if form in ("sparse", "dense"):
        layer.sparse = form == "sparse"
    nn.init.normal_(layer.slope)
    x = inputs(n)
    given = None
    if form == "with the call":
        adjacency = given = torch.stack([directed(n, 0.4), directed(n, 0.4)])
    expected = oracle(*x, layer.slope, adjacency)
    found = layer(*x, given)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    weight = torch.randn_like(expected)
    both = [torch.autograd.grad((y * weight).sum(), (*x, layer.slope)) for y in (found, expected)]
    for gradient, other in zip(*both):
        torch.testing.assert_close(gradient, other, rtol=0, atol=1e-9)


def test_chosen_by_degree():
    assert NeighbourAttention(ring(9), 1).sparse
    assert not NeighbourAttention(torch.ones(9, 9), 1).sparse
    assert not NeighbourAttention(ring(4), 1).sparse


def test_gradcheck():
    layer = NeighbourAttention(directed(7, 0.2), 2).double()
    layer.sparse = True
    nn.init.uniform_(layer.slope, 0.2, 0.8)
    x = inputs(7, channels=2, steps=2, batch=1)
    assert torch.autograd.gradcheck(lambda *args: layer(*args), x)


@pytest.mark.parametrize("wanted", [0, 2])
def test_partial_gradients(wanted):
    layer = NeighbourAttention(ring(8), 2).double()
    x = [value.detach().requires_grad_(i == wanted) for i, value in enumerate(inputs(8))]
    found = torch.autograd.grad(layer(*x).sum(), x[wanted])[0]
    expected = torch.autograd.grad(oracle(*x, layer.slope, ring(8)).sum(), x[wanted])[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_rows_are_sources():
    adjacency = torch.zeros(4, 4)
    adjacency[0, 2] = 1  # 0 is heard by 2, not the other way
    layer = NeighbourAttention(adjacency, 1).double()
    x = inputs(4, heads=1)
    before = layer(*x)
    x[2] = x[2].detach().clone()
    x[2][..., 0, :] += 1
    changed = (layer(*x) != before).any(dim=(0, 1, 3))
    assert changed.tolist() == [True, False, True, False]


def test_alone_a_node_keeps_its_own_value():
    source, target, values = inputs(5)
    y = NeighbourAttention(torch.zeros(5, 5), 2).double()(source, target, values)
    torch.testing.assert_close(y, values.mean(1), rtol=0, atol=1e-12)


class LargestTensor(TorchDispatchMode):
    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, torch.Tensor):
                self.largest = max(self.largest, value.untyped_storage().nbytes() // value.element_size())
        return out


def test_nothing_grows_with_the_square_of_the_nodes():
    n, steps, heads, batch = 60, 40, 2, 2
    layer = NeighbourAttention(ring(n), heads).double()
    x = inputs(n, heads, channels=2, steps=steps, batch=batch)
    with LargestTensor() as seen:
        layer(*x).sum().backward()
    edges = batch * heads * n * steps * 3  # 3 sources a node, which is more than 2 channels
    assert seen.largest <= edges + 1  # an embedding bag keeps one offset too many
    with LargestTensor() as seen:
        layer(*x, ring(n).expand(batch, n, n))
    assert seen.largest >= batch * heads * n * n * steps


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    layer = NeighbourAttention(ring(8), 2).to(dtype)
    nn.init.constant_(layer.slope, -0.5)
    x = [value.detach().to(dtype) for value in inputs(8)]
    expected = oracle(*(value.double() for value in x), layer.slope.double(), ring(8))
    for given in (None, ring(8).expand(2, 8, 8)):
        torch.testing.assert_close(layer(*x, given).double(), expected, rtol=0.02, atol=0.02)
        assert layer(1000 * x[0], 1000 * x[1], x[2], given).isfinite().all()


def test_compiled_and_its_gradient(without_shape_checks):
    layer = NeighbourAttention(directed(12, 0.15), 2).double()
    nn.init.normal_(layer.slope)
    x = inputs(12)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    both = [torch.autograd.grad(call(*x).square().sum(), (*x, layer.slope)) for call in (layer, compiled)]
    for gradient, other in zip(*both):
        torch.testing.assert_close(gradient, other, rtol=0, atol=1e-9)


def test_dropout_only_in_training():
    layer = NeighbourAttention(ring(8), 2, dropout=0.5).double()
    x = inputs(8)
    assert not torch.equal(layer(*x), layer(*x))
    layer.eval()
    torch.testing.assert_close(layer(*x), oracle(*x, layer.slope, ring(8)), rtol=0, atol=1e-9)


def test_only_the_slope_is_saved():
    assert list(NeighbourAttention(ring(5), 2).state_dict()) == ["slope"]


@pytest.mark.parametrize(
    ("adjacency", "heads", "said"),
    [
        (torch.ones(3, 4), 1, "shape \\(3, 4\\)"),
        (torch.ones(0, 0), 1, "shape \\(0, 0\\)"),
        (torch.full((3, 3), 0.5), 1, "0 and 1 only"),
        (torch.ones(3, 3), 0, "num_heads is 0"),
    ],
)
def test_bad_arguments(adjacency, heads, said):
    with pytest.raises(ValueError, match=said):
        NeighbourAttention(adjacency, heads)


def gcat(adjacency: torch.Tensor, **options) -> GraphConvAttention:
    model = GraphConvAttention(3, 4, adjacency, kernel_size=4, **options).double().eval()
    nn.init.normal_(model.attention.slope)
    nn.init.normal_(model.bias)
    return model


@pytest.mark.parametrize("graph", ["directed", "complete"])
def test_gcat_is_equivariant_under_relabelling(graph):
    adjacency = GRAPHS[graph]()
    n = len(adjacency)
    order = torch.randperm(n)
    model, relabelled = gcat(adjacency), gcat(adjacency[order][:, order])
    with torch.no_grad():
        state = model.state_dict()
        state["attention.slope"] = state["attention.slope"][order][:, order]
        relabelled.load_state_dict(state)
        x = torch.randn(2, 3, n, 10, dtype=torch.float64)
        torch.testing.assert_close(relabelled(x[:, :, order]), model(x)[:, :, order], rtol=0, atol=1e-9)


def test_gcat_layouts_agree():
    model = gcat(ring(8))
    x = torch.randn(2, 3, 8, 10, dtype=torch.float64)
    torch.testing.assert_close(model(x), model(x.contiguous(memory_format=torch.channels_last)), rtol=0, atol=1e-12)


def test_gcat_over_a_grid_of_one_pixel_is_that_over_a_series():
    series, grid = gcat(ring(8)), gcat(ring(8))
    grid = GraphConvAttention(3, 4, ring(8), kernel_size=(1, 4), score_kernel_size=(1, 2)).double().eval()
    with torch.no_grad():
        state = {
            name: value.unsqueeze(-2) if "depthwise" in name else value for name, value in series.state_dict().items()
        }
        grid.load_state_dict(state)
        x = torch.randn(2, 3, 8, 10, dtype=torch.float64)
        torch.testing.assert_close(grid(x.unsqueeze(3)).squeeze(3), series(x), rtol=0, atol=1e-9)


def test_causal_gcat_sees_nothing_later():
    model = gcat(ring(8), causal=True)
    x = torch.randn(1, 3, 8, 12, dtype=torch.float64)
    y = model(x)
    x[..., 7:] += 1
    changed = (model(x) != y).any(dim=(0, 1, 2))
    assert not changed[:7].any()
    assert changed[7:].all()


def test_gcat_trains():
    model = GraphConvAttention(3, 4, ring(8), dropout=0.2)
    model(torch.randn(2, 3, 8, 10)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert F.relu(model.attention.slope.grad.abs()).sum() > 0
