"""Rotations, translations and deformations: the grid's speed beside foolbox's, and what each attack finds.

    RBL_DATA=... OMP_NUM_THREADS=1 python benchmarks/spatial.py [--parts speed,search,flows] [--images 100]

speed: median over paired runs of foolbox's process time / ours on the 775-point grid, and the share that falls to each
(foolbox shifts in the turned frame, by (n - 1) / n of a pixel for each of ours, so the two grids differ a little).
search: the share that falls to the grid, to the worst of uniform draws and to gradient ascent, each with about as many
forward passes as the grid, and with ten; +/- count the samples that only this one, or only the grid, fools.
flows: the share that falls within each displacement, under a budget, and of the minimum-norm attacks by thresholding.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable

import foolbox
import torch
from torch import Tensor, nn

from robustbench_lite.attacks import ADef, Attack, FlowPGD, RotationTranslationGrid, RotationTranslationPGD, STAdv
from robustbench_lite.core.models import predict
from robustbench_lite.core.spatial import Deformation, RotationTranslation
from robustbench_lite.data import load_data
from robustbench_lite.zoo import load_defense

NETS = ("mnist/standard", "mnist/pgd_at_0.3")
TURNS = [RotationTranslation(30, 3), RotationTranslation(15, 1.5), RotationTranslation(10, 1)]
FLOWS = (0.5, 1.0, 1.5, 2.0, 3.0)
SEARCHES = {
    "grid, 775 points": RotationTranslationGrid(),
    "worst of 775": RotationTranslationGrid(worst_of=775),
    "PGD, 19 runs of 40 steps": RotationTranslationPGD(restarts=19),
    "worst of 10": RotationTranslationGrid(worst_of=10),
    "PGD, one run of 9 steps": RotationTranslationPGD(steps=9),
}
DEFORMATIONS = {"ADef": ADef(), "stAdv": STAdv(), "stAdv, tau 0.001": STAdv(tau=0.001), "FlowPGD": FlowPGD()}


def correct(name: str, images: int) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a net of the zoo, and the first test images that it gets right, with their labels."""
    data, net = load_data("mnist"), load_defense(name).eval()
    x, y = data.images[: 2 * images], data.labels[: 2 * images]
    with torch.no_grad():
        right = (predict(net, x) == y).nonzero().flatten()[:images]
    return net, x[right], y[right]


def timed(run: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Return the process time in seconds, and what was found."""
    start = time.process_time()
    found = run()
    return time.process_time() - start, found


def foolbox_grid(net: nn.Module, x: Tensor, y: Tensor, threat: RotationTranslation) -> Tensor:
    """Return bool (B,): foolbox's grid of the same size fools the sample."""
    peer = foolbox.attacks.SpatialAttack(threat.pixels, threat.degrees, num_translations=5, num_rotations=31)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")
        success: Tensor = peer(model, x, foolbox.criteria.Misclassification(y))[2]
    return success


def speed(images: int, repeats: int) -> None:
    """Print the ratio of times for large and small batches."""
    print(f"{'net':18} {'threat':30} {'images':>6} {'foolbox/ours':>12} {'ours ms':>8} {'ours fell':>9} {'foolbox':>8}")
    for name in NETS:
        net, x, y = correct(name, images)
        for threat in TURNS:
            for count in sorted({10, images}):
                part, labels = x[:count], y[:count]
                pairs = [
                    (
                        timed(lambda n=net, p=part, t=labels, h=threat: foolbox_grid(n, p, t, h)),
                        timed(lambda n=net, p=part, t=labels, h=threat: RotationTranslationGrid()(n, p, t, h).success),
                    )
                    for _ in range(repeats)
                ]
                ratio = statistics.median(theirs[0] / ours[0] for theirs, ours in pairs)
                ms = 1e3 * statistics.median(ours[0] for _, ours in pairs)
                fell, peer = (found.double().mean() for found in (pairs[0][1][1], pairs[0][0][1]))
                print(
                    f"{name:18} {threat.name:30} {count:6} {ratio:12.2f} {ms:8.1f} {fell:9.1%} {peer:8.1%}", flush=True
                )


def search(images: int) -> None:
    """Print what grid, random draws and gradients find."""
    for name in NETS:
        net, x, y = correct(name, images)
        for threat in TURNS:
            grid: Tensor | None = None
            for label, attack in SEARCHES.items():
                result = attack(net, x, y, threat)
                grid = result.success if grid is None else grid
                more, fewer = (result.success & ~grid).sum(), (grid & ~result.success).sum()
                share, passes = result.success.double().mean(), result.forwards.double().mean()
                print(
                    f"{name:18} {threat.name:30} {label:26} {share:6.1%} +{more:<3} -{fewer:<3} {passes:6.1f} forwards"
                )


def flows(images: int, smoothness: float) -> None:
    """Print the share that falls within each displacement."""
    print(f"smoothness {smoothness:g}; columns: largest displacement in pixels {FLOWS}; the mean of the nearest found")
    for name in NETS:
        net, x, y = correct(name, images)
        for label, attack in DEFORMATIONS.items():
            found = [attack(net, x, y, Deformation(size, smoothness)).success for size in FLOWS]
            print(f"{name:18} {label:18} budget   {_shares(found)}", flush=True)
            if attack.supports(Deformation(None, smoothness)):
                print(f"{name:18} {label:18} nearest  {_nearest(attack, net, x, y, smoothness)}", flush=True)


def _nearest(attack: Attack, net: nn.Module, x: Tensor, y: Tensor, smoothness: float) -> str:
    distance = attack(net, x, y, Deformation(None, smoothness)).distance
    fallen = distance.isfinite()
    mean = distance[fallen].mean() if fallen.any() else torch.inf
    return f"{_shares([distance <= size for size in FLOWS])}  mean {mean:.2f} over {fallen.double().mean():.1%}"


def _shares(found: list[Tensor]) -> str:
    return " ".join(f"{success.double().mean():6.1%}" for success in found)


def main() -> None:
    """Run the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="speed,search,flows")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--smoothness", type=float, default=1.0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for part in given.parts.split(","):
        if part == "speed":
            speed(given.images, given.repeats)
        elif part == "search":
            search(given.images)
        elif part == "flows":
            flows(given.images, given.smoothness)
        else:
            parser.error(f"--parts are speed, search, flows, got {part!r}")


if __name__ == "__main__":
    main()
