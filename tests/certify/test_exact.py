"""The exact certifier: its statuses against closed forms and exact minima, its counterexamples against the model."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robustbench_lite.attacks import PGD
from robustbench_lite.certify import CROWN, IBP, Exact, _milp, bounds, exact_margins
from robustbench_lite.certify.errors import UnsupportedOperator
from robustbench_lite.core.models import INVALID
from robustbench_lite.core.results import Status
from robustbench_lite.core.threats import Lp
from robustbench_lite.data import load_data
from robustbench_lite.zoo import load_defense

NORMS = {"linf": 0.12, "l1": 0.45, "l0": 2.0}


def random_net(seed: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        conv = nn.Conv2d(1, 3, 2), nn.ReLU(), nn.MaxPool2d(2, 1), nn.Flatten()
        net = nn.Sequential(*conv, nn.Linear(3, 5), nn.LeakyReLU(0.1), nn.Linear(5, 3))
        for layer in net:
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                nn.init.normal_(layer.weight)
    return net.to(dtype).eval()


def pictures(count: int = 6) -> Tensor:
    return torch.rand(count, 1, 3, 3, generator=torch.Generator().manual_seed(2))


def halfspace() -> tuple[nn.Module, Tensor]:
    """Two classes in 9 dimensions, w and an image whose margin is w x + b = 1."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(9, 2)).double()
    w = torch.tensor([0.9, -0.8, 0.7, -0.5, 0.4, 0.3, -0.2, 0.1, 0.05], dtype=torch.float64)
    net[1].weight.data = torch.stack([torch.zeros(9, dtype=torch.float64), w])
    net[1].bias.data = torch.tensor([0.0, 1.0 - 0.5 * w.sum()], dtype=torch.float64)
    return net, w


@pytest.mark.parametrize(
    ("norm", "radius"), [("linf", 1 / 3.95), ("l1", 0.5 + 0.5 + (1 - 0.85) / 0.7), ("l0", 3)]
)  # l1: two coordinates to the end of the box, part of a third; l0: 2 take away .85, 3 take away 1.2
def test_halfspace_is_decided_on_both_sides_of_its_radius(norm, radius):
    net, _ = halfspace()
    x, y = torch.full((1, 1, 3, 3), 0.5, dtype=torch.float64), torch.tensor([1])
    inside, outside = (radius - 1, radius) if norm == "l0" else (radius - 1e-4, radius + 1e-4)
    found = Exact()(net, x, y, Lp(norm, inside))
    assert found.status.item() == Status.VERIFIED
    assert found.radius.item() == inside
    found = Exact()(net, x, y, Lp(norm, outside))
    assert found.status.item() == Status.FALSIFIED
    assert found.radius.item() == 0
    assert not found.certified.item()
    assert net(found.counterexample).argmax(1).item() == 0


@pytest.mark.parametrize(("norm", "seeds"), [("linf", (2, 4)), ("l1", (4,)), ("l0", (5,))])
def test_statuses_are_the_signs_of_the_exact_minima(norm, seeds):
    statuses = set()
    for seed in seeds:
        net, x, threat = random_net(seed), pictures(4), Lp(norm, NORMS[norm])
        y = net(x).argmax(1)
        found = Exact()(net, x, y, threat)
        unit = torch.eye(3)
        least, most = exact_margins(net, x, threat, unit[y].unsqueeze(1) - unit)
        others = unit[y] == 0
        assert (found.margins[others] <= most[others] + 1e-6).all()
        least, most = least.masked_fill(~others, math.inf).amin(1), most.masked_fill(~others, math.inf).amin(1)
        assert (found.status[least > 1e-4] == int(Status.VERIFIED)).all()
        assert (found.status[most < -1e-4] == int(Status.FALSIFIED)).all()
        fallen = found.status == int(Status.FALSIFIED)
        assert (net(found.counterexample).argmax(1)[fallen] != y[fallen]).all()
        assert threat.contains(found.counterexample, x).all()
        assert torch.equal(found.counterexample[~fallen], x[~fallen])
        assert torch.equal(found.certified, found.status == int(Status.VERIFIED))
        statuses |= set(found.status.tolist())
    assert statuses >= {int(Status.VERIFIED), int(Status.FALSIFIED)}


@pytest.mark.parametrize("norm", NORMS)
def test_what_cheaper_bounds_prove_is_proven(norm):
    for seed in range(3):
        net, x, threat = random_net(seed), pictures(4), Lp(norm, NORMS[norm] / 3 if norm != "l0" else 1)
        y = net(x).argmax(1)
        found = Exact()(net, x, y, threat)
        for certifier in (IBP(), CROWN()):
            if certifier.supports(threat):
                assert (found.certified | ~certifier(net, x, y, threat).certified).all()


