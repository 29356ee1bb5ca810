"""Randomized ablation against l0: its bound by counting all subsets, and what a base model gets to see."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robustbench_lite.certify import EarlyStopping, RandomizedAblation
from robustbench_lite.core.results import Status
from robustbench_lite.core.threats import Lp


class SeesBright(nn.Module):
    """Class 1 where at least one kept pixel is bright in its first channel: all is known by counting."""

    def forward(self, x: Tensor) -> Tensor:
        lead = (x[:, 0] > 0.5).flatten(1).any(1).to(x) - 0.5
        return torch.stack([-lead, lead], dim=1)


def bright(count: int, size: int = 4, channels: int = 1) -> Tensor:
    x = torch.zeros(1, channels, size * size)
    x[:, 0, :count] = 1
    return x.reshape(1, channels, size, size)


@pytest.mark.parametrize("k", [1, 3, 6])
def test_the_probability_that_a_pixel_is_seen_is_counted_over_all_subsets(k):
    d = 9
    subsets = list(itertools.combinations(range(d), k))
    for r in range(d + 1):
        seen = Fraction(sum(any(i < r for i in s) for s in subsets), len(subsets))
        needed = float(RandomizedAblation(k).needed(np.array([float(r)]), "l0", torch.Size([1, 3, 3]))[0])
        assert needed == (pytest.approx(float(seen) + 0.5, abs=1e-12) if seen < 0.5 else 1.0)


def test_radii_are_the_largest_number_of_pixels_by_binomial_coefficients():
    """At 28 x 28 and k = 45, the setting of the paper."""
    d, k = 784, 45
    for p in (0.5, 0.5000001, 0.6, 0.9, 0.99, 0.999999, 1.0):
        found = float(RandomizedAblation(k).radii(np.array([p]), "l0", torch.Size([1, 28, 28]))[0])
        if p <= 0.5:
            assert math.isnan(found)
            continue
        holds = [r for r in range(50) if Fraction(p) > Fraction(3, 2) - Fraction(math.comb(d - r, k), math.comb(d, k))]
        assert found == holds[-1]
    assert RandomizedAblation(1).radii(np.array([0.75, 0.76]), "l0", torch.Size([1, 2, 2])).tolist() == [0, 1]


def test_certificates_agree_with_what_no_attack_can_change():
    """Copies that see a bright pixel vote 1. Darkening all `count` bright pixels is the attack; fewer are certified."""
    x, y = torch.cat([bright(c) for c in range(1, 17)]), torch.ones(16, dtype=torch.int64)
    method = RandomizedAblation(2, n=3000)
    found = method.radius(SeesBright(), x, y, "l0")
    for count, radius in enumerate(found.tolist(), start=1):
        chance = 1 - math.comb(16 - count, 2) / math.comb(16, 2)
        assert radius < count
        assert chance > 0.5 or radius == 0
    assert found.max() >= 3
    certificate = method(SeesBright(), x[-1:], y[-1:], Lp("l0", 3))
    assert (certificate.status.item(), certificate.radius.item()) == (Status.VERIFIED, found[-1])
    assert method(SeesBright(), x[-1:], y[-1:], Lp("l0", 2.7)).certified.item()
    by_coordinate = method(SeesBright(), x[-1:], y[-1:], Lp("l0", 3, per="coordinate"))
    assert by_coordinate.certified.item()
    early = RandomizedAblation(2, stopping=EarlyStopping())(SeesBright(), x[-1:], y[-1:], Lp("l0", 2))
    assert early.certified.item()
    assert early.samples.item() < 2000


def test_copies_show_k_pixels_twice_and_nothing_else():
    seen: list[Tensor] = []

    class Watches(SeesBright):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.clone())
            return super().forward(x)

    x = torch.rand(1, 3, 4, 5, generator=torch.Generator().manual_seed(0)) * 2 - 1
    RandomizedAblation(7, n=2000).votes(Watches(), x, bounds=(-1.0, 1.0))
    copies = torch.cat([part for part in seen if len(part) > 4])
    assert copies.shape[1:] == (6, 4, 5)
    shown = copies[:, :3] + copies[:, 3:] > 0
    assert (shown.all(dim=1) == shown.any(dim=1)).all()
    assert (shown[:, 0].flatten(1).sum(1) == 7).all()
    torch.testing.assert_close(copies[:, :3][shown], (x + 1).expand(len(copies), 3, 4, 5)[shown])
    torch.testing.assert_close(copies[:, 3:][shown], (1 - x).expand(len(copies), 3, 4, 5)[shown])
    share = shown[:, 0].flatten(1).double().mean(0)
    assert (share - 7 / 20).abs().max() < 5 * math.sqrt(0.35 * 0.65 / len(copies))


def test_votes_count_pixels_and_speak_of_l0_alone():
    x, y, method = bright(16), torch.tensor([1]), RandomizedAblation(2, n=1000)
    votes = method.votes(SeesBright(), x)
    for threat in (Lp("l2", 3.0), Lp("linf", 1.0)):
        for read in (lambda t: method.certify_votes(votes, y, t), lambda t: method.p_values(votes, t)):
            with pytest.raises(ValueError, match="does not support"):
                read(threat)
    with pytest.raises(ValueError, match="certifies l0, got the norm 'l2'"):
        method.largest_radius("l2", x.shape[1:])
    almost = 4 - 3e-6  # four pixels lie in this threat, by the tolerance of membership
    darker = x.clone()
    darker[0, 0, 0] = 0
    assert Lp("l0", almost).contains(darker, x).item()
    assert method.p_values(votes, Lp("l0", almost)) == method.p_values(votes, Lp("l0", 4))
    needed = 1.5 - math.comb(12, 2) / math.comb(16, 2)
    assert method.p_values(votes, Lp("l0", 4)).item() == pytest.approx(needed**1000, rel=1e-9)  # all votes agree
    assert method.p_values(votes, Lp("l0", 3.99)) == method.p_values(votes, Lp("l0", 3))
    assert method.p_values(votes, Lp("l0", 4)) > method.p_values(votes, Lp("l0", 3))
    assert method.p_values(votes, Lp("l0", 12)).item() == 1  # no number of votes is enough


def test_bad_settings():
    x, y = bright(3), torch.tensor([1])
    with pytest.raises(ValueError, match="k = 17 pixels cannot be kept of images of 16"):
        RandomizedAblation(17, n=100)(SeesBright(), x, y, Lp("l0", 1))
    for k in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="k must be a whole number"):
            RandomizedAblation(k)
    assert not RandomizedAblation(2).supports(Lp("l2", 0.1))
    with pytest.raises(ValueError, match="l0 radius of at most 4"):
        RandomizedAblation(2, n=1000)(SeesBright(), x, y, Lp("l0", 9))
    assert RandomizedAblation(16, n=100).radius(SeesBright(), x, y, "l0").item() == 0
