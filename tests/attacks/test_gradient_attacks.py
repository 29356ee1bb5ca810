"""FGSM, BIM and PGD against closed forms and Foolbox."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import nn

from robustbench_lite.attacks import BIM, FGSM, PGD, RandomNoise
from robustbench_lite.core.goals import Targeted, Untargeted
from robustbench_lite.core.losses import cross_entropy
from robustbench_lite.core.models import predict
from robustbench_lite.core.oracle import Access
from robustbench_lite.core.threats import Lp

DUAL = {"linf": 1, "l2": 2, "l1": float("inf")}


def linear(dims=16, seed=0):
    """A two-class linear model with margin w.x + b, and its w and b."""
    g = torch.Generator().manual_seed(seed)
    w, b = torch.randn(dims, dtype=torch.float64, generator=g), 0.05

    def model(x):
        score = x.flatten(1) @ w + b - 0.5 * w.sum()
        return torch.stack([score / 2, -score / 2], dim=1)

    return model, w, b


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_a_linear_model_falls_exactly_beyond_its_distance(norm):
    """Far from the box the distance of x to the boundary is |w.x + b| / ||w||_dual."""
    model, w, _ = linear()
    x = 0.5 + 0.02 * torch.randn(60, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = predict(model, x)
    logits = model(x)
    distance = (logits[:, 0] - logits[:, 1]).abs() / torch.linalg.vector_norm(w, ord=DUAL[norm])
    attacks = [PGD(steps=100, density=1 / 16), PGD(steps=100, loss="margin", random_start=False, density=1 / 16)]
    # From a random start, steps of 2.5 eps in all leave a part of the start that is orthogonal to w.
    for attack, slack in [*zip(attacks, (1.06, 1.001), strict=True), (FGSM(density=1 / 16), 1.001)]:
        assert attack(model, x, y, Lp(norm, distance * slack)).success.all()
        assert not attack(model, x, y, Lp(norm, distance * 0.999)).success.any()


def test_fgsm_is_its_formula(net, images):
    y = predict(net, images)
    leaf = images.clone().requires_grad_()
    (slope,) = torch.autograd.grad(cross_entropy(net(leaf), Untargeted(y)).sum(), leaf)
    expected = (images + 0.1 * slope.sign()).clamp(0, 1)
    result = FGSM()(net, images, y, Lp("linf", 0.1), stop="never")
    moved = (result.x_adv - expected).flatten(1).abs().amax(dim=1)
    kept = (result.x_adv == images).flatten(1).all(dim=1)  # the step lowered the loss: the clean image was better
    assert ((moved < 1e-9) | kept).all()
    assert (moved < 1e-9).sum() >= 10


def test_bim_takes_the_originals_steps():
    """At eps 8/255 and 10 steps the default step is 1/255 (Kurakin et al. 2016)."""
    model, _, _ = linear()
    x = torch.full((1, 1, 4, 4), 0.5, dtype=torch.float64)
    seen = []

    def spy(images):
        seen.append(images.detach().clone())
        return model(images)

    BIM()(spy, x, predict(model, x), Lp("linf", "8/255"), stop="never")
    sizes = [(image - x).abs().max().item() * 255 for image in seen[1:]]
    assert sizes == pytest.approx([0, 1, 2, 3, 4, 5, 6, 7, 8, 8, 8], abs=1e-6)


def test_restarts_only_cost_those_that_stand(net, images):
    y = predict(net, images)
    threat = Lp("linf", 0.12)
    once, more = (PGD(steps=5, restarts=k)(net, images, y, threat) for k in (1, 4))
    assert 0 < once.success.sum() < 12
    assert (more.success | ~once.success).all()
    assert torch.equal(more.forwards[once.success], once.forwards[once.success])
    assert (more.forwards[~more.success] == 1 + 4 * 6).all()


def test_targeted_pgd_finds_targets_that_linear_programming_says_exist():
    """The largest margin of the target class over the whole image box is a linear program."""
    g = torch.Generator().manual_seed(0)
    w, b = torch.randn(5, 16, dtype=torch.float64, generator=g), torch.zeros(5, dtype=torch.float64)
    x = torch.rand(10, 1, 4, 4, dtype=torch.float64, generator=g)
    reachable = []
    for t in range(5):
        others = [j for j in range(5) if j != t]
        rows = np.column_stack([-(w[t] - w[others]).numpy(), np.ones(4)])  # s <= (w_t - w_j) x
        best = linprog(np.r_[np.zeros(16), -1], A_ub=rows, b_ub=np.zeros(4), bounds=[(0, 1)] * 16 + [(None, None)])
        reachable.append(-best.fun)
    assert min(reachable) > 0.5  # every class has room, so that a miss is the attack's fault
    for shift in range(1, 5):
        target = (predict(lambda x: x.flatten(1) @ w.T + b, x) + shift) % 5
        for loss in ("ce", "margin", "dlr"):
            result = PGD(loss=loss)(lambda x: x.flatten(1) @ w.T + b, x, Targeted(target), Lp("linf", 1.0))
            assert result.success.all(), loss


def test_random_noise_needs_labels_only(net, images):
    assert RandomNoise().access == Access.LABEL
    result = RandomNoise(draws=7)(net, images, predict(net, images), Lp("linf", 1e-4))
    assert (result.forwards == 8).all()
    assert (result.backwards == 0).all()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Please import:DeprecationWarning")  # foolbox's own imports
def test_pgd_is_no_weaker_than_foolbox_on_a_third_partys_net(shared_data):
    """First 200 test images of an adversarially trained net, linf 0.3: equal steps, starts and restarts."""
    import foolbox

    with np.load(shared_data / "mnist.npz") as file:
        x = torch.tensor(file["x_test"][:200, None] / 255, dtype=torch.float32)
        y = torch.tensor(file["y_test"][:200], dtype=torch.int64)
    net = nn.Sequential(
        *[nn.Conv2d(1, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU()],
        *[nn.Flatten(), nn.Linear(1568, 100), nn.ReLU(), nn.Linear(100, 10)],
    )
    net.load_state_dict(torch.load(shared_data / "nets" / "mnist_small_adv.pth", weights_only=True))
    net.eval()
    ours = PGD(steps=40, step_size=0.01)(net, x, y, Lp("linf", 0.3))
    torch.manual_seed(0)
    theirs = foolbox.attacks.LinfPGD(steps=40, abs_stepsize=0.01)
    _, _, fallen = theirs(foolbox.PyTorchModel(net, (0, 1), device="cpu"), x, y, epsilons=0.3)
    assert ours.success.sum() >= fallen.sum() - 1
    assert 0.76 <= 1 - ours.success.float().mean() <= 0.83
