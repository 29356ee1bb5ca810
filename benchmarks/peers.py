"""The same work by other libraries, as they recommend it: each gives the images it ends with, or bool (N,).

A seed goes to those that take one; the others draw from the global generators of PyTorch and NumPy.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from importlib.util import find_spec

import foolbox
import torch
from nets import Subject
from torch import Tensor, nn

__all__ = ["PEERS", "Found"]

Found = Tensor


def _foolbox(s: Subject) -> foolbox.PyTorchModel:
    return foolbox.PyTorchModel(s.model, bounds=(0, 1), device=s.x.device)


def _linf_pgd() -> foolbox.attacks.LinfPGD:
    return foolbox.attacks.LinfPGD(steps=40, rel_stepsize=2.5 / 40)


def foolbox_pgd(s: Subject, seed: int) -> Found:
    """PGD with 40 steps from a random start."""
    return _linf_pgd().run(_foolbox(s), s.x, foolbox.criteria.Misclassification(s.y), epsilon=s.eps)


def foolbox_restarts(s: Subject, seed: int) -> Found:
    """The same, five times; foolbox keeps what succeeded."""
    return _linf_pgd().repeat(5)(_foolbox(s), s.x, s.y, epsilons=s.eps)[1]


def foolbox_curve(s: Subject, seed: int) -> Found:
    """PGD at eight budgets; a sample has fallen if it fell at any."""
    budgets = [s.eps * (i + 1) / 8 for i in range(8)]
    return _linf_pgd()(_foolbox(s), s.x, s.y, epsilons=budgets)[2].any(dim=0)


def foolbox_grid(s: Subject, seed: int) -> Found:
    """The grid of 31 angles and 5 x 5 shifts."""
    attack = foolbox.attacks.SpatialAttack(max_translation=3, max_rotation=30, num_translations=5, num_rotations=31)
    return attack.run(_foolbox(s), s.x, foolbox.criteria.Misclassification(s.y))


PEERS: dict[str, Callable[[Subject, int], Found]] = {
    "foolbox pgd": foolbox_pgd,
    "foolbox restarts": foolbox_restarts,
    "foolbox curve": foolbox_curve,
    "foolbox grid": foolbox_grid,
}

if find_spec("torchattacks"):
    import torchattacks

    def torchattacks_pgd(s: Subject, seed: int) -> Found:
        """PGD with 40 steps from a random start."""
        return torchattacks.PGD(s.model, eps=s.eps, alpha=2.5 * s.eps / 40, steps=40)(s.x, s.y)

    def torchattacks_apgd(s: Subject, seed: int) -> Found:
        """APGD with 100 steps on the cross-entropy."""
        return torchattacks.APGD(s.model, eps=s.eps, steps=100, n_restarts=1, loss="ce", seed=seed)(s.x, s.y)

    def torchattacks_square(s: Subject, seed: int) -> Found:
        """Square with 1,000 queries."""
        return torchattacks.Square(s.model, eps=s.eps, n_queries=1000, n_restarts=1, loss="margin", seed=seed)(s.x, s.y)

    PEERS |= {
        "torchattacks pgd": torchattacks_pgd,
        "torchattacks apgd": torchattacks_apgd,
        "torchattacks square": torchattacks_square,
    }

if find_spec("pyautoattack"):
    from pyautoattack import AutoAttack

    def _pyautoattack(s: Subject, seed: int, *attacks: str, queries: int | None = None) -> Found:
        kind = {"version": "custom", "attacks": list(attacks)} if attacks else {"version": "standard"}
        judge = AutoAttack(s.model, norm="Linf", eps=s.eps, seed=seed, device=s.x.device, **kind)
        judge.apgd.n_restarts = 1
        judge.square.n_queries = queries or judge.square.n_queries
        return judge.run_standard_evaluation(s.x, s.y, batch_size=len(s.x))[0]

    def pyautoattack_apgd(s: Subject, seed: int) -> Found:
        """APGD with 100 steps on the cross-entropy, one run."""
        return _pyautoattack(s, seed, "apgd-ce")

    def pyautoattack_square(s: Subject, seed: int) -> Found:
        """Square with 1,000 queries."""
        return _pyautoattack(s, seed, "square", queries=1000)

    def pyautoattack_standard(s: Subject, seed: int) -> Found:
        """The standard ensemble."""
        return _pyautoattack(s, seed)

    PEERS |= {
        "pyautoattack apgd": pyautoattack_apgd,
        "pyautoattack square": pyautoattack_square,
        "pyautoattack standard": pyautoattack_standard,
    }

if find_spec("art"):
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    def art_pgd(s: Subject, seed: int) -> Found:
        """PGD with 40 steps from a random start."""
        classifier = PyTorchClassifier(
            s.model,
            nn.CrossEntropyLoss(),
            s.x.shape[1:],
            10,
            clip_values=(0, 1),
            device_type="cpu" if s.x.device.type == "cpu" else "gpu",
        )
        attack = ProjectedGradientDescentPyTorch(
            classifier,
            eps=s.eps,
            eps_step=2.5 * s.eps / 40,
            max_iter=40,
            num_random_init=1,
            batch_size=len(s.x),
            verbose=False,
        )
        with contextlib.redirect_stderr(io.StringIO()):
            found = attack.generate(s.x.cpu().numpy(), s.y.cpu().numpy())
        return torch.from_numpy(found).to(s.x.device)

    PEERS["art pgd"] = art_pgd
