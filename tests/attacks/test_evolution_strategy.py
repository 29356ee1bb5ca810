"""Evolution strategies: formulas, convergence where the optimum is known, and what they are invariant to."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn

from robustbench_lite.attacks import CMAES, DCT, EvolutionStrategy, OpenAIES, Pixels, RankNES
from robustbench_lite.attacks._cma_es import Constants, evolve
from robustbench_lite.core.losses import cross_entropy, margin
from robustbench_lite.core.models import predict
from robustbench_lite.core.oracle import Access, Oracle
from robustbench_lite.core.rng import Streams
from robustbench_lite.core.threats import Lp

STRATEGIES = [RankNES(), OpenAIES(), CMAES()]
every_strategy = pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: type(s).__name__)


def streams(count, seed=0):
    return Streams(seed, list(range(count)), torch.device("cpu"))


def search(strategy, objective, count, size, generations, unit=1.0):
    """Maximise `objective` of (n, lambda, m) in `count` independent searches."""
    state, source = strategy.start(torch.full((count, 1), unit, dtype=torch.float64), size), streams(count)
    for generation in range(generations):
        draws = strategy.draw(size, source)
        state = strategy.update(state, draws, objective(strategy.offspring(state, draws)), generation)
    return state


@pytest.mark.parametrize(("size", "population"), [(10, 10), (49, 15), (192, 19), (4, 50)])
def test_the_constants_are_the_tutorials(size, population):
    k, n, parents = Constants(size, population), size, population // 2
    raw = np.array([math.log(parents + 0.5) - math.log(i) for i in range(1, parents + 1)])
    w = raw / raw.sum()
    mass = 1 / (w**2).sum()
    assert np.allclose(k.weights, w)
    assert k.mass == pytest.approx(mass)
    assert k.sigma_rate == pytest.approx((mass + 2) / (n + mass + 5))
    assert k.damping == pytest.approx(1 + 2 * max(0, math.sqrt((mass - 1) / (n + 1)) - 1) + k.sigma_rate)
    assert k.path_rate == pytest.approx((4 + mass / n) / (n + 4 + 2 * mass / n))
    assert k.rank_one == pytest.approx(2 / ((n + 1.3) ** 2 + mass))
    assert k.rank_mu == pytest.approx(min(1 - k.rank_one, 2 * (mass - 2 + 1 / mass) / ((n + 2) ** 2 + mass)))
    exact = math.sqrt(2) * math.exp(math.lgamma((n + 1) / 2) - math.lgamma(n / 2))
    assert k.expected_norm == pytest.approx(exact, rel=2e-3)


def test_ten_dimensions_have_the_published_mass():
    """The reference implementation prints (5_w,10), mu_w = 3.2, w_1 = 45 % in dimension 10."""
    k = Constants(10, CMAES().members(10))
    assert k.population == 10
    assert k.mass == pytest.approx(3.2, abs=0.05)
    assert float(k.weights[0]) == pytest.approx(0.45, abs=0.01)


def test_one_generation_of_cma_is_the_update_written_out():
    """With a full covariance, C^(-1/2) from scipy, and the weighted sums over members in loops."""
    n, population, g = 5, 8, 3
    k = Constants(n, population)
    random = np.random.default_rng(0)
    root = random.normal(size=(n, n))
    covariance = root @ root.T + np.eye(n)
    half = scipy.linalg.sqrtm(covariance).real
    z, loss = random.normal(size=(population, n)), random.normal(size=population)
    mean, sigma, p_sigma, p_c = random.normal(size=n), 0.3, 0.2 * random.normal(size=n), random.normal(size=n)

    y = z @ half
    order = np.argsort(-loss)
    y_w = sum(float(k.weights[i]) * y[order[i]] for i in range(4))
    inverse_root = np.linalg.inv(half)
    p_sigma_new = (1 - k.sigma_rate) * p_sigma
    p_sigma_new = p_sigma_new + math.sqrt(k.sigma_rate * (2 - k.sigma_rate) * k.mass) * inverse_root @ y_w
    length = np.linalg.norm(p_sigma_new)
    h = length / math.sqrt(1 - (1 - k.sigma_rate) ** (2 * (g + 1))) < (1.4 + 2 / (n + 1)) * k.expected_norm
    p_c_new = (1 - k.path_rate) * p_c + h * math.sqrt(k.path_rate * (2 - k.path_rate) * k.mass) * y_w
    expected = (
        (1 - k.rank_one - k.rank_mu) * covariance
        + k.rank_one * (np.outer(p_c_new, p_c_new) + (not h) * k.path_rate * (2 - k.path_rate) * covariance)
        + k.rank_mu * sum(float(k.weights[i]) * np.outer(y[order[i]], y[order[i]]) for i in range(4))
    )

    def batch(array):
        return torch.from_numpy(np.asarray(array)).unsqueeze(0)

    state = {
        "mean": batch(mean),
        "sigma": torch.full((1, 1), sigma, dtype=torch.float64),
        "sigma_path": batch(p_sigma),
        "path": batch(p_c),
        "covariance": batch(covariance),
        "root": batch(half),
    }
    after = evolve(state, batch(z), batch(order.copy()), k, g)
    assert np.allclose(after["mean"], mean + sigma * y_w)
    assert np.allclose(after["sigma_path"], p_sigma_new)
    assert np.allclose(after["path"], p_c_new)
    assert np.allclose(after["covariance"], expected)
    growth = math.exp(k.sigma_rate / k.damping * (length / k.expected_norm - 1))
    assert float(after["sigma"]) == pytest.approx(sigma * growth)
    assert torch.allclose(after["root"] @ after["root"], after["covariance"])


def test_under_random_selection_the_step_size_and_the_covariance_stay():
    """The updates are unbiased: with ranks that mean nothing, E |p_sigma|^2 = n, and C stays 1 on average."""
    n, count = 6, 1000
    noise = torch.Generator().manual_seed(1)
    state = search(CMAES(), lambda members: torch.rand(members.shape[:2], generator=noise), count, n, 25)
    path = state["sigma_path"].square().sum(dim=1)
    assert abs(path.mean() - n) < 4 * path.std() / math.sqrt(count)
    mean, error = state["covariance"].mean(dim=0), state["covariance"].std(dim=0) / math.sqrt(count)
    off = ~torch.eye(n, dtype=torch.bool)
    assert (mean[off].abs() < 4.5 * error[off]).all()
    # The path starts at 0 and pauses while p_sigma is long, which costs C a few per cent of its size.
    assert (mean.diagonal() > 0.85).all()
    assert (mean.diagonal() < 1 + 4.5 * error.diagonal()).all()


@pytest.mark.parametrize(("strategy", "generations"), [(CMAES(), 260), (RankNES(), 400)], ids=["cma", "rank"])
def test_a_quadratic_is_solved(strategy, generations):
    """Closed form: the maximum of -(c - a)^T H (c - a) is a. CMA-ES learns H^-1 up to a factor; condition 1,000."""
    n, count = 6, 4
    rotation = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    scales = torch.logspace(0, 3 if isinstance(strategy, CMAES) else 0, n, dtype=torch.float64)
    hessian = rotation @ torch.diag(scales) @ rotation.T
    optimum = torch.linspace(-1, 1, n, dtype=torch.float64)

    def objective(members):
        away = members - optimum
        return -((away @ hessian) * away).sum(dim=-1)

    state = search(strategy, objective, count, n, generations)
    assert (state["mean"] - optimum).norm(dim=1).max() < 1e-5
    if isinstance(strategy, CMAES):
        spread = (scales.sqrt().unsqueeze(1) * rotation.T) @ state["covariance"] @ (rotation * scales.sqrt())
        condition = torch.linalg.cond(spread)
        assert condition.max() < 60  # 1,000 before it has learned anything


def test_utilities_are_the_formula():
    u = RankNES.utilities(10)
    raw = [max(0.0, math.log(6) - math.log(rank)) for rank in range(1, 11)]
    assert np.allclose(u, [value / sum(raw) - 0.1 for value in raw])
    assert abs(u.sum()) < 1e-12


def test_the_rank_gradient_of_the_mean_points_up_and_sigma_shrinks_at_a_peak():
    size, count = 8, 500
    w = torch.linspace(-1, 1, size, dtype=torch.float64)
    state = search(RankNES(), lambda members: members @ w, count, size, 1)
    assert torch.nn.functional.cosine_similarity(state["mean"].mean(dim=0), w, dim=0) > 0.99
    at_peak = search(RankNES(), lambda members: -members.square().sum(dim=2), count, size, 1)
    assert at_peak["sigma"].mean() < 1
    assert at_peak["mean"].abs().mean(dim=0).max() < 1


def test_the_openai_gradient_is_the_gradient_of_the_smoothed_loss():
    """E[e F(mean + sigma e)] / sigma = grad E[F]; for F = w.c + |c|^2 that is w + 2 mean."""
    size, count, strategy = 5, 4000, OpenAIES(sigma=0.7)
    w = torch.linspace(-1, 1, size, dtype=torch.float64)
    state = strategy.start(torch.ones(count, 1, dtype=torch.float64), size)
    state["mean"] = state["mean"] + 0.3
    draws = strategy.draw(size, streams(count))
    members = strategy.offspring(state, draws)
    after = strategy.update(state, draws, members @ w + members.square().sum(dim=2), 0)
    gradient = after["first"] / 0.1  # Adam's first moment after one step
    error = gradient.std(dim=0) / math.sqrt(count)
    assert ((gradient.mean(dim=0) - (w + 0.6)).abs() < 4.5 * error).all()
    step = (after["mean"] - state["mean"]) / strategy.lr
    assert torch.allclose(step, gradient.sign(), atol=1e-6)  # Adam's first step


@pytest.fixture
def smooth():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(36, 12), nn.Tanh(), nn.Linear(12, 4)).double()


DISTORTED = {
    "exp": lambda logits, goal: margin(logits, goal).exp(),
    "cube": lambda logits, goal: 1e3 * margin(logits, goal) ** 3 - 7,
    "sigmoid": lambda logits, goal: margin(logits, goal).sigmoid(),
}


@pytest.mark.parametrize("strategy", [RankNES(), RankNES(population=8, lr=0.5), CMAES(), CMAES(population=12)], ids=str)
@pytest.mark.parametrize("distortion", DISTORTED)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_an_increasing_change_of_the_score_changes_no_bit(strategy, distortion, norm, smooth, images):
    y, threat = predict(smooth, images), Lp(norm, 0.1 if norm == "linf" else 0.4)
    seen = {}
    for name, loss in (("margin", "margin"), (distortion, DISTORTED[distortion])):
        asked = seen.setdefault(name, [])

        def spy(x, asked=asked):
            asked.append(x.clone())
            return smooth(x)

        attack = EvolutionStrategy(strategy, DCT(0.7), loss=loss)
        seen[name + "!"] = attack(spy, images, y, threat, max_queries=200)
    assert len(seen["margin"]) == len(seen[distortion]) > 5
    assert all(torch.equal(*pair) for pair in zip(seen["margin"], seen[distortion], strict=True))
    assert torch.equal(seen["margin!"].x_adv, seen[distortion + "!"].x_adv)
    assert torch.equal(seen["margin!"].forwards, seen[distortion + "!"].forwards)


def test_raw_scores_are_not_invariant(smooth, images):
    y, threat = predict(smooth, images), Lp("linf", 0.02)
    plain, cubed = (
        EvolutionStrategy(OpenAIES(), loss=loss)(smooth, images, y, threat, max_queries=200, stop="never")
        for loss in ("margin", DISTORTED["cube"])
    )
    assert not torch.equal(plain.x_adv, cubed.x_adv)


@every_strategy
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_low_frequency_linear_model_falls_near_its_distance_and_not_within(strategy, norm):
    basis, shape = DCT(0.5), (1, 8, 8)
    coefficients = torch.randn(16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    w = basis.decode(coefficients, shape).flatten()

    def model(x):
        score = (x.flatten(1) - 0.5) @ w - 0.2
        return torch.stack([torch.zeros_like(score), score], dim=1)

    x, y = torch.full((10, *shape), 0.5, dtype=torch.float64), torch.zeros(10, dtype=torch.int64)
    distance = 0.2 / float(w.norm(p=1 if norm == "linf" else 2))
    attack = EvolutionStrategy(strategy, basis)
    assert attack(model, x, y, Lp(norm, distance * 1.25), max_queries=2000).success.all()
    assert not attack(model, x, y, Lp(norm, distance * 0.999), max_queries=500).success.any()


@every_strategy
def test_members_are_in_the_threat_and_paid_and_the_best_one_is_judged(strategy, smooth, images):
    y, threat, asked = predict(smooth, images), Lp("l2", 0.05), []

    def spy(x):
        asked.append(x.clone())
        return smooth(x)

    count = strategy.members(Pixels().size((1, 6, 6)))
    result = EvolutionStrategy(strategy, Pixels(), queries=2 * count + 2)(spy, images, y, threat, stop="never")
    assert (result.forwards == 1 + 2 * (count + 1)).all()
    assert sum(len(x) for x in asked) == result.forwards.sum()
    first, champions = asked[1], asked[2]
    clean = images.repeat_interleave(count, dim=0)
    assert threat.contains(first, clean).all()
    value = margin(smooth(first), type(result_goal := goal_of(y))(result_goal.labels.repeat_interleave(count)))
    best = value.reshape(12, count).argmax(dim=1)
    assert torch.allclose(champions, first.reshape(12, count, 1, 6, 6)[torch.arange(12), best])


def goal_of(y):
    from robustbench_lite.core.goals import Untargeted

    return Untargeted(y)


@every_strategy
@pytest.mark.parametrize("capacity", [1, 30])
def test_memory_bounds_the_members_and_changes_nothing(strategy, capacity, smooth, images, monkeypatch):
    y, threat, asked = predict(smooth, images), Lp("linf", 0.1), []
    attack = EvolutionStrategy(strategy, DCT(0.5), loss=cross_entropy)
    expected = attack(smooth, images, y, threat, max_queries=120)
    scores = Oracle.scores

    def spy(self, points, *args, **kwargs):
        asked.append(len(points))
        return scores(self, points, *args, **kwargs)

    monkeypatch.setattr(Oracle, "scores", spy)
    monkeypatch.setattr(Oracle, "capacity", capacity)
    monkeypatch.setattr(EvolutionStrategy, "_at_once", lambda self, oracle, size: 5)
    frugal = attack(smooth, images, y, threat, max_queries=120)
    assert max(asked) <= capacity
    assert torch.allclose(frugal.x_adv, expected.x_adv, atol=1e-12)
    assert torch.equal(frugal.forwards, expected.forwards)


@every_strategy
def test_a_generation_that_does_not_fit_in_memory_is_refused(strategy, smooth, images):
    """And one that just fits is searched, as many images at a time as the budget has room for."""
    y, attack = predict(smooth, images), EvolutionStrategy(strategy, DCT(0.5))
    room = strategy.state_bytes(9) + strategy.generation_bytes(9)
    assert room >= 8 * 9 * strategy.members(9)
    with pytest.raises(ValueError, match="lower the population, choose a smaller basis"):
        attack(smooth, images, y, Lp("linf", 0.1), max_queries=60, memory_budget=room - 1)
    frugal = attack(smooth, images, y, Lp("linf", 0.1), max_queries=60, memory_budget=room)
    expected = attack(smooth, images, y, Lp("linf", 0.1), max_queries=60)
    assert torch.allclose(frugal.x_adv, expected.x_adv, atol=1e-12)


def test_scores_are_enough_and_the_rest_says_so(smooth, images):
    assert EvolutionStrategy().access == Access.SCORES
    assert not EvolutionStrategy().supports(Lp("l2", None))
    assert not EvolutionStrategy().supports(Lp("l0", 3))
    with pytest.raises(ValueError, match="at most 512 coefficients, got 768"):
        EvolutionStrategy(CMAES(), Pixels())(
            nn.Flatten(), torch.rand(1, 3, 16, 16), torch.tensor([700]), Lp("linf", 0.1)
        )


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: RankNES(population=5), "even number"),
        (lambda: OpenAIES(population=2), "at least 4, got 2"),
        (lambda: CMAES(population=3), "at least 4, got 3"),
        (lambda: CMAES(sigma=0), "sigma must be > 0"),
        (lambda: RankNES(lr=0), "lr must be > 0"),
        (lambda: RankNES(sigma_lr=-1), "sigma_lr must be >= 0"),
        (lambda: OpenAIES(lr=-1), "lr must be > 0"),
        (lambda: EvolutionStrategy(queries=0), "queries must be"),
        (lambda: EvolutionStrategy(loss="nothing"), "loss"),
    ],
)
def test_settings_out_of_range_say_so(build, message):
    with pytest.raises(ValueError, match=message):
        build()
