"""The contract of every attack (DESIGN 4.3), run on every config of conf/attack: a new attack inherits it.

Models of other kinds are in `test_contract_models.py`; what calls promise whatever the attack is, in `test_calls.py`.
"""

from __future__ import annotations

import dataclasses
import inspect
import random

import numpy as np
import pytest
import torch
from torch import nn

from robustbench_lite import attacks
from robustbench_lite.attacks import Attack, FixedPerturbation, NoiseAveraged, Transfer
from robustbench_lite.core.goals import Targeted
from robustbench_lite.core.models import predict
from robustbench_lite.core.threats import Lp
from robustbench_lite.core.weighted import WeightedLp
from tests.attacks.contract_cases import (
    CONFIGS,
    NAMES,
    THREATS,
    every_case,
    generator,
    load,
    points_of,
    spy,
    tensors,
    true_labels,
)


@pytest.fixture
def y():
    return true_labels()


def test_every_config_is_an_attack_that_supports_something():
    assert len(CONFIGS) >= 4
    for config in CONFIGS:
        assert isinstance(load(config), Attack)
        assert any(load(config).supports(threat) for threat in THREATS), config.stem


def test_every_attack_has_a_config():
    """But for those that take what a config cannot give: perturbations fitted before."""
    kinds = [kind for name, kind in vars(attacks).items() if isinstance(kind, type) and not name.startswith("_")]
    public = {kind for kind in kinds if issubclass(kind, Attack) and not inspect.isabstract(kind)}
    configured = {type(load(config)) for config in CONFIGS}
    assert public - configured == {FixedPerturbation}


@every_case
def test_success_is_feasible_and_holds_on_a_fresh_forward_pass(case, net, images, y):
    result, point = case.first, points_of(case.first)
    assert case.threat.contains(point, images).all()
    assert result.x_adv.isfinite().all()
    assert result.x_adv.shape == images.shape
    if result.parameters is not None:
        assert torch.equal(case.threat.apply(images, result.parameters), result.x_adv)
    assert torch.equal(predict(net.eval(), result.x_adv) != y, result.success)
    distance = case.threat.distance(point, images)
    assert torch.equal(result.distance, torch.where(result.success, distance, torch.inf))
    assert torch.equal(result.first_success >= 0, result.success)
    assert (result.first_success <= result.forwards).all()


@every_case
def test_a_search_that_never_stops_falls_where_one_that_stops_does(case, net, images, y):
    """Until a sample falls the two are the same search; what comes later is judged and paid for alike."""
    rows, passes = slice(0, 3 if case.foolbox else 6), {}
    spy(net, passes)
    run = {"max_queries": case.queries, "indices": NAMES[rows], "generator": generator()}
    result = case.attack(net, images[rows], y[rows], case.threat, stop="never", **run)
    assert passes == {"forwards": result.forwards.sum(), "backwards": result.backwards.sum()}
    assert result.forwards.max() <= case.queries
    assert result.x_adv.isfinite().all()
    assert case.threat.contains(points_of(result), images[rows]).all()
    assert torch.equal(predict(net.eval(), result.x_adv) != y[rows], result.success)
    assert torch.equal(result.first_success, case.first.first_success[rows])
    assert torch.equal(result.success, case.first.success[rows])


class Breaking(nn.Module):
    """The net near the clean images; farther than 0.1 from them its largest logit is NaN, which argmax still names."""

    def __init__(self, net, clean):
        super().__init__()
        self.net, self.clean = net, clean.flatten(1)

    def forward(self, x):
        away = torch.cdist(x.flatten(1).detach(), self.clean).amin(dim=1, keepdim=True) > 0.1
        logits = self.net(x)
        return logits.masked_fill(away & (logits == logits.amax(dim=1, keepdim=True)), torch.nan)


@every_case
def test_a_model_that_breaks_on_the_way_has_fallen(case, net, images, y):
    """A NaN among the logits is a wrong answer wherever a search meets it."""
    model, rows, passes = Breaking(net, images), slice(1, 4), {}
    spy(model, passes)
    result = case.attack(model, images[rows], y[rows], case.threat, max_queries=case.queries, generator=generator())
    assert passes == {"forwards": result.forwards.sum(), "backwards": result.backwards.sum()}
    assert result.forwards.max() <= case.queries
    assert result.x_adv.isfinite().all()
    assert case.threat.contains(points_of(result), images[rows]).all()
    logits = model.eval()(result.x_adv)
    assert torch.equal(logits.isnan().any(dim=1) | (logits.argmax(dim=1) != y[rows]), result.success)
    blind = getattr(case.attack, "estimator", None) == NoiseAveraged()  # its copies are all far away: no slope
    assert result.success.all() or blind or case.foolbox