def test_time_that_runs_out_is_a_status_of_its_own():
    threat = Lp("linf", 0.25)
    late_ones = 0
    for seed in range(4):
        net, x = random_net(seed), pictures()
        y = net(x).argmax(1)
        whole, found = Exact()(net, x, y, threat), Exact(time_limit=1e-9)(net, x, y, threat)
        late = found.status == int(Status.TIMEOUT)
        assert (late | (found.status == int(Status.VERIFIED))).all()  # no solver ran: nothing is falsified
        assert not (found.certified & (late | ~whole.certified)).any()
        assert not found.radius[late].any()
        assert not (late & IBP()(net, x, y, threat).certified).any()  # bounds that need no solver count
        late_ones += int(late.sum())
    assert late_ones


@pytest.mark.parametrize(("bound", "status"), [(5.0, Status.VERIFIED), (-5.0, Status.TIMEOUT)])
def test_a_bound_that_proves_counts_although_time_ran_out(monkeypatch, bound, status):
    monkeypatch.setattr(
        _milp, "_solve", lambda *arguments: SimpleNamespace(status=1, x=None, fun=None, mip_dual_bound=bound)
    )
    asked = 0
    for seed in range(4):
        net, x = random_net(seed), pictures()
        y = net(x).argmax(1)
        late = Exact(time_limit=1e-9)(net, x, y, Lp("linf", 0.25)).status == int(Status.TIMEOUT)
        found = Exact()(net, x, y, Lp("linf", 0.25))
        assert (found.status[late & (found.margins.abs() < 1e3).any(1)] == int(status)).all()
        asked += int(late.sum())
    assert asked


def test_a_solver_without_an_answer_proves_nothing(monkeypatch):
    for state in (1, 3, 4):  # time limit, unbounded, other
        answer = SimpleNamespace(status=state, x=None, fun=None, mip_dual_bound=None)
        monkeypatch.setattr(_milp, "_solve", lambda *arguments, answer=answer: answer)
        programme = _milp.Programme()
        found = programme.minimise(programme.variables(np.zeros(1), np.ones(1)), ceiling=1.0)
        assert found.lower == -math.inf
        assert found.finished == (state != 1)


def test_margins_of_a_wrong_prediction_are_about_the_true_label():
    net, x, threat = random_net(0), pictures(), Lp("linf", 0.02)
    prediction = net(x).argmax(1)
    y = (prediction + 1) % 3
    found = Exact()(net, x, y, threat)
    right = Exact()(net, x, prediction, threat)
    assert torch.equal(found.status, right.status)
    assert not found.certified.any()
    clean = net(x).double()
    gaps = clean.gather(1, y.unsqueeze(1)) - clean
    assert (found.margins <= gaps.masked_fill(gaps == 0, math.inf) + 1e-5).all()
    assert found.margins.isposinf().nonzero()[:, 1].tolist() == y.tolist()


def test_a_falsifier_comes_first_and_every_margin_goes_on():
    threat, unit, unasked = Lp("linf", 0.25), torch.eye(3), 0
    for seed in (4, 7):
        net, x = random_net(seed), pictures(4)
        y = net(x).argmax(1)
        plain, quick = Exact()(net, x, y, threat), Exact(falsifier=PGD(steps=20))(net, x, y, threat)
        whole = Exact(every_margin=True, falsifier=PGD(steps=20))(net, x, y, threat)
        assert torch.equal(plain.status, quick.status)
        assert torch.equal(plain.status, whole.status)
        fallen = plain.status == int(Status.FALSIFIED)
        reached = net(quick.counterexample).argmax(1)
        assert (reached[fallen] != y[fallen]).all()
        assert (quick.margins.gather(1, reached.unsqueeze(1))[fallen] <= 0).all()
        least, _ = exact_margins(net, x, threat, unit[y].unsqueeze(1) - unit)
        sure = (least > 1e-4) & (unit[y] == 0) & fallen.unsqueeze(1)
        assert (whole.margins[sure] > 1e-6).all()
        unasked += int((quick.margins[sure] <= 1e-6).sum())
    assert unasked  # what the falsifier's success left open


