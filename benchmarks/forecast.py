"""Forecasts beside the truth: passes, time and memory of evaluations, as expected and as they came.

Each run is forecast in one fresh process and evaluated in another, one after the other. Time is that of the methods
(the column `seconds`); memory is the process's at its peak. Ratios are forecast over truth.

    RBL_DATA=... python benchmarks/forecast.py --images 500
"""

from __future__ import annotations

import argparse
import logging
from typing import Any

import torch
from meter import STATUS, in_fresh_process
from nets import DATA

from robustbench_lite.attacks import FGSM, NES, PGD, AutoAttack, RandomNoise, Square
from robustbench_lite.certify import CROWNIBP, IBP, Cascade
from robustbench_lite.core.threats import Lp
from robustbench_lite.data import load_data
from robustbench_lite.evaluation import evaluate
from robustbench_lite.evaluation.forecast import forecast
from robustbench_lite.zoo import load_defense

QUICK: dict[str, Any] = {
    "attacks": [RandomNoise(draws=20), FGSM(), PGD(steps=40, loss="margin")],
    "certifiers": [Cascade(falsifier=PGD(steps=10, loss="margin"))],
}
STANDARD: dict[str, Any] = {"attacks": [RandomNoise(), AutoAttack(), NES()], "certifiers": [CROWNIBP()]}
RUNS: dict[str, tuple[str, float, dict[str, Any]]] = {
    "quick, full, robust": ("digits/pgd_at", 0.1, QUICK),
    "quick, full, not robust": ("digits/standard", 0.1, QUICK),
    "quick, cascade, robust": ("digits/pgd_at", 0.1, QUICK | {"mode": "cascade"}),
    "quick, cascade, certified": ("digits/ibp", 0.1, QUICK | {"mode": "cascade"}),
    "queries, full": ("digits/pgd_at", 0.1, {"attacks": [Square(queries=500), NES()], "certifiers": [IBP()]}),
    "standard, cascade": ("digits/pgd_at", 0.1, STANDARD | {"mode": "cascade"}),
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=list(RUNS))
    options = parser.parse_args()
    print("forecast / truth           calibration   forwards              backwards             seconds            MiB")
    for run in options.runs:
        expected, took = in_fresh_process(_forecast, run, options.images)
        truth = in_fresh_process(_truth, run, options.images)
        pairs = zip(expected, truth, strict=True)
        shown = (f"{a:9,.0f} /{b:9,.0f} {a / b:5.2f}" if b else f"{'-':>25s}" for a, b in pairs)
        print(f"{run:26s} {took:6.1f} s    {'  '.join(shown)}", flush=True)


def _given(run: str, images: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    torch.set_num_threads(1)
    logging.disable()
    entry, eps, settings = RUNS[run]
    name = entry.partition("/")[0]
    data = load_data(name, data_dir=DATA).head(images)
    return (load_defense(entry, data_dir=DATA).eval(), data, Lp("linf", eps)), settings | {"device": "cpu"}


def _forecast(run: str, images: int) -> tuple[list[float], float]:
    """Return forwards, backwards, seconds and MiB as forecast, and the seconds that this took."""
    arguments, settings = _given(run, images)
    found = forecast(*arguments, **settings)
    total = found.total
    numbers = [total.forwards, total.backwards, 60 * total.minutes, (total.peak or 0) / 2**20]
    return [float(number) for number in numbers], found.seconds


def _truth(run: str, images: int) -> list[float]:
    """Return forwards, backwards, seconds and MiB of the evaluation itself."""
    arguments, settings = _given(run, images)
    sums = evaluate(*arguments, **settings).records[["forwards", "backwards", "seconds"]].sum()
    peak = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return [*(float(number) for number in sums), int(peak.split()[1]) / 1024]


if __name__ == "__main__":
    main()