@every_case
def test_a_sample_wrong_at_the_start_costs_one_forward_pass(case, images):
    result = case.first
    assert result.success[0]
    assert result.distance[0] == 0
    assert torch.allclose(result.x_adv[0], images[0], atol=1e-12)
    assert (result.forwards[0], result.backwards[0], result.first_success[0]) == (1, 0, 1)


@every_case
def test_passes_are_what_a_spy_counts_and_the_budget_is_kept(case):
    result = case.first
    assert case.passes == {"forwards": result.forwards.sum(), "backwards": result.backwards.sum()}
    assert result.forwards.max() <= case.queries


@every_case
def test_a_batch_equals_its_samples_one_by_one(case, net, images, y):
    """The sample that spends most, the one that falls last, and one more; rounding grows over some 100 steps."""
    whole, rows = case.first, {int(case.first.forwards.argmax()), int(case.first.first_success.argmax()), 5}
    for i in rows:
        one, run = slice(i, i + 1), {"max_queries": case.queries, "generator": generator()}
        alone = case.attack(net, images[one], y[one], case.threat, indices=NAMES[one], **run)
        for key, value in tensors(alone).items():
            assert torch.allclose(value.double(), getattr(whole, key)[one].double(), atol=1e-6, rtol=0), key


class NamedArgmax(nn.Module):
    """The net with a `predict` that says it is the largest logit: one forward pass serves both."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.predict = lambda x: predict(net, x)
        self.predict.is_argmax = True

    def forward(self, x):
        return self.net(x)


@every_case
def test_one_seed_gives_one_answer(case, net, images, y):
    run = {"max_queries": case.queries, "indices": NAMES, "generator": generator()}
    second = case.attack(NamedArgmax(net), images, y, case.threat, **run)
    for key, value in tensors(case.first).items():
        assert torch.equal(value, getattr(second, key)), key


@every_case
@pytest.mark.parametrize("budget", [1, 2, 7])
def test_the_budget_is_never_exceeded(case, budget, net, images, y):
    result = case.attack(net, images[:4], y[:4], case.threat, max_queries=budget, generator=generator())
    assert result.forwards.max() <= budget


class Viewed(nn.Module):
    """Flattens as much code does, which takes contiguous images."""

    def forward(self, x):
        return x.view(x.size(0), -1)


@every_case
def test_the_model_and_the_global_randomness_are_left_alone(case):
    with torch.random.fork_rng():
        net = nn.Sequential(Viewed(), nn.Linear(60, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 3))
    net.double()[2].eval()
    net[1].weight.requires_grad_(False)
    for p in net[:3].parameters():  # the last layer has none
        p.grad = p.detach().clone()
    images = torch.rand(3, 3, 4, 5, dtype=torch.float64, generator=generator())
    state = {k: v.clone() for k, v in net.state_dict().items()}
    modes, flags = [m.training for m in net.modules()], [p.requires_grad for p in net.parameters()]
    gradients = [p.grad for p in net.parameters()]
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    case.attack(net, images, torch.tensor([0, 1, 2]), case.threat, max_queries=30, generator=generator())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    assert random.getstate() == before[2]
    assert modes == [m.training for m in net.modules()]
    assert flags == [p.requires_grad for p in net.parameters()]
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert all(p.grad is g for p, g in zip(net.parameters(), gradients, strict=True))
    assert all(torch.equal(p.grad, p) for p in net[:3].parameters())


@every_case
def test_targeted_goals_or_a_clear_refusal(case, net, images, y):
    images, target = images[:5], (y[:5] + 1) % 4
    run = {"max_queries": case.queries, "generator": generator()}
    try:
        result = case.attack(net, images, Targeted(target), case.threat, **run)
    except ValueError as error:
        assert "target" in str(error).lower()  # noqa: PT017
        return
    assert torch.equal(predict(net.eval(), result.x_adv) == target, result.success)


@every_case
def test_shapes_dtypes_and_bounds_of_all_kinds(case):
    threat = dataclasses.replace(case.threat, bounds=(-1.0, 2.0))
    x = torch.rand(4, 3, 5, 7, generator=generator()) * 3 - 1
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(60, 2))  # two classes, float32
    labels = predict(net, x)
    result = case.attack(net, x, labels, threat, max_queries=60, generator=generator())
    assert result.x_adv.dtype == torch.float32
    assert threat.contains(points_of(result), x).all()
    assert torch.equal(threat.apply(x, points_of(result)), result.x_adv)
    assert torch.equal(predict(net.eval(), result.x_adv) != labels, result.success)
    empty = case.attack(net, x[:0], labels[:0], threat)
    assert empty.x_adv.shape == (0, 3, 5, 7)
    assert empty.success.shape == (0,)


class InOtherUnits(nn.Module):
    """The net for images between -1 and 2."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net((x + 1) / 3)


