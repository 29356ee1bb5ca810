"""Cost-sensitive certificates against linear nets, whose margins over an linf ball have a closed form."""

from __future__ import annotations

import math

import pytest
import torch
from hydra.utils import instantiate
from torch import Tensor, nn

from robustbench_lite.certify import IBP, CostSensitive, Exact, cost_report, seed_class_costs, small_large_costs
from robustbench_lite.core.registry import load
from robustbench_lite.core.results import Status
from robustbench_lite.core.threats import Lp

WEIGHTS = torch.tensor([[2.0, 0.0], [0.0, 2.0], [-1.0, 1.0]])
BIAS = torch.tensor([0.0, 0.1, 0.4])
X = torch.tensor([[0.8, 0.3], [0.6, 0.4], [0.3, 0.7], [0.1, 0.4], [0.52, 0.5]]).reshape(5, 1, 1, 2)
EPS = 0.12


def net() -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 3))
    model[1].weight.data, model[1].bias.data = WEIGHTS.clone(), BIAS.clone()
    return model


def closed_form(y: Tensor) -> Tensor:
    """The least z_y - z_j over the ball, inside the image box."""
    rows = WEIGHTS[y].unsqueeze(1) - WEIGHTS
    z = X.flatten(1) @ WEIGHTS.T + BIAS
    return z.gather(1, y.unsqueeze(1)) - z - EPS * rows.abs().sum(2)


def labels() -> Tensor:
    return net()(X).argmax(1)


@pytest.mark.parametrize("inner", [IBP(), Exact(every_margin=True)], ids=str)
@pytest.mark.parametrize("costs", [small_large_costs(3), seed_class_costs(0, 3), ((0, 0, 2), (0, 0, 0), (1, 0, 0))])
def test_certified_is_every_protected_margin_in_closed_form(inner, costs):
    y, matrix = labels(), torch.tensor(costs)
    for label in (y, (y + 1) % 3):
        margins = closed_form(label)
        wanted = ((margins > 1e-6) | (matrix[label] == 0)).all(1) & (label == y)
        found = CostSensitive(inner, costs)(net(), X, label, Lp("linf", EPS))
        assert found.certified.tolist() == wanted.tolist()
        assert (found.status[wanted] == int(Status.VERIFIED)).all()
        assert (found.status[~wanted] != int(Status.VERIFIED)).all()
        assert found.radius.tolist() == [EPS if ok else 0.0 for ok in wanted]


def test_costs_of_nothing_and_of_everything():
    y, threat = labels(), Lp("linf", EPS)
    free = CostSensitive(IBP(), torch.zeros(3, 3))(net(), X, (y + torch.tensor([0, 0, 0, 0, 1])) % 3, threat)
    assert free.certified.tolist() == [True] * 4 + [False]  # a wrong prediction is never certified
    whole, plain = CostSensitive(IBP(), 1 - torch.eye(3))(net(), X, y, threat), IBP()(net(), X, y, threat)
    assert whole.certified.tolist() == plain.certified.tolist()
    assert 0 < plain.certified.sum() < 5
    assert torch.equal(whole.margins, plain.margins)


def test_a_counterexample_counts_where_its_label_costs():
    y, threat = labels(), Lp("linf", EPS)
    inner = Exact(every_margin=True)
    plain = inner(net(), X, y, threat)
    fallen = (plain.status == int(Status.FALSIFIED)).nonzero().flatten()
    assert len(fallen)
    for row in fallen.tolist():
        reached = int(net()(plain.counterexample[row : row + 1]).argmax())
        one = torch.zeros(3, 3)
        one[y[row], reached] = 1.0
        assert CostSensitive(inner, one)(net(), X, y, threat).status[row] == Status.FALSIFIED

    wide = Lp("linf", 0.5)
    plain = inner(net(), X, y, wide)
    row = int(((plain.margins < -1e-3).sum(1) == 2).nonzero()[0])
    reached = int(net()(plain.counterexample[row : row + 1]).argmax())
    other = 1 - torch.eye(3)
    other[y[row], reached] = 0.0  # what was shown costs nothing, and the other class is not proven
    assert CostSensitive(inner, other)(net(), X, y, wide).status[row] == Status.UNKNOWN


def test_report_counts_pairs_and_costs():
    y = torch.tensor([0, 0, 1, 2])
    inf = math.inf
    margins = torch.tensor([[inf, 1.0, -1.0], [inf, -1.0, -1.0], [-0.5, inf, 0.5], [math.nan, 0.0, inf]])
    report = cost_report(margins, y, [[0, 1, 4], [0, 0, 9], [0, 0, 0]])
    assert report.robust_cost == pytest.approx((4 + 5 + 0) / 3)  # class 2 costs nothing and does not count
    assert report.violated == pytest.approx(2 / 3)
    nan = math.nan
    expected = torch.tensor([[nan, 0.5, 1.0], [nan, nan, 0.0], [nan, nan, nan]], dtype=torch.float64)
    torch.testing.assert_close(report.protected, expected, equal_nan=True)
    expected = torch.tensor([[nan, nan, nan], [1.0, nan, nan], [1.0, 1.0, nan]], dtype=torch.float64)
    torch.testing.assert_close(report.unprotected, expected, equal_nan=True)
    absent = cost_report(margins[3:], y[3:], [[0, 1, 4], [0, 0, 9], [0, 0, 0]])
    assert math.isnan(absent.robust_cost)
    assert absent.protected.isnan().all()


def test_binary_cost_of_one_seed_class_is_what_is_not_certified_of_it():
    y = torch.zeros(5, dtype=torch.int64)
    certificate = CostSensitive(IBP(), seed_class_costs(0, 3))(net(), X, y, Lp("linf", EPS))
    report = cost_report(certificate.margins, y, seed_class_costs(0, 3))
    assert report.violated == pytest.approx(1 - certificate.certified.double().mean().item())
    open_pairs = (closed_form(y) <= 1e-6).double()[:, 1:]
    assert report.robust_cost == pytest.approx(open_pairs.sum(1).mean().item())
    assert report.protected[0, 1:].tolist() == pytest.approx(open_pairs.mean(0).tolist())


def test_configuration_builds_the_papers_task():
    built = instantiate(load("certifier", "cost_sensitive"))
    assert isinstance(built, CostSensitive)
    assert torch.tensor(built.cost_matrix).nonzero().tolist() == [[9, j] for j in range(9)]


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="square"):
        CostSensitive(IBP(), [[0.0, 1.0]])
    with pytest.raises(ValueError, match="diagonal"):
        CostSensitive(IBP(), torch.eye(3))
    with pytest.raises(ValueError, match=">= 0"):
        CostSensitive(IBP(), -1 + torch.eye(3))
    with pytest.raises(ValueError, match=r"shape \(5, 4\)"):
        CostSensitive(IBP(), seed_class_costs(0, 4))(net(), X, labels(), Lp("linf", 0.1))
    with pytest.raises(ValueError, match="does not support"):
        CostSensitive(IBP(), seed_class_costs(0, 3))(net(), X, labels(), Lp("l0", 1))
    with pytest.raises(ValueError, match="seed_class"):
        seed_class_costs(3, 3)

    class Guess(IBP):
        kind = "estimate"

    with pytest.raises(ValueError, match="is estimate"):
        CostSensitive(Guess(), seed_class_costs(0, 3))
