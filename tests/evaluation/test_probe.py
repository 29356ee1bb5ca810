"""The probe on nets whose faults are known."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustbench_lite.attacks import FGSM, PGD
from robustbench_lite.core.spatial import RotationTranslation
from robustbench_lite.core.threats import Lp
from robustbench_lite.data import load_data
from robustbench_lite.evaluation import EvaluationError, Store, evaluate, summarize
from robustbench_lite.evaluation.flags import PROBED
from robustbench_lite.evaluation.scan import scan
from robustbench_lite.zoo import load_defense

LINF = Lp("linf", 0.1)
STRONG = PGD(steps=100, restarts=5, loss="margin")


def ids(model: nn.Module, threat: Lp = LINF, attacks: Any = (STRONG,), n: int = 60, **options: Any) -> set[str]:
    report = evaluate(model.eval(), load_data("digits").head(n), threat, attacks, probed=True, **options)
    return {flag.id for flag in report.flags}


class Masked(nn.Module):
    """A net behind a change of its input or its logits."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.net, self.kind = load_defense("digits/standard"), kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "steps":  # rounded to 32 values: no gradient
            return self.net((x * 31).round() / 31)
        if self.kind == "cold":
            return 1e5 * self.net(x)
        if self.kind == "waves":  # a ripple too small to change answers, whose slope hides the net's
            return self.net(x + 2e-4 * torch.sin(3e4 * x))
        return self.net(x)


@pytest.mark.parametrize("name", ["standard", pytest.param("pgd_at", marks=pytest.mark.slow), "ibp"])
def test_honest_nets_raise_nothing(name: str) -> None:
    report = evaluate(load_defense(f"digits/{name}"), load_data("digits").head(60), LINF, [STRONG], probed=True)
    assert report.flags == []
    assert report.verdict == report.summary()["verdict"].item() == "reliable"
    assert evaluate(load_defense(f"digits/{name}"), load_data("digits").head(20), LINF, [FGSM()]).verdict == "doubtful"


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("steps", {"zero_gradients", "blind_beats_gradients", "out_of_reach"}),
        ("cold", {"zero_gradients"}),
        ("waves", {"unstable_gradients", "blind_beats_gradients"}),
    ],
)
def test_masks_are_seen(kind: str, expected: set[str]) -> None:
    found = ids(Masked(kind))
    assert expected <= found, found


class Wavering(nn.Module):
    """The net; but its gradient points the wrong way in nine calls of ten."""

    stochastic = True

    def __init__(self) -> None:
        super().__init__()
        self.net = load_defense("digits/standard")

    def forward(self, x: Tensor) -> Tensor:
        sign = 1.0 if float(torch.rand(())) < 0.1 else -1.0
        return self.net(x.detach() + sign * (x - x.detach()))


def test_frozen_draws_find_what_fresh_ones_hide() -> None:
    seeds = (seed for seed in range(100) if float(torch.rand((), generator=torch.Generator().manual_seed(seed))) < 0.1)
    assert "frozen_beats_averaged" in ids(Wavering(), attacks=[FGSM()], seed=next(seeds))


def test_a_weak_suite_is_told_from_a_weak_defense() -> None:
    weak = ids(load_defense("digits/standard"), attacks=[PGD(steps=1, step_size=0.001)])
    assert {"steps_help", "restarts_help"} <= weak


def test_stronger_attacks_settle_what_weak_ones_left_open(tmp_path: Path) -> None:
    net, data = load_defense("digits/standard"), load_data("digits").head(40)
    kept = [
        evaluate(net, data, LINF, [attack], probed=True, store=tmp_path).summary()["verdict"].item()
        for attack in (PGD(steps=1, step_size=0.001), STRONG)
    ]
    assert kept == ["doubtful", "reliable"]
    (flags,) = Store(tmp_path).flags().values()
    assert {flag["id"] for flag in flags} == {PROBED}


def test_other_norms_and_none(tmp_path: Path) -> None:
    net = load_defense("digits/standard")
    assert ids(net, Lp("l2", 0.5), n=40, store=tmp_path) == set()
    turned = evaluate(net, load_data("digits").head(20), RotationTranslation(5, 1), [], probed=True, store=tmp_path)
    assert turned.verdict == "doubtful"  # the probe does not know this threat
    table = summarize(Store(tmp_path).records(), Store(tmp_path).flags()).set_index("threat")["verdict"]
    assert table["l2"] == "reliable"  # read back from the store


@pytest.mark.slow
def test_l1() -> None:
    assert ids(load_defense("digits/standard"), Lp("l1", 1.5)) == set()


def test_one_probe_does_not_speak_for_another_threat(tmp_path: Path) -> None:
    net, data = load_defense("digits/standard"), load_data("digits").head(30)
    evaluate(net, data, LINF, [STRONG], probed=True, store=tmp_path)
    evaluate(net, data, Lp("linf", 0.2), [STRONG], store=tmp_path)
    table = summarize(Store(tmp_path).records(), Store(tmp_path).flags()).set_index("eps")["verdict"]
    assert (table[0.1], table[0.2]) == ("reliable", "doubtful")


def test_the_probe_is_reproducible_and_leaves_no_rows() -> None:
    net, data = load_defense("digits/pgd_at"), load_data("digits").head(40)
    plain, probed, again = (evaluate(net, data, LINF, [FGSM()], probed=p) for p in (False, True, True))
    assert plain.records.drop(columns="seconds").equals(probed.records.drop(columns="seconds"))
    assert probed.notes == again.notes
    assert [note.id for note in probed.notes if not note.raised] == ["probed"]
    assert plain.notes == []


def verdicts(store: Path) -> dict[tuple[int, int], tuple[str, str]]:
    table = scan(store).table
    return {(row["seed"], row["n"]): (row["verdict"], row["flags"]) for _, row in table.iterrows()}


def test_a_probe_speaks_for_its_seed_and_for_no_more_samples_than_it_had(tmp_path: Path) -> None:
    net, data = load_defense("digits/standard"), load_data("digits")
    evaluate(net, data.head(30), LINF, [STRONG], probed=True, store=tmp_path)
    evaluate(net, data.head(30), LINF, [FGSM()], seed=1, store=tmp_path)
    assert verdicts(tmp_path) == {(0, 30): ("reliable", ""), (1, 30): ("doubtful", "")}
    evaluate(net, data.head(10), LINF, [STRONG], store=tmp_path)  # fewer: what was compared holds for them
    assert verdicts(tmp_path)[0, 30] == ("reliable", "")
    evaluate(net, data.head(40), LINF, [STRONG], store=tmp_path)
    assert verdicts(tmp_path)[0, 40] == ("doubtful", "")


@dataclass(frozen=True)
class Tired(PGD):
    def __call__(self, *args: Any, **options: Any) -> Any:
        raise RuntimeError("not today")


def test_what_is_unfinished_is_doubtful_in_the_store_until_a_run_finishes_it(tmp_path: Path) -> None:
    net, data = load_defense("digits/standard"), load_data("digits").head(30)
    with pytest.raises(EvaluationError):
        evaluate(net, data, LINF, [STRONG, Tired()], probed=True, store=tmp_path)
    assert verdicts(tmp_path)[0, 30] == ("doubtful", "unfinished")
    evaluate(net, data, LINF, [STRONG], store=tmp_path)
    assert verdicts(tmp_path)[0, 30] == ("reliable", "")


def test_on_few_samples_nothing_is_reliable() -> None:
    assert ids(load_defense("digits/standard"), n=20) == {"few_samples"}
