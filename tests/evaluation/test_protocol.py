"""The protocol (docs/protocol.md): the rules that no other test is about, and that the page names tests that exist."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_fakes import CALLS, Exact, Linear, Shift, two_blocks
from scipy.stats import binomtest
from torch import Tensor, nn

from robustbench_lite.attacks import NES, RandomNoise
from robustbench_lite.attacks.base import Attack
from robustbench_lite.certify import RandomizedSmoothing
from robustbench_lite.core.models import ABSTAIN
from robustbench_lite.core.threats import Lp
from robustbench_lite.evaluation import evaluate

ROOT = Path(__file__).parents[2]
THREAT = Lp("linf", 0.05)


@dataclass(frozen=True)
class Parity(Shift):
    """`Shift` on the samples of even, or of odd, indices alone; keeps the images that it was given."""

    odd: bool = False

    def __call__(self, model: Any, x: Tensor, goal: Any, threat: Any, **rest: Any) -> Any:
        GIVEN.append((rest["indices"], x.clone()))
        return Attack.__call__(self, model, x, goal, threat, **rest)

    def run(self, oracle: Any, x: Tensor, goal: Any, threat: Any, streams: Any) -> Tensor:
        sign = torch.where(goal.labels == 0, -1.0, 1.0).to(x).reshape(-1, 1, 1, 1)
        rows = oracle.standing(oracle.judge_cost)
        rows = rows[GIVEN[-1][0][rows] % 2 == int(self.odd)]
        oracle.judge(threat.project(x + sign * threat.eps, x)[rows], rows)
        return oracle.best


GIVEN: list[tuple[Tensor, Tensor]] = []


@pytest.mark.parametrize("mode", ["full", "cascade"])
def test_robust_accuracy_is_the_mean_of_minima_and_every_attack_starts_from_the_clean_image(mode: str) -> None:
    data = two_blocks(80)
    GIVEN.clear()
    apart = evaluate(Linear(), data, THREAT, [Parity(), Parity(odd=True)], mode=mode).summary().iloc[0]
    strong = evaluate(Linear(), data, THREAT, [Shift()]).summary().iloc[0]
    assert apart["worst_case"] == strong["worst_case"]
    if mode == "full":
        assert apart["worst_case"] < min(apart["Parity"], apart["Parity(odd=True)"])
    image = dict(zip(data.indices.tolist(), data.images, strict=True))
    for indices, x in GIVEN:
        for index, given in zip(indices.tolist(), x, strict=True):
            assert torch.equal(given, image[index])


def test_wrong_clean_images_are_broken_at_distance_0() -> None:
    rows = evaluate(Linear(), two_blocks(60), THREAT, [Shift()]).records
    wrong = rows.loc[(rows["kind"] == "clean") & ~rows["correct"], "index"]
    attacked = rows[(rows["kind"] == "attack") & rows["index"].isin(wrong)]
    assert len(wrong) > 5
    assert attacked["success"].all()
    assert (attacked["distance"] == 0).all()


class Undecided(nn.Module):
    """A vote without a winner near the boundary: no detector, so that no answer is an error."""

    rejects = False

    def forward(self, x: Tensor) -> Tensor:
        return Linear()(x)

    def predict(self, x: Tensor) -> Tensor:
        logits = self(x)
        return torch.where(logits.amax(dim=1) < 0.5, ABSTAIN, logits.argmax(dim=1))


def test_an_abstention_is_an_error_clean_and_attacked() -> None:
    rows = evaluate(Undecided(), two_blocks(60), THREAT, [Shift()]).records
    clean, attacked = (rows[rows["kind"] == kind] for kind in ("clean", "attack"))
    assert (clean["prediction"] == ABSTAIN).sum() > 3
    assert not clean.loc[clean["prediction"] == ABSTAIN, "correct"].any()
    assert attacked.loc[attacked["prediction"] == ABSTAIN, "success"].all()


def test_a_query_budget_that_is_spent_breaks_nothing_and_is_recorded() -> None:
    attack = NES(samples=10)  # five mirrored pairs a step
    report = evaluate(Linear(), two_blocks(40), Lp("linf", 1e-4), [attack], max_queries=25)
    rows = report.records[report.records["kind"] == "attack"]
    spent = rows[~rows["success"]]
    assert len(spent) > 10
    assert (spent["forwards"] <= 25).all()
    assert (spent["forwards"] >= 21).all()  # two steps of ten, and the clean answer
    assert (spent["first_success"] == -1).all()


class Flighty(nn.Module):
    """Right three times of four, whatever the image."""

    stochastic = True

    def forward(self, x: Tensor) -> Tensor:
        right = torch.where(torch.rand(len(x)) < 0.75, 1.0, -1.0)
        return torch.stack([-right, right], dim=1) + 0 * x.flatten(1).sum(dim=1, keepdim=True)


def test_a_lucky_draw_is_no_success() -> None:
    data = two_blocks(60)
    ones = (data.images, torch.ones(60, dtype=torch.int64))
    rows = evaluate(Flighty(), ones, THREAT, [RandomNoise(draws=50)]).records
    attacked = rows[rows["kind"] == "attack"]
    assert attacked["success"].mean() < 0.2  # 50 draws a sample, of which a quarter is wrong


def test_only_attacks_whose_threat_a_proof_contains_are_pruned() -> None:
    CALLS.clear()
    wide = Lp("linf", 0.06)
    evaluate(Linear(), two_blocks(80), [THREAT, wide], [Shift()], [Exact()], mode="cascade", audit=0.0)
    narrow, broad = CALLS["Shift 1"][::2], CALLS["Shift 1"][1::2]
    asked = [sum(len(call) for call in calls) for calls in (narrow, broad)]
    alone = []
    for threat in (THREAT, wide):
        CALLS.clear()
        evaluate(Linear(), two_blocks(80), threat, [Shift()], [Exact()], mode="cascade", audit=0.0)
        alone.append(sum(len(call) for call in CALLS["Shift 1"]))
    assert asked == alone
    assert asked[0] < asked[1]  # what is proven at 0.05 is attacked at 0.06 unless it is proven there


def test_a_timeout_has_a_column_of_its_own() -> None:
    row = evaluate(Linear(), two_blocks(40), THREAT, [], [Exact(timeout=True)]).summary().iloc[0]
    assert row["timeouts"] > 20
    rows = evaluate(Linear(), two_blocks(40), THREAT, [], [Exact(timeout=True)]).records
    assert set(rows.loc[rows["kind"] == "certifier", "status"]) <= {"timeout", "verified"}


def test_a_probabilistic_certificate_says_what_it_holds_with() -> None:
    certificate = RandomizedSmoothing(sigma=0.25, n0=10, n=100, alpha=0.02)(
        Linear(), torch.rand(3, 1, 4, 4), torch.zeros(3, dtype=torch.int64), Lp("l2", 0.1)
    )
    assert (certificate.kind, certificate.confidence) == ("probabilistic", 0.98)
    assert certificate.samples.tolist() == [110] * 3


def test_accuracies_carry_exact_intervals() -> None:
    row = evaluate(Linear(), two_blocks(50), THREAT, [Shift()]).summary().iloc[0]
    for name in ("clean", "Shift", "worst_case"):
        exact = binomtest(round(row[name] * 50), 50).proportion_ci(0.95, method="exact")
        np.testing.assert_allclose((row[f"{name}_low"], row[f"{name}_high"]), (exact.low, exact.high), atol=1e-9)


def test_the_page_names_tests_that_exist() -> None:
    page = (ROOT / "docs" / "protocol.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page)
    assert len(named) > 20
    for file, test in named:
        assert f"def {test}(" in (ROOT / file).read_text(), f"{file}::{test}"
    assert [int(n) for n in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)] == list(range(1, 12))