def test_batches_and_models_that_decide_by_themselves():
    net, x, threat = random_net(2), pictures(), Lp("l1", 0.3)
    y = net(x).argmax(1)
    whole, cut = Exact()(net, x, y, threat), Exact()(net, x, y, threat, batch_size=4)
    assert torch.equal(whole.status, cut.status)
    torch.testing.assert_close(whole.margins, cut.margins)

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def predict(self, x: Tensor) -> Tensor:
            return self.net(x).argmin(1)

    found = Exact()(Own(), x, y, threat)
    assert found.margins is None
    assert (found.status == int(Status.UNKNOWN)).all()


def test_a_model_without_finite_logits_is_unknown():
    net, x = random_net(0), pictures(2)
    net[4].weight.data[0, 0] = torch.inf
    found = Exact()(net, x, torch.zeros(2, dtype=torch.int64), Lp("linf", 0.1))
    assert found.prediction.tolist() == [INVALID] * 2
    assert found.status.tolist() == [Status.UNKNOWN] * 2


def test_a_tie_is_neither_proven_nor_falsified():
    net, _ = halfspace()
    net[1].weight.data[1] = 0.0
    net[1].bias.data[:] = 0.0  # the first of equal logits wins: no image changes the label, no margin is positive
    x = torch.full((1, 1, 3, 3), 0.5, dtype=torch.float64)
    assert Exact()(net, x, torch.tensor([0]), Lp("linf", 0.1)).status.item() == Status.UNKNOWN


@pytest.mark.parametrize("name", ["digits/ibp", "digits/pgd_at"])
def test_zoo_nets_agree_with_bounds_and_attacks(name):
    data, net = load_data("digits"), load_defense(name)
    x, y = data.images[:6], data.labels[:6]
    for eps in (0.03, 0.3 if name == "digits/pgd_at" else 0.15):
        threat = Lp("linf", eps)
        found = Exact(time_limit=1.0, falsifier=PGD(steps=20, loss="margin"))(net, x, y, threat)
        right = found.prediction == y
        assert (found.certified | ~IBP()(net, x, y, threat).certified).all()
        broken = PGD(steps=20, loss="margin")(net, x, y, threat).success
        assert (found.status[broken & right] == int(Status.FALSIFIED)).all()
        assert not (found.certified & broken).any()
        if eps == 0.03:
            assert found.certified.sum() >= 5
    assert (found.status == int(Status.FALSIFIED)).any() or name == "digits/ibp"


def test_what_it_refuses():
    net, x = random_net(0), pictures(2)
    y = net(x).argmax(1)
    assert not Exact().supports(Lp("l2", 0.1))
    with pytest.raises(ValueError, match=r"norm linf, l1, l0.*take IBP, CROWN or AlphaCROWN"):
        Exact()(net, x, y, Lp("l2", 0.1))
    with pytest.raises(ValueError, match="time_limit"):
        Exact(time_limit=0)
    with pytest.raises(ValueError, match="tolerance"):
        Exact(tolerance=-1)
    with pytest.raises(UnsupportedOperator, match="gelu has no exact encoding"):
        Exact()(nn.Sequential(nn.Flatten(), nn.Linear(9, 4), nn.GELU(), nn.Linear(4, 3)), x, y, Lp("linf", 0.1))


def test_lower_margins_are_below_every_point():
    net, x = random_net(4, torch.float64), pictures().double()
    threat, C = Lp("linf", 0.15), torch.eye(3, dtype=torch.float64).expand(6, 3, 3)
    lower = Exact().lower_margins(net, x, threat, C)
    noise = torch.from_numpy(np.random.default_rng(0).uniform(-0.15, 0.15, (500, *x.shape)))
    values = torch.stack([net((x + part).clamp(0, 1)) for part in noise]).detach()
    assert (lower <= values.amin(0) + 1e-9).all()
    assert (lower >= bounds(net, threat, C=C, x=x)[0] - 1e-6).all()


def test_values_beyond_the_solvers_tolerances_prove_nothing() -> None:
    """With activations of 1e16 HiGHS calls feasible programmes infeasible: 52 of 136 nets were verified falsely."""
    for seed in range(6):
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Flatten(), nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2, bias=False)
        ).double()
        with torch.no_grad():
            for place, factor in ((1, 1e8), (3, 1e8), (5, 1e-16)):
                net[place].weight.mul_(factor)
            net[1].bias.mul_(1e8)
            net[3].bias.mul_(1e16)
        x = torch.rand(1, 1, 1, 2, dtype=torch.float64)
        found = Exact(time_limit=2)(net, x, net(x).argmax(1), Lp("linf", 0.5))
        assert found.status.item() != Status.VERIFIED
