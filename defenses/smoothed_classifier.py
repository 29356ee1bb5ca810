"""Randomized smoothing as a defense: a net behind a vote under Gaussian noise."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from robustbench_lite.attacks.smooth_adv import SmoothAdv
from robustbench_lite.certify.inside import Inside
from robustbench_lite.core.models import ABSTAIN, INVALID
from robustbench_lite.defenses.smoothed_vote import SmoothedVote
from robustbench_lite.defenses.voting import Voting

if TYPE_CHECKING:
    from robustbench_lite.attacks.base import Attack
    from robustbench_lite.certify.base import Certifier
    from robustbench_lite.core.threats import Threat

__all__ = ["SmoothedClassifier"]


class SmoothedClassifier(Voting):
    """Answers the class that a net gives most often under Gaussian noise, or `ABSTAIN` where the vote is not clear.

    Abstention for lack of votes is an error in every table, so `rejects` is False. The certificates are about what is
    deployed: within a certified radius one call of `predict` gives the class with probability 1 - alpha. Why that
    radius is smaller than Cohen's, and by how much: docs/decisions/0008-smoothed-classifiers.md.

    Source: Cohen, Rosenfeld, Kolter, "Certified Adversarial Robustness via Randomized Smoothing", ICML 2019,
    arXiv:1902.02918.
    Departures: PREDICT looks twice (`ClearWinner`), with fewer draws than CERTIFY, for an attack asks it often.

    Args:
        net: trained under the same noise.
        sigma: standard deviation of the noise, in the units of the images.
        n0: draws that choose the class of a certificate.
        n: further draws, that measure how likely it is.
        alpha: probability with which a certificate, or an answer, may be wrong.
        draws: votes of one answer at most.

    Raises:
        ValueError: a setting out of range, draws that can never be clear, or a net that is stochastic.
    """

    _fewest: Tensor

    def __init__(
        self,
        net: nn.Module,
        sigma: float,
        n0: int = 100,
        n: int = 100_000,
        alpha: float = 0.001,
        draws: int = 1000,
    ) -> None:
        super().__init__(net, draws)
        self.sigma, self.n0, self.n, self.alpha = sigma, n0, n, alpha
        rule = self.certifier.vote
        self._looks = rule.looks
        self.register_buffer("_fewest", rule.fewest, persistent=False)

    @property
    def certifier(self) -> SmoothedVote:
        """What certifies the answers, given the net."""
        return SmoothedVote(self.sigma, self.draws, n0=self.n0, n=self.n, alpha=self.alpha)

    def draw(self, x: Tensor) -> Tensor:
        """Return the net's logits (B, K) under fresh noise."""
        logits: Tensor = self.net(x + self.sigma * torch.randn_like(x))
        return logits

    def predict(self, x: Tensor) -> Tensor:
        """Return the winners of the vote, int64 (B,): `ABSTAIN` where there is none, `INVALID` where it is no class."""
        labels = torch.full((len(x),), ABSTAIN, device=x.device)
        rows, votes, before = torch.arange(len(x), device=x.device), torch.zeros((), dtype=torch.int64), 0
        for look in self._looks:
            votes = votes.to(x.device) + self.votes(x[rows], look - before)
            most, columns = votes.topk(2, dim=1)
            clear = most[:, 0] >= self._fewest[most.sum(dim=1)]
            answer = torch.where(columns[:, 0] == votes.shape[1] - 1, INVALID, columns[:, 0])
            labels[rows[clear]] = answer[clear]
            rows, votes, before = rows[~clear], votes[~clear], look
            if len(rows) == 0:
                break
        return labels

    def adaptive_attacks(self, threat: Threat) -> list[Attack]:
        """Return PGD on the smoothed soft classifier; its margin loss breaks more digits than cross-entropy."""
        attack = SmoothAdv(loss="margin")
        return [attack] if attack.supports(threat) else []

    def certifiers(self) -> list[Certifier]:
        """Return the certificate of the vote: in l2, and by inclusion in l1 and linf."""
        return [Inside(self.certifier)]
