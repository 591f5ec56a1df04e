"""What holds for every backbone; a test class inherits `BackboneTester` and names a model, a variant, settings."""

import copy
import inspect
import io
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnxruntime
import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from peft import LoraConfig, get_peft_model
from timm.models import FeatureGraphNet
from timm.models._manipulate import reparameterize_model
from timm.optim import param_groups_layer_decay
from torch import fx
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.feature_extraction import create_feature_extractor

from nearfar.core.contracts import Contract, fill
from nearfar.core.errors import CheckpointError
from nearfar.vision.models.base import PictureModel
from nearfar.vision.models.registry import MODELS, VARIANTS


def described(
    shapes: dict[str, tuple[int, ...]],
    settings: dict[str, Any] | None = None,
    inputs: Sequence[tuple[int, ...]] = ((1, 3, 64, 64),),
    outputs: int = 0,
) -> Contract:
    """A contract that no file holds: a published state, settings, and one output or a list of `outputs`."""
    kinds = {"num_batches_tracked": "constant", "attention_bias_idxs": "constant"}
    content = {
        "system": "test",
        "variant": "test",
        "settings": settings or {},
        "inputs": [{"name": f"x{i}", "shape": list(shape), "dist": "normal"} for i, shape in enumerate(inputs)],
        "outputs": [{"name": f"out.{i}"} for i in range(outputs)] or [{"name": "out"}],
        "state": [
            {"name": name, "shape": list(shape), "kind": kinds.get(name.split(".")[-1], "parameter")}
            for name, shape in shapes.items()
        ],
    }
    return Contract(Path("test.json"), content)


