"""Universal perturbations: closed forms on linear models, the contract of attacks, and what a stored result needs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from robustbench_lite.attacks import AdamUpdate, FixedPerturbation, Perturbation, SteepestUpdate, UniversalPerturbation
from robustbench_lite.core.goals import Targeted
from robustbench_lite.core.models import predict
from robustbench_lite.core.threats import Lp
from robustbench_lite.evaluation.specs import spec, title

THREATS = [Lp("linf", 0.15), Lp("l2", 0.8), Lp("l1", 2.5)]


def generator(seed=3):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def y(net, images):
    labels = predict(net, images)
    labels[0] = (labels[0] + 1) % 4
    return labels


@pytest.fixture
def linear():
    """Two classes, logits (0, <w, x>); class 0 is the truth throughout."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 2)).double()
    weight = torch.randn(36, dtype=torch.float64, generator=generator(4))
    with torch.no_grad():
        net[1].weight.copy_(torch.stack([torch.zeros_like(weight), weight]))
        net[1].bias.zero_()
    return net, weight.reshape(1, 6, 6)


@pytest.mark.parametrize("loss", ["ce", "margin"])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_on_a_linear_model_it_is_the_closed_form(norm, loss, linear, images):
    net, weight = linear
    eps = {"linf": 0.1, "l2": 0.3, "l1": 0.4}[norm]
    inside = images * 0.1 + 0.45  # no entry is ever clipped
    fit = UniversalPerturbation(epochs=200, batch_size=5, loss=loss, beta=1e9, update=SteepestUpdate(density=1 / 36))
    found = fit.fit(net, inside, torch.zeros(12, dtype=torch.int64), Lp(norm, eps)).perturbation.delta
    top = torch.zeros(36, dtype=torch.float64)
    top[weight.abs().argmax()] = weight.flatten()[weight.abs().argmax()].sign()
    expected = {"linf": weight.sign(), "l2": weight / weight.norm(), "l1": top.reshape(1, 6, 6)}[norm] * eps
    assert torch.allclose(found, expected, atol=1e-3)


def test_adam_finds_the_corner_too(linear, images):
    net, weight = linear
    fit = UniversalPerturbation(epochs=50, batch_size=5, update=AdamUpdate())
    found = fit.fit(net, images * 0.1 + 0.45, torch.zeros(12, dtype=torch.int64), Lp("linf", 0.1)).perturbation.delta
    assert torch.allclose(found, 0.1 * weight.sign(), atol=1e-6)