@every_case
def test_images_in_other_units_fall_all_the_same(case, net, images, y):
    """What moves pixels does not see their values; deviations are in their units, as the floor is."""
    if isinstance(case.threat, Lp) or isinstance(case.attack, Transfer):
        pytest.skip("a size in the units of the images, or a surrogate that knows one unit")
    threat = dataclasses.replace(case.threat, bounds=(-1.0, 2.0))
    if isinstance(threat, WeightedLp):
        threat = dataclasses.replace(threat, floor=3 * case.threat.floor)
    run = {"max_queries": case.queries, "indices": NAMES, "generator": generator()}
    result = case.attack(InOtherUnits(net), 3 * images - 1, y, threat, **run)
    assert torch.equal(result.success, case.first.success)


@every_case
def test_a_budget_for_each_sample(case, net, images, y):
    """Twice the radius breaks as many; the same radius gives the same answer; a radius of 0 moves nothing."""
    if not isinstance(case.threat, Lp) or case.threat.eps is None:
        pytest.skip("one size only")
    radii = torch.full((12,), 2 * case.threat.eps, dtype=torch.float64)
    radii[1], radii[2] = 0, case.threat.eps
    threat = Lp(case.threat.norm, radii)
    result = case.attack(net, images, y, threat, max_queries=150, indices=NAMES, generator=generator())
    assert threat.contains(result.x_adv, images).all()
    assert torch.equal(result.x_adv[1], images[1])
    assert not result.success[1]
    if case.queries == 150:
        assert torch.allclose(result.x_adv[2], case.first.x_adv[2], atol=1e-9, rtol=0)
        assert result.forwards[2] == case.first.forwards[2]
    wider = radii > case.threat.eps
    assert result.success[wider].sum() >= case.first.success[wider].sum()
    assert result.success.sum() > 1 or case.one_way


@every_case
def test_twice_the_budget_breaks_as_many(case, net, images, y):
    """Whatever the size measures; with queries enough to search it all, and one sample for the luck of the draws."""
    if case.threat.size is None or isinstance(case.threat, Lp):
        pytest.skip("no size, or one for each sample: see above")
    half, whole = (
        case.attack(net, images, y, threat, max_queries=800, indices=NAMES, generator=generator()).success.sum()
        for threat in (case.threat.resized(case.threat.size / 2), case.threat)
    )
    assert whole >= half - 1


@every_case
def test_a_budget_of_nothing_moves_nothing(case, net, images, y):
    if case.threat.size is None:
        pytest.skip("no size")
    threat = case.threat.resized(0)
    result = case.attack(net, images[:2], y[:2], threat, max_queries=20, generator=generator())
    assert threat.contains(points_of(result), images[:2]).all()
    assert torch.allclose(result.x_adv, images[:2], atol=1e-12)
    assert result.success.tolist() == [True, False]
    assert result.forwards.max() <= 20


@every_case
def test_more_queries_never_hurt(case, net, images, y):
    """A budget cuts a search short and changes nothing before: what a small one breaks, a larger one breaks too."""
    if case.foolbox:
        pytest.skip("foolbox ends where the budget does; ours continue as they began")
    run = {"max_queries": 30, "indices": NAMES, "generator": generator()}
    few = case.attack(net, images, y, case.threat, **run).success
    assert (case.first.success | ~few).all()


@every_case
def test_more_restarts_never_hurt(case, net, images, y):
    attack = case.attack
    if not hasattr(attack, "restarts") or (hasattr(attack, "random_start") and not attack.random_start):
        pytest.skip("no restarts")
    short = {"steps": 10} if hasattr(attack, "steps") else {}
    one, three = (
        dataclasses.replace(attack, restarts=restarts, **short)(
            net, images[:5], y[:5], case.threat, max_queries=150, generator=generator()
        ).success
        for restarts in (1, 3)
    )
    assert (three | ~one).all()
