"""Comparisons against the binomial test of scipy, and against Holm's procedure as it is written."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from scipy.stats import binomtest

from robustbench_lite.evaluation.compare import ALPHA, compare, holm, mcnemar
from robustbench_lite.evaluation.lines import Names, Outcomes


def line(index: np.ndarray, standing: np.ndarray, label: int = 0) -> Outcomes:
    return Outcomes(Names(index, np.array([f"{i:016x}" for i in index], dtype=object), index * 0 + label), standing)


def test_p_values_are_those_of_the_binomial_test() -> None:
    counts = [(b, c) for b in (0, 1, 2, 5, 17, 400) for c in (0, 1, 3, 5, 18, 470)]
    found = mcnemar([b for b, _ in counts], [c for _, c in counts])
    expected = [binomtest(b, b + c).pvalue if b + c else 1.0 for b, c in counts]
    assert found == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("seed", range(5))
def test_holm_rejects_what_the_procedure_rejects(seed: int) -> None:
    p = np.random.default_rng(seed).random(30) ** 6
    p[3] = p[4]
    rejected, alive = np.zeros(30, dtype=bool), True
    for place, i in enumerate(np.argsort(p, kind="stable")):
        alive = alive and p[i] <= ALPHA / (30 - place)
        rejected[i] = alive
    assert ((holm(p) <= ALPHA) == rejected).all()
    assert 0 < rejected.sum() < 30
    assert (holm(p) >= p).all()
    assert holm([]).size == 0


@pytest.mark.parametrize("seed", range(3))
def test_counts_by_loops_over_samples(seed: int) -> None:
    """Lines over different samples, in different orders; an index may stand for two labels."""
    rng = np.random.default_rng(seed)
    lines, facts = [], []
    for number in range(5):
        index = rng.permutation(60)[: rng.integers(20, 60)]
        standing = rng.random(len(index)) < 0.15 * number + 0.1
        lines.append(line(index, standing, label=int(number == 4)))
        facts.append({(int(i), int(number == 4)): bool(s) for i, s in zip(index, standing, strict=True)})
    found = compare(lines)
    for i, j in combinations(range(5), 2):
        shared = facts[i].keys() & facts[j].keys()
        assert found.common[i, j] == found.common[j, i] == len(shared)
        assert found.only[i, j] == sum(facts[i][key] and not facts[j][key] for key in shared)
        assert found.only[j, i] == sum(facts[j][key] and not facts[i][key] for key in shared)
    assert (found.common[4, :4] == 0).all()
    assert (found.p[4] == 1).all()
    assert not found.better[4].any()


def test_lines_that_share_their_names_give_the_same_as_copies() -> None:
    rng = np.random.default_rng(0)
    index = np.arange(200)
    one = [line(index, rng.random(200) < share) for share in (0.2, 0.5, 0.55)]
    shared = [Outcomes(one[0].names, own.standing) for own in one]
    for name in ("common", "only", "p", "better"):
        assert (getattr(compare(one), name) == getattr(compare(shared), name)).all()
    better = compare(one).better
    assert better[1, 0] and better[2, 0] and not better[0, 1] and not better[2, 1] and not better[1, 2]


def test_one_line_and_none() -> None:
    assert compare([]).p.shape == (0, 0)
    assert compare([line(np.arange(3), np.ones(3, dtype=bool))]).better.tolist() == [[False]]