def test_images_whose_loss_is_clipped_do_not_pull():
    """Three images are lost already, and would pull one way for more; the fourth can still be won, the other way."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(2, 2)).double()
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([[0.0, 0.0], [10.0, -10.0]]))
        net[1].bias.zero_()
    x = torch.tensor([[0.45, 0.55]] + [[0.15, 0.85]] * 3).reshape(4, 1, 1, 2).double()
    y = torch.tensor([0, 1, 1, 1])
    for beta, sign in ((2.0, 1), (1e9, -1)):
        fit = UniversalPerturbation(beta=beta, held_out=0, loss="margin")
        found = fit.fit(net, x, y, Lp("linf", 0.1)).perturbation.delta.flatten()
        assert torch.allclose(found, sign * torch.tensor([0.1, -0.1]).double(), atol=1e-6), beta


@pytest.mark.parametrize("threat", THREATS, ids=lambda t: t.norm)
def test_the_fit_respects_the_ball_and_repeats_itself(threat, net, images, y):
    fit = UniversalPerturbation(epochs=20, batch_size=4, starts=2)
    first, second = (fit.fit(net, images, y, threat, generator=generator()) for _ in range(2))
    assert torch.equal(first.perturbation.delta, second.perturbation.delta)
    delta = first.perturbation.delta.unsqueeze(0)
    assert Lp(threat.norm, None).distance(delta, torch.zeros_like(delta)).item() <= threat.eps
    assert (first.training_success, first.held_out_success) == (second.training_success, second.held_out_success)
    other = fit.fit(net, images, y, threat, generator=generator(9))
    assert not torch.equal(other.perturbation.delta, first.perturbation.delta)


def test_success_is_reported_on_the_part_it_is_named_for(net, images, y):
    fit = UniversalPerturbation(epochs=10, batch_size=4, held_out=0.25)
    attack = fit.fit(net, images, y, THREATS[0], generator=generator())
    whole = attack(net, images, y, THREATS[0]).success.double().mean().item()
    assert 9 / 12 * attack.training_success + 3 / 12 * attack.held_out_success == pytest.approx(whole)
    assert whole > 2 / 12
    everything = UniversalPerturbation(held_out=0).fit(net, images, y, THREATS[0])
    assert everything.held_out_success is None
    assert everything.training_success == everything(net, images, y, THREATS[0]).success.double().mean().item()


def test_the_fit_leaves_the_model_alone(images):
    with torch.random.fork_rng():
        net = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).double()
    net[1].weight.requires_grad_(False)
    state = {k: v.clone() for k, v in net.state_dict().items()}
    before = torch.get_rng_state()
    UniversalPerturbation(epochs=2).fit(net, images, torch.arange(12) % 3, THREATS[0])
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert [p.requires_grad for p in net.parameters()] == [False] + [True] * 5
    assert all(m.training for m in net.modules())
    assert all(p.grad is None for p in net.parameters())
    assert torch.equal(torch.get_rng_state(), before)


def test_gradients_come_from_the_view(net, images, y, linear):
    view, weight = linear
    blind = nn.Sequential(nn.Flatten(), nn.Linear(36, 4)).double().requires_grad_(False)
    fit = UniversalPerturbation(epochs=20, batch_size=4, beta=1e9)
    zero = torch.zeros(12, dtype=torch.int64)
    attack = fit.fit(lambda x: blind(x.round()), images * 0.1 + 0.45, zero, Lp("linf", 0.1), view=view)
    assert torch.allclose(attack.perturbation.delta, 0.1 * weight.sign(), atol=1e-6)


@pytest.fixture
def attack():
    return FixedPerturbation(Perturbation(torch.randn(1, 6, 6, generator=generator())))


@pytest.mark.parametrize("threat", [*THREATS, Lp("l2", None)], ids=lambda t: f"{t.norm}-{t.size}")
def test_the_contract_of_attacks(threat, attack, net, images, y):
    seen = []
    net.register_forward_hook(lambda _, args, logits: seen.append(len(logits)))
    result = attack(net, images, y, threat)
    assert sum(seen) == result.forwards.sum() == 1 + 11 * 2
    assert (result.forwards[0], result.first_success[0], result.distance[0]) == (1, 1, 0)
    assert (result.backwards == 0).all()
    assert threat.contains(result.x_adv, images).all()
    assert torch.equal(predict(net.eval(), result.x_adv) != y, result.success)
    for i in range(4):
        one = slice(i, i + 1)
        alone = attack(net, images[one], y[one], threat)
        assert torch.equal(alone.x_adv, result.x_adv[one])
    assert attack(net, images, y, threat, max_queries=1).forwards.max() == 1
    target = (y + 1) % 4
    aimed = attack(net, images, Targeted(target), threat)
    assert torch.equal(predict(net, aimed.x_adv) == target, aimed.success)


def test_stored_results_tell_two_perturbations_apart(attack):
    same = FixedPerturbation(Perturbation(attack.perturbation.delta), training_success=0.5)
    other = FixedPerturbation(Perturbation(attack.perturbation.delta + 1))
    assert spec(attack)["perturbation"] == spec(same)["perturbation"] != spec(other)["perturbation"]
    assert title(attack) == title(same) != title(other)


def test_bad_settings_say_what_is_wrong(attack, net, images, y):
    for build, message in [
        (lambda: UniversalPerturbation(epochs=0), "epochs must be a whole number"),
        (lambda: UniversalPerturbation(path=0), "path must be > 0"),
        (lambda: UniversalPerturbation(held_out=1), r"held_out must be in \[0, 1\)"),
        (lambda: UniversalPerturbation(loss="cee"), "did you mean 'ce'"),
        (lambda: UniversalPerturbation().fit(net, images, y, Lp("l0", 3)), "needs an linf, l2 or l1 ball with one eps"),
        (lambda: UniversalPerturbation().fit(net, images, y, Lp("l2", None)), "with one eps"),
        (lambda: UniversalPerturbation(held_out=0.9).fit(net, images[:1], y[:1], THREATS[0]), "no image is left"),
        (lambda: UniversalPerturbation(update=AdamUpdate()).fit(net, images, y, THREATS[1]), "AdamUpdate is for linf"),
        (
            lambda: attack(lambda x: x.flatten(1), images[:, :, :5], y, THREATS[0]),
            r"for images \(1, 6, 6\), got \(1, 5, 6\)",
        ),
        (lambda: attack(net, images, y, Lp("l0", 3)), "does not support"),
    ]:
        with pytest.raises(ValueError, match=message):
            build()


def test_memory_bounds_the_questions_and_changes_little():
    """The first pass, of at most 64 images, tells what an image takes; then questions are as small as the budget."""
    asked = []

    def model(x):
        asked.append(len(x))
        return torch.stack([x.mean(dim=(1, 2, 3)), x.square().mean(dim=(1, 2, 3))], dim=1)

    x = torch.rand(200, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y, fit = torch.zeros(200, dtype=torch.int64), UniversalPerturbation(epochs=3)
    whole = fit.fit(model, x, y, Lp("linf", 0.1))
    assert max(asked) == 160
    asked.clear()
    frugal = fit.fit(model, x, y, Lp("linf", 0.1), memory_budget=60_000)
    assert max(asked) == 64
    assert torch.allclose(frugal.perturbation.delta, whole.perturbation.delta, atol=1e-9)
    assert frugal.held_out_success == whole.held_out_success


@pytest.mark.slow
def test_a_standard_net_falls_to_one_perturbation_on_unseen_images(shared_data):
    """SEEDS X7: linf 0.3 leaves a standard MNIST net well below half, and unseen images fare like the others."""
    import numpy as np

    from robustbench_lite.zoo import load_defense

    with np.load(shared_data / "mnist.npz") as file:
        x = torch.from_numpy(file["x_test"][:500]).float().reshape(-1, 1, 28, 28) / 255
        y = torch.from_numpy(file["y_test"][:500]).long()
    attack = UniversalPerturbation().fit(load_defense("mnist/standard"), x, y, Lp("linf", 0.3))
    assert attack.held_out_success > 0.5
    assert abs(attack.held_out_success - attack.training_success) < 0.1
