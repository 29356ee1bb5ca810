"""The contract of every attack (DESIGN 4.3), run on every config of conf/attack: a new attack inherits it."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn

from robustbench_lite.attacks import PGD, Attack, FoolboxAttack, IterativeAttack
from robustbench_lite.core.goals import Targeted
from robustbench_lite.core.models import predict
from robustbench_lite.core.spatial import Deformation, RotationTranslation
from robustbench_lite.core.threats import Lp
from robustbench_lite.core.weighted import WeightedLp

CONFIGS = sorted((Path(__file__).parents[2] / "conf" / "attack").glob("*.yaml"))
THREATS = [
    Lp("linf", 0.15),
    Lp("l2", 0.8),
    Lp("l1", 2.5),
    Lp("l0", 4),
    RotationTranslation(),
    Deformation(1.5),
    Lp("l2", None),
    Lp("linf", None),
    WeightedLp("l1", 12.0),
]


def queries(attack: Attack) -> int:
    """Enough for each search to find something. Foolbox runs sample by sample, some 1.5 ms a query."""
    return 40 if isinstance(attack, FoolboxAttack) else 150


def load(config: Path) -> Attack:
    return instantiate(OmegaConf.load(config))


# Baselines that try one direction or one filter: they find what lies there, and need not find anything. In any norm.
ONE_WAY = {"LinearSearchBlendedUniformNoiseAttack", "LinearSearchContrastReductionAttack", "GaussianBlurAttack"}


def is_one_way(attack: Attack) -> bool:
    return isinstance(attack, FoolboxAttack) and attack.name in ONE_WAY


CASES = [
    pytest.param(attack, threat, id=f"{config.stem}-{threat.name}{'' if threat.size else '-minimum'}")
    for config in CONFIGS
    for attack in [load(config)]
    for threat in THREATS
    if attack.supports(threat)
    # One attack on the iterative core shows for all that the core searches weighted balls.
    if not (isinstance(threat, WeightedLp) and isinstance(attack, IterativeAttack) and type(attack) is not PGD)
    if not (is_one_way(attack) and threat.name != "l2")
]
every_case = pytest.mark.parametrize(("attack", "threat"), CASES)


def tensors(result):
    return {k: v for k, v in vars(result).items() if v is not None}


def generator(seed=3):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def y(net, images):
    """True labels, one of them not the model's answer."""
    labels = predict(net, images)
    labels[0] = (labels[0] + 1) % 4
    return labels


def test_every_config_is_an_attack_that_supports_something():
    assert len(CONFIGS) >= 4
    for config in CONFIGS:
        assert isinstance(load(config), Attack)
        assert any(load(config).supports(threat) for threat in THREATS), config.stem


@every_case
def test_success_is_feasible_and_holds_on_a_fresh_forward_pass(attack, threat, net, images, y):
    result = attack(net, images, y, threat, max_queries=queries(attack), generator=generator())
    point = result.x_adv if result.parameters is None else result.parameters
    assert threat.contains(point, images).all()
    assert result.x_adv.isfinite().all()
    assert result.x_adv.shape == images.shape
    if result.parameters is not None:
        assert torch.equal(threat.apply(images, result.parameters), result.x_adv)
    assert torch.equal(predict(net.eval(), result.x_adv) != y, result.success)
    distance = threat.distance(point, images)
    assert torch.equal(result.distance, torch.where(result.success, distance, torch.inf))
    assert torch.equal(result.first_success >= 0, result.success)
    assert (result.first_success <= result.forwards).all()


@every_case
def test_a_sample_wrong_at_the_start_costs_one_forward_pass(attack, threat, net, images, y):
    result = attack(net, images, y, threat, max_queries=queries(attack), generator=generator())
    assert result.success[0]
    assert result.distance[0] == 0
    assert torch.allclose(result.x_adv[0], images[0], atol=1e-12)
    assert (result.forwards[0], result.backwards[0], result.first_success[0]) == (1, 0, 1)


@every_case
def test_a_batch_equals_its_samples_one_by_one(attack, threat, net, images, y):
    part = slice(0, 5)
    names = torch.arange(40, 45)
    run = {"max_queries": queries(attack)}
    whole = attack(net, images[part], y[part], threat, indices=names, generator=generator(), **run)
    for i in range(5):
        one = slice(i, i + 1)
        alone = attack(net, images[one], y[one], threat, indices=names[one], generator=generator(), **run)
        for key, value in tensors(alone).items():
            expected = getattr(whole, key)[one]
            assert torch.allclose(value.double(), expected.double(), atol=1e-9, rtol=0), key


