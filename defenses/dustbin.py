"""Out-distribution training: one class more than there are, for all that belongs to none of them.

Source: Abbasi and Gagne 2018, "Out-distribution training confers robustness to deep neural networks" (1802.07124).
A net with K + 1 outputs learns by plain cross-entropy; the last class gets images of another, natural data set and
mixes of images of different classes. An input of that class is refused.
The net of a config has K outputs. `Dustbin` owns the missing row of its last layer: z_{K+1} = w phi(x) + b on the
features that go into that layer, which is the same function as a net with K + 1 outputs.
Departures: a defense cannot load a second data set, so by default all out-distribution images are made of the batch
(mixes, shuffled blocks, noise); `others` takes a data set. The original refuses where class K + 1 wins, which is
z_{K+1} - max_k z_k > 0; the threshold on this score comes from a false-positive rate here (`threshold.zero_()` gives
the original). Around a net that was trained otherwise, `fit` learns the row alone.
What it withstands: one-step attacks that do not know of the extra class. `RejectionAware` is the one to believe.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustbench_lite.attacks.rejection_aware import RejectionAware
from robustbench_lite.core.rng import Streams
from robustbench_lite.defenses._out_distribution import check_kinds, check_others, out_of_distribution
from robustbench_lite.defenses._penultimate import embed, embed_all, last_linear
from robustbench_lite.defenses.base import Batch, Objective, Step, TrainingData
from robustbench_lite.defenses.detector import Detector

if TYPE_CHECKING:
    from robustbench_lite.attacks.base import Attack
    from robustbench_lite.core.threats import Threat

__all__ = ["Dustbin", "DustbinTraining"]

BATCH = 128  # samples among which partners of mixes are sought
DECAY = 1e-3  # of the row that is learned alone: separable data would let it grow for ever


class Dustbin(Detector):
    """A net with one more output; an input is refused where that output is too large.

    The score is z_{K+1} - max_k z_k. `fit` sets the threshold; around a net that `DustbinTraining` has not trained it
    first learns the extra row by cross-entropy on the features, the net as it is.

    Args:
        net: the net, with K outputs.
        fpr: share of clean inputs that may be rejected.
        kinds: out-distribution images that `fit` learns an untrained row by: of "uniform", "gaussian", "pixels"
            (shuffled), "blocks" (shuffled), "mixes" (of two classes); none will do where the row is trained.

    Raises:
        ValueError: an unknown kind, or a net without a linear layer at its end.
    """

    def __init__(
        self, net: nn.Module, fpr: float = 0.05, kinds: Sequence[str] = ("mixes", "blocks", "uniform")
    ) -> None:
        super().__init__(net, fpr)
        self.kinds = list(check_kinds(kinds))
        self.row = _row(net, torch.nan)  # not learned yet

    def answer(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of the K classes (B, K), and how far the extra one is above them (B,)."""
        logits, features = embed(self.net, x)
        return logits, self.row(features).squeeze(1) - logits.amax(dim=1)

    def learn(self, data: TrainingData) -> None:
        """Learn the extra row from the features, unless it was trained. The problem is convex.

        Raises:
            ValueError: no kind of image to learn it by.
        """
        if not bool(self.row.weight.isnan().any()):
            return
        _require_some(self.kinds)
        logits, features, outside = self._with_outsiders(data)
        spread = features.std(dim=0).clamp_min(1e-6)
        weight = torch.zeros(features.shape[1] + 1, dtype=features.dtype, device=features.device, requires_grad=True)
        target = torch.where(outside, logits.shape[1], logits.argmax(dim=1))
        solver = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            solver.zero_grad()
            extra = features / spread @ weight[:-1] + weight[-1]
            value = F.cross_entropy(torch.cat([logits, extra.unsqueeze(1)], dim=1), target)
            value = value + DECAY * weight.square().sum()
            value.backward()  # type: ignore[no-untyped-call]
            return value

        with torch.enable_grad():
            solver.step(loss)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            self.row.weight.copy_((weight[:-1] / spread).unsqueeze(0))
            self.row.bias.copy_(weight[-1:])

    def _with_outsiders(self, data: TrainingData) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits (2N, K), features (2N, D) and which are outside, for the data and as many other images."""
        order = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(0))
        made = []
        for rows in torch.split(order, BATCH):
            at = rows.to(data.images.device)
            batch = Batch(data.images[at], data.labels[at], data.indices[rows])
            streams = Streams.from_generator(None, batch.indices, batch.x.device)
            made.append(out_of_distribution(batch, self.kinds, streams))
        inside, outside = embed_all(self.net, data.images), embed_all(self.net, torch.cat(made))
        logits, features = (torch.cat(pair).double() for pair in zip(inside, outside, strict=True))
        return logits, features, torch.arange(len(logits), device=logits.device) >= len(data.images)

    def adaptive_attacks(self, threat: Threat) -> list[Attack]:
        """Return the attack that keeps below the extra class."""
        attack = RejectionAware()
        return [attack] if attack.supports(threat) else []


@dataclass(frozen=True)
class DustbinTraining(Objective):
    """Minimise CE_{K+1}(x, y) + weight * CE_{K+1}(x_out, K + 1), and deploy the net as a `Dustbin`.

    Args:
        kinds: out-distribution images made of each batch, drawn evenly: of "uniform", "gaussian", "pixels" (shuffled),
            "blocks" (shuffled), "mixes" (of two classes).
        others: another data set (`load_data("fashion_mnist")`), one more kind; None: none.
        weight: of the out-distribution images, of which there are as many as samples.
        fpr: share of clean inputs that may be rejected.

    Raises:
        ValueError: no kind of image at all, a weight that is not positive, images of another shape, or no calibration
            samples at the end.
    """

    kinds: Sequence[str] = ("mixes", "blocks", "uniform")
    others: TrainingData | None = None
    weight: float = 1.0
    fpr: float = 0.05

    def __post_init__(self) -> None:
        object.__setattr__(self, "kinds", check_kinds(self.kinds))
        if self.others is None:
            _require_some(self.kinds)
        if not self.weight > 0:
            raise ValueError(f"weight must be > 0, got {self.weight:g}")

    def setup(self, model: nn.Module, data: TrainingData) -> nn.Module:
        """Return the extra row of the last layer, zeros at first."""
        check_others(self.others, data)
        return _row(model, 0.0)

    def loss(self, model: nn.Module, batch: Batch, step: Step, state: Any, streams: Streams) -> Tensor:
        """Return the cross-entropy over K + 1 classes, of both halves."""
        outside = out_of_distribution(batch, self.kinds, streams, self.others)
        # one pass over both halves: BatchNorm then sees the mixture that it must serve
        logits, features = embed(model, torch.cat([batch.x, outside]))
        inside, outside = torch.cat([logits, state(features)], dim=1).float().chunk(2)
        extra = torch.full_like(batch.y, logits.shape[1])
        return F.cross_entropy(inside, batch.y) + self.weight * F.cross_entropy(outside, extra)

    def finish(
        self, model: nn.Module, data: TrainingData, state: Any, calibration: TrainingData | None = None
    ) -> nn.Module:
        """Return the detector, its threshold set."""
        defense = Dustbin(model, self.fpr, self.kinds).to(next(model.parameters()).device).eval()
        defense.row.load_state_dict(state.state_dict())
        defense.fit(data, calibration)
        return defense


def _row(net: nn.Module, value: float) -> nn.Linear:
    """Return one more row for the last layer of a net, filled with a value; no random numbers are drawn."""
    head = last_linear(net)
    row: nn.Linear = nn.utils.skip_init(nn.Linear, head.in_features, 1)  # type: ignore[no-untyped-call]
    for parameter in row.parameters():
        nn.init.constant_(parameter, value)
    return row.to(head.weight.device)


def _require_some(kinds: Sequence[str]) -> None:
    if not kinds:
        raise ValueError("out-distribution training needs images of no class: give kinds=[...], or others=...")
