from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import logsumexp

from robustbench_lite.core.goals import Targeted, Untargeted, as_goal
from robustbench_lite.core.losses import LOSSES, cross_entropy, dlr, loss_named, margin
from robustbench_lite.core.models import ABSTAIN, INVALID, labels_of

Z = torch.randn(50, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.arange(50) % 5


def test_cross_entropy_against_numpy():
    expected = logsumexp(Z.numpy(), axis=1) - Z.numpy()[np.arange(50), Y.numpy()]
    assert np.allclose(cross_entropy(Z, Untargeted(Y)).numpy(), expected)
    assert np.allclose(cross_entropy(Z, Targeted(Y)).numpy(), -expected)


def test_margin_is_positive_exactly_where_the_goal_is_achieved():
    for goal in (Untargeted(Y), Targeted(Y)):
        assert torch.equal(margin(Z, goal) > 0, goal.achieved(Z.argmax(dim=1)))


def test_margin_gradient_reaches_two_logits_even_in_a_tie():
    z = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(margin(z, Untargeted(torch.tensor([2]))).sum(), z)
    assert sorted(gradient.flatten().tolist()) == [-1, 0, 0, 1]


def test_dlr_by_its_formula_and_its_invariance():
    ordered = np.sort(Z.numpy(), axis=1)[:, ::-1]
    rows = np.arange(50)
    correct = Z.numpy()[rows, Y.numpy()]
    others = Z.numpy().copy()
    others[rows, Y.numpy()] = -np.inf
    expected = -(correct - others.max(axis=1)) / (ordered[:, 0] - ordered[:, 2] + 1e-12)
    assert np.allclose(dlr(Z, Untargeted(Y)).numpy(), expected)
    for goal in (Untargeted(Y), Targeted(Y)):
        assert torch.allclose(dlr(7 * Z - 3, goal), dlr(Z, goal))


def test_dlr_with_few_classes():
    """Two classes: the margin, for (z_1 - z_2) / (z_1 - z_2) has no slope; three: the third is all there is to take."""
    two, three = Z[:, :2], Z[:, :3]
    assert torch.equal(dlr(two, Untargeted(Y % 2)), margin(two, Untargeted(Y % 2)))
    assert torch.equal(dlr(two, Targeted(Y % 2)), margin(two, Targeted(Y % 2)))
    spread = three.amax(dim=1) - three.amin(dim=1)
    for goal in (Untargeted(Y % 3), Targeted(Y % 3)):
        assert torch.allclose(dlr(three, goal), margin(three, goal) / spread)


def test_too_few_classes_are_named():
    for loss in (margin, dlr):
        with pytest.raises(ValueError, match="at least 2 classes"):
            loss(Z[:, :1], Untargeted(torch.zeros(50, dtype=torch.int64)))


def test_names():
    assert loss_named("ce") is LOSSES["ce"]
    assert loss_named(margin) is margin
    with pytest.raises(ValueError, match="did you mean 'margin'"):
        loss_named("margins")


def test_goals_and_refusals():
    labels = torch.tensor([0, 1, ABSTAIN, INVALID])
    goal = as_goal(torch.zeros(4, dtype=torch.int64))
    assert goal.achieved(labels).tolist() == [False, True, True, True]
    assert goal.achieved(labels, rejects=True).tolist() == [False, True, False, True]
    assert Targeted(torch.ones(4, dtype=torch.int64)).achieved(labels).tolist() == [False, True, False, False]
    assert as_goal(goal) is goal


def test_non_finite_logits_have_no_label():
    z = torch.tensor([[0.0, 1.0], [float("nan"), 0.0], [float("inf"), 0.0]])
    assert labels_of(z).tolist() == [1, INVALID, INVALID]
