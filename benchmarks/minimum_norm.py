"""FMN, or FarFMN, against minimum-norm attacks of foolbox: the same images and number of steps, on the whole batch.

One line a net, norm and peer: median distances (inf where fewer than half fall), how many images ours, or the peer,
breaks at a smaller distance (an image that one alone breaks counts for it), the p-value of the sign test, and the mean
of our distance over the peer's where both fall. Steps are gradient steps; ours judges its last point as well. FarFMN
splits them over five starts, each of which costs up to 19 more forward passes, EAD over five binary searches; DeepFool
stops by itself, and its steps cost ten gradients each.

    RBL_DATA=... python benchmarks/minimum_norm.py --images 100 --steps 100
    RBL_DATA=... python benchmarks/minimum_norm.py --images 100 --steps 300 --ours FarFMN
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import foolbox
import torch
from nets import DATA, Subject, subjects
from scipy.stats import binomtest
from torch import Tensor

from robustbench_lite.attacks import FMN, FarFMN
from robustbench_lite.core.models import predict
from robustbench_lite.core.threats import Lp
from robustbench_lite.data import load_data
from robustbench_lite.zoo import load_defense

OURS = {"FMN": lambda steps: FMN(steps=steps), "FarFMN": lambda steps: FarFMN(steps=max(1, steps // 5))}
HEADER = "  peer         median     peer falls  peer nearer farther        p  ratio      s   peer"
PEERS: dict[str, dict[str, Callable[[int], Any]]] = {
    "l2": {"DDN": lambda steps: foolbox.attacks.DDNAttack(steps=steps)},
    "linf": {
        "FMN": lambda steps: foolbox.attacks.LInfFMNAttack(steps=steps),
        "DeepFool": lambda steps: foolbox.attacks.LinfDeepFoolAttack(steps=50),
    },
    "l1": {
        "FMN": lambda steps: foolbox.attacks.L1FMNAttack(steps=steps),
        "EAD": lambda steps: foolbox.attacks.EADAttack(
            binary_search_steps=5, steps=max(1, steps // 5), initial_stepsize=0.02, initial_const=1.0
        ),
    },
}


def ibp_subject(images: int) -> Subject:
    """Return the net that is trained with interval bounds, with the images that it gets right."""
    model, data = load_defense("mnist/ibp_0.3").eval(), load_data("mnist", data_dir=DATA).head(2 * images)
    x, y = data.images, data.labels
    right = (predict(model, x) == y).nonzero().flatten()[:images]
    return Subject("mnist/ibp_0.3", True, model, x[right], y[right], 0.3)


def peer_distances(attack: Any, subject: Subject, threat: Lp) -> Tensor:
    """Return the distance at which foolbox's attack breaks each image; +inf where it does not."""
    model = foolbox.PyTorchModel(subject.model, bounds=threat.bounds, device="cpu")
    found = attack.run(model, subject.x, foolbox.criteria.Misclassification(subject.y)).detach()
    fooled = predict(subject.model, found) != subject.y
    return torch.where(fooled & threat.contains(found, subject.x), threat.distance(found, subject.x), torch.inf)


def row(peer: str, ours: Tensor, theirs: Tensor, seconds: tuple[float, float]) -> str:
    """Return one line of the table."""
    same = ((ours - theirs).abs() <= 1e-6 * ours) | (ours.isinf() & theirs.isinf())
    same &= ours.isinf() == theirs.isinf()
    nearer, farther = int(((ours < theirs) & ~same).sum()), int(((ours > theirs) & ~same).sum())
    p = binomtest(nearer, nearer + farther).pvalue if nearer + farther else 1.0
    both = ours.isfinite() & theirs.isfinite() & (theirs > 0)
    ratio = (ours[both] / theirs[both]).mean().item()
    medians = [d.sort().values[(len(d) - 1) // 2].item() for d in (ours, theirs)]
    falls = [int(d.isfinite().sum()) for d in (ours, theirs)]
    counts = f"{falls[0]:5d} {falls[1]:5d} {nearer:6d} {farther:7d} {p:8.1g} {ratio:6.3f}"
    return f"  {peer:10} {medians[0]:8.4f} {medians[1]:8.4f} {counts} {seconds[0]:6.1f} {seconds[1]:6.1f}"


def compare(subject: Subject, norm: str, steps: int, name: str) -> None:
    """Print the lines of one net and norm."""
    threat = Lp(norm, None)
    subject.model.requires_grad_(False)
    start = time.process_time()
    ours = OURS[name](steps)(subject.model, subject.x, subject.y, threat).distance
    spent = time.process_time() - start
    for peer, build in PEERS[norm].items():
        start = time.process_time()
        theirs = peer_distances(build(steps), subject, threat)
        print(row(peer, ours, theirs, (spent, time.process_time() - start)), flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=100, help="images that each net gets right")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--ours", default="FMN", choices=list(OURS))
    parser.add_argument("--norms", nargs="*", default=["l2"], choices=list(PEERS))
    parser.add_argument("--nets", nargs="*", help="names; all where not given")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for subject in [*subjects(options.images), ibp_subject(options.images)]:
        for norm in options.norms if not options.nets or subject.name in options.nets else []:
            print(f"\n{subject.name}, {norm}, {len(subject.x)} images, {options.steps} steps")
            print(HEADER)
            compare(subject, norm, options.steps, options.ours)


if __name__ == "__main__":
    main()
