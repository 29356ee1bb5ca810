"""Transfer: ensembles equal their definitions, surrogates cost nothing, and the matrix is what it says."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from robustbench_lite.attacks import (
    FABT,
    PGD,
    Ensemble,
    RandomNoise,
    RotationTranslationGrid,
    Transfer,
    transfer_matrix,
)
from robustbench_lite.attacks.transfer import _craft
from robustbench_lite.core.goals import Targeted, Untargeted
from robustbench_lite.core.losses import cross_entropy, dlr, margin
from robustbench_lite.core.models import predict
from robustbench_lite.core.rng import Streams
from robustbench_lite.core.spatial import RotationTranslation
from robustbench_lite.core.threats import Lp

THREAT = Lp("linf", 0.15)


def net_of(seed, channels=1, size=6, classes=4):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(channels, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * size * size, classes)
        ).double()


def generator(seed=3):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def nets():
    return tuple(net_of(seed) for seed in (11, 12, 13))


@pytest.fixture
def y(net, images):
    labels = predict(net, images)
    labels[0] = (labels[0] + 1) % 4
    return labels


class Counted(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net, self.seen = net, 0

    def forward(self, x):
        self.seen += len(x)
        return self.net(x)


WEIGHTS = (1.0, 2.0, 5.0)
SHARES = torch.tensor(WEIGHTS, dtype=torch.float64) / 8


def test_the_cross_entropy_of_averaged_probabilities_is_that_of_the_mean_probability(nets, images):
    labels = torch.arange(12) % 4
    with torch.no_grad():
        found = F.cross_entropy(Ensemble(nets, "probabilities", WEIGHTS)(images), labels, reduction="none")
        mean = sum(share * net(images).softmax(dim=1) for share, net in zip(SHARES, nets, strict=True))
    assert torch.allclose(found, -mean.gather(1, labels[:, None]).squeeze(1).log(), atol=1e-12)


def test_averaged_logits_are_averaged_logits(nets, images):
    with torch.no_grad():
        mean = sum(share * net(images) for share, net in zip(SHARES, nets, strict=True))
        assert torch.allclose(Ensemble(nets, "logits", WEIGHTS)(images), mean)


@pytest.mark.parametrize("kind", [Untargeted, Targeted])
@pytest.mark.parametrize("loss", [cross_entropy, margin, dlr])
def test_averaged_losses_are_averaged_losses_and_so_are_their_gradients(kind, loss, nets, images):
    goal, ensemble = kind(torch.arange(12) % 4), Ensemble(nets, "losses", WEIGHTS)
    with ensemble.oracle(images, goal, THREAT, stop="never") as oracle:
        value, slope = oracle.gradient(images, torch.arange(12), loss)
        leaf = images.clone().requires_grad_()
        expected = sum(share * loss(net(leaf), goal) for share, net in zip(SHARES, nets, strict=True))
        (expected_slope,) = torch.autograd.grad(expected.sum(), leaf)
        assert torch.allclose(value, expected.detach(), atol=1e-12)
        assert torch.allclose(slope, expected_slope, atol=1e-12)
        direct = oracle.scores(images, torch.arange(12))
        logits, pull = oracle.pullback(images, torch.arange(12))
        assert torch.equal(direct, logits)
        assert torch.allclose(logits, ensemble(images), atol=1e-12)
        leaf = images.clone().requires_grad_()
        (one,) = torch.autograd.grad(ensemble(leaf)[:, 2].sum(), leaf)
        assert torch.allclose(pull(F.one_hot(torch.full((12,), 2), 4).double()), one, atol=1e-12)
    assert torch.equal(oracle.verdict, goal.achieved(predict(ensemble, images)))


def test_one_net_is_an_ensemble_of_itself(nets, images, net, y):
    alone = Transfer(PGD(steps=5), nets[:1])(net, images, y, THREAT, generator=generator())
    for combine in ("probabilities", "losses"):
        again = Transfer(PGD(steps=5), nets[0], combine)(net, images, y, THREAT, generator=generator())
        assert torch.allclose(again.x_adv, alone.x_adv, atol=1e-9)


def test_crafting_on_the_target_itself_is_the_white_box_attack(net, images, y):
    inside = Transfer(PGD(steps=20, random_start=False), (net,))(net, images, y, THREAT)
    outside = PGD(steps=20, random_start=False)(net, images, y, THREAT)
    assert torch.equal(inside.success, outside.success)


CASES = [
    (PGD(steps=8), THREAT, "logits"),
    (PGD(steps=8, restarts=2), Lp("l2", 0.8), "probabilities"),
    (PGD(steps=8), Lp("l1", 2.5), "losses"),
    (FABT(steps=5), Lp("l2", 0.8), "losses"),
    (RandomNoise(draws=10), THREAT, "losses"),
    (RotationTranslationGrid(), RotationTranslation(), "logits"),
]
every_case = pytest.mark.parametrize(("attack", "threat", "combine"), CASES)


@every_case
def test_the_result_is_feasible_and_judged_by_the_target(attack, threat, combine, nets, net, images, y):
    transfer = Transfer(attack, nets, combine)
    result = transfer(net, images, y, threat, generator=generator())
    point = result.x_adv if result.parameters is None else result.parameters
    assert threat.contains(point, images).all()
    assert torch.equal(predict(net, result.x_adv) != y, result.success)
    assert (result.first_success[0], result.forwards[0]) == (1, 1)
    assert (result.forwards[1:] == 2).all()
    assert (result.backwards == 0).all()
    if result.parameters is not None:
        assert torch.equal(threat.apply(images, result.parameters), result.x_adv)


@every_case
def test_a_batch_equals_its_samples_and_one_seed_gives_one_answer(attack, threat, combine, nets, net, images, y):
    transfer, names = Transfer(attack, nets, combine), torch.arange(40, 52)
    whole = transfer(net, images, y, threat, indices=names, generator=generator())
    again = transfer(net, images, y, threat, indices=names, generator=generator())
    assert torch.equal(whole.x_adv, again.x_adv)
    for i in range(4):
        one = slice(i, i + 1)
        alone = transfer(net, images[one], y[one], threat, indices=names[one], generator=generator())
        assert torch.allclose(alone.x_adv, whole.x_adv[one], atol=1e-9)
        assert torch.equal(alone.success, whole.success[one])


@pytest.mark.parametrize("budget", [1, 2, None])
def test_the_targets_passes_are_what_a_spy_counts_and_the_surrogates_are_free(budget, nets, net, images, y):
    target, surrogate = Counted(net), Counted(nets[0])
    result = Transfer(PGD(steps=8), (surrogate, nets[1]))(target, images, y, THREAT, max_queries=budget)
    assert result.forwards.sum() == target.seen
    assert target.seen == (12 if budget == 1 else 12 + 11)
    assert surrogate.seen == (0 if budget == 1 else 11 * (1 + 8 + 1))


def test_all_nets_are_left_as_they_were(nets, net, images, y):
    nets[0].eval()
    nets[1][0].weight.requires_grad_(False)
    before = [[p.clone() for p in model.parameters()] for model in (*nets, net)]
    Transfer(PGD(steps=3), nets, "losses")(net, images, y, THREAT)
    transfer_matrix(PGD(steps=3), {"a": nets[0], "b": net}, images, y, THREAT)
    assert [model.training for model in (*nets, net)] == [False, True, True, True]
    assert not nets[1][0].weight.requires_grad and nets[2][0].weight.requires_grad
    for model, parameters in zip((*nets, net), before, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), parameters, strict=True))
        assert all(p.grad is None for p in model.parameters())


def test_targets_pass_through_to_the_surrogates(net, images):
    target = (predict(net, images) + 1) % 4
    twin = copy.deepcopy(net)
    result = Transfer(PGD(steps=40), (twin,))(net, images, Targeted(target), Lp("linf", 0.5))
    assert result.success.double().mean() >= 0.9
    assert torch.equal(predict(net, result.x_adv) == target, result.success)


def test_surrogates_that_are_wrong_on_the_clean_image_are_crafted_on_all_the_same(images, y):
    """`stop="never"`: the point moves on from an image that the surrogate gets wrong anyway."""
    wrong = net_of(21)
    with torch.no_grad():
        wrong[3].bias += torch.tensor([100.0, 0, 0, 0])  # says 0 to everything
    streams = Streams.from_generator(None, torch.arange(12))
    points = _craft(PGD(steps=5), Ensemble([wrong]), images, Untargeted(y), THREAT, streams)
    assert THREAT.contains(points, images).all()
    assert ((points != images).flatten(1).any(dim=1)).all()


def test_the_matrix_of_twins_is_constant_and_its_diagonal_is_the_white_box_attack(nets, net, images):
    y, attack = predict(net, images), PGD(steps=10, random_start=False)
    models = {"a": net, "twin": copy.deepcopy(net), "other": nets[0]}
    matrix = transfer_matrix(attack, models, images, y, THREAT)
    assert list(matrix.index) == list(matrix.columns) == ["a", "twin", "other"]
    same = matrix.loc[["a", "twin"], ["a", "twin"]].to_numpy()
    assert (same == same[0, 0]).all()
    for name, model in models.items():
        right = predict(model, images) == y
        white = attack(model, images, y, THREAT).success[right].double().mean().item()
        assert matrix.loc[name, name] == pytest.approx(white) or not right.any()
    right = predict(nets[0], images) == y
    if right.any():
        one = Transfer(attack, (net,))(nets[0], images, y, THREAT).success[right].double().mean().item()
        assert matrix.loc["a", "other"] == pytest.approx(one)


def test_a_target_without_a_right_answer_has_no_rate(net, images):
    y = (predict(net, images) + 1) % 4
    assert math.isnan(transfer_matrix(PGD(steps=2), {"a": net}, images, y, THREAT).loc["a", "a"])


def test_a_random_attack_crafts_the_same_points_for_each_column(nets, images):
    y = predict(nets[0], images)
    models = {"a": nets[0], "b": nets[1]}
    first, second = (
        transfer_matrix(PGD(steps=5), order, images, y, THREAT, generator=generator())
        for order in (models, dict(reversed(models.items())))
    )
    assert first.equals(second.loc[["a", "b"], ["a", "b"]])


def test_bad_calls_say_what_is_wrong(nets, net, images, y):
    other = net_of(5, classes=3)
    for build, kind, message in [
        (lambda: Transfer(PGD(), ()), ValueError, "at least one net"),
        (lambda: Transfer(PGD(), nets, "logit"), ValueError, "did you mean 'logits'"),
        (lambda: Transfer(PGD(), nets, weights=(1.0,)), ValueError, "each of the 3 nets"),
        (lambda: Transfer(PGD(), nets, weights=(1.0, 0.0, 1.0)), ValueError, "positive"),
        (lambda: Transfer(nets[0], nets), TypeError, "must be an Attack"),
        (lambda: Transfer(PGD(), (lambda x: x,)), TypeError, "nn.Modules"),
        (lambda: Transfer(PGD(), (nets[0], other))(net, images, y, THREAT), ValueError, "same classes"),
        (lambda: Transfer(PGD(), nets)(net, images, y, Lp("l0", 3)), ValueError, "does not support"),
        (lambda: Transfer(FABT(), nets)(net, images, y, Lp("l2", None)), ValueError, "does not support"),
        (lambda: transfer_matrix(PGD(), {}, images, y, THREAT), ValueError, "at least one model"),
        (lambda: transfer_matrix(PGD(), {"a": net}, images, y, Lp("linf", None)), ValueError, "budget"),
        (lambda: transfer_matrix(PGD(), {"a": net}, images * 255, y, THREAT), ValueError, "divide by 255"),
    ]:
        with pytest.raises(kind, match=message):
            build()


def test_its_name_is_short(nets):
    assert len(repr(Transfer(PGD(), nets))) < 250
