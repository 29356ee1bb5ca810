"""Query attacks keep within a memory budget, however many draws they are asked for."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from robustbench_lite.core.memory import PER_PROBE, Memory

ATTACKS = [
    "NES(samples=600, queries=1300)",
    "SPSA(samples=600)",
    "FiniteDifferences(coordinates=600)",
    "EvolutionStrategy(RankNES(population=100), Pixels())",
    "EvolutionStrategy(CMAES(), DCT(0.3))",
    "NESPartialInformation(samples=600, queries=1300)",
    "NESLabelOnly(samples=20, m=60, queries=1300)",
    "Square(queries=30)",
    "Bandits(queries=60)",
    "SimBA(queries=60)",
    "HopSkipJump(queries=1300)",
    "Boundary(queries=100)",
    "RandomNoise(draws=30)",
    "RotationTranslationGrid(worst_of=200000)",
    "LowFrequencyNES(samples=600, queries=1300)",
    "LowFrequencyBoundary(queries=100)",
    "PGD(steps=2, estimator=NESEstimator(samples=600))",
]

SCRIPT = """
import resource, sys, torch
from torch import nn
from robustbench_lite.attacks import *
from robustbench_lite.core.models import predict
from robustbench_lite.core.spatial import RotationTranslation
from robustbench_lite.core.threats import Lp

torch.set_num_threads(1)
torch.manual_seed(0)
net = nn.Sequential(
    nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 10)
)
x = torch.rand(16, 3, 32, 32)
y = predict(net, x)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # bytes, as Linux counts

attack = eval(sys.argv[1])
threat = next(t for t in (Lp("linf", 0.001), Lp("l2", 0.01), RotationTranslation(0.1, 0.01)) if attack.supports(t))
attack(net, x[:2], y[:2], threat, max_queries=40)  # what is loaded on first use is not the attack's
before = peak()
result = attack(net, x, y, threat, max_queries=1300, memory_budget=int(sys.argv[2]))
print(peak() - before, int(result.forwards.max()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.skipif(sys.platform != "linux", reason="counts resident memory as Linux does")
def test_a_query_attack_keeps_within_its_budget(attack):
    """16 images of 3 x 32 x 32; 600 draws at once would take 118 MB as images alone."""
    budget = 48 * 2**20
    done = subprocess.run([sys.executable, "-c", SCRIPT, attack, str(budget)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    grown, forwards = map(int, done.stdout.split())
    assert forwards > 20
    assert grown < budget


def test_a_chunk_is_never_empty_and_a_budget_is_a_number_of_bytes():
    x = torch.rand(5, 1, 4, 4)
    memory = Memory(1, x)
    assert memory.ask(lambda part: (x[part].flatten(1),), 5)[0].shape == (5, 16)
    assert memory.capacity == 1
    with pytest.raises(ValueError, match="number of bytes"):
        Memory(0, x)


def test_what_an_operator_makes_counts_and_views_do_not():
    x = torch.rand(10, 1, 8, 8)
    memory = Memory(None, x)
    memory.ask(lambda part: (x[part].reshape(-1, 64).repeat(1, 100),), 10)
    image = 64 * 4
    assert memory.capacity == 2**30 // (4 * 100 * image + PER_PROBE * image)