def shapes_of(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a module's state, as a contract lists them."""
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


@torch.no_grad()
def randomize(model: torch.nn.Module) -> torch.nn.Module:
    """Give every tensor values of a sane scale, so that no branch is hidden by its initial scale; eval mode."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(fill(name, tuple(tensor.shape)))
    return model.eval()


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-4) -> None:
    assert a.shape == b.shape
    error = (a.double() - b.double()).norm() / b.double().norm()
    assert error < tolerance, float(error)


def without_shape_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take off the run-time shape checks that the test run puts round every operator; production code has none."""
    for module in [m for name, m in sys.modules.items() if name.startswith("nearfar.")]:
        for owner in [module, *(value for value in vars(module).values() if inspect.isclass(value))]:
            if owner is not module and not owner.__module__.startswith("nearfar."):
                continue
            for name, value in list(vars(owner).items()):
                function = value.__func__ if isinstance(value, classmethod) else value
                if not inspect.isfunction(function) or not (function.__module__ or "").startswith("nearfar.ops"):
                    continue  # the checks stand round operators alone
                if hasattr(function, "__wrapped__"):
                    plain = inspect.unwrap(function)
                    monkeypatch.setattr(owner, name, classmethod(plain) if isinstance(value, classmethod) else plain)


class PictureTester:
    """What holds whatever the features are."""

    model: ClassVar[type[PictureModel]]
    name: ClassVar[str]
    """A registered variant."""
    tiny: ClassVar[dict[str, Any]]
    """Settings that make it small; every kind of block is still there."""
    least: ClassVar[dict[str, Any]] = {}
    """Settings of the fewest layers that have every kind of block, for what is slow: tracing and export."""
    sizes: ClassVar[tuple[tuple[int, int], ...]] = ((32, 32), (45, 33), (64, 96))
    size = 64
    refusal = "at least"
    macs_tolerance = 0.02
    autocast_tolerance = 0.05

    def create(self, **settings: Any) -> Any:
        return randomize(timm.create_model(self.name, **{"num_classes": 5, **self.tiny, **settings}))

    counted: ClassVar[dict[str, Any]] = {}
    """Settings of the form that the paper counts."""
    other_count: ClassVar[dict[str, int]] = {}
    """Parameters of variants whose published figure counts something else."""

    def input(self, batch: int = 2, channels: int = 3, size: tuple[int, int] | None = None) -> torch.Tensor:
        torch.manual_seed(0)
        return torch.randn(batch, channels, *(size or (self.size, self.size)))

    def unshaped(self) -> dict[str, Any]:
        """Settings that shapes do not tell."""
        defaults = self.model.built_as(VARIANTS[self.name], self.tiny)
        return {name: defaults[name] for name in self.model.UNSHAPED}

    def variants(self) -> list[str]:
        return [name for name, model in MODELS.items() if model is self.model]

    def test_published_variants(self) -> None:
        """Parameters of every variant, and its registered configuration, which names what the model has."""
        names = self.variants()
        assert self.name in names
        for name in names:
            variant = VARIANTS[name]
            with torch.device("meta"):
                model = timm.create_model(name)
                counted = timm.create_model(name, **self.counted) if self.counted else model
            params = sum(p.numel() for p in counted.parameters())
            decimals = len(str(variant.params).partition(".")[2])
            if name in self.other_count:
                assert params == self.other_count[name]
            else:  # papers round, or cut, to the digits they print
                assert abs(params / 1e6 - variant.params) <= 1.01 * 10**-decimals, (name, params)
            assert timm.is_model(name)
            assert model.pretrained_cfg["crop_pct"] == variant.weights[0].crop_pct
            assert model.pretrained_cfg["mean"] == variant.weights[0].mean
            cfg, state = timm.get_pretrained_cfg(name), model.state_dict()
            classifiers = cfg.classifier if isinstance(cfg.classifier, tuple) else (cfg.classifier,)
            assert {f"{part}.weight" for part in (*classifiers, cfg.first_conv)} <= state.keys(), name
            assert all(f"{part}.weight" not in state for part in set(model.CLASSIFIERS) - set(classifiers)), name
            assert cfg.pool_size == (-(-cfg.input_size[-1] // model.feature_info[-1]["reduction"]),) * 2, name
            assert cfg.num_classes == model.num_classes

    def test_published_macs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.check_macs(monkeypatch, self.variants()[:1])

    @pytest.mark.ci
    def test_published_macs_of_every_variant(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.check_macs(monkeypatch, self.variants()[1:])

    def check_macs(self, monkeypatch: pytest.MonkeyPatch, names: Sequence[str]) -> None:
        without_shape_checks(monkeypatch)
        for name in names:
            variant = VARIANTS[name]
            size = variant.weights[0].size
            with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as flops:
                model = timm.create_model(name, **self.counted).eval()
                x = torch.empty(1, variant.settings.get("in_chans", 3), size, size)
                assert model(x).shape == (1, variant.weights[0].num_classes)
            if variant.gmacs is not None:
                macs = (flops.get_total_flops() / 2 + self.saved_macs(model, size)) / 1e9
                assert math.isclose(macs, variant.gmacs, rel_tol=self.macs_tolerance, abs_tol=0.05), (name, macs)

    def saved_macs(self, model: PictureModel, size: int) -> float:
        """Multiply-accumulates that the published order of computation needs and ours does not."""
        return 0

    @pytest.mark.slow
    def test_shapes_and_gradients_of_every_variant(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Maps are as `feature_info` tells, a pooled vector as wide as told, and the loss reaches every parameter."""
        without_shape_checks(monkeypatch)
        for name in self.variants():
            size = VARIANTS[name].weights[0].size
            with torch.device("meta"):
                x = torch.empty(2, VARIANTS[name].settings.get("in_chans", 3), size, size)
                with torch.no_grad():  # which functions without shape checks have lost
                    model = timm.create_model(name)
                outputs = model(x)
                sum(y.sum() for y in (outputs if isinstance(outputs, tuple) else (outputs,))).backward()
                left = [key for key, parameter in model.named_parameters() if parameter.grad is None]
                assert all(self.untouched(key) or key.startswith("aux_head.") for key in left), (name, left)
                with torch.no_grad():
                    pyramid = timm.create_model(name, features_only=True).eval()
                    told = list(zip(pyramid.feature_info.channels(), pyramid.feature_info.reduction()))
                    self.check_maps(pyramid(x), told, size)
                    final, levels = model.eval().forward_intermediates(x)
                    assert final.shape == model.forward_features(x).shape
                    self.check_maps(levels, [(info["num_chs"], info["reduction"]) for info in model.feature_info], size)
                    model.reset_classifier(0)
                    assert model(x).shape == (2, model.head_hidden_size)

    def check_maps(self, maps: Sequence[torch.Tensor], told: Sequence[tuple[int, int]], size: int) -> None:
        for feature, (channels, stride) in zip(maps, told, strict=True):
            assert feature.shape == (2, channels, -(-size // stride), -(-size // stride))

    @torch.no_grad()
    def test_any_input(self) -> None:
        for channels in (1, 5):
            assert self.create(in_chans=channels)(self.input(1, channels)).shape == (1, 5)
        model = self.create()
        for size in self.sizes:
            x = self.input(2, size=size)
            y = model(x)
            assert y.shape == (2, 5)
            assert y.isfinite().all()
            close(model(x[:1]), y[:1])
        with pytest.raises(ValueError, match=self.refusal):
            model(self.input(1, size=(model.min_size - 1, 64)))

    def test_gradients(self) -> None:
        model, x = self.create().train(), self.input(2)
        grads = []
        for checkpointing in (False, True):
            model.set_grad_checkpointing(checkpointing)
            model.zero_grad()
            torch.manual_seed(1)
            # double keeps the comparison above the rounding of batch statistics over few positions
            model.double()(x.double()).square().sum().backward()
            for name, parameter in model.named_parameters():
                if self.untouched(name):
                    continue
                assert parameter.grad is not None, name
                assert parameter.grad.isfinite().all(), name
            grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        total = sum(float(g.norm()) for g in grads[0].values())
        for name, grad in grads[0].items():
            assert (grad - grads[1][name]).norm() <= 1e-9 * total, name

    @torch.no_grad()
    def test_adapters(self) -> None:
        """Low-rank adapters of peft on every linear map and convolution count, none is passed by."""
        model, x = self.create(**self.least), self.input(1)
        names = [
            name
            for name, layer in model.named_modules()
            if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)
            and (getattr(layer, "groups", 1), max(getattr(layer, "dilation", (1,)))) == (1, 1)  # what peft can do
        ]
        config = LoraConfig(target_modules=names, r=2, init_lora_weights=False)
        adapted = get_peft_model(copy.deepcopy(model), config).eval()
        y = adapted(x)
        assert (y - model(x)).norm() > 1e-3 * y.norm()
        close(y, adapted.merge_and_unload().eval()(x))

    def untouched(self, name: str) -> bool:
        """Whether the parameter takes no part in training on logits alone."""
        return False

    @pytest.mark.slow
    @torch.no_grad()
    def test_compile_without_graph_breaks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        without_shape_checks(monkeypatch)
        model, x = self.create(**self.least), self.input(1)
        for form in (model, copy.deepcopy(model).fuse()):
            torch._dynamo.reset()
            close(torch.compile(form, fullgraph=True, backend="aot_eager")(x), model(x))

    @pytest.mark.ci
    @torch.no_grad()
    def test_export(self, monkeypatch: pytest.MonkeyPatch) -> None:
        without_shape_checks(monkeypatch)
        model, x = self.create(**self.least), self.input(2)
        program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
        three = self.input(3)
        close(program.module()(three), model(three))
        onnx = io.BytesIO()
        torch.onnx.export(program, (), onnx, verbose=False)
        session = onnxruntime.InferenceSession(onnx.getvalue(), providers=["CPUExecutionProvider"])
        (y,) = session.run(None, {session.get_inputs()[0].name: three.numpy()})
        close(torch.from_numpy(np.asarray(y)), model(three))

    @torch.no_grad()
    def test_memory_format_and_autocast(self) -> None:
        model, x = self.create(), self.input(2)
        y = model(x)
        close(model.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last)), y)
        with torch.autocast("cpu", torch.bfloat16):
            low = model(x)
        close(low.float(), y, self.autocast_tolerance)

    @torch.no_grad()
    def test_save_and_load(self, tmp_path: Path) -> None:
        model, x = timm.create_model(self.name, num_classes=5, **self.tiny), self.input(1)
        randomize(model).save_pretrained(tmp_path)
        close(self.model.from_pretrained(tmp_path)(x), model(x), 1e-6)
        close(timm.create_model(f"local-dir:{tmp_path}", pretrained=True, **self.tiny).eval()(x), model(x), 1e-6)
        # a classifier for other classes and a first convolution for other channels
        heads = self.unshaped()
        other = self.model.from_published(model.state_dict(), num_classes=3, in_chans=1, **heads)
        assert other(self.input(1, 1)).shape == (1, 3)
        # every key is accounted for
        state = model.state_dict()
        lost = next(name for name in reversed(state) if name.endswith("weight") and "head" not in name)
        with pytest.raises(CheckpointError, match=lost.replace(".", r"\.")):
            self.model.from_published({name: value for name, value in state.items() if name != lost}, **heads)
        with pytest.raises(CheckpointError, match="surplus"):
            self.model.from_published({**state, "surplus.weight": torch.zeros(3)}, **heads)
        told = self.model.published_settings(state)
        if any(told.get(name) is None for name in heads):
            with pytest.raises(CheckpointError, match="do not tell"):
                self.model.from_published(state)
        with pytest.raises(CheckpointError):
            self.model.from_published({"conv.weight": torch.zeros(3)})

    def test_variant_is_detected(self) -> None:
        with torch.device("meta"):
            state = timm.create_model(self.name).state_dict()
        assert self.model.variant(self.model.published_settings(state)) == self.name

    @torch.no_grad()
    def test_fused_form(self) -> None:
        model, x = self.create(), self.input(2)
        y = model(x)
        tensors = len(model.state_dict())
        close(model.fuse()(x), y, 1e-5)
        assert len(model.state_dict()) < tensors or not self.fuses
        assert not model.training

    fuses = True

    @torch.no_grad()
    def test_traced_by_torch_fx(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Also by torchvision's own tracer, and the graph is for any size and batch."""
        without_shape_checks(monkeypatch)
        model = self.create()
        node = model.feature_info[-1]["module"]
        extractor = create_feature_extractor(model, [node, "head"])
        other = self.input(3, size=(self.size, self.size) if getattr(self, "fixed", False) else (96, 64))
        outputs = list(extractor(other).values())
        assert len(outputs) == 2
        whole = FeatureGraphNet(model, (len(model.feature_info) - 1,))
        assert len(whole(other)) == 1
        graph = fx.symbolic_trace(model)
        last = other.contiguous(memory_format=torch.channels_last)  # a graph leaves the layout of its map alone
        close(graph(last), model(other), 1e-6)

    @torch.no_grad()
    def test_features_are_intermediates(self) -> None:
        """`features_only` cuts the model down to what its levels need, and changes none of them."""
        model, cut, x = self.create(), self.create(features_only=True), self.input(2)
        state = model.state_dict()
        cut.model.load_state_dict({name: state[name] for name in cut.model.state_dict()})
        levels = model.forward_intermediates(x, list(cut.out_indices), intermediates_only=True)
        for feature, level in zip(cut(x), levels, strict=True):
            close(feature, level, 1e-6)

    @torch.no_grad()
    def test_timm_fuses_it(self) -> None:
        model, x = self.create(), self.input(2)
        close(reparameterize_model(model)(x), model(x), 1e-5)

    def test_one_line_for_what_it_has_not(self) -> None:
        with pytest.raises(TypeError):
            self.create(not_a_setting=1)
        with pytest.raises(NotImplementedError, match=r"^[^\n]*torch.jit.script[^\n]*$"):
            torch.jit.script(self.create(**self.least))
        for way in {"list", "hook"} - set(self.model.FEATURE_CLASSES):
            with pytest.raises(ValueError, match="feature_cls is"):
                self.create(features_only=True, feature_cls=way)
        if "drop_path_rate" not in inspect.signature(self.model).parameters:
            self.create(drop_path_rate=0.0)
            with pytest.raises(TypeError, match="drops no paths"):
                self.create(drop_path_rate=0.1)

    @torch.no_grad()
    def test_classifiers_of_checkpoints(self, tmp_path: Path) -> None:
        """One that fits is kept; one that does not is an error unless other classes were asked for."""
        model, settings = timm.create_model(self.name, num_classes=5, **self.tiny), dict(self.tiny)
        file = tmp_path / "five.pth"
        torch.save(model.state_dict(), file)
        load = lambda **more: timm.create_model(  # noqa: E731
            self.name, pretrained=True, pretrained_cfg_overlay={"file": str(file)}, **settings, **more
        )
        asked = load(num_classes=5)
        assert torch.equal(asked.get_classifier().weight, model.get_classifier().weight)
        assert asked.pretrained_cfg["num_classes"] == 5
        assert not asked.loaded.fresh
        with pytest.raises(CheckpointError, match="is for 5 classes"):
            load()
        other = load(num_classes=3, in_chans=1)
        assert "head.fc.weight" in other.loaded.fresh
        assert other.loaded.adapted
        assert str(other.loaded).count("\n") >= 2
        assert other.get_classifier().out_features == 3
        path = {"checkpoint_path": str(file), **settings}
        five = timm.create_model(self.name, num_classes=5, **path)
        assert torch.equal(five.get_classifier().weight, model.get_classifier().weight)
        assert timm.create_model(self.name, num_classes=3, **path).get_classifier().out_features == 3
        with pytest.raises((CheckpointError, RuntimeError), match="head"):
            timm.create_model(self.name, **path)
        assert len(load(features_only=True).eval()(self.input(1))) > 0
        with pytest.raises(ValueError, match="save it before fuse"):
            model.fuse().save_pretrained(tmp_path)

    def test_surface_that_timm_checks(self) -> None:
        """What is made anew lies and learns as the model does; precision follows; names of parameters are true."""
        meta = timm.create_model(self.name, device="meta", **self.tiny)
        assert all(tensor.is_meta for tensor in (*meta.parameters(), *meta.buffers()))
        meta.to(dtype=torch.float64).eval()
        meta.reset_classifier(0)
        meta.reset_classifier(2)
        weight = meta.get_classifier().weight
        assert (weight.device.type, weight.dtype, len(weight)) == ("meta", torch.float64, 2)
        assert not any(module.training for module in meta.modules())
        meta.requires_grad_(False)
        meta.reset_classifier(0)
        meta.reset_classifier(0, "")
        assert not any(parameter.requires_grad for parameter in meta.parameters())
        names = {name for name, _ in self.create().named_parameters()}
        assert {name for name in self.create().no_weight_decay() if name in names or "." in name} <= names
        model, x = self.create(), self.input(1)
        with torch.no_grad():
            model(x)  # what is kept of it must not keep its precision
            assert model.bfloat16()(x.bfloat16()).dtype == torch.bfloat16

    def test_features_learn_alike_with_checkpointing(self) -> None:
        grads = []
        for checkpointing in (False, True):
            model = self.create(features_only=True).train().double()
            model.model.set_grad_checkpointing(checkpointing)
            torch.manual_seed(1)
            sum(level.square().mean() for level in model(self.input(2).double())).backward()
            grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        assert grads[0].keys() == grads[1].keys()
        total = sum(float(g.norm()) for g in grads[0].values())
        assert all((grads[0][name] - grads[1][name]).norm() <= 1e-9 * total for name in grads[0])

    @pytest.mark.ci
    def test_pruning(self) -> None:
        """timm's contract: levels stay, the last kept one is the output, and nothing is left that is not used."""
        model, x = self.create(**self.pruned), self.input(2)
        with torch.no_grad():
            levels = model.forward_intermediates(x, intermediates_only=True)
            whole = copy.deepcopy(model)
            whole.prune_intermediate_layers([len(levels) - 1], prune_head=False)
            close(whole(x), model(x), 1e-6)
        for i, level in enumerate(levels):
            for prune_norm in (True, False):
                pruned = copy.deepcopy(model)
                take = pruned.prune_intermediate_layers([i], prune_norm=prune_norm)
                settings = {"indices": take, "intermediates_only": True}
                with torch.no_grad():
                    close(pruned.forward_intermediates(x, **settings)[0], level, 1e-6)
                    close(model.forward_intermediates(x, [i], stop_early=True, intermediates_only=True)[0], level, 1e-6)
                    close(pruned.forward_features(x), pruned(x), 1e-6)
                    assert pruned.num_features == level.shape[1]
                pruned.train().forward_intermediates(x, norm=not prune_norm, **settings)[0].sum().backward()
                assert not [n for n, p in pruned.named_parameters() if p.grad is None and not self.untouched(n)]
                pruned.eval().reset_classifier(3, "avg")
                assert pruned(x).shape == (2, 3)

    pruned: ClassVar[dict[str, Any]] = {}
    """Settings of the model that is pruned."""

    def test_layer_decay_groups(self) -> None:
        model = self.create()
        groups = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.8)
        assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
        assert len({group["lr_scale"] for group in groups}) > 3
        head = [g["lr_scale"] for g in groups if any(p is model.get_classifier().weight for p in g["params"])]
        assert head == [1.0]


class BackboneTester(PictureTester):
    """Pyramids of feature maps."""

    @torch.no_grad()
    def test_features(self) -> None:
        for size in ((64, 64), (128, 64)):
            model = self.create(features_only=True)
            x = self.input(size=size)
            features = model(x)
            assert len(features) == len(model.feature_info)
            for feature, channels, stride in zip(
                features, model.feature_info.channels(), model.feature_info.reduction(), strict=True
            ):
                assert feature.shape == (2, channels, size[0] // stride, size[1] // stride)
        last = self.create(features_only=True, out_indices=(-1,))
        close(last(x)[0], features[-1])
        assert sum(p.numel() for p in self.create(features_only=True, out_indices=(0,)).parameters()) < sum(
            p.numel() for p in model.parameters()
        )
        whole = self.create()
        final, levels = whole.forward_intermediates(x)
        ways = []
        for way in ("hook", "getter"):
            torch.manual_seed(0)
            ways.append(timm.create_model(self.name, features_only=True, feature_cls=way, **self.tiny).eval())
        hooked, getter = ways
        for told, mine in zip(hooked(x), getter(x), strict=True):
            close(told, mine, 1e-6)
        close(whole.forward_head(final), whole(x), 1e-6)
        assert len(levels) == len(features)
        for level, tokens in zip(levels, whole.forward_intermediates(x, output_fmt="NLC", intermediates_only=True)):
            close(level.flatten(2).mT, tokens, 1e-6)
        with pytest.raises(ValueError, match="NHWC"):
            whole.forward_intermediates(x, output_fmt="NHWC")

    @torch.no_grad()
    def test_head(self) -> None:
        model, x = self.create(), self.input()
        features = model.forward_features(x)
        assert features.shape[1] == model.num_features
        close(model.forward_head(features), model(x), 1e-6)
        hidden = model.forward_head(features, pre_logits=True)
        assert hidden.shape == (2, model.head_hidden_size)
        model.reset_classifier(7)
        assert model(x).shape == (2, 7)
        assert model.num_classes == 7
        assert model.get_classifier().out_features == 7
        model.reset_classifier(0)
        close(model(x), hidden, 1e-6)
        model.reset_classifier(0, "")
        assert model(x).ndim == 4

    @torch.no_grad()
    def test_encoder_of_segmentation_models(self) -> None:
        net = smp.Unet(f"tu-{self.name}", encoder_weights=None, classes=2, in_channels=4, **self.segmentation())
        assert net.eval()(self.input(1, 4)).shape == (1, 2, 64, 64)

    def segmentation(self) -> dict[str, Any]:
        return dict(self.tiny)


class TokenTester(PictureTester):
    """Prefix tokens and a grid of patches; `timm`'s expectations of its own vision transformers."""

    sizes = ((64, 64), (48, 32), (64, 96))
    refusal = "multiples|at least"
    default_levels = 3
    prefix_of_levels = 1
    """Prefix tokens that features of the default levels have."""
    fixed = False
    """Whether the model is for one size until `set_input_size`."""

    def create(self, size: tuple[int, int] | None = None, **settings: Any) -> Any:
        """The model, for pictures of `size` where it must know."""
        model = super().create(**settings)
        if self.fixed and size is not None:
            getattr(model, "model", model).set_input_size(size)
        return model

    @torch.no_grad()
    def test_features(self) -> None:
        for size in ((64, 64), (128, 64)):
            model = self.create(size, features_only=True)
            x = self.input(size=size)
            features = model(x)
            assert len(features) == len(model.feature_info.channels()) == self.default_levels
            for feature, channels, stride in zip(
                features, model.feature_info.channels(), model.feature_info.reduction(), strict=True
            ):
                assert feature.shape == (2, channels, size[0] // stride, size[1] // stride)
        last = self.create(size, features_only=True, out_indices=(-1,))
        close(last(x)[0], features[-1])
        assert sum(p.numel() for p in self.create(features_only=True, out_indices=(0,)).parameters()) < sum(
            p.numel() for p in model.parameters()
        )

    @torch.no_grad()
    def test_intermediates(self) -> None:
        model, x = self.create((64, 96)), self.input(size=(64, 96))
        final, maps = model.forward_intermediates(x)
        close(final, model.forward_features(x), 1e-6)
        close(model.forward_head(final), model(x), 1e-6)
        assert len(maps) == len(model.feature_info)
        tokens = model.forward_intermediates(x, output_fmt="NLC", intermediates_only=True)
        for a, b in zip(maps, tokens, strict=True):
            close(a.flatten(2).mT, b, 1e-6)
        ((patches, prefix),) = model.forward_intermediates(x, 1, return_prefix_tokens=True, intermediates_only=True)
        close(patches, maps[-1], 1e-6)
        assert prefix.shape == (2, self.prefix_of_levels, model.num_features)
        (normed,) = model.forward_intermediates(x, 1, norm=True, stop_early=True, intermediates_only=True)
        close(normed.flatten(2).mT, model.norm(tokens[-1]), 1e-6)
        (last,) = model.get_intermediate_layers(x, 1, reshape=True)
        close(last, maps[-1], 1e-6)
        with pytest.raises(ValueError, match="NHWC"):
            model.forward_intermediates(x, output_fmt="NHWC")

    @torch.no_grad()
    def test_head(self) -> None:
        model, x = self.create(), self.input()
        features = model.forward_features(x)
        assert features.shape[2] == model.num_features == model.embed_dim
        close(model.forward_head(features), model(x), 1e-6)
        hidden = model.forward_head(features, pre_logits=True)
        assert hidden.shape == (2, model.head_hidden_size)
        model.reset_classifier(7)
        assert model(x).shape == (2, 7)
        assert model.num_classes == 7
        assert model.get_classifier().out_features == 7
        model.reset_classifier(0)
        close(model(x), hidden, 1e-6)
        model.reset_classifier(0, "")
        close(model(x), features, 1e-6)
        prefix = model.num_prefix_tokens
        model.reset_classifier(0, "avg")
        close(model(x), features[:, prefix:].mean(1), 1e-6)
        model.reset_classifier(4, "map")
        assert model(x).shape == (2, 4)
        assert self.create(global_pool="map")(x).shape == (2, 5)
        with pytest.raises(ValueError, match="global_pool is 'mean'"):
            model.reset_classifier(4, "mean")

    @torch.no_grad()
    def test_set_input_size(self) -> None:
        model, x = self.create(), self.input(size=(64, 96))
        y = None if self.fixed else model(x)
        size = model.img_size
        model.requires_grad_(False).set_input_size((64, 96))
        assert model.img_size == (64, 96)
        assert not any(parameter.requires_grad for parameter in model.parameters())
        if self.fixed:
            assert model(x).isfinite().all()
            close(
                self.model.from_published(model.state_dict(), **self.unshaped(), img_size=(64, 96))(x), model(x), 1e-5
            )
            return
        close(model(x), y, 1e-5)
        if model.pos_embed is not None:
            assert model.pos_embed.size == model.grid((64, 96))
            # a checkpoint of another size is resized as it is read
            fresh = self.create(img_size=(64, 96))
            fresh.load_state_dict(fresh.fit_state(self.create(img_size=size).state_dict()))
            close(fresh(x), y, 1e-5)
            assert self.model.published_settings(model.state_dict())["img_size"] == (64, 96)

    @torch.no_grad()
    def test_padding(self) -> None:
        model = self.create((64, 48), dynamic_img_pad=True)
        x = self.input(size=(61, 40))
        height, width = (-(-n // model.patch_size) * model.patch_size for n in (61, 40))
        whole = torch.zeros(2, 3, height, width)
        whole[:, :, :61, :40] = x
        close(model(x), model(whole), 1e-6)

    @torch.no_grad()
    def test_encoder_of_segmentation_models(self) -> None:
        net = smp.DPT(f"tu-{self.name}", encoder_weights=None, classes=2, in_channels=4, **self.segmentation())
        assert net.eval()(self.input(1, 4)).shape == (1, 2, 64, 64)

    def segmentation(self) -> dict[str, Any]:
        return dict(self.tiny)