@every_case
def test_one_seed_gives_one_answer(attack, threat, net, images, y):
    first, second = (
        attack(net, images, y, threat, max_queries=queries(attack), generator=generator()) for _ in range(2)
    )
    for key, value in tensors(first).items():
        assert torch.equal(value, getattr(second, key)), key


@every_case
def test_passes_are_what_a_spy_counts(attack, threat, net, images, y):
    seen = {"forwards": 0, "backwards": 0}

    def forward(_, args, logits):
        seen["forwards"] += len(logits)
        if logits.requires_grad:
            logits.register_hook(lambda grad: seen.__setitem__("backwards", seen["backwards"] + len(grad)))

    net.register_forward_hook(forward)
    result = attack(net, images, y, threat, max_queries=queries(attack), generator=generator())
    assert seen == {"forwards": result.forwards.sum().item(), "backwards": result.backwards.sum().item()}


@every_case
@pytest.mark.parametrize("budget", [1, 2, 7])
def test_the_budget_is_never_exceeded(attack, threat, budget, net, images, y):
    result = attack(net, images, y, threat, max_queries=budget, generator=generator())
    assert result.forwards.max() <= budget


@every_case
def test_the_model_and_the_global_randomness_are_left_alone(attack, threat, images):
    with torch.random.fork_rng():
        net = nn.Sequential(
            nn.Flatten(), nn.Linear(36, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 3)
        ).double()
    net[2].eval()
    net[1].weight.requires_grad_(False)
    state = {k: v.clone() for k, v in net.state_dict().items()}
    modes, flags = [m.training for m in net.modules()], [p.requires_grad for p in net.parameters()]
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    attack(net, images[:3], torch.tensor([0, 1, 2]), threat, max_queries=20, generator=generator())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    assert random.getstate() == before[2]
    assert modes == [m.training for m in net.modules()]
    assert flags == [p.requires_grad for p in net.parameters()]
    assert all(p.grad is None for p in net.parameters())
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())


@every_case
def test_targeted_goals_or_a_clear_refusal(attack, threat, net, images, y):
    target = (y + 1) % 4
    try:
        result = attack(net, images, Targeted(target), threat, max_queries=queries(attack), generator=generator())
    except ValueError as error:
        assert "target" in str(error).lower()  # noqa: PT017
        return
    assert torch.equal(predict(net.eval(), result.x_adv) == target, result.success)


@every_case
def test_a_constant_model_does_not_fall(attack, threat, images):
    def constant(x):
        return torch.zeros(len(x), 3).to(x) + x.flatten(1).sum(dim=1, keepdim=True) * 0

    labels = torch.zeros(len(images), dtype=torch.int64)
    result = attack(constant, images, labels, threat, max_queries=20)
    assert not result.success.any()
    assert threat.contains(result.x_adv if result.parameters is None else result.parameters, images).all()


@every_case
def test_non_finite_logits_are_the_models_error(attack, threat, images):
    def broken(x):
        return torch.full((len(x), 3), float("nan")).to(x) + x.flatten(1).sum(dim=1, keepdim=True) * 0

    result = attack(broken, images, torch.zeros(len(images), dtype=torch.int64), threat)
    assert result.success.all()
    assert (result.distance == 0).all()
    assert (result.forwards == 1).all()


@every_case
def test_shapes_dtypes_and_bounds_of_all_kinds(attack, threat):
    if isinstance(threat, Lp):
        threat = Lp(threat.norm, threat.eps, bounds=(-1.0, 2.0))
    x = torch.rand(4, 3, 5, 7, generator=generator()) * 3 - 1
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(60, 2))  # two classes, float32
    if not isinstance(threat, Lp):
        x = x.clamp(0, 1)
    labels = predict(net, x)
    result = attack(net, x, labels, threat, max_queries=60, generator=generator())
    assert result.x_adv.dtype == torch.float32
    point = result.x_adv if result.parameters is None else result.parameters
    assert threat.contains(point, x).all()
    empty = attack(net, x[:0], labels[:0], threat)
    assert empty.x_adv.shape == (0, 3, 5, 7)
    assert empty.success.shape == (0,)


