"""Forks evaluations to be killed: importing torch once is quicker than once a kill.

Each line on stdin is a folder: a fresh evaluation that stores there starts in a forked process, whose id is printed;
when it has ended, killed or not, its exit status is printed, and the next line is read.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from evaluation_fakes import Exact, Linear, Shift, linear_data

from robustbench_lite.core.threats import Lp
from robustbench_lite.data.base import Dataset
from robustbench_lite.evaluation import evaluate, samples

BLOCKS, SIZE = 4, 12
SLEEP = 0.01  # in each call of an attack
samples.UNIT = 10  # of many small units of work one is quickly hit


def data() -> Dataset:
    """A few samples in each of several blocks."""
    x, y = linear_data(BLOCKS * SIZE)
    place = torch.arange(BLOCKS * SIZE)
    return Dataset("linear", "test", x, y, place % SIZE + 500 * (place // SIZE), 2)


def run(store: str | None, sleep: float) -> None:
    """Evaluate with two attacks, an honest certifier and a lying one."""
    attacks = [Shift(0.5, sleep=sleep), Shift(sleep=sleep)]
    evaluate(Linear(), data(), Lp("linf", 0.05), attacks, [Exact(), Exact(2.0)], store=store, batch_size=5)


def main() -> None:
    torch.set_num_threads(1)
    run(None, 0.0)  # import everything that is imported late
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            run(line.strip(), SLEEP)
            os._exit(0)
        sys.stdout.write(f"{child}\n")
        sys.stdout.flush()
        sys.stdout.write(f"{os.waitpid(child, 0)[1]}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
