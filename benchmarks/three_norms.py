"""The three-norm table: defenses that were made for one norm, under the others too.

Accuracy under the worst of PGD (40 steps, 2 restarts, margin loss), QuickAutoAttack and Square (1,000 queries), where
they support the norm, FMN and FarFMN, in l0 Foolbox's Pointwise attack, and what the defense names in
`adaptive_attacks`; `all` is the share that no attack in any of the norms brings down. An attack sees the samples that
still stand. Medians are those of the smallest l2 distance that the attacks without a budget find, over fewer images (a
wrong answer to the clean image is a distance of 0); `--norms` without a norm measures them alone.

`--suite short` is for defenses that are slow to answer: of the attacks above PGD (40 steps, one start), FMN, FarFMN,
Pointwise and what the defense names; `--suite own` for those that take 50 ms (ABS): Pointwise and what the defense
names.

    RBL_DATA=... python benchmarks/three_norms.py --images 1000 --medians 100
    RBL_DATA=... python benchmarks/three_norms.py --entries nearest_neighbour --suite short
    RBL_DATA=... python benchmarks/three_norms.py --entries abs binary_abs --suite own

What a store holds already is not computed again.
"""

from __future__ import annotations

import argparse
import time

import torch
from fallen import fallen
from nets import DATA
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from robustbench_lite.attacks import FMN, PGD, FarFMN, FoolboxAttack, QuickAutoAttack, Square
from robustbench_lite.attacks.base import Attack
from robustbench_lite.core.models import predict
from robustbench_lite.core.threats import Lp
from robustbench_lite.data import load_data
from robustbench_lite.data.base import Dataset
from robustbench_lite.defenses.base import Wrapper
from robustbench_lite.evaluation import evaluate
from robustbench_lite.zoo import load_defense

ENTRIES = ("standard", "pgd_at_0.3", "pgd_at_l2_2", "abs", "binary_abs", "ibp_0.3", "nearest_neighbour")
BUDGETS = {"linf": 0.3, "l2": 2.0, "l1": 10.0, "l0": 12.0}
SUITES: dict[str, list[Attack]] = {
    "full": [PGD(loss="margin", restarts=2), FMN(), FarFMN(steps=100), QuickAutoAttack(), Square(queries=1000)],
    "short": [PGD(loss="margin"), FMN(), FarFMN()],
    "own": [],
}
POINTWISE = FoolboxAttack("PointwiseAttack")
UNLIMITED = Lp("l2", None)


def accuracies(model: nn.Module, data: Dataset, norms: list[str], options: argparse.Namespace) -> list[str]:
    """Return the accuracy in each norm, and against all of them, in per cent."""
    down = []
    for norm in norms:
        threat = Lp(norm, options.eps.get(norm, BUDGETS[norm]))
        attacks = [attack for attack in SUITES[options.suite] if attack.supports(threat)]
        attacks += [POINTWISE] * (norm == "l0")
        report = evaluate(model, data, threat, attacks, mode="cascade", batch_size=100, store=options.store)
        down.append(fallen(report))
    down += [set[int]().union(*down)] * bool(norms)
    return [f"{100 * (1 - len(found) / len(data)):.1f}" for found in down]


def median(model: nn.Module, data: Dataset, suite: str, console: Console) -> str:
    """Return the median over the images of the distance in l2 to the nearest example that an attack finds."""
    own = model.adaptive_attacks(UNLIMITED) if isinstance(model, Wrapper) else []
    general: list[Attack] = [] if suite == "own" else [FMN(steps=200), FarFMN(steps=100)]
    attacks = [attack for attack in [*general, *own] if attack.supports(UNLIMITED)]
    nearest, cell = torch.empty(0, dtype=torch.float64), "-"
    for part in torch.arange(len(data)).split(100):
        nearest = torch.cat([nearest, distances(model, data.take(part), attacks)])
        cell = f"{nearest.sort().values[(len(nearest) - 1) // 2]:.2f}"
        console.print(f"median l2 of the first {len(nearest)}: {cell}", style="dim", highlight=False)
    return cell


def distances(model: nn.Module, data: Dataset, attacks: list[Attack]) -> Tensor:
    """Return the distance of each image to the nearest example that an attack finds in l2, float64 (B,)."""
    x, y, view = data.images, data.labels, model.attack_view() if isinstance(model, Wrapper) else None
    with torch.no_grad():
        nearest = torch.where(predict(model, x) == y, torch.inf, 0.0).double()
    for attack in attacks:
        nearest = torch.minimum(nearest, attack(model, x, y, UNLIMITED, view=view, indices=data.indices).distance)
    return nearest


def budget(text: str) -> tuple[str, float]:
    """Read NORM=EPS."""
    norm, eps = text.split("=")
    return norm, float(eps)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="mnist", choices=["digits", "mnist"])
    parser.add_argument("--images", type=int, default=1000, help="seeded test images")
    parser.add_argument("--medians", type=int, default=100, help="the first of them, for the medians; 0: none")
    parser.add_argument("--entries", nargs="*", default=ENTRIES)
    parser.add_argument("--norms", nargs="*", default=list(BUDGETS), choices=list(BUDGETS))
    parser.add_argument("--suite", default="full", choices=list(SUITES))
    parser.add_argument("--eps", nargs="*", type=budget, default=[], help=f"NORM=EPS; default: {BUDGETS}")
    parser.add_argument("--store", help="a folder that keeps the rows")
    options = parser.parse_args()
    options.eps = dict(options.eps)
    torch.set_num_threads(1)
    data = load_data(options.data, data_dir=DATA).sample(options.images, seed=0)
    title = f"{options.data}, {len(data)} images, {options.suite} suite"
    console, heads = Console(width=120), [f"{norm} {options.eps.get(norm, BUDGETS[norm]):g}" for norm in options.norms]
    heads += ["all"] * bool(heads)
    heads += ["median l2"] * bool(options.medians)
    table = Table("defense", "clean", *heads, "s", title=title)
    for name in options.entries:
        start = time.process_time()
        model = load_defense(f"{options.data}/{name}", data_dir=DATA).eval()
        clean = fallen(evaluate(model, data, Lp("linf", 0.1), [], adaptive=False, batch_size=100))
        cells = [name, f"{100 * (1 - len(clean) / len(data)):.1f}", *accuracies(model, data, options.norms, options)]
        if options.medians:
            cells += [median(model, data.take(slice(options.medians)), options.suite, console)]
        cells += [f"{time.process_time() - start:.0f}"]
        console.print("  ".join(cells), style="dim", highlight=False)
        table.add_row(*cells)
    console.print(table)


if __name__ == "__main__":
    main()
