"""FoolboxAttack: faithful to foolbox, counted, contained, and honest about foolbox's faults."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import json
import pickle
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from robustbench_lite.attacks import FoolboxAttack
from robustbench_lite.attacks import _foolbox_bridge as bridge
from robustbench_lite.attacks._foolbox_catalogue import ALIASES, ATTACKS, REFUSED
from robustbench_lite.core.goals import Targeted, Untargeted
from robustbench_lite.core.losses import margin
from robustbench_lite.core.models import ABSTAIN, predict
from robustbench_lite.core.oracle import Access, AccessDeniedError, Oracle, OutOfBudgetError
from robustbench_lite.core.rng import Streams
from robustbench_lite.core.threats import Lp

foolbox = bridge.foolbox
EPS = {"linf": 0.15, "l2": 0.8, "l1": 2.5, "l0": 4}
HAS_NUMBA = importlib.util.find_spec("numba") is not None


def generator(seed=5):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def y(net, images):
    return predict(net, images)


def short(value):
    if isinstance(value, FoolboxAttack):
        return value.name
    return f"{value.norm}-{'minimum' if value.eps is None else 'eps'}"


class Spy(nn.Module):
    """Records every image that it is shown, and counts every gradient that flows back through its logits."""

    def __init__(self, net):
        super().__init__()
        self.net, self.seen, self.backwards = net, [], 0

    def count(self, grad):
        self.backwards += len(grad)

    def forward(self, x):
        self.seen.append(x.detach().clone())
        logits = self.net(x)
        if logits.requires_grad:
            logits.register_hook(self.count)
        return logits


SHORT = {"steps": 40, "binary_search_steps": 2, "initial_const": 10.0}
FAITHFUL = [
    (FoolboxAttack("LinfPGD", steps=8), Lp("linf", 0.15)),
    (FoolboxAttack("L2AdamPGD", steps=8), Lp("l2", 0.8)),
    (FoolboxAttack("SparseL1DescentAttack", steps=5), Lp("l1", 2.5)),
    (FoolboxAttack("DDNAttack", steps=30), Lp("l2", None)),
    (FoolboxAttack("DDNAttack", steps=30), Lp("l2", 0.8)),
    (FoolboxAttack("L2DeepFoolAttack"), Lp("l2", None)),
    (FoolboxAttack("LinfDeepFoolAttack"), Lp("linf", None)),
    (
        FoolboxAttack("L2CarliniWagnerAttack", steps=40, binary_search_steps=2, initial_const=10.0, stepsize=0.1),
        Lp("l2", None),
    ),
    (
        FoolboxAttack("EADAttack", steps=40, binary_search_steps=2, initial_const=10.0, initial_stepsize=0.1),
        Lp("l1", None),
    ),
    (FoolboxAttack("LInfFMNAttack", steps=20), Lp("linf", None)),
    (FoolboxAttack("BoundaryAttack", steps=60), Lp("l2", None)),
    (FoolboxAttack("HopSkipJumpAttack", steps=1), Lp("l2", None)),
    (FoolboxAttack("SaltAndPepperNoiseAttack", steps=80), Lp("l2", None)),
    (FoolboxAttack("L2RepeatedAdditiveUniformNoiseAttack", repeats=20), Lp("l2", 0.8)),
]


@pytest.mark.parametrize(("attack", "threat"), FAITHFUL, ids=short)
def test_the_model_sees_exactly_what_foolbox_alone_would_show_it(attack, threat, net, images, y):
    row = slice(3, 4)
    alone, ours = Spy(net).eval(), Spy(net).eval()
    theirs = getattr(foolbox.attacks, attack.name)(**dict(attack.options))
    budget = {"epsilon": threat.eps} if ATTACKS[attack.name].fixed else {"early_stop": threat.eps}
    seed = Streams.from_generator(generator(), torch.tensor([7])).integers(2**31).item()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        np.random.seed(seed)
        criterion = foolbox.criteria.Misclassification(y[row])
        model = foolbox.PyTorchModel(alone, threat.bounds, device="cpu")
        expected = theirs.run(model, images[row], criterion, **budget)
    names = torch.tensor([7])
    result = attack(ours, images[row], y[row], threat, stop="never", indices=names, generator=generator())
    assert len(alone.seen) >= 5
    # First the clean image, which the base class asks for; last the returned point, where it was not asked about yet.
    assert torch.allclose(torch.cat(ours.seen[1 : len(alone.seen) + 1]), torch.cat(alone.seen), atol=1e-12)
    assert len(ours.seen) - len(alone.seen) in (1, 2)
    assert (result.forwards.item(), result.backwards.item()) == (len(ours.seen), alone.backwards)
    assert ours.backwards == alone.backwards
    if threat.eps is None:
        assert result.success.all()
        assert result.distance.item() <= threat.distance(expected, images[row]).item() + 1e-9
    if attack.name in ("DDNAttack", "L2DeepFoolAttack", "LinfDeepFoolAttack") and threat.eps is None:
        assert torch.allclose(result.x_adv, expected, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in ATTACKS if ATTACKS[name].goals != "untargeted"])
def test_every_attack_runs_on_odd_images_and_bounds(name):
    """Two classes, three channels, no square, float32, bounds other than [0, 1]: finite, inside, within budget."""
    entry = ATTACKS[name]
    bounds = (0.0, 1.0) if entry.unit_bounds else (-1.0, 2.3)
    x = torch.rand(2, 3, 4, 5, generator=generator()) * (bounds[1] - bounds[0]) + bounds[0]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = nn.Sequential(nn.Flatten(), nn.Linear(60, 2))
    labels = predict(net, x)
    goal = Targeted(1 - labels) if entry.goals == "targeted" else Untargeted(labels)
    for norm in ("l2",) if name == "HopSkipJumpAttack" else entry.norms:
        attack, threat = FoolboxAttack(name), Lp(norm, EPS[norm] if entry.fixed else None, bounds)
        assert attack.supports(threat)
        if entry.needs and not HAS_NUMBA:
            with pytest.raises(ImportError, match="pip install numba"):
                attack(net, x, goal, threat)
            continue
        result = attack(net, x, goal, threat, max_queries=40, generator=generator())
        assert threat.contains(result.x_adv, x).all()
        assert result.forwards.max() <= 40
        assert torch.equal(goal.achieved(predict(net, result.x_adv)), result.success)
        assert attack.access >= Access.GRADIENT or result.backwards.sum() == 0


def test_the_catalogue_is_what_foolbox_says_of_itself():
    base = foolbox.attacks.base
    kinds = {
        name: kind
        for name, kind in vars(foolbox.attacks).items()
        if inspect.isclass(kind) and issubclass(kind, base.Attack)
    }
    assert set(kinds) == set(ATTACKS) | set(ALIASES) | {name for name in REFUSED if "estimator" not in name}
    for alias, name in ALIASES.items():
        assert kinds[alias] is kinds[name]
    for name, entry in ATTACKS.items():
        kind = kinds[name]
        assert entry.fixed == issubclass(kind, base.FixedEpsilonAttack), name
        if issubclass(kind, base.FlexibleDistanceMinimizationAttack):
            assert entry.norms == ("linf", "l2", "l1", "l0"), name
        elif name != "HopSkipJumpAttack":
            distance = kind.distance.fget(None) if isinstance(kind.distance, property) else kind.distance
            assert [getattr(foolbox.distances, norm) for norm in entry.norms] == [distance], name


@pytest.mark.parametrize(
    ("attack", "threat"),
    [
        (FoolboxAttack("HopSkipJumpAttack", steps=1, constraint="linf"), Lp("linf", 0.1)),
        (FoolboxAttack("PointwiseAttack"), Lp("l0", None)),
        (FoolboxAttack("L2PGD", steps=5, rel_stepsize=0.5), Lp("l2", torch.linspace(0.1, 1.5, 12))),
    ],
    ids=short,
)
def test_a_sample_does_not_depend_on_its_batch_and_randomness_stays_inside(attack, threat, net, images, y):
    names = torch.arange(20, 32)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    run = {"max_queries": 120}
    whole = attack(net, images, y, threat, indices=names, generator=generator(), **run)
    assert whole.success.any()
    for row in (2, 9):
        keep = torch.tensor([row])
        alone = attack(net, images[keep], y[keep], threat.take(keep), indices=names[keep], generator=generator(), **run)
        assert torch.allclose(whole.x_adv[keep], alone.x_adv, atol=1e-12)
        assert (whole.forwards[row], whole.backwards[row]) == (alone.forwards[0], alone.backwards[0])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    assert random.getstate() == before[2]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["L2PGD", "DDNAttack", "L2DeepFoolAttack", "BoundaryAttack", "PointwiseAttack"])
def test_a_gpu_is_no_different(name, net, images, y):
    before = torch.cuda.get_rng_state()
    attack, threat = FoolboxAttack(name), Lp("l2", 2.0)
    result, again = (
        attack(net.cuda(), images.cuda(), y.cuda(), threat, max_queries=80, generator=generator()) for _ in range(2)
    )
    assert result.success.any()
    assert result.x_adv.is_cuda
    assert torch.allclose(result.x_adv, again.x_adv)
    assert torch.equal(torch.cuda.get_rng_state(), before)


def test_a_bare_function_keeps_its_gradients_clean(images):
    weight = torch.randn(36, 3, dtype=torch.float64, generator=generator()).requires_grad_()
    result = FoolboxAttack("DDNAttack", steps=20)(
        lambda x: x.flatten(1) @ weight, images, (images.flatten(1) @ weight).argmax(1), Lp("l2", None)
    )
    assert result.success.all()
    assert weight.grad is None


class Steps(nn.Module):
    """Reads images of a few grey levels only: its gradient is zero everywhere."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net((x * 15).round() / 15)


