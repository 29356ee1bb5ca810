"""Analysis by synthesis: accuracy, time, bounds against each other and against attacks.

Clean accuracy on seeded test images and milliseconds an image; the mean l2 estimates of the paper's bound and of the
better one, on test images that are classified correctly, and their ratio; how many perturbations of 0.95 of the better
bound, one towards each other class's worst reconstruction, change the class (none should); the median l2 distance that
each adaptive attack finds, and on how many images one of them comes nearer than the better bound (none should).

    RBL_DATA=... python benchmarks/abs_bounds.py --entry mnist/abs --clean 1000 --bounds 100 --attacked 50
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from nets import DATA
from torch import Tensor

from robustbench_lite.core.threats import Lp
from robustbench_lite.data import load_data
from robustbench_lite.data.base import Dataset
from robustbench_lite.defenses.abs import ABS
from robustbench_lite.defenses.abs_bound import FORMS, ABSBound
from robustbench_lite.zoo import load_defense

SHARE = 0.95


def clean(model: ABS, data: Dataset) -> None:
    """Print the accuracy and the time of an inference."""
    start = time.process_time()
    model.predict(data.images[:1])
    first, start = time.process_time() - start, time.process_time()
    answers = torch.cat([model.predict(part) for part in data.images.split(100)])
    spent = 1000 * (time.process_time() - start) / len(data)
    accuracy = 100 * (answers == data.labels).double().mean()
    print(f"clean {accuracy:.2f} % of {len(data)}; {spent:.1f} ms an image, {first:.1f} s once", flush=True)


def bounds(model: ABS, x: Tensor, y: Tensor) -> None:
    """Print the means of all forms in l2, and check the better one along worst directions."""
    means = {}
    for form in FORMS:
        estimate = ABSBound(form)(model, x, y, Lp("l2", 1)).estimate
        means[form] = float(estimate.mean()) if estimate is not None else 0.0
        print(f"{form:10} mean l2 estimate {means[form]:.3f} over {len(x)} images", flush=True)
    print(
        f"linear / paper {means['linear'] / means['paper']:.2f}, / lipschitz {means['linear'] / means['lipschitz']:.2f}"
    )
    for norm in ("l2", "linf", "l1"):
        flipped, tried = flips(model, x, y, norm)
        print(f"{norm:4} at {SHARE} of the bound {flipped} of {tried} worst directions change the class", flush=True)


def flips(model: ABS, x: Tensor, y: Tensor, norm: str) -> tuple[int, int]:
    """Return how many perturbations towards the rivals change the class, and how many there are: K - 1 an image."""
    rivals, own = ABSBound().rivals(model, x, norm), model.reconstruct(x)[torch.arange(len(x)), y]
    radius = SHARE * rivals.radii.amin(dim=1).clamp_min(0).view(-1, 1, 1, 1)
    changed = tried = 0
    for label in range(rivals.radii.shape[1]):
        other = y != label
        towards = Lp(norm, None).steepest(rivals.images[other, label] - own[other])
        answers = model.predict(x[other] + radius[other] * towards)
        changed, tried = changed + int((answers != y[other]).sum()), tried + int(other.sum())
    return changed, tried


def attacks(model: ABS, x: Tensor, y: Tensor) -> None:
    """Print the median distance of each adaptive attack, and hold the better bound against the nearest of them."""
    threat, nearest = Lp("l2", None), torch.full((len(x),), torch.inf, dtype=torch.float64)
    for attack in model.adaptive_attacks(threat):
        start = time.process_time()
        distance = attack(model, x, y, threat, view=model.attack_view()).distance
        nearest = torch.minimum(nearest, distance)
        spent = (time.process_time() - start) / len(x)
        print(f"{attack}: median l2 {float(distance.median()):.3f}, {spent:.1f} s an image", flush=True)
    bound = ABSBound()(model, x, y, threat).estimate
    below = int((nearest < bound).sum()) if bound is not None else 0
    print(f"nearest: median l2 {float(nearest.median()):.3f}; nearer than the better bound on {below} of {len(x)}")


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--entry", default="mnist/abs")
    parser.add_argument("--root", type=Path, help="another zoo's folder")
    parser.add_argument("--clean", type=int, default=1000, help="images")
    parser.add_argument("--bounds", type=int, default=100, help="images")
    parser.add_argument("--attacked", type=int, default=50, help="images")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = load_defense(options.entry, root=options.root)
    if not isinstance(model, ABS):
        raise SystemExit(f"{options.entry} is no ABS")
    model.requires_grad_(False)
    data = load_data(options.entry.partition("/")[0], data_dir=DATA)
    clean(model, data.sample(options.clean, seed=0))
    few = data.sample(2 * max(options.bounds, options.attacked), seed=1)
    right = (model.predict(few.images) == few.labels).nonzero().flatten()
    x, y = few.images[right], few.labels[right]
    if options.bounds:
        bounds(model, x[: options.bounds], y[: options.bounds])
    if options.attacked:
        attacks(model, x[: options.attacked], y[: options.attacked])


if __name__ == "__main__":
    main()
