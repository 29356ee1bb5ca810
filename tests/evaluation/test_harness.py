"""What evaluate promises: the same rows however the work is cut, modes, refusals."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import evaluation_fakes as fakes
import numpy as np
import pandas as pd
import pytest
import torch
from evaluation_fakes import Exact, Linear, Shift, exact_radius, linear_data, two_blocks
from scipy.stats import binomtest
from torch import Tensor, nn

from robustbench_lite.attacks import PGD, RandomNoise
from robustbench_lite.attacks.base import Attack
from robustbench_lite.certify import IBP, CostSensitive, RandomizedSmoothing, seed_class_costs
from robustbench_lite.core.models import ABSTAIN
from robustbench_lite.core.spatial import RotationTranslation
from robustbench_lite.core.threats import Lp
from robustbench_lite.data import load_data
from robustbench_lite.data.base import Dataset
from robustbench_lite.evaluation import EvaluationError, Report, Store, evaluate
from robustbench_lite.zoo import load_defense

THREAT = Lp("linf", 0.05)
METHODS: dict[str, Any] = {"attacks": [Shift(0.5), Shift()], "certifiers": [Exact()]}
EXACT_COLUMNS = ["kind", "method", "index", "sample_hash", "prediction", "correct", "success", "certified", "status"]


@pytest.fixture(autouse=True)
def _fresh_calls() -> None:
    fakes.CALLS.clear()


def same_rows(one: Report, two: Report) -> None:
    a, b = (r.records.sort_values(["kind", "method", "index"], ignore_index=True) for r in (one, two))
    assert a[EXACT_COLUMNS].equals(b[EXACT_COLUMNS])
    for column in ("distance", "radius", "margin"):
        np.testing.assert_allclose(a[column], b[column], atol=1e-5)


def test_figures_are_those_of_the_exact_answer() -> None:
    data = two_blocks(80)
    row = evaluate(Linear(), data, THREAT, **METHODS).summary().iloc[0]
    right = (data.images.flatten(1).sum(dim=1) < 8).long() == data.labels
    room = exact_radius(data.images)
    assert row["n"] == 80
    assert row["clean"] == right.double().mean().item()
    assert row["worst_case"] == row["Shift"]
    assert row["certified"] == row["Exact"] == (right & (room > 0.05)).double().mean().item()
    assert row["certified"] <= row["worst_case"] <= row["Shift(reach=0.5)"] <= row["clean"]
    assert row["gap"] == row["worst_case"] - row["certified"]
    assert row["mode"] == "full"
    assert row["verdict"] == "doubtful"


@pytest.mark.parametrize("batch_size", [1, 7])
def test_batch_size_changes_nothing(batch_size: int) -> None:
    methods: dict[str, Any] = {"attacks": [PGD(steps=3), RandomNoise(draws=4), Shift()], "certifiers": [Exact()]}
    data = two_blocks(24)
    same_rows(
        evaluate(Linear(), data, THREAT, **methods), evaluate(Linear(), data, THREAT, batch_size=batch_size, **methods)
    )


def test_neither_order_nor_company_changes_a_row() -> None:
    data = two_blocks(24)
    whole = evaluate(Linear(), data, THREAT, attacks=[PGD(steps=3), RandomNoise(draws=4)])
    shuffled = evaluate(Linear(), data.take(torch.randperm(24)), THREAT, attacks=[RandomNoise(draws=4), PGD(steps=3)])
    same_rows(whole, shuffled)
    part = evaluate(Linear(), data.take(torch.tensor([3, 15, 7])), THREAT, attacks=[PGD(steps=3), RandomNoise(draws=4)])
    keep = whole.records["index"].isin(part.records["index"])
    np.testing.assert_allclose(part.records["margin"], whole.records.loc[keep, "margin"], atol=1e-5)


def test_the_seed_matters_and_suffices() -> None:
    data, attacks = linear_data(30), [RandomNoise(draws=2)]
    one, again, other = (evaluate(Linear(), data, THREAT, attacks, seed=seed).records for seed in (1, 1, 2))
    assert one.drop(columns="seconds").equals(again.drop(columns="seconds"))
    assert not one["margin"].equals(other["margin"])


def named(rows: pd.DataFrame, method: str, column: str) -> set[int]:
    """The indices of the rows of a method in which a column is true."""
    return set(rows.loc[(rows["method"] == method) & rows[column].fillna(False), "index"])


def asked(name: str) -> set[int]:
    return {i for call in fakes.CALLS.get(name, []) for i in call}


def test_a_cascade_attacks_what_stands_unproven_and_agrees_with_full() -> None:
    data = two_blocks(80)
    methods: dict[str, Any] = {"attacks": [Shift(0.5), Shift()], "certifiers": [Exact(0.5), Exact(0.9)]}
    full = evaluate(Linear(), data, THREAT, **methods)
    fakes.CALLS.clear()
    cascade = evaluate(Linear(), data, THREAT, mode="cascade", audit=0.0, **methods)
    rows = full.records
    right = named(rows, "clean", "correct")
    first, proven = named(rows, "Exact(factor=0.5)", "certified"), named(rows, "Exact(factor=0.9)", "certified")
    fell = named(rows, "Shift(reach=0.5)", "success")
    assert first < proven < right
    assert asked("Exact 0.5") == set(rows["index"])  # the first method sees all
    assert asked("Exact 0.9") == right - first
    assert asked("Shift 0.5") == right - proven
    assert asked("Shift 1") == right - proven - fell < right - proven
    one, two = full.summary().iloc[0], cascade.summary().iloc[0]
    for name in ("n", "clean", "worst_case", "worst_case_low", "certified", "gap"):
        assert one[name] == two[name], name
    assert (one["mode"], two["mode"]) == ("full", "cascade")
    assert np.isnan(two["Shift"])  # it has not seen what the first attack broke, or a proof covers
    assert two["incomplete"] == 0
    saved, done = 2 * len(proven), len(right - proven) + len(right - proven - fell)
    assert (one["spared"], two["spared"]) == (0, saved / (saved + done))


def test_without_proofs_the_first_attack_sees_all() -> None:
    report = evaluate(Linear(), two_blocks(80), THREAT, [Shift(0.5), Shift()], mode="cascade")
    right = named(report.records, "clean", "correct")
    fell = named(report.records, "Shift(reach=0.5)", "success") & right
    assert (asked("Shift 0.5"), asked("Shift 1")) == (right, right - fell)  # misclassified samples need no attack
    assert set(report.records.loc[report.records["kind"] == "attack", "index"]) == set(report.records["index"])
    assert report.summary()["spared"].item() == 0


def test_only_deterministic_proofs_spare_attacks() -> None:
    for kind in ("probabilistic", "estimate"):
        fakes.CALLS.clear()
        report = evaluate(Linear(), two_blocks(80), THREAT, [Shift()], [Exact(kind=kind, alpha=0.01)], mode="cascade")
        assert asked("Shift 1") == named(report.records, "clean", "correct")
        assert report.summary()["spared"].item() == 0


def test_dear_certifiers_come_last_and_see_what_is_left() -> None:
    methods: dict[str, Any] = {"attacks": [Shift()], "certifiers": [Exact(0.9, cheap=False), Exact(0.5)]}
    report = evaluate(Linear(), two_blocks(80), THREAT, mode="cascade", audit=0.0, **methods)
    rows = report.records
    proven, fell = named(rows, "Exact(factor=0.5)", "certified"), named(rows, "Shift", "success")
    assert asked("Exact 0.9") == named(rows, "clean", "correct") - proven - fell
    assert fell
    full = evaluate(Linear(), two_blocks(80), THREAT, **methods).summary().iloc[0]
    for name in ("worst_case", "certified", "gap"):
        assert report.summary().iloc[0][name] == full[name]


def test_the_audit_is_a_share_drawn_by_image_and_seed() -> None:
    data = two_blocks(300)
    methods: dict[str, Any] = {"attacks": [Shift()], "certifiers": [Exact()], "mode": "cascade"}

    def audited(part: Any, **settings: Any) -> set[int]:
        fakes.CALLS.clear()
        rows = evaluate(Linear(), part, THREAT, **methods, **settings).records
        return asked("Shift 1") & named(rows, "Exact", "certified")

    some = audited(data, audit=0.3)
    proven = audited(data, audit=1.0)
    assert not audited(data, audit=0.0)
    assert some < proven
    assert binomtest(len(some), len(proven), 0.3).pvalue > 1e-3
    assert audited(data, audit=0.3, batch_size=7) == some
    assert audited(data, audit=0.5) > some
    assert audited(data.head(100), audit=0.3) == some & set(data.indices[:100].tolist())
    assert audited(data, audit=0.3, seed=1) != some


def test_a_lying_certifier_is_caught_by_the_audit() -> None:
    data = two_blocks(300)
    blind = evaluate(Linear(), data, THREAT, [Shift()], [Exact(3.0)], mode="cascade", audit=0.0)
    assert blind.verdict == "doubtful"
    report = evaluate(Linear(), data, THREAT, [Shift()], [Exact(3.0)], mode="cascade", audit=0.2)
    assert report.verdict == "invalid"


def test_costs_that_are_forgiven_are_no_robust_accuracy() -> None:
    net, data = load_defense("digits/ibp"), load_data("digits").head(30)
    certifier = CostSensitive(IBP(), seed_class_costs(9, 10))  # mistakes about the other classes are free
    report = evaluate(net, data, Lp("linf", 0.2), [PGD(steps=5)], [certifier, IBP()])
    (missing,) = report.not_applicable
    assert "forgives mistakes" in missing.reason
    assert certifier(net, data.images, data.labels, Lp("linf", 0.2)).certified.sum() > 20
    assert report.summary()["certified"].item() == report.summary()["IBP"].item() < 0.5
    assert report.violations == []


def test_a_deterministic_certifier_is_not_applicable_to_a_randomised_model() -> None:
    report = evaluate(Noisy(), two_blocks(10), THREAT, [Shift()], [IBP()])
    (missing,) = report.not_applicable
    assert "stochastic" in missing.reason
    assert report.unfinished == []


def test_a_cascade_asks_what_is_left_of_several_batches_together() -> None:
    """Samples of a seeded draw lie thin in the blocks of the store; attacks on single images cost many times more."""
    data, every = two_blocks(100), {}
    data = replace(data, indices=data.indices * 97)
    for size in (10, 100):
        fakes.CALLS.clear()
        methods: dict[str, Any] = {"attacks": [Shift()], "certifiers": [Exact()]}
        report = evaluate(Linear(), data, THREAT, mode="cascade", audit=0.0, batch_size=size, **methods)
        every[size] = [len(call) for call in fakes.CALLS["Shift 1"]]
        assert [len(call) for call in fakes.CALLS["Exact 1"]] == [size] * (100 // size)
        assert report.records["index"].nunique() == 100
    (together,) = every[100]
    assert 3 < together == sum(every[10])
    assert len(every[10]) == -(-together // 10)


def test_full_after_a_cascade_computes_the_missing_rows_alone(tmp_path: Path) -> None:
    data = two_blocks(80)
    cascade = evaluate(Linear(), data, THREAT, mode="cascade", audit=1.0, store=tmp_path, **METHODS)
    seen = {name: fakes.count(name) for name in ("Shift 0.5", "Shift 1", "Exact 1")}
    fakes.CALLS.clear()
    full = evaluate(Linear(), data, THREAT, store=tmp_path, **METHODS)
    wrong = int((~cascade.records.loc[cascade.records["kind"] == "clean", "correct"]).sum())
    assert fakes.count("Shift 0.5") == 80 - seen["Shift 0.5"] == wrong  # the proofs stood for them in the cascade
    assert fakes.count("Shift 1") == 80 - seen["Shift 1"]
    assert fakes.count("Exact 1") == 0
    scratch = evaluate(Linear(), data, THREAT, **METHODS)
    same_rows(full, scratch)
    assert full.records["forwards"].equals(scratch.records["forwards"])
    assert full.summary().equals(scratch.summary())
    fakes.CALLS.clear()
    again = evaluate(Linear(), data, THREAT, mode="cascade", audit=1.0, store=tmp_path, **METHODS)
    assert not fakes.CALLS
    assert again.summary().equals(cascade.summary())


def test_another_slice_or_attack_computes_the_difference(tmp_path: Path) -> None:
    data = two_blocks(40)
    evaluate(Linear(), data.head(10), THREAT, [Shift()], store=tmp_path)
    evaluate(Linear(), data, THREAT, [Shift(), Shift(0.5)], store=tmp_path)
    assert fakes.count("Shift 1") == 40
    assert fakes.count("Shift 0.5") == 40


def test_what_changes_the_answer_is_another_row(tmp_path: Path) -> None:
    data, attack = two_blocks(10), [Shift()]
    changes: list[dict[str, Any]] = [{}, {"seed": 1}, {"max_queries": 5}, {"precision": "float64"}]
    for change in changes:
        evaluate(Linear(), data, THREAT, attack, store=tmp_path, **change)
    evaluate(Linear(), data, Lp("linf", 0.06), attack, store=tmp_path)
    evaluate(Linear(7.0), data, THREAT, attack, store=tmp_path)
    other = Dataset(data.name, data.split, data.images, 1 - data.labels, data.indices, 2)
    evaluate(Linear(), other, THREAT, attack, store=tmp_path)
    assert fakes.count("Shift 1") == 10 * 7
    evaluate(Linear(), data, THREAT, attack, store=tmp_path, name="another name")
    assert fakes.count("Shift 1") == 10 * 7


def test_a_failing_attack_is_named_and_finished_batches_are_kept(tmp_path: Path) -> None:
    data = two_blocks(40)
    with pytest.raises(EvaluationError, match=r"Linear: Shift.* failed on samples 520 .. 539 .*: a bad day"):
        evaluate(Linear(), data, THREAT, [Shift(fail_from=500)], store=tmp_path, batch_size=20)
    fakes.CALLS.clear()
    with pytest.raises(EvaluationError):
        evaluate(Linear(), data, THREAT, [Shift(fail_from=500)], store=tmp_path, batch_size=20)
    assert {i for call in fakes.CALLS["Shift 1"] for i in call} == set(range(520, 540))


def test_threats_are_judged_alone() -> None:
    data, small, large = two_blocks(40), Lp("linf", 0.02), Lp("linf", 0.08)
    both = evaluate(Linear(), data, [small, large], **METHODS).summary()
    assert list(both["eps"]) == [0.02, 0.08]
    for place, threat in enumerate((small, large)):
        alone = evaluate(Linear(), data, threat, **METHODS).summary().iloc[0]
        assert both.iloc[place].equals(alone.rename(place))


def test_what_does_not_apply_is_na() -> None:
    report = evaluate(Linear(), two_blocks(20), RotationTranslation(5, 1), [Shift(), RandomNoise(draws=2)], [Exact()])
    row = report.summary().iloc[0]
    assert {(n.kind, n.method) for n in report.not_applicable} == {("attack", "Shift"), ("certifier", "Exact")}
    assert all("does not support rotation" in n.reason for n in report.not_applicable)
    assert np.isnan(row["Shift"])
    assert np.isnan(row["Exact"])
    assert np.isnan(row["certified"])
    assert np.isnan(row["gap"])
    assert row["RandomNoise(draws=2)"] == row["worst_case"]
    only = evaluate(Linear(), two_blocks(20), RotationTranslation(5, 1), [Shift()]).summary().iloc[0]
    assert only["threat"].startswith("rotation")
    assert np.isnan(only["worst_case"])


class Softmax(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Linear()(x).softmax(dim=1)


@pytest.mark.parametrize("mode", ["full", "cascade"])
def test_an_operator_without_bounds_costs_a_column_not_the_row(mode: str, tmp_path: Path) -> None:
    shared: dict[str, Any] = {"mode": mode, "audit": 1.0}
    for _ in range(2):
        report = evaluate(Softmax(), two_blocks(20), THREAT, [Shift()], [IBP(), Exact()], store=tmp_path, **shared)
        (missing,) = report.not_applicable
        assert (missing.threat, missing.eps, missing.kind, missing.method) == ("linf", 0.05, "certifier", "IBP")
        assert "is not supported" in missing.reason
        row, alone = (
            report.summary().iloc[0],
            evaluate(Softmax(), two_blocks(20), THREAT, [Shift()], [Exact()], **shared),
        )
        assert np.isnan(row["IBP"])
        assert "probabilities" in row["flags"]
        for name in ("n", "clean", "Shift", "worst_case", "Exact", "certified"):
            assert row[name] == alone.summary().iloc[0][name], name


class Noisy(nn.Module):
    stochastic = True

    def forward(self, x: Tensor) -> Tensor:
        return Linear()(x) + torch.randn(len(x), 2)


class Hidden(nn.Module):
    """A wrapper whose gradient is masked; its view shows it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Linear()

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x * 4096).round() / 4096)

    def attack_view(self, samples: int) -> nn.Module:
        return self.net


