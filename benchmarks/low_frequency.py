"""Low frequencies against pixels, at equal budgets and on the same samples: NES, evolution strategies, Boundary.

For each net, threat and attack, one line for each basis: how many samples fall, the median queries over all samples
(inf where fewer than half fall), and, sample by sample on those that fall to both, the median ratio of the queries of
the first line to those of this one. `+` and `-` count the samples that only this line, or only the first, fools, with
the p-value of McNemar's exact test. `l2` is the median length of the changes that fool.

    RBL_DATA=... python benchmarks/low_frequency.py --images 50 --budget 2000
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

import torch
from nets import Subject, subjects
from scipy.stats import binomtest

from robustbench_lite.attacks import (
    CMAES,
    DCT,
    NES,
    Attack,
    Boundary,
    EvolutionStrategy,
    FoolboxAttack,
    LowFrequencyBoundary,
    LowFrequencyNES,
    OpenAIES,
    Pixels,
    RankNES,
)
from robustbench_lite.core.results import AttackResult
from robustbench_lite.core.threats import Lp

FRACTIONS = {"1/7": 1 / 7, "2/7": 2 / 7, "4/7": 4 / 7, "1": 1.0}
THREATS = {
    "mnist/standard": [Lp("linf", 0.1), Lp("l2", 1.5)],
    "mnist/pgd_at_0.3": [Lp("l2", 2.0)],
    "cifar/resnet2b_at": [Lp("linf", "4/255"), Lp("l2", 0.4)],
    "cifar/resnet20": [Lp("linf", "2/255"), Lp("l2", 0.3)],
}
Lines = list[tuple[str, Attack]]


def families(threat: Lp) -> dict[str, Lines]:
    """Return the attacks to compare under a threat; the first line of each family is what the others are held to."""
    low = [(f"low, {name}", LowFrequencyNES(basis=DCT(fraction))) for name, fraction in FRACTIONS.items()]
    found: dict[str, Lines] = {"NES": [("pixels", NES()), *low]}
    basis = DCT(2 / 7)
    found["strategies, DCT 2/7"] = [
        ("NES, steps in the ball", NES(basis=basis)),
        ("OpenAI-ES", EvolutionStrategy(OpenAIES(), basis)),
        ("rank-shaped NES", EvolutionStrategy(RankNES(), basis)),
        ("CMA-ES", EvolutionStrategy(CMAES(), basis)),
    ]
    found["strategies, pixels"] = [
        ("NES, steps in the ball", NES()),
        ("OpenAI-ES", EvolutionStrategy(OpenAIES(), Pixels())),
        ("rank-shaped NES", EvolutionStrategy(RankNES(), Pixels())),
    ]
    if threat.norm == "l2":
        walks: Lines = [
            (f"low, {name}", replace(LowFrequencyBoundary(), basis=DCT(f))) for name, f in FRACTIONS.items()
        ]
        found["Boundary"] = [("pixels", Boundary()), ("Foolbox's", FoolboxAttack("BoundaryAttack")), *walks]
    return found


def compare(subject: Subject, threat: Lp, lines: Lines, budget: int) -> None:
    """Run each line, and print its row."""
    first: AttackResult | None = None
    for name, attack in lines:
        start = time.process_time()
        result = attack(subject.model, subject.x, subject.y, threat, max_queries=budget)
        first = result if first is None else first
        print(row(name, first, result, subject, time.process_time() - start), flush=True)


def row(name: str, first: AttackResult, result: AttackResult, subject: Subject, seconds: float) -> str:
    """Return one line of the table."""
    queries = torch.where(result.success, result.first_success.double(), torch.inf)
    before = torch.where(first.success, first.first_success.double(), torch.inf)
    both = result.success & first.success
    ratio = (before[both] / queries[both]).quantile(0.5).item() if both.any() else float("nan")
    gained, lost = int((result.success & ~first.success).sum()), int((first.success & ~result.success).sum())
    p = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    length = (result.x_adv - subject.x).flatten(1).norm(dim=1)[result.success]
    median = length.quantile(0.5).item() if len(length) else float("nan")
    share, middle = result.success.double().mean().item(), queries.sort().values[(len(queries) - 1) // 2].item()
    found = f"{share:6.0%} {middle:8.0f} {ratio:7.2f} {gained:4d} {lost:4d} {p:8.1g}"
    return f"  {name:24} {found} {median:7.2f} {seconds:6.0f}"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=50, help="images that each net gets right")
    parser.add_argument("--budget", type=int, default=2000, help="forward passes a sample")
    parser.add_argument("--nets", nargs="*", default=["mnist/standard", "cifar/resnet2b_at"], choices=list(THREATS))
    parser.add_argument("--families", nargs="*", default=["NES", "strategies", "Boundary"], help="what to compare")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for subject in subjects(options.images):
        for threat in THREATS[subject.name] if subject.name in options.nets else []:
            for family, lines in families(threat).items():
                if family.split(",")[0] not in options.families:
                    continue
                print(f"\n{subject.name}, {threat.norm} {threat.size:.3g}, {options.budget} queries: {family}")
                print(
                    f"  {'':24} {'falls':>6} {'median':>8} {'ratio':>7} {'+':>4} {'-':>4} {'p':>8} {'l2':>7} {'s':>6}"
                )
                compare(subject, threat, lines, options.budget)


if __name__ == "__main__":
    main()
