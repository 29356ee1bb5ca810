"""Proof prunes attack: one evaluation in cascade mode with proofs first, and one by attacks alone, in one process.

Both by the attacks of the suite `standard` (noise, AutoAttack, NES) in the same threat, on the same seeded images; the
first with the cascade of bounds, and the share of proven samples that the audit attacks all the same. CPU seconds of
each, their ratio, both accuracies under the worst case (they must agree), what was proven, and the share of the
attacks' work that proofs made needless.

    RBL_DATA=... python benchmarks/pruning.py --entry mnist/ibp_0.3 --eps 0.3 --images 1000
"""

from __future__ import annotations

import argparse
import time

import torch
from nets import DATA

from robustbench_lite.attacks import NES, PGD, AutoAttack, RandomNoise
from robustbench_lite.certify import Cascade
from robustbench_lite.core.threats import Lp
from robustbench_lite.data import load_data
from robustbench_lite.evaluation import evaluate
from robustbench_lite.zoo import load_defense


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--entry", default="mnist/ibp_0.3")
    parser.add_argument("--eps", type=float, default=0.3)
    parser.add_argument("--images", type=int, default=1000, help="seeded test images")
    parser.add_argument("--audit", type=float, default=0.05)
    options = parser.parse_args()
    torch.set_num_threads(1)
    name = options.entry.partition("/")[0]
    model = load_defense(options.entry, data_dir=DATA).eval()
    data, threat = load_data(name, data_dir=DATA).sample(options.images, seed=0), Lp("linf", options.eps)
    attacks = [RandomNoise(), AutoAttack(), NES()]
    seconds, rows = [], []
    for certifiers in ([Cascade(falsifier=PGD(steps=10, loss="margin"))], []):
        start = time.process_time()
        report = evaluate(model, data, threat, attacks, certifiers, mode="cascade", audit=options.audit)
        seconds.append(time.process_time() - start)
        rows.append(report.summary().iloc[0])
    pruned, plain = rows
    print(f"{options.entry}, linf {options.eps:g}, {len(data)} images, audit {options.audit:g}")
    print(f"proofs first {seconds[0]:.0f} s, attacks alone {seconds[1]:.0f} s, ratio {seconds[1] / seconds[0]:.1f}")
    worst = f"{100 * pruned['worst_case']:.1f} % and {100 * plain['worst_case']:.1f} %"
    print(f"robust {worst}, certified {100 * pruned['certified']:.1f} %, spared {100 * pruned['spared']:.1f} %")


if __name__ == "__main__":
    main()
