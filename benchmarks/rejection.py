"""Rejecting defenses on digits: what they detect of attacks that do not know them, and of one that does.

Plain attacks (FGSM, PGD on the margin) see the logits and stop at the first wrong answer; each of their inputs is then
shown to the detector. The joint attack (`RejectionAware`; `HighConfidenceLowUncertainty` where there is a variance)
looks for an input that is wrong and accepted. Thresholds come from the calibration split.

coverage: accepted clean test images at three false-positive rates. AUC: of the score, for telling the attack's wrong
inputs from clean test images; the joint attack's inputs are made against the clean median as threshold, and where it
finds none against that of 5 %. robust: share that is right and accepted when clean, and rejected or right when attacked
(5 %). Each defense is trained as by the `rbl train` line that its row of `DEFENSES` amounts to.

    python benchmarks/rejection.py --images 200 --eps 0.15
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from rich.console import Console
from rich.table import Table
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from robustbench_lite.attacks import FGSM, PGD, HighConfidenceLowUncertainty, RejectionAware
from robustbench_lite.attacks.base import Attack
from robustbench_lite.core.models import ABSTAIN, labels_of, predict
from robustbench_lite.core.threats import Lp
from robustbench_lite.data import load_data
from robustbench_lite.data.base import Dataset
from robustbench_lite.defenses import Deploy, StandardTraining
from robustbench_lite.defenses.base import Objective
from robustbench_lite.defenses.deep_rbf import DeepRBFTraining
from robustbench_lite.defenses.detector import Detector
from robustbench_lite.defenses.dustbin import DustbinTraining
from robustbench_lite.defenses.gaussian_process_head import GaussianProcessHead
from robustbench_lite.models import create_model
from robustbench_lite.training import train
from robustbench_lite.zoo import load_defense

RATES = (0.01, 0.05, 0.1)
PLAIN: dict[str, Attack] = {"FGSM": FGSM(), "PGD": PGD(steps=100, restarts=5, loss="margin")}
DEFENSES: dict[str, Objective] = {
    "deep_rbf": DeepRBFTraining(),
    "dustbin": DustbinTraining(),
    "gaussian_process": Deploy(StandardTraining(), GaussianProcessHead),
}


class Undefended(nn.Module):
    """The logits of a detector, nothing refused."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.view = detector.attack_view()

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.view(x)


def trained(objective: Objective, epochs: int) -> Detector:
    """Return the detector that `rbl train data=digits model=small_cnn epochs=... learning_rate=3e-3` makes."""
    samples = load_data("digits", "train")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = create_model("small_cnn", in_channels=1, image_size=8, num_classes=10)
    defense = train(
        net, samples, objective, epochs=epochs, learning_rate=3e-3, schedule="one_cycle", device="cpu",
        calibration=load_data("digits", "calibration"),
    )  # fmt: skip
    if not isinstance(defense, Detector):
        raise TypeError(f"{objective} makes no Detector")
    return defense


def on_adversarial_training() -> Detector:
    """Return a Gaussian process on the features of the zoo's adversarially trained net."""
    head = GaussianProcessHead(load_defense("digits/pgd_at"))
    head.fit(load_data("digits", "train"), load_data("digits", "calibration"))
    return head.eval()


@torch.no_grad()
def auc(detector: Detector, clean: Tensor, found: Tensor, wrong: Tensor) -> str:
    """Return the area under the curve of the score, and how many wrong inputs it is about."""
    if not bool(wrong.any()):
        return "none"
    scores = torch.cat([detector.answer(clean)[1], detector.answer(found[wrong])[1]])
    marks = torch.cat([torch.zeros(len(clean)), torch.ones(int(wrong.sum()))])
    return f"{roc_auc_score(marks.numpy(), scores.numpy()):.3f} ({int(wrong.sum())})"


def joint(
    detector: Detector, attack: Attack, held_out: Dataset, x: Tensor, y: Tensor, threat: Lp
) -> tuple[Tensor, Tensor]:
    """Return which samples fall at 5 %, and for each the input that was accepted at the lowest threshold."""
    detector.calibrate(held_out, 0.5)
    low = attack(detector, x, y, threat)
    detector.calibrate(held_out, 0.05)
    found = attack(detector, x, y, threat)
    return found.success, torch.where(low.success.reshape(-1, 1, 1, 1), low.x_adv, found.x_adv)


def row(detector: Detector, test: Dataset, count: int, threat: Lp) -> list[str]:
    """Return the entries of one line of the table."""
    held_out, whole = load_data("digits", "calibration"), test.images
    with torch.no_grad():
        cells = [f"{100 * (labels_of(detector(whole)) == test.labels).double().mean():.1f}"]
        for rate in RATES:
            detector.calibrate(held_out, rate)
            cells.append(f"{100 * (predict(detector, whole) != ABSTAIN).double().mean():.1f}")
    detector.calibrate(held_out, 0.05)
    x, y = test.images[:count], test.labels[:count]
    with torch.no_grad():
        good, bare = predict(detector, x) == y, Undefended(detector)
    robust: list[str] = [f"{100 * good.double().mean():.1f}"]
    x, y = x[good], y[good]
    for attack in PLAIN.values():
        found = attack(bare, x, y, threat)
        cells.append(auc(detector, whole, found.x_adv, found.success))
        with torch.no_grad():
            answers = predict(detector, found.x_adv)
        robust.append(f"{100 * ((answers == ABSTAIN) | (answers == y)).sum() / count:.1f}")
    fallen = torch.zeros_like(y, dtype=torch.bool)
    for kind in (RejectionAware(), HighConfidenceLowUncertainty()):
        if kind.needs is None or not isinstance(detector, kind.needs):
            cells.append("-")
            continue
        success, lowest = joint(detector, kind, held_out, x, y, threat)
        cells.append(auc(detector, whole, lowest, success))
        fallen |= success
    robust.append(f"{100 * (~fallen).sum() / count:.1f}")
    return cells + robust


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=200, help="test images that are attacked")
    parser.add_argument("--eps", type=float, default=0.15)
    parser.add_argument("--norm", default="linf", choices=["linf", "l2"])
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--defenses", nargs="*", default=[*DEFENSES, "gaussian_process on pgd_at"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    makers: dict[str, Callable[[], Detector]] = {
        name: partial(trained, objective, options.epochs) for name, objective in DEFENSES.items()
    }
    makers["gaussian_process on pgd_at"] = on_adversarial_training
    threat, test = Lp(options.norm, options.eps), load_data("digits", "test")
    table = Table(title=f"digits, {options.norm} {options.eps:g}, {options.images} images attacked; per cent, AUC")
    heads = ["defense", "clean", *(f"coverage {100 * rate:g} %" for rate in RATES)]
    heads += ["AUC FGSM", "AUC PGD", "AUC joint", "AUC HCLU"]
    for head in [*heads, "right & accepted", "robust FGSM", "robust PGD", "robust joint", "s"]:
        table.add_column(head)
    for name in options.defenses:
        start = time.process_time()
        cells = row(makers[name](), test, options.images, threat)
        table.add_row(name, *cells, f"{time.process_time() - start:.0f}")
    Console(width=200).print(table)


if __name__ == "__main__":
    main()