@every_case
def test_a_bigger_budget_of_the_threat_never_hurts(attack, threat, net, images, y):
    if not isinstance(threat, Lp) or threat.eps is None:
        pytest.skip("one size only")
    small, large = (
        attack(net, images, y, Lp(threat.norm, eps), max_queries=150, generator=generator()).success.sum()
        for eps in (threat.eps / 4, threat.eps * 2)
    )
    assert large >= small
    assert large > 1 or is_one_way(attack)


@every_case
def test_more_queries_never_hurt(attack, threat, net, images, y):
    """A budget cuts a search short and changes nothing before: what a small one breaks, a larger one breaks too."""
    if isinstance(attack, FoolboxAttack):
        pytest.skip("foolbox ends where the budget does; ours continue as they began")
    few, many = (
        attack(net, images, y, threat, max_queries=budget, generator=generator()).success for budget in (30, 150)
    )
    assert (many | ~few).all()


@every_case
def test_more_restarts_never_hurt(attack, threat, net, images, y):
    if not hasattr(attack, "restarts") or (hasattr(attack, "random_start") and not attack.random_start):
        pytest.skip("no restarts")
    budget = 100 if isinstance(attack, FoolboxAttack) else 300
    one, three = (
        dataclasses.replace(attack, restarts=restarts)(
            net, images, y, threat, max_queries=budget, generator=generator()
        ).success
        for restarts in (1, 3)
    )
    assert (three | ~one).all()


@pytest.mark.parametrize("loss", ["ce", "margin", "dlr"])
@pytest.mark.parametrize("targeted", [False, True])
def test_stop_never_moves_every_sample(loss, targeted, net, images):
    """The clean input is no candidate: its loss is another one than the attack's."""
    from robustbench_lite.attacks import PGD

    y = predict(net, images)
    goal = Targeted((y + 1) % 4) if targeted else y
    result = PGD(steps=5, loss=loss)(net, images, goal, Lp("linf", 0.05), stop="never")
    assert ((result.x_adv != images).flatten(1).any(dim=1)).all()


class Wrapped(nn.Module):
    """A defense whose own predict decides; the counterpart of a plain net."""

    def __init__(self, net, argmax):
        super().__init__()
        self.net, self.asked = net, 0
        if argmax:
            self.predict = lambda x: predict(net, x)
            self.predict.is_argmax = True

    def forward(self, x):
        self.asked += len(x)
        return self.net(x)

    def predict(self, x):
        self.asked += len(x)
        return predict(self.net, x)


@every_case
@pytest.mark.parametrize("argmax", [False, True])
def test_a_model_with_its_own_predict_is_judged_by_it(attack, threat, argmax, net, images, y):
    if isinstance(attack, FoolboxAttack) and threat.size is None:
        pytest.skip("covered with a budget; sample by sample it takes long")
    wrapped = Wrapped(net, argmax)
    result = attack(wrapped, images[:4], y[:4], threat, max_queries=30, generator=generator())
    assert result.forwards.sum() == wrapped.asked
    assert result.forwards.max() <= 30
    assert torch.equal(predict(net.eval(), result.x_adv) != y[:4], result.success)
    only_clean = attack(wrapped, images[:4], y[:4], threat, max_queries=1)
    assert only_clean.success.tolist() == [True, False, False, False]
    if argmax:
        plain = attack(net, images[:4], y[:4], threat, max_queries=30, generator=generator())
        assert torch.equal(plain.forwards, result.forwards)


def test_stop_never_keeps_a_loss_at_least_as_high(net, images, y):
    from robustbench_lite.attacks import PGD
    from robustbench_lite.core.goals import Untargeted
    from robustbench_lite.core.losses import cross_entropy

    threat = Lp("linf", 0.05)
    early = PGD(steps=10)(net, images, y, threat)
    late = PGD(steps=10)(net, images, y, threat, stop="never")
    assert (late.backwards == 10).all()
    assert torch.equal(early.success, late.success)
    gain = cross_entropy(net(late.x_adv), Untargeted(y)) - cross_entropy(net(early.x_adv), Untargeted(y))
    assert gain.min() >= -1e-9


