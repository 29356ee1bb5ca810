"""The cascade proves what any of its stages proves; what it falsifies comes with a witness; radii hold."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from robustbench_lite.attacks import PGD
from robustbench_lite.certify import CROWN, CROWNIBP, IBP, AlphaCROWN, Cascade, exact_margins
from robustbench_lite.core.models import ABSTAIN
from robustbench_lite.core.results import Status
from robustbench_lite.core.threats import Lp
from robustbench_lite.defenses import Wrapper

STAGES = (CROWNIBP(), CROWN(), AlphaCROWN())
FIELDS = ("status", "certified", "radius", "prediction", "margins")


def net_for(seed: int, steep: float = 1.0) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(36, 12), nn.ReLU(), nn.Linear(12, 3)
    )
    with torch.no_grad():
        for p in net.parameters():
            p *= 1 + steep
    return net.double()


def batch(net: nn.Module, count: int = 24) -> tuple[Tensor, Tensor]:
    x = torch.rand(count, 1, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return x, net(x).argmax(1)


def spread(norm: str, count: int = 24) -> Lp:
    """A threat with an eps of its own for each sample, from far too small to far too large."""
    most = {"linf": 0.25, "l2": 1.2, "l1": 4.0, "l0": 4.0}[norm]
    eps = torch.linspace(0.02, 1, count, dtype=torch.float64) * most
    return Lp(norm, eps.round() if norm == "l0" else eps)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1", "l0"])
@pytest.mark.parametrize("seed", range(3))
def test_it_proves_what_any_stage_proves(seed, norm):
    net = net_for(seed)
    x, y = batch(net)
    threat = spread(norm)
    union = torch.zeros(len(x), dtype=torch.bool)
    for stage in (*STAGES, *([IBP()] if norm != "l0" else [])):
        found = stage(net, x, y, threat)
        union |= found.certified
    certificate = Cascade()(net, x, y, threat)
    assert (certificate.certified >= union).all()
    assert certificate.certified.any() and not certificate.certified.all()
    if norm == "linf":  # never more than is true
        C = torch.eye(3, dtype=torch.float64)[y][:, None] - torch.eye(3, dtype=torch.float64)
        for i in range(0, len(x), 12):
            exact = exact_margins(net, x[i : i + 1], threat.take(torch.tensor([i])), C[i])[1][0]
            others = torch.arange(3) != y[i]
            assert (certificate.margins[i][others] <= exact[others] + 1e-6).all()


def test_the_proven_and_the_falsified_cost_nothing_further(monkeypatch):
    net = net_for(0)
    x, y = batch(net)
    seen: list[int] = []
    least = Cascade.least

    def counted(self, graph, model, region, C):
        seen.append(len(C))
        return least(self, graph, model, region, C)

    monkeypatch.setattr(Cascade, "least", counted)
    threat = spread("linf")
    proven = int(IBP()(net, x, y, threat).certified.sum())
    felled = int(Cascade(falsifier=PGD(steps=10))(net, x, y, threat).status.eq(int(Status.FALSIFIED)).sum())
    assert proven > 0 and felled > 0
    assert seen == [len(x) - proven - felled]


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_counterexamples_are_witnesses(norm):
    net = net_for(1)
    x, y = batch(net)
    threat = spread(norm)
    certificate = Cascade(falsifier=PGD(steps=20))(net, x, y, threat)
    fallen = certificate.status == int(Status.FALSIFIED)
    assert fallen.any() and certificate.certified.any()
    points = certificate.counterexample[fallen]
    assert threat.take(fallen.nonzero().flatten()).contains(points, x[fallen]).all()
    assert (net(points).argmax(1) != certificate.prediction[fallen]).all()
    assert not certificate.certified[fallen].any() and not certificate.radius[fallen].any()
    without = Cascade()(net, x, y, threat)
    assert torch.equal(without.certified, certificate.certified)
    assert not without.certified[fallen].any()  # a proof beside a counterexample would be a contradiction


@pytest.mark.parametrize("falsifier", [None, PGD(steps=5)])
@pytest.mark.parametrize("size", [1, 5, 7])
def test_batch_sizes_and_order_change_nothing(size, falsifier):
    net = net_for(2)
    x, y = batch(net)
    y[3] = (y[3] + 1) % 3
    threat, turn = spread("linf"), torch.arange(23, -1, -1)
    whole = Cascade(falsifier=falsifier)(net, x, y, threat)
    cut = Cascade(falsifier=falsifier)(net, x, y, threat, batch_size=size)
    turned = Cascade(falsifier=falsifier)(net, x[turn], y[turn], threat.take(turn), indices=turn, batch_size=size)
    for name in FIELDS:
        near = {"rtol": 0, "atol": 1e-3 if name == "margins" else 0}  # at kinks an ascent amplifies rounding
        torch.testing.assert_close(getattr(cut, name), getattr(whole, name), **near)
        torch.testing.assert_close(getattr(turned, name), getattr(whole, name)[turn], **near)
    if falsifier is not None:
        fallen = whole.status == int(Status.FALSIFIED)
        torch.testing.assert_close(cut.counterexample[fallen], whole.counterexample[fallen])
        torch.testing.assert_close(turned.counterexample[fallen[turn]], whole.counterexample[turn][fallen[turn]])


def test_a_falsifier_that_does_not_know_the_norm_is_left_out():
    net = net_for(0)
    x, y = batch(net)
    certificate = Cascade(falsifier=PGD(steps=2))(net, x, y, spread("l0"))
    assert not certificate.status.eq(int(Status.FALSIFIED)).any()


@pytest.mark.parametrize("certifier", [*STAGES, Cascade(), Cascade(falsifier=PGD(steps=3))])
def test_wrong_predictions_are_verified_but_never_certified(certifier):
    net = net_for(3)
    x, prediction = batch(net, 6)
    y = prediction.clone()
    y[:3] = (y[:3] + 1) % 3
    certificate = certifier(net, x, y, Lp("linf", 1e-3))
    assert certificate.status.tolist() == [int(Status.VERIFIED)] * 6
    assert certificate.certified.tolist() == [False] * 3 + [True] * 3
    assert (certificate.margins[range(3), prediction[:3]] < 0).all()


class Deciding(Wrapper):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def predict(self, x: Tensor) -> Tensor:
        return torch.where(x[:, 0, 0, 0] < 0.5, ABSTAIN, super().predict(x))


class Noisy(nn.Module):
    stochastic = True

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + 0.01 * torch.randn_like(x))


@pytest.mark.parametrize("certifier", [*STAGES, Cascade(), Cascade(falsifier=PGD(steps=3))])
def test_models_that_decide_by_themselves_and_noisy_ones(certifier):
    net = net_for(4)
    x, y = batch(net, 6)
    certificate = certifier(Deciding(net), x, y, Lp("linf", 1e-3))
    abstained = x[:, 0, 0, 0] < 0.5
    assert abstained.any() and not abstained.all()
    expected = torch.where(abstained, int(Status.ABSTAINED), int(Status.UNKNOWN))
    assert certificate.status.tolist() == expected.tolist()
    assert not certificate.certified.any() and certificate.margins is None
    with pytest.raises(ValueError, match="stochastic"):
        certifier(Noisy(net), x, y, Lp("linf", 1e-3))


@pytest.mark.parametrize("norm", ["linf", "l2", "l1", "l0"])
@pytest.mark.parametrize("certifier", [CROWN(), Cascade()])
def test_radii_are_certified_themselves(certifier, norm, threat_points):
    net = net_for(5)
    x, y = batch(net, 5)
    radius = certifier.radius(net, x, y, norm, tolerance=1e-2)
    assert (radius > 0).any()
    rows = (radius > 0).nonzero().flatten()
    assert certifier(net, x[rows], y[rows], Lp(norm, radius[rows])).certified.all()
    generator = torch.Generator().manual_seed(0)
    for i in rows.tolist():
        tried = threat_points(x[i], norm, float(radius[i]), 500, generator)
        assert (net(tried).argmax(1) == y[i]).all()
    larger = certifier(net, x, y, Lp(norm, radius + (1.0 if norm == "l0" else 0.02)))
    assert not larger.certified.all()


def test_tighter_methods_have_no_smaller_radii():
    net = net_for(6)
    x, y = batch(net, 5)
    radii = [method.radius(net, x, y, "linf", tolerance=1e-3) for method in (IBP(), CROWN(), AlphaCROWN())]
    assert (radii[1] >= radii[0] - 1e-3).all() and (radii[2] >= radii[1] - 1e-3).all()
    assert (radii[1] > radii[0] + 1e-2).any()


@pytest.mark.parametrize("seed", range(4))
def test_no_certified_sample_falls(seed):
    net = net_for(seed, steep=2.0)
    x, y = batch(net)
    for norm in ("linf", "l2", "l1"):
        threat = spread(norm)
        certified = Cascade()(net, x, y, threat).certified
        attacked = PGD(steps=50, restarts=2)(net, x, y, threat)
        assert not (certified & attacked.success).any()
