"""Contracts of L-TDNN: any published variant from its settings and shapes."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nearfar.audio.speakers import scoring
from nearfar.audio.speakers.ltdnn import LTDNN, published_settings, published_state
from nearfar.core.checkpoints import load_state_dict
from nearfar.core.contracts import Contract
from nearfar.core.errors import UserError
from nearfar.ops.aggregation.layer_attention import LayerAttentionPool
from nearfar.ops.aggregation.statistics import AttentiveStatisticsPool
from nearfar.ops.convolution.se_blocks import SED2Block, SERes2Block
from nearfar.ops.losses.margin_softmax import AAMSoftmax


class _Embeddings(nn.Module):
    """Head with both outputs that contracts name."""

    def __init__(self, head: LTDNN) -> None:
        super().__init__()
        self.head = head

    def forward(self, states: Tensor) -> dict[str, Tensor]:
        embedding = self.head(states)
        return {"embedding": embedding, "unit": nn.functional.normalize(embedding, dim=1)}


class _MaskedPool(nn.Module):
    """Time pool without and with a mask."""

    def __init__(self, pool: AttentiveStatisticsPool, frames: Sequence[int]) -> None:
        super().__init__()
        self.pool, self.frames = pool, list(frames)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        mask = torch.arange(x.shape[2], device=x.device) < torch.tensor(self.frames, device=x.device)[:, None]
        name = "mask_" + "_".join(map(str, self.frames))
        return {"no_mask": self.pool(x), name: self.pool(x, mask)}


class _MarginLoss(nn.Module):
    """Margin softmax with fixed labels: probabilities and loss."""

    def __init__(self, loss: AAMSoftmax, labels: Sequence[int]) -> None:
        super().__init__()
        self.loss, self.labels = loss, list(labels)

    def forward(self, embedding: Tensor) -> list[Tensor] | dict[str, Tensor]:
        logits, loss = self.loss(embedding, torch.tensor(self.labels, device=embedding.device))
        return {"probability": logits.softmax(1), "loss": loss}


def _score_metrics(score: Tensor, contract: Contract) -> dict[str, Tensor]:
    """EER and minDCF in both conventions, at the priors that the outputs name, of scores as the settings say."""
    settings = contract.settings
    contract.require_text(target_rule=r"index % \d+ == \d+", score=r"input \+ [\d.]+ for targets")
    every, rest = map(int, re.findall(r"\d+", settings["target_rule"]))
    gain = float(settings["score"].split()[2])
    labels = np.arange(len(score)) % every == rest
    scores = score.cpu().double().numpy() + gain * labels
    values = {
        "eer_interpolated": scoring.eer(scores, labels).value,
        "eer_midpoint": scoring.eer(scores, labels, "midpoint").value,
    }
    for output in contract.outputs:
        if found := re.search(r"min_dcf_(norm|raw)_p(\d+)$", output["name"]):
            cost = scoring.Cost(float(f"0.{found[2]}"), settings["c_miss"], settings["c_fa"])
            values[found[0]] = scoring.min_dcf(scores, labels, cost, normalize=found[1] == "norm").value
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


def _score_norm(*tensors: Tensor, settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """Cosines, S-norm and AS-norm of all pairs."""
    enroll, test, cohort, *rest = (t.cpu().double().numpy() for t in tensors)
    mean = rest[0] if rest and settings.get("mean_subtraction", True) else None
    ddof = 1 if "ddof 1" in settings.get("std", "") else 0
    cosine = scoring.unit(enroll, mean) @ scoring.unit(test, mean).T
    found = {"cosine": cosine}
    for name, top_n in (("snorm", None), (f"asnorm_top{settings['top_n']}", settings["top_n"])):
        e = scoring.cohort_statistics(enroll, cohort, mean, top_n, ddof)
        t = scoring.cohort_statistics(test, cohort, mean, top_n, ddof)
        e = scoring.CohortStatistics(e.mean[:, None], e.std[:, None])
        found[name] = scoring.normalize_scores(cosine, e, t)
    return {name: torch.from_numpy(value) for name, value in found.items()}


def build_contract(contract: Contract) -> Any:
    """The head, operator or score function of an L-TDNN contract, in evaluation mode, with its published state."""
    settings, state = contract.settings, published_state(contract.state())
    contract.document("rng", "layout")
    if contract.variant.startswith("op-eer-mindcf"):
        contract.require(trials=contract.inputs[0]["shape"][0])
        return lambda score: _score_metrics(score, contract)
    if contract.variant.startswith("op-score-norm"):
        contract.require_text(std=r"(population )?\(?ddof 0\)?|(sample )?\(?ddof 1\)?")
        return lambda *tensors: _score_norm(*tensors, settings=settings)
    if depth := sum(bool(re.match(r"(net\.blocks\.0\.)?stages\.\d+\.conv\.weight$", name)) for name in state):
        contract.require(dilations=[2**i for i in range(depth)])
    if not contract.variant.startswith("op-"):
        arguments = published_settings(state)
        if arguments["form"] == "ecapa" and "dilations" in settings:
            arguments["dilations"] = settings["dilations"]
        form = {"ecapa": "ECAPA", "d3net": "D3Net"}[arguments["form"]]
        contract.require_text(frame_network=rf"(2-D )?{form}")
        contract.require(
            backbone_hidden=arguments["hidden_size"],
            hidden_states=arguments["num_states"],
            in_conv_kernel_layer_time=arguments["kernel_size"],
            blocks=arguments["num_blocks"],
            res2_scale=arguments.get("scale"),
            **arguments,
        )
        head = LTDNN(**arguments)
        load_state_dict(head, state)
        return _Embeddings(head).eval()
    shape = {name: tuple(value.shape) for name, value in state.items()}
    model: nn.Module
    match contract.variant.removeprefix("op-"):
        case name if name.startswith("se-res2-block-2d"):
            channels = shape["conv_in.conv.weight"][0]
            width, _, *kernel = shape["convs.0.conv.weight"]
            hidden = shape["se.reduce.weight"][0]
            contract.require(channels=channels, kernel=kernel, scale=channels // width, se_channels=hidden)
            model = SERes2Block(channels, kernel, settings["dilation"], channels // width, hidden)
            load_state_dict(model, state)
        case name if name.startswith("se-d2-block-2d"):
            channels, _, *kernel = shape["stages.0.conv.weight"]
            depth = sum(bool(re.match(r"stages\.\d+\.conv\.weight$", n)) for n in shape)
            contract.require(channels=channels, depth=depth, kernel=kernel, se_channels=shape["se.reduce.weight"][0])
            model = SED2Block(channels, depth, kernel, shape["se.reduce.weight"][0])
            load_state_dict(model, state)
        case name if name.startswith("layer-attention-pool"):
            heads, layers, _ = shape["gate.w1"]
            out_dim, in_dim, *_ = shape["proj_in.weight"]
            contract.require(in_dim=in_dim, out_dim=out_dim, layers=layers, heads=heads)
            contract.require(bottleneck=shape["gate.w1"][2])
            model = LayerAttentionPool(in_dim, out_dim, layers, heads)
            load_state_dict(model, state)
        case name if name.startswith("attentive-stats-pool"):
            state = {k.removeprefix("time_pool."): v for k, v in state.items()}
            hidden, triple, _ = tuple(state["reduce.weight"].shape)
            contract.require(in_dim=triple // 3, out_dim=len(state["linear.weight"]), attention_hidden=hidden)
            pool = AttentiveStatisticsPool(triple // 3, state["linear.weight"].shape[0], hidden)
            load_state_dict(pool, state)
            model = _MaskedPool(pool, settings["valid_frames"]) if "valid_frames" in settings else pool
        case name if name.startswith("aam-softmax"):
            centers, dim, classes = tuple(state["classifier.weight"].shape)
            contract.require(embedding_dim=dim, classes=classes, heads=centers)
            loss = AAMSoftmax(dim, classes, float(settings["margin"]), float(settings["scale"]), centers)
            load_state_dict(loss, {"weight": state["classifier.weight"]})
            model = _MarginLoss(loss, settings["labels"])
        case _:
            raise UserError(f"l-tdnn has no operator contract {contract.variant!r}")
    return model.eval()