def test_gradients_come_from_the_view_and_verdicts_from_the_model(net, images):
    threat, attack = Lp("l2", None), FoolboxAttack("DDNAttack", steps=25)
    deployed, view = Spy(Steps(net)).eval(), Spy(net).eval()
    y = predict(deployed, images)
    deployed.seen.clear()
    result = attack(deployed, images, y, threat, view=view)
    assert result.success.all()
    assert torch.equal(predict(Steps(net), result.x_adv) != y, result.success)
    # One clean check; then a view and a deployed model for each of 25 steps.
    assert (result.forwards == 51).all()
    assert (len(torch.cat(deployed.seen)), len(view.seen)) == (12 * 26, 12 * 25)
    assert (deployed.backwards, view.backwards) == (0, 12 * 25)
    assert (result.backwards == 25).all()
    blind = attack(Steps(net), images, y, threat)
    assert result.distance.median() < blind.distance.median()


class Detector(nn.Module):
    """Refuses images whose mean is above a threshold."""

    rejects = True

    def __init__(self, net, threshold):
        super().__init__()
        self.net, self.threshold = net, threshold

    def forward(self, x):
        return self.net(x)

    def predict(self, x):
        return torch.where(x.mean(dim=(1, 2, 3)) > self.threshold, ABSTAIN, self.net(x).argmax(dim=1))