class NaNs(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        logits = Linear()(x)
        return torch.where(x[:, 0, 0, :1] > 0.8, torch.nan, logits)


class Picky(nn.Module):
    """A detector: refuses images whose first pixel is bright."""

    rejects = True

    def forward(self, x: Tensor) -> Tensor:
        return Linear()(x)

    def predict(self, x: Tensor) -> Tensor:
        return torch.where(x[:, 0, 0, 0] > 0.8, ABSTAIN, self(x).argmax(dim=1))


def test_a_defense_is_attacked_through_its_view() -> None:
    data = two_blocks(40)
    seen = evaluate(Hidden(), data, THREAT, [PGD(steps=5)])
    assert seen.summary()["PGD(steps=5)"].item() < seen.summary()["clean"].item()
    assert not seen.flags

    class Bare(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Hidden()(x)

    bare = evaluate(Bare(), data, THREAT, [PGD(steps=5, random_start=False)])
    assert bare.summary()["worst_case"].item() == bare.summary()["clean"].item()
    assert [flag.id for flag in bare.flags] == ["zero_gradients"]
    assert bare.summary()["flags"].item() == "zero_gradients"


def test_not_finite_is_broken_and_flagged() -> None:
    data = two_blocks(60)
    report = evaluate(NaNs(), data, THREAT, [Shift()])
    bad = int((data.images[:, 0, 0, 0] > 0.8).sum())
    clean = report.records[report.records["kind"] == "clean"]
    assert (clean["prediction"] == -2).sum() == bad
    assert not clean.loc[clean["prediction"] == -2, "correct"].any()
    assert "non_finite" in [flag.id for flag in report.flags]
    assert f"for {bad} samples" in report.flags[-1].evidence or bad < 60


def test_a_refusal_of_a_clean_image_is_an_error_but_no_success() -> None:
    data = two_blocks(60)
    for mode in ("full", "cascade"):
        report = evaluate(Picky(), data, THREAT, [Shift()], mode=mode)
        rows = report.records.set_index(["kind", "index"])
        refused = [int(i) for i in data.indices[data.images[:, 0, 0, 0] > 0.86]]
        assert not rows.loc["clean"].loc[refused, "correct"].any()
        still = rows.loc["attack"].loc[refused]
        assert not still.loc[still["prediction"] == ABSTAIN, "success"].any()
        assert report.summary()["worst_case"].item() <= report.summary()["clean"].item()


def test_flags_of_outputs() -> None:
    data = two_blocks(20)

    class Soft(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Linear()(x).softmax(dim=1)

    class Secretly(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Linear()(x) + torch.rand(len(x), 2)

    assert [f.id for f in evaluate(Soft(), data, THREAT).flags] == ["probabilities"]
    assert [f.id for f in evaluate(Secretly(), data, THREAT).flags] == ["randomised"]
    assert not evaluate(Noisy(), data, THREAT).flags
    assert not evaluate(Linear(), data, THREAT).flags


def test_the_world_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    model.train()
    model[1].weight.grad = torch.ones(2, 16)
    x, y = linear_data(10)
    before, state = x.clone(), torch.get_rng_state()
    evaluate(model, (x, y), THREAT, [PGD(steps=2)])
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(model[1].weight.grad, torch.ones(2, 16))
    assert torch.equal(x, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_float64_models_and_callables() -> None:
    data = two_blocks(12)
    report = evaluate(Linear().double(), data, THREAT, [PGD(steps=2)])
    assert set(report.records["precision"]) == {"float64"}
    model = Linear()
    report = evaluate(lambda x: model(x), data, THREAT, [PGD(steps=2)], name="mine")
    assert set(report.records["defense"]) == {"mine"}


@pytest.mark.gpu
def test_a_gpu_gives_the_same_rows_and_the_model_stays_where_it_is() -> None:
    model, data = Linear(), two_blocks(40)
    methods: dict[str, Any] = {"attacks": [Shift(0.5), Shift()]}
    report = evaluate(model, data, THREAT, device="cuda", **methods)
    assert model.scale.device.type == "cpu"
    a, b = (r.records for r in (report, evaluate(model, data, THREAT, device="cpu", **methods)))
    settled = (a["margin"].abs() > 1e-4) & (b["margin"].abs() > 1e-4)
    assert a.loc[settled, "correct"].equals(b.loc[settled, "correct"])


def test_progress_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(Linear(), two_blocks(4), THREAT, progress=True)
    assert "evaluating" in capsys.readouterr().out


def test_other_bounds() -> None:
    x, y = linear_data(12)
    report = evaluate(Linear(), (x * 4 - 2, y), Lp("linf", 0.05, bounds=(-2.0, 2.0)), [PGD(steps=2)])
    assert set(report.records["threat"].dropna()) == {"linf[-2,2]"}


@dataclass(frozen=True)
class Needy(Attack):
    noise: Any = None

    def supports(self, threat: Any) -> bool:
        return True

    def run(self, oracle: Any, x: Tensor, goal: Any, threat: Any, streams: Any) -> Tensor:
        return oracle.best


@dataclass(frozen=True)
class Secret(Needy):
    hidden: int = field(default=0, repr=False)


def _refusals() -> list[Any]:
    x, y = linear_data(8)
    train = nn.Sequential(nn.Dropout(0.5), nn.Flatten(), nn.Linear(16, 2))
    norm = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(16, 2))
    wrong = nn.Sequential(nn.Flatten(), nn.Linear(16, 2), nn.Flatten(0))
    twice = Dataset("d", "test", x, y, torch.zeros(8, dtype=torch.int64), 2)
    ok: dict[str, Any] = {"model": Linear(), "data": (x, y), "threat": THREAT}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"model": train.train()}, r"train mode.*Dropout.*model.eval\(\)"),
        ({"model": norm.train()}, r"train mode.*BatchNorm2d"),
        ({"model": wrong}, r"logits of shape \(8, K\)"),
        ({"model": lambda x: x}, "needs a name"),
        ({"model": 3}, "callable"),
        ({"data": (x, y + 5)}, "the model returns 2 logits but the data have labels up to 6"),
        ({"data": (x * 255, y)}, "divide by 255"),
        ({"data": (x[0], y)}, r"shape \(B, C, H, W\)"),
        ({"data": (x[:0], y[:0])}, "no samples"),
        ({"data": twice}, "index comes twice"),
        ({"threat": []}, "at least one threat"),
        ({"threat": "linf"}, r"Lp\('linf', '8/255'\)"),
        ({"threat": ["linf"]}, r"Lp\('linf', '8/255'\)"),
        ({"threat": None}, r"threat must be a threat or a list"),
        ({"attacks": PGD()}, r"attacks must be a list of attacks, got PGD.*attacks=\[...\]"),
        ({"certifiers": IBP()}, r"certifiers must be a list of certifiers"),
        ({"data": None}, "data must be a Dataset.*got NoneType"),
        ({"data": x.numpy()}, "data must be a Dataset.*got ndarray"),
        ({"data": (x,)}, "data must be a Dataset.*sequence of 1"),
        ({"data": (x.numpy(), y)}, "images must be a torch.Tensor"),
        (
            {"model": nn.Sequential(nn.Flatten(), nn.Linear(9, 2))},
            "Sequential cannot take images of shape 1x4x4: .*9x2",
        ),
        ({"threat": Lp("linf", None)}, "one budget"),
        ({"threat": Lp("linf", torch.full((8,), 0.1))}, "one budget"),
        ({"threat": [THREAT, THREAT]}, "comes twice"),
        ({"attacks": [PGD(), PGD()]}, "attack PGD comes twice"),
        ({"attacks": [Secret(hidden=1), Secret(hidden=2)]}, "both called Secret"),
        ({"attacks": [PGD]}, "instances of dataclasses"),
        ({"attacks": [Needy(torch.ones(1))]}, "no place in a stored identity"),
        ({"seed": 1.0}, "seed must be a whole number, an int, got 1.0"),
        ({"audit": 1.5}, "audit is a share of the samples"),
        ({"mode": "fast"}, "mode must be one of full, cascade"),
        ({"batch_size": 0}, "batch_size"),
        ({"max_queries": 0}, "max_queries"),
        ({"precision": "float16"}, "precision must be"),
        ({"model": Linear().half()}, "float32 or float64"),
    ]
    return [pytest.param(ok | change, message, id=message[:20]) for change, message in cases]


@pytest.mark.parametrize("error", [KeyError("depth"), ZeroDivisionError("by what"), NotImplementedError("one day")])
def test_an_error_inside_a_model_names_the_model(error: Exception) -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise error

    with pytest.raises(EvaluationError, match=rf"Broken failed .*{type(error).__name__}: .*{error.args[0]}"):
        evaluate(Broken(), linear_data(4), THREAT)


def test_flags_of_an_earlier_slice_stay(tmp_path: Path) -> None:
    class Sometimes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            logits = Linear()(x)
            return torch.where(x[:, :, 0, 0] > 0.5, logits, logits.detach())

    data, first = two_blocks(40), two_blocks(40).images[:, 0, 0, 0]
    dark, light = (data.take(rows.nonzero().flatten()) for rows in (first <= 0.5, first > 0.5))
    assert [flag.id for flag in evaluate(Sometimes(), dark, THREAT, store=tmp_path).flags] == ["zero_gradients"]
    assert not evaluate(Sometimes(), light, THREAT, store=tmp_path).flags
    ((kept,),) = Store(tmp_path).flags().values()
    assert kept["id"] == "zero_gradients"


@pytest.mark.parametrize(("arguments", "message"), _refusals())
def test_refusals_say_why(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        evaluate(**arguments)


def test_smoothing_says_nothing_about_a_net_without_noise() -> None:
    report = evaluate(Linear(), two_blocks(20), Lp("l2", 0.1), certifiers=[RandomizedSmoothing(0.5, n0=10, n=100)])
    assert report.records["kind"].unique().tolist() == ["clean"]
    (found,) = report.not_applicable
    assert "RandomizedSmoothing" in found.method and "smoothed classifier" in found.reason


@dataclass(frozen=True)
class Careless(Attack):
    """Writes into the images that it was given."""

    def supports(self, threat: Any) -> bool:
        return True

    def run(self, oracle: Any, x: Tensor, goal: Any, threat: Any, streams: Any) -> Tensor:
        return x.mul_(0.5)


def test_an_attack_that_writes_into_its_images_spoils_neither_the_data_nor_other_rows() -> None:
    x, y = linear_data()
    before, attack, threat = x.clone(), PGD(steps=2), Lp("linf", 0.05)
    alone = evaluate(Linear(), (x.clone(), y), threat, [attack]).records
    after = evaluate(Linear(), (x, y), threat, [Careless(), attack]).records
    own, other = (rows[rows["method"] == "PGD(steps=2)"] for rows in (alone, after))
    assert torch.equal(x, before)
    assert len(own) == len(x)
    assert own["success"].tolist() == other["success"].tolist()
