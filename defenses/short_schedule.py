"""Certified training in fewer epochs: weights that do not blow boxes up, and regularisers while the ball grows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from robustbench_lite.certify.graph import graph_of, uncompiled
from robustbench_lite.certify.intervals import Interval
from robustbench_lite.certify.ir import Node
from robustbench_lite.certify.operators.registry import Value
from robustbench_lite.certify.precision import full_precision
from robustbench_lite.certify.propagate import propagate
from robustbench_lite.defenses.base import Batch, Objective, State, Step, TrainingData
from robustbench_lite.defenses.certified_training import Box, CertifiedTraining

if TYPE_CHECKING:
    from robustbench_lite.core.rng import Streams

__all__ = ["ShortSchedule", "balance_loss", "relu_inputs", "rescale_for_intervals", "tightness_loss"]

LEAST_SHARE = 1e-3  # of eps: during the warm-up the boxes of the regularisers are this small, for they need a width
TINY = 1e-12  # in the place of a divisor 0


@dataclass(frozen=True)
class ShortSchedule(Objective):
    """Add to a certified training the initialisation and the regularisers that let it ramp in a few epochs.

    Interval bounds of a net with the usual weights grow by a large factor a layer, and training against them turns most
    ReLUs off. So the weights begin at a scale that hands the width of boxes on as it is, and until the ball has grown
    weight * (1 - share of eps) * (tightness + balance) joins the loss: see `tightness_loss` and `balance_loss`.

    Source: Shi, Wang, Zhang, Yi, Hsieh, "Fast Certified Robust Training with Short Warmup", NeurIPS 2021,
    arXiv:2103.17268.
    Departures: the given weights are rescaled, not drawn anew from N(0, 2 pi / fan-in^2), which has the same mean
    magnitude. Theirs puts BatchNorm behind every layer, bounded with the statistics of the clean batch; here bounds
    take the running statistics, and BatchNorm undoes the scale of the weights before it, so that there only the
    regularisers act.

    Args:
        objective: the certified training, whose eps, warm-up, ramp and bounds count.
        weight: lambda, of the regularisers at the start.
        tolerance: tau in (0, 1], below which a ratio is penalised.

    Raises:
        TypeError: an objective that is no certified training.
        ValueError: a negative weight, a tolerance outside (0, 1]; at `setup`, a net without a ReLU.
    """

    objective: CertifiedTraining
    weight: float = 0.5
    tolerance: float = 0.5

    def __post_init__(self) -> None:
        if not isinstance(self.objective, CertifiedTraining):
            raise TypeError(
                f"ShortSchedule wraps a certified training such as IBPTraining, got {type(self.objective).__name__}"
            )
        if not 0 <= self.weight < float("inf"):
            raise ValueError(f"weight, of the regularisers, must be >= 0 and finite, got {self.weight:g}")
        if not 0 < self.tolerance <= 1:
            raise ValueError(f"tolerance is the least ratio that is not penalised, in (0, 1], got {self.tolerance:g}")

    def setup(self, model: nn.Module, data: TrainingData) -> State:
        """Rescale the weights, and set the objective up."""
        x = data.images[:1].to(next(model.parameters()).device)
        if not relu_inputs(model, self.objective.ball(x, 1.0)):
            raise ValueError("ShortSchedule regularises the boxes before ReLUs, and this net has none")
        rescale_for_intervals(model)
        return self.objective.setup(model, data)

    def loss(self, model: nn.Module, batch: Batch, step: Step, state: Any, streams: Streams) -> Tensor:
        """Return the loss of the objective, plus the regularisers until the ball has grown."""
        loss = self.objective.loss(model, batch, step, state, streams)
        share = self.objective.share(step)
        weight = self.weight * (1 - share)
        if weight == 0:
            return loss
        box = self.objective.ball(batch.x, max(share, LEAST_SHARE))
        hidden = relu_inputs(model, box)
        return loss + weight * (tightness_loss(box, hidden, self.tolerance) + balance_loss(hidden, self.tolerance))

    def after_step(self, model: nn.Module, state: Any) -> None:
        """Do what the objective does after a step."""
        self.objective.after_step(model, state)

    def finish(
        self, model: nn.Module, data: TrainingData, state: Any, calibration: TrainingData | None = None
    ) -> nn.Module:
        """Return what the objective deploys."""
        return self.objective.finish(model, data, state, calibration)


@torch.no_grad()
def rescale_for_intervals(model: nn.Module) -> None:
    """Scale each linear and convolutional layer, weight and bias, to a mean magnitude of its weights of 2 / fan-in.

    A box then goes through the layer and a ReLU, which halves widths on average, with its mean width unchanged.

    >>> layer = nn.Linear(8, 3)
    >>> rescale_for_intervals(layer)
    >>> round(layer.weight.abs().mean().item(), 6)
    0.25
    """
    for layer in model.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            size = layer.weight.abs().mean()
            factor = torch.where(size > 0, 2 / layer.weight[0].numel() / size, 1.0)
            layer.weight.mul_(factor)
            if layer.bias is not None:
                layer.bias.mul_(factor)


def relu_inputs(model: nn.Module, box: Box) -> list[Interval]:
    """Return the interval bounds before each ReLU, in the order of evaluation, each (B, ...)."""
    graph, found = graph_of(model, box[0]), dict[int, Interval]()
    watched = {node.inputs[0] for node in graph.nodes if node.op == "relu" and node.varies}

    def keep(node: Node, value: Value) -> Value:
        if node.index in watched and isinstance(value, Interval):
            found[node.index] = value
        return value

    with full_precision(box[0].device):
        propagate(graph, uncompiled(model), Interval(*box), keep=keep)
    return list(found.values())


def tightness_loss(box: Box, hidden: list[Interval], tolerance: float) -> Tensor:
    """Return the mean over layers of relu(tau - mean width of the inputs / mean width of the layer) / tau.

    0 where no layer's boxes are on average more than 1 / tau as wide as those of the images.
    """
    width = (box[1] - box[0]).mean()
    ratios = torch.stack([width / (z.upper - z.lower).mean().clamp_min(TINY) for z in hidden])
    return (tolerance - ratios).relu().mean() / tolerance


def balance_loss(hidden: list[Interval], tolerance: float) -> Tensor:
    """Return the mean over layers of (relu(tau - r_1) + relu(tau - r_2)) / tau: ReLUs on and off are to balance.

    Over the neurons that are on all over the box, r_1 sums the centres c of boxes and r_2 their (c - mean c)^2; the
    same sums over those that are off, in magnitude; the ratio of the smaller one to the larger one.
    """
    ratios = []
    for z in hidden:
        centre, on, off = z.centre, z.lower > 0, z.upper < 0
        spread = (centre - centre.mean()).square()
        ratios += [
            _ratio((centre * on).sum(), -(centre * off).sum()),
            _ratio((spread * on).sum(), (spread * off).sum()),
        ]
    return 2 * (tolerance - torch.stack(ratios)).relu().mean() / tolerance


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    return torch.minimum(a, b) / torch.maximum(a, b).clamp_min(TINY)
