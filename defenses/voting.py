"""The base of defenses that answer by votes of a net that is randomised anew for each."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustbench_lite.attacks.eot import EOT
from robustbench_lite.core.models import INVALID, is_stochastic, labels_of, own_predict
from robustbench_lite.defenses.base import Wrapper

__all__ = ["Draw", "Voting"]

SOFT_DRAWS = 50  # at most, behind the logits: they rank and are shown, the votes decide
CPU_VALUES, GPU_VALUES = 2**19, 2**25  # of the copies in one forward pass: on a CPU they stay in its cache


class Voting(Wrapper):
    """A wrapper around a net that a subclass randomises in `draw`; the class with most votes of `draws` is the answer.

    Draws come from torch's global generator.

    Args:
        net: answers by its largest logit, the same each time.
        draws: votes behind one answer.

    Raises:
        ValueError: draws below 1, or a net that is stochastic or has a `predict` of its own.
    """

    stochastic: ClassVar[bool] = True
    folds: ClassVar[bool] = True
    """Whether each row of a batch has a draw of its own, so that copies of an image can share a forward pass."""

    def __init__(self, net: nn.Module, draws: int) -> None:
        super().__init__()
        if isinstance(draws, bool) or not isinstance(draws, int) or draws < 1:
            raise ValueError(f"draws must be a whole number of votes, at least 1, got {draws!r}")
        if is_stochastic(net) or own_predict(net) is not None:
            raise ValueError(
                f"{type(self).__name__} votes by the largest logit of a net, and {type(net).__name__} is stochastic or "
                "has a predict of its own: wrap the net inside it"
            )
        self.net, self.draws = net, draws

    @abstractmethod
    def draw(self, x: Tensor) -> Tensor:
        """Return the logits (B, K) of the net under one fresh draw."""

    def answers(self, x: Tensor, draws: int) -> Iterator[Tensor]:
        """Yield the logits of `draws` draws in blocks (k, B, K).

        Raises:
            ValueError: no batch of images, or logits for a single class.
            RuntimeError: images that the net failed on.
        """
        values = CPU_VALUES if x.device.type == "cpu" else GPU_VALUES
        block = max(1, values // max(1, x.numel())) if self.folds else 1
        while draws > 0:
            copies = min(block, draws)
            draws -= copies
            logits = self._checked(partial(self._copied, copies), x)
            yield logits.reshape(copies, len(x), logits.shape[1])

    def _copied(self, copies: int, x: Tensor) -> Tensor:
        return self.draw(x.repeat(copies, 1, 1, 1))

    @torch.no_grad()
    def votes(self, x: Tensor, draws: int) -> Tensor:
        """Return the votes int64 (B, K + 1) of fresh draws; the last column counts answers that are not finite."""
        return torch.stack([_ballots(logits) for logits in self.answers(x, draws)]).sum(dim=0)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, K) of the soft vote: the log of the mean softmax over `draws` draws, at most 50."""
        samples = min(self.draws, SOFT_DRAWS)
        parts = [logits.log_softmax(dim=2).logsumexp(dim=0) for logits in self.answers(x, samples)]
        return torch.stack(parts).logsumexp(dim=0) - math.log(samples)

    def predict(self, x: Tensor) -> Tensor:
        """Return the classes with most votes, int64 (B,), the first of several; `INVALID` where most are not finite."""
        return winner(self.votes(x, self.draws))

    def attack_view(self, samples: int = 1) -> nn.Module:
        """Return the soft vote over `samples` draws, in one graph."""
        return EOT(Draw(self), samples)


class Draw(nn.Module):
    """One draw of a `Voting` defense, images (B, C, H, W) to logits (B, K): what an attacker averages over."""

    stochastic = True

    def __init__(self, defense: Voting) -> None:
        super().__init__()
        self.defense = defense

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (B, K) under one fresh draw."""
        return self.defense.draw(x)


def winner(votes: Tensor) -> Tensor:
    """Return the columns int64 (B,) with most votes (B, K + 1); `INVALID` for the last."""
    first = votes.argmax(dim=1)
    return torch.where(first == votes.shape[1] - 1, INVALID, first)


def _ballots(logits: Tensor) -> Tensor:
    """Return how many of logits (k, B, K) are for each class, int64 (B, K + 1), with a column for none."""
    count = logits.shape[2]
    labels = labels_of(logits.flatten(0, 1))
    columns = torch.where(labels == INVALID, count, labels).view(logits.shape[:2])
    return F.one_hot(columns, count + 1).sum(dim=0)