def test_the_norm_is_steered_by_the_detectors_verdict(net, images, y):
    detector = Detector(net, images.mean(dim=(1, 2, 3)).max())
    result = FoolboxAttack("DDNAttack", steps=40)(detector, images, y, Lp("l2", None))
    answers = detector.predict(result.x_adv)
    assert result.success.any()
    assert (answers[result.success] != ABSTAIN).all()
    assert torch.equal((answers != y) & (answers != ABSTAIN), result.success)


class LabelsOnly(nn.Module):
    """A model whose logits nobody may see."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        raise AssertionError("logits were asked for")

    def predict(self, x):
        return self.net(x).argmax(dim=1)


@pytest.mark.parametrize("name", ["BoundaryAttack", "HopSkipJumpAttack", "PointwiseAttack", "SaltAndPepperNoiseAttack"])
def test_decision_based_attacks_need_labels_only(name, net, images, y):
    attack = FoolboxAttack(name)
    assert attack.access == Access.LABEL
    result = attack(LabelsOnly(net.eval()), images[:4], y[:4], Lp("l2", None), max_queries=150)
    assert result.success.any()
    assert result.backwards.sum() == 0


@pytest.mark.parametrize("name", ["BoundaryAttack", "HopSkipJumpAttack", "PointwiseAttack"])
def test_a_walk_without_a_start_fails_quietly_but_errors_are_not_swallowed(name, images):
    zeros = torch.zeros(1, dtype=torch.int64)
    calls = 0

    def constant(x):
        return torch.eye(3, dtype=x.dtype)[:1].expand(len(x), 3)

    def breaks(x):
        nonlocal calls
        calls += 1
        if calls > 10:
            raise AssertionError("the model's own error")
        return constant(x)

    result = FoolboxAttack(name)(constant, images[:1], zeros, Lp("l2", None))
    assert not result.success.any()
    assert torch.equal(result.x_adv, images[:1])
    with pytest.raises(AssertionError, match="the model's own error"):
        FoolboxAttack(name)(breaks, images[:1], zeros, Lp("l2", None))


def test_success_and_budget_stop_a_sample_at_once(net, images, y):
    threat = Lp("l2", 3.0)
    attack = FoolboxAttack("L2PGD", steps=50, rel_stepsize=0.2)
    result = attack(net, images, y, threat, generator=generator())
    assert result.success.all()
    assert torch.equal(result.forwards, result.first_success)  # nothing is asked after the success
    assert (result.backwards < result.forwards - 1).all()  # not even the gradient there
    on = attack(net, images[:2], y[:2], threat, stop="never", generator=generator())
    assert (on.backwards == 50).all()
    spent = [attack(net, images[:2], y[:2], Lp("l2", 1e-3), max_queries=n).forwards for n in (1, 2, 9, 30)]
    assert [s.tolist() for s in spent] == [[n] * 2 for n in (1, 2, 9, 30)]


def test_a_randomised_model_is_counted_and_falls_by_majority(net, images, y):
    class Noisy(Spy):
        stochastic = True

        def forward(self, x):
            return super().forward(x + 0.05 * torch.randn_like(x))

    model = Noisy(net.eval())
    result = FoolboxAttack("DDNAttack", steps=10)(model, images[:4], y[:4], Lp("l2", 2.0), max_queries=90)
    assert result.forwards.sum() == sum(len(x) for x in model.seen)
    assert result.forwards.max() <= 90
    again = FoolboxAttack("DDNAttack", steps=10)(model, images[:4], y[:4], Lp("l2", 2.0), max_queries=90)
    assert again.forwards.shape == result.forwards.shape


@pytest.mark.parametrize("name", ["BoundaryAttack", "HopSkipJumpAttack", "PointwiseAttack"])
def test_a_walk_whose_start_a_stochastic_model_takes_back_fails_quietly(name, images):
    class Coin(nn.Module):
        stochastic = True

        def forward(self, x):
            return torch.randn(len(x), 2).to(x)

    options = {"steps": 5} if name != "PointwiseAttack" else {}
    zeros = torch.zeros(6, dtype=torch.int64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        result = FoolboxAttack(name, **options)(Coin(), images[:6], zeros, Lp("l2", None), max_queries=200)
    assert (result.forwards <= 200).all()
    assert result.distance[~result.success].isposinf().all()


def test_gen_attack_reaches_its_targets_even_with_huge_logits(net, images, y):
    goal = Targeted((y + 1) % 4)
    attack = FoolboxAttack("GenAttack", steps=40)
    result = attack(lambda x: 1e4 * net(x), images[:4], goal.take(slice(0, 4)), Lp("linf", 0.6), max_queries=400)
    assert attack.access == Access.SCORES
    assert result.success.any()
    assert result.backwards.sum() == 0


def test_a_confidence_is_honoured(net, images, y):
    options = {"steps": 40, "stepsize": 0.1, "binary_search_steps": 1, "initial_const": 10.0}
    plain, sure = (
        FoolboxAttack("L2CarliniWagnerAttack", options, confidence=confidence)(net, images[:3], y[:3], Lp("l2", None))
        for confidence in (0.0, 1.0)
    )
    goal = Untargeted(y[:3])
    assert margin(net(sure.x_adv), goal).median() > margin(net(plain.x_adv), goal).median()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("L2FMNAttack", "projection does nothing.*use DDNAttack"),
        ("L0FMNAttack", r"eps \+ 1 entries.*IndexError"),
        ("NewtonFoolAttack", "NaN images.*use L2DeepFoolAttack"),
        ("MIFGSM", "not the paper's attack"),
        ("L2MomentumIterativeFastGradientMethod", "not the paper's attack"),
        ("L1AdamBasicIterativeAttack", "never uses Adam"),
        ("LinfPGDWithESGradientEstimator", "loss of the whole batch"),
        ("es_gradient_estimator", "loss of the whole batch"),
        ("LinfRepeatedAdditiveUniformNoiseAttack", "largest absolute.*use RandomNoise"),
        ("VirtualAdversarialAttack", "NaN images"),
        ("SpatialAttack", "use the threat RotationTranslation"),
        ("DatasetAttack", "feed"),
        ("BinarizationRefinementAttack", "refines"),
        ("Attack", "base class"),
        ("DDNAtack", "unknown foolbox attack 'DDNAtack'; did you mean 'DDNAttack'"),
        ("Repeated", "unknown foolbox attack"),
    ],
)
def test_faulty_and_unknown_names_are_refused_with_the_reason(name, reason):
    with pytest.raises(ValueError, match=reason):
        FoolboxAttack(name)


def test_the_faults_are_there():
    """Should a new foolbox mend them, these entries of the catalogue can go."""
    import eagerpy as ep

    x = torch.rand(4, 1, 6, 6, generator=generator())
    wrap = ep.astensor
    moved = foolbox.attacks.L2FMNAttack().project(wrap(x + 10), wrap(x), wrap(torch.full((4,), 0.1))).raw - x
    assert moved.flatten(1).norm(dim=1).min() > 50
    kept = foolbox.attacks.L0FMNAttack().project(wrap(x + 1 + x**2), wrap(x), wrap(torch.full((4,), 3.0))).raw != x
    assert (kept.flatten(1).sum(dim=1) == 4).all()
    flat = foolbox.PyTorchModel(
        nn.Sequential(nn.Flatten(), nn.Linear(36, 4), nn.Threshold(99, 0)).eval(), (0, 1), "cpu"
    )
    newton = foolbox.attacks.NewtonFoolAttack(steps=2).run(flat, x, torch.zeros(4, dtype=torch.int64))
    assert newton.isnan().any()
    for name in ("L1AdamBasicIterativeAttack", "L2AdamBasicIterativeAttack"):
        assert "get_optimizer" not in vars(getattr(foolbox.attacks, name))
    noise = foolbox.attacks.LinfAdditiveUniformNoiseAttack()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = [(noise.run(flat, x * 0 + 0.5, None, epsilon=0.1) - 0.5).abs().max().item() for _ in range(20)]
    assert max(sizes) > 0.1 + 1e-4


def test_options_are_checked_and_named(net, images, y):
    with pytest.raises(ValueError, match=r"unknown option of foolbox's DDNAttack 'step'; did you mean 'steps'"):
        FoolboxAttack("DDNAttack", step=3)(net, images, y, Lp("l2", None))
    with pytest.raises(ValueError, match="'distance' is the threat's norm"):
        FoolboxAttack("InversionAttack", distance="l2")
    with pytest.raises(ValueError, match="'init_attack' must be a number, text or None, got DDNAttack"):
        FoolboxAttack("BoundaryAttack", init_attack=foolbox.attacks.DDNAttack())
    for name, threat in [
        ("DDNAttack", Lp("linf", 0.1)),
        ("LinfPGD", Lp("linf", None)),
        ("HopSkipJumpAttack", Lp("linf", 0.1)),
        ("HopSkipJumpAttack", Lp("l2", None, bounds=(-1, 1))),
        ("GenAttack", Lp("linf", 0.1, bounds=(0, 2))),
    ]:
        with pytest.raises(ValueError, match="does not support"):
            FoolboxAttack(name)(net, images, y, threat)
    with pytest.raises(ValueError, match="knows no target"):
        FoolboxAttack("L2DeepFoolAttack")(net, images, Targeted(y), Lp("l2", None))
    with pytest.raises(ValueError, match="needs a target"):
        FoolboxAttack("GenAttack")(net, images, y, Lp("linf", 0.1))


def test_an_attack_is_a_value():
    attack = FoolboxAttack("DDNAttack", {"steps": 50}, gamma=0.1)
    assert repr(attack) == "FoolboxAttack('DDNAttack', gamma=0.1, steps=50)"
    assert attack == FoolboxAttack("DDNAttack", gamma=0.1, steps=50)
    assert len({attack, FoolboxAttack("DDNAttack", [("steps", 50), ("gamma", 0.1)]), FoolboxAttack("DDNAttack")}) == 2
    assert FoolboxAttack("LinfPGD") == FoolboxAttack("PGD") == FoolboxAttack("LinfProjectedGradientDescentAttack")
    spec = json.loads(json.dumps(dataclasses.asdict(attack)))
    assert FoolboxAttack(**spec) == attack
    assert pickle.loads(pickle.dumps(attack)) == attack
    assert dataclasses.replace(attack, options={"steps": 9}) == FoolboxAttack("DDNAttack", steps=9)


def test_foolbox_is_imported_only_when_an_attack_runs():
    code = (
        "import sys, robustbench_lite.attacks as a; from robustbench_lite.core.threats import Lp;"
        "attack = a.FoolboxAttack('DDNAttack', steps=3); attack.access, attack.supports(Lp('l2', 1.0)), repr(attack);"
        "assert not {'foolbox', 'eagerpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_pullback_is_the_gradient_of_any_loss_and_is_paid_for(net, images, y):
    rows = torch.arange(12)
    weights = torch.randn(12, 4, dtype=torch.float64, generator=generator())
    with Oracle(net, images, Untargeted(y), Lp("linf", 0.2), max_queries=3) as oracle:
        logits, pull = oracle.pullback(images, rows)
        assert oracle.backwards.sum() == 0
        slope = pull(weights)
        assert (oracle.forwards == 1).all()
        assert (oracle.backwards == 1).all()
        assert not logits.requires_grad
        assert not oracle.verdict.any()
        oracle.labels(images.flip(0), rows)
        assert torch.equal(oracle.verdict, predict(net, images.flip(0)) != y)
        oracle.pullback(images, rows, candidate=False)
        with pytest.raises(OutOfBudgetError):
            oracle.pullback(images, rows)
    leaf = images.clone().requires_grad_()
    expected = torch.autograd.grad((net(leaf) * weights).sum(), leaf)[0]
    assert torch.allclose(slope, expected)
    assert torch.allclose(logits, net(images))
    scores = Oracle(net, images, Untargeted(y), Lp("linf", 0.2), access=Access.SCORES)
    with pytest.raises(AccessDeniedError, match="GRADIENT"):
        scores.pullback(images, rows)
    with Oracle(lambda x: torch.zeros(len(x), 2), images, Untargeted(y * 0), Lp("linf", 0.2)) as oracle:
        assert oracle.pullback(images, rows)[1](torch.ones(12, 2)).abs().sum() == 0
