"""CROWN-IBP training: tight bounds while the ball grows, cheap ones when it has grown."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from robustbench_lite.certify.graph import graph_of, uncompiled
from robustbench_lite.certify.linear_bounds import LinearBounds, specification_rows
from robustbench_lite.certify.precision import full_precision
from robustbench_lite.certify.region import Region
from robustbench_lite.defenses.certified_training import Box
from robustbench_lite.defenses.ibp_training import IBPTraining

__all__ = ["CROWNIBPTraining"]


@dataclass(frozen=True)
class CROWNIBPTraining(IBPTraining):
    """Minimise kappa * CE(z, y) + (1 - kappa) * CE(beta * CROWN-IBP bounds + (1 - beta) * interval bounds).

    Interval bounds of an untrained net are so loose that the start of IBP training is unstable. CROWN-IBP walks the
    margins backwards through the net once, over the interval bounds of its hidden layers: tighter on such a net, though
    no longer so on one that is trained for interval bounds. Hence beta falls from 1 to `beta` with the rise of eps; at
    beta = 0 what follows is IBP training. Certified by `certify.IBP` where beta ends at 0, else by `certify.CROWNIBP`.

    A step costs about 8 times one of IBP training while beta > 0 (`SmallCNN` on MNIST, one core).

    Source: Zhang, Chen, Xiao, Gowal, Stanforth, Li, Boning, Hsieh, "Towards Stable and Efficient Training of Verifiably
    Robust Neural Networks", ICLR 2020, arXiv:1906.06316.
    Departures: the linear bounds are cut with the interval bounds, so they are never the looser ones; the input set is
    the ball cut by the images' range; shares of the training instead of numbers of epochs. BatchNorm enters with its
    running statistics.

    Args:
        eps: linf radius of the training, a number or "8/255".
        warmup: share of the training with the clean loss alone.
        ramp: share of the training, after the warm-up, in which eps rises, and kappa and beta fall.
        bounds: range of the images.
        kappa: share of the clean loss in the end; it starts at 1.
        beta: share of the CROWN-IBP bounds in the end; it starts at 1.

    Raises:
        ValueError: as `IBPTraining`, or beta outside [0, 1].
    """

    beta: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta is the share of the CROWN-IBP bounds, in [0, 1], got {self.beta:g}")

    def upper(self, model: nn.Module, box: Box, specification: Tensor, share: float) -> Tensor:
        """Return beta * CROWN-IBP + (1 - beta) * IBP upper bounds (B, rows of the specification) over the box."""
        beta = 1 - share * (1 - self.beta)
        if beta == 0:
            return super().upper(model, box, specification, share)
        linear, intervals = _upper_bounds(model, box, specification)
        return beta * linear + (1 - beta) * intervals


def _upper_bounds(model: nn.Module, box: Box, specification: Tensor) -> tuple[Tensor, Tensor]:
    """Return CROWN-IBP and interval upper bounds (B, S), from one pass over the hidden layers.

    `certify.bounds` would walk from below as well, which training has no use for: twice the time.
    """
    x = box[0]
    with full_precision(x.device):
        below = -specification.to(x)
        net = LinearBounds(graph_of(model, x), uncompiled(model), Region(*box), below, tighten=False)
        linear = net.lower(net.graph.output, specification_rows(below, len(x))).reshape(below.shape[:2])
        return -linear.maximum(net.final.lower), -net.final.lower