def test_bad_calls_say_what_is_wrong(net, images, y):
    from robustbench_lite.attacks import FGSM, PGD, RandomNoise

    for attack, arguments, options, message in [
        (PGD(), (net, images, y, Lp("l0", 3)), {}, "does not support"),
        (PGD(), (net, images, y, Lp("linf", None)), {}, "does not support"),
        (PGD(), (net, images * 255, y, Lp("linf", 0.1)), {}, "divide by 255"),
        (PGD(), (net, images, y + 9, Lp("linf", 0.1)), {}, r"labels must be in 0 .. 3"),
        (PGD(), (net, images, y[:3], Lp("linf", 0.1)), {}, r"shape \(12,\)"),
        (PGD(), (net, images, y, Lp("linf", 0.1)), {"stop": "sometimes"}, "stop must be"),
        (PGD(), (net, images, y, Lp("linf", 0.1)), {"max_queries": 0}, "max_queries must be at least 1"),
        (PGD(), (net, images, y, Lp("linf", 0.1)), {"indices": torch.arange(3)}, "indices must have shape"),
        (FGSM(), (net, images, y, RotationTranslation()), {}, "does not support"),
        (PGD(), (net, images, y, Lp("linf", torch.full((9,), 0.1))), {}, "one value for each of the 12 images, got 9"),
        (PGD(), (net, images, y, Lp("linf", torch.full((15,), 0.1))), {}, "one value for each of the 12 images"),
        (PGD(), (net, images, y, Lp("l2", 128)), {}, "divide by 255"),
    ]:
        with pytest.raises(ValueError, match=message):
            attack(*arguments, **options)
    for build, message in [
        (lambda: PGD(steps=0), "steps must be a whole number"),
        (lambda: PGD(restarts=0), "restarts must be a whole number"),
        (lambda: PGD(step_size=-1), "step_size must be > 0"),
        (lambda: PGD(restarts=2, random_start=False), "would all be the same"),
        (lambda: PGD(loss="cee"), "did you mean 'ce'"),
        (lambda: PGD(density=0), "density"),
        (lambda: RandomNoise(draws=0), "draws must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            build()


def test_bad_types_say_what_is_wrong(net, images, y):
    from robustbench_lite.attacks import PGD

    for arguments, options, message in [
        ((None, images, y, Lp("linf", 0.1)), {}, "a model is a callable"),
        ((net, images, y.tolist(), Lp("linf", 0.1)), {}, "a goal is"),
        ((net, images, y, "linf"), {}, "a threat is"),
        ((net, images, y, Lp("linf", 0.1)), {"indices": [1, 2]}, "indices must be an int64 tensor, got list"),
        ((lambda x: net(x.sub_(0.1)), images.clone(), y, Lp("linf", 0.1)), {}, "in place"),
    ]:
        with pytest.raises((TypeError, ValueError), match=message):
            PGD()(*arguments, **options)


def test_attacks_without_gradients_work_in_inference_mode(net, images, y):
    from robustbench_lite.attacks import RandomNoise

    with torch.inference_mode():
        inside = RandomNoise(draws=5)(net, images, y, Lp("linf", 0.3))
    assert torch.equal(inside.x_adv, RandomNoise(draws=5)(net, images, y, Lp("linf", 0.3)).x_adv)


def test_images_that_require_a_gradient_come_back_without_one(net, images, y):
    from robustbench_lite.attacks import PGD

    assert not PGD()(net, images.clone().requires_grad_(), y, Lp("linf", 0.1)).x_adv.requires_grad


def test_a_lying_attack_is_not_believed(net, images, y):
    class Liar(Attack):
        def supports(self, threat):
            return True

        def run(self, oracle, x, goal, threat, streams):
            x = x.clone()
            x[1] = float("nan")
            x[2] = 1 - x[2]  # far outside
            return x

    result = Liar()(net, images, y, Lp("linf", 0.05))
    assert torch.equal(result.x_adv[1:3], images[1:3])
    assert not result.success[1:].any()


def test_an_attack_that_returns_its_own_points_is_judged(net, images, y):
    class Last(Attack):
        def supports(self, threat):
            return True

        def run(self, oracle, x, goal, threat, streams):
            return threat.random_point(x, streams)

    result = Last()(net, images, y, Lp("linf", 0.3), generator=generator())
    assert result.success.sum() > 1
    assert torch.equal(predict(net, result.x_adv) != y, result.success)
    assert result.forwards.tolist() == [1] + [2] * 11
