"""Deep k-nearest neighbours: what its credibility tells apart, and what its own attack leaves of it.

The zoo's defense meets adversarial examples of its bare net (FGSM at linf 0.25, Carlini and Wagner's l2: the nearest,
and the nearest that lead by 10 logits; Foolbox makes those, in batches of 100), and those of `DeepKNNAttack` on the
defense: the nearest that it accepts at its threshold, and the nearest that are as credible as half of the clean
calibration images (a threshold with a false-positive rate of 50 %).
One line a kind of input: accuracy of the net; accuracy of the neighbours; share of inputs that are wrong and accepted
at the rate of 5 %; then, of the successes alone (a failure leaves the clean image), their number; mean credibility;
ROC-AUC of the credibility, clean against these; mean l2 distance, and the same over that of Carlini and Wagner's
examples, where both succeed.

    python benchmarks/deep_knn.py --data digits
    RBL_DATA=... python benchmarks/deep_knn.py --data mnist --images 100 --steps 200
    RBL_DATA=... python benchmarks/deep_knn.py --data mnist --images 1000 --also
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import foolbox
import torch
from nets import DATA
from rich.console import Console
from rich.table import Table
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from robustbench_lite.attacks import FGSM, DeepKNNAttack
from robustbench_lite.core.models import predict
from robustbench_lite.core.results import AttackResult
from robustbench_lite.core.threats import Lp
from robustbench_lite.data import load_data
from robustbench_lite.defenses import DeepKNN
from robustbench_lite.zoo import load_defense

UNLIMITED = Lp("l2", None)
COLUMNS = ("input", "net %", "neighbours %", "fooled %", "successes", "credibility", "AUC", "l2", "/ C&W", "s")


@dataclass(frozen=True)
class Inputs:
    """Inputs of one kind: points (B, C, H, W), which of them count as successes, bool (B,), and seconds."""

    points: Tensor
    success: Tensor
    seconds: float


def points_and_success(result: AttackResult) -> tuple[Tensor, Tensor]:
    """Return the points (B, C, H, W), and which of them are successes."""
    return result.x_adv, result.success


def carlini_wagner(net: nn.Module, x: Tensor, y: Tensor, confidence: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return examples (B, C, H, W) that are to lead by so many logits, and which of them get another label."""
    attack = foolbox.attacks.L2CarliniWagnerAttack(
        binary_search_steps=6, steps=300, stepsize=0.02, initial_const=1.0, confidence=confidence
    )
    model, points = foolbox.PyTorchModel(net, bounds=(0, 1), device=x.device), []
    for images, labels in zip(x.split(100), y.split(100), strict=True):
        points.append(attack(model, images, foolbox.Misclassification(labels), epsilons=None)[0])
    found = torch.cat(points)
    return found, predict(net, found) != y


def examples(defense: DeepKNN, x: Tensor, y: Tensor, options: argparse.Namespace) -> dict[str, Inputs]:
    """Return the kinds of inputs; where an attack fails, the clean image."""
    held_out = load_data(options.data, split="calibration", data_dir=DATA)
    attack = DeepKNNAttack(steps=options.steps, judge_every=options.judge_every)
    found = {"clean": Inputs(x, torch.ones_like(y, dtype=torch.bool), 0.0)}

    def add(name: str, work: Callable[[], tuple[Tensor, Tensor]]) -> None:
        start = time.process_time()
        found[name] = Inputs(*work(), time.process_time() - start)

    add("FGSM linf 0.25", lambda: points_and_success(FGSM()(defense.net, x, y, Lp("linf", 0.25), stop="never")))
    add("C&W l2", lambda: carlini_wagner(defense.net, x, y))
    if "confident" in options.also:
        add("C&W l2, confident", lambda: carlini_wagner(defense.net, x, y, confidence=10.0))
    rates = {"DeepKNNAttack, accepted": 0.05, "DeepKNNAttack, as credible": 0.5} if "own" in options.also else {}
    for name, rate in rates.items():
        defense.calibrate(held_out, rate)
        add(name, lambda: points_and_success(attack(defense, x, y, UNLIMITED)))
    defense.calibrate(held_out, 0.05)
    return found


def table(defense: DeepKNN, x: Tensor, y: Tensor, options: argparse.Namespace) -> Table:
    """Return the lines of all kinds of inputs."""
    kinds, clean = examples(defense, x, y, options), defense.credibility(x)
    about = f"k = {defense.k}, {len(defense.reference_labels)} references, threshold {1 - float(defense.threshold):.3f}"
    lines = Table(*COLUMNS, title=f"{options.data}, {len(x)} images, {about}")
    for name, inputs in kinds.items():
        answers = predict(defense, inputs.points)
        shares = (
            predict(defense.net, inputs.points) == y,
            defense(inputs.points).argmax(dim=1) == y,
            (answers >= 0) & (answers != y),
        )
        lines.add_row(
            name,
            *(f"{100 * share.double().mean():.1f}" for share in shares),
            str(int(inputs.success.sum())),
            *of_successes(defense, x, clean, inputs, kinds["C&W l2"]),
            f"{inputs.seconds:.0f}",
        )
    return lines


def of_successes(
    defense: DeepKNN, x: Tensor, clean: Tensor, inputs: Inputs, reference: Inputs
) -> tuple[str, str, str, str]:
    """Return mean credibility, AUC, mean l2 distance and its ratio to the reference's; "-" where there is none."""
    if not inputs.success.any():
        return "-", "-", "-", "-"
    credibility = defense.credibility(inputs.points[inputs.success])
    truth = [1] * len(clean) + [0] * len(credibility)
    area = roc_auc_score(truth, torch.cat([clean, credibility]).tolist())
    distance, other = (UNLIMITED.distance(one.points, x) for one in (inputs, reference))
    both = inputs.success & reference.success
    ratio = f"{distance[both].mean() / other[both].mean():.2f}" if both.any() else "-"
    return f"{credibility.mean():.3f}", f"{area:.3f}", f"{distance[inputs.success].mean():.3f}", ratio


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="digits", choices=["digits", "mnist"])
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument(
        "--also", nargs="*", default=["confident", "own"], choices=["confident", "own"], help="slow kinds"
    )
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--judge-every", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    test = load_data(options.data, data_dir=DATA).sample(options.images, seed=0)
    defense = load_defense(f"{options.data}/deep_knn", data_dir=DATA).eval()
    assert isinstance(defense, DeepKNN)
    Console(width=120).print(table(defense, test.images, test.labels, options))


if __name__ == "__main__":
    main()
