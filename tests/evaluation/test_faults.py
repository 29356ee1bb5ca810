"""Faults: each costs the rows it concerns, is named, and the rest of the run is complete (docs/faults.md)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import evaluation_fakes as fakes
import fault_fakes
import numpy as np
import pandas as pd
import pytest
import torch
from evaluation_fakes import Exact, Liar, Linear, Shift, linear_data
from fault_fakes import Faulty, Hungry, NotANumber
from torch import nn

from robustbench_lite.attacks import PGD
from robustbench_lite.certify import IBP
from robustbench_lite.core.threats import Lp
from robustbench_lite.data.base import Dataset
from robustbench_lite.evaluation import EvaluationError, Report, Store, evaluate
from robustbench_lite.evaluation import runner as runners
from robustbench_lite.evaluation.scarcity import fitting, in_chunks, ran_out
from robustbench_lite.report.sheet import sheets, table_of

THREAT = Lp("linf", 0.05)
LIMIT = 5.0  # seconds; a worker answers about these samples in milliseconds


@pytest.fixture(autouse=True)
def _fresh_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    fakes.CALLS.clear()
    monkeypatch.setattr("gc.collect", lambda: 0)  # a quarter of a second each, and there is no graph here to free


def data() -> Dataset:
    """20 samples in each of two blocks: indices 0 .. 19 and 500 .. 519."""
    x, y = linear_data(40)
    return Dataset("linear", "test", x, y, torch.arange(40) % 20 + 500 * (torch.arange(40) // 20), 2)


def rows(report: Report, method: str) -> pd.DataFrame:
    """The rows of a method without their times, which differ from run to run."""
    found = report.records[report.records["method"] == method]
    return found.drop(columns="seconds").reset_index(drop=True)


def asked(name: str) -> list[int]:
    return [index for call in fakes.CALLS.get(name, []) for index in call]


@dataclass
class Cut:
    """An evaluation under a time limit, of methods with several faults, and what it is compared with."""

    store: Path
    fault: Path
    methods: dict[str, Any]
    error: EvaluationError

    @property
    def report(self) -> Report:
        assert self.error.report is not None
        return self.error.report


HANG, FAIL = "Faulty(fault=hang", "Faulty(at=510"


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Cut:
    store = tmp_path_factory.mktemp("store")
    fault = store / "fault"
    fault.touch()
    hanging = Faulty(fault="hang", at=505, while_there=str(fault))
    failing = Faulty(at=510, while_there=str(fault))
    methods: dict[str, Any] = {"attacks": [Shift(0.5), hanging, failing, Shift()], "certifiers": [Exact()]}
    settings: dict[str, Any] = {"batch_size": 5, "time_limit": LIMIT, "store": store}
    with pytest.raises(EvaluationError) as caught:
        evaluate(Linear(), data(), THREAT, **methods, **settings)
    return Cut(store, fault, methods, caught.value)


def test_a_kernel_that_hangs_is_cut_off_and_the_rest_is_complete(cut: Cut) -> None:
    late = next(part for part in cut.report.unfinished if part.reason == "time limit")
    assert (late.kind, late.threat, late.eps, late.samples) == ("attack", "linf", 0.05, 15)
    whole = evaluate(Linear(), data(), THREAT, [Shift(0.5), Shift()], [Exact()], batch_size=5)
    for method in ("clean", "Shift(reach=0.5)", "Shift", "Exact"):
        assert len(rows(whole, method)) == 40
        assert rows(cut.report, method).equals(rows(whole, method)), method  # in a worker as here, to the last digit
    found = rows(cut.report, late.method)
    assert set(found["index"]) == {*range(20), *range(500, 505)}  # its finished batches
    same = rows(whole, "Shift")
    same = same[same["index"].isin(found["index"])].reset_index(drop=True)
    assert found.drop(columns="method").equals(same.drop(columns="method"))
    assert whole.summary().iloc[0]["certified"] == cut.report.summary().iloc[0]["certified"]


def test_an_error_in_the_worker_comes_back_with_its_traceback(cut: Cut) -> None:
    assert "BadDayError: no figure because of the weather" in str(cut.error)
    assert "samples 510 .. 514" in str(cut.error)
    failed = next(part for part in cut.report.unfinished if part.reason == "error")
    assert failed.samples == 10
    assert "fault_fakes.py" in failed.traceback and "_fail" in failed.traceback
    assert set(rows(cut.report, failed.method)["index"]) == {*range(20), *range(500, 510)}


def test_what_was_cut_off_is_no_evidence_and_stands_in_the_table(cut: Cut) -> None:
    (row,) = (row for _, row in cut.report.summary().iterrows())
    assert row["n"] == 40
    seen = [rows(cut.report, part.method) for part in cut.report.unfinished]
    standing = rows(cut.report, "clean")["correct"].to_numpy(dtype=bool)
    broken = set(cut.report.records.loc[cut.report.records["success"].fillna(False), "index"])
    indices = rows(cut.report, "clean")["index"].to_numpy()
    open_ = standing & ~np.isin(indices, list(broken))
    open_ &= ~np.isin(indices, rows(cut.report, "Exact").query("certified")["index"])
    unseen = ~np.logical_and.reduce([np.isin(indices, part["index"]) for part in seen])
    assert row["incomplete"] == (open_ & unseen).sum() > 0
    assert row["verdict"] == "doubtful"
    assert "unfinished" in row["flags"]
    assert sum(flag.id == "unfinished" for flag in cut.report.flags) == 2
    (sheet,) = sheets([table_of(cut.report)])
    texts = {header: cell.text for header, cell in zip(sheet.headers, sheet.rows[0], strict=True)}
    assert next(text for header, text in texts.items() if header.startswith(HANG)) == "open: time limit"
    assert next(text for header, text in texts.items() if header.startswith(FAIL)) == "open: error"
    assert np.isnan(sheet.frame["rank"].item())  # a row that is not complete has no rank


def test_the_next_run_computes_what_was_left_open_and_no_more(cut: Cut) -> None:
    cut.fault.unlink(missing_ok=True)
    report = evaluate(Linear(), data(), THREAT, **cut.methods, batch_size=5, store=cut.store)
    assert sorted(asked("Shift 1")) == sorted([*range(505, 520), *range(510, 520)])
    assert not report.unfinished
    alone = evaluate(Linear(), data(), THREAT, **cut.methods, batch_size=5)
    assert report.summary().equals(alone.summary())


def test_a_limit_that_is_not_hit_changes_nothing_and_none_starts_no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("multiprocessing.context.SpawnProcess.start", None)
        evaluate(Linear(), data(), THREAT, [PGD(steps=2)])
    methods: dict[str, Any] = {"attacks": [PGD(steps=2, restarts=2)], "certifiers": [IBP()], "mode": "cascade"}
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2))
    one = evaluate(model, data(), THREAT, **methods, probed=True)
    two = evaluate(model, data(), THREAT, **methods, probed=True, time_limit=300)
    assert one.records.drop(columns="seconds").equals(two.records.drop(columns="seconds"))
    assert one.notes == two.notes
    assert one.summary().equals(two.summary())


def test_a_model_that_cannot_be_sent_is_refused_before_anything_starts() -> None:
    class Local(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return Linear()(x)

    with pytest.raises(ValueError, match=r"time limit needs a worker process.*Local.*top level of a module"):
        evaluate(Local(), data(), THREAT, time_limit=1)
    for limit in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="time_limit must be a positive number of seconds"):
            evaluate(Linear(), data(), THREAT, time_limit=limit)


@pytest.mark.slow
def test_a_worker_that_dies_costs_its_batch_or_gets_a_smaller_one(tmp_path: Path) -> None:
    fault = tmp_path / "fault"
    fault.touch()
    deaths = [Faulty(fault="segv", at=515, while_there=str(fault)), Faulty(fault="killed", while_there=str(fault))]
    with pytest.raises(EvaluationError, match=r"WorkerError: the worker process died by signal SIGSEGV") as caught:
        evaluate(Linear(), data(), THREAT, deaths, batch_size=5, time_limit=60)
    report = caught.value.report
    assert report is not None
    (left,) = report.unfinished
    assert left.samples == 5
    whole = evaluate(Linear(), data(), THREAT, [Shift()], batch_size=5)
    assert (
        rows(report, report.records["method"].iloc[-1])
        .drop(columns="method")
        .equals(rows(whole, "Shift").drop(columns="method"))
    )
    assert any("2 samples at a time" in remark for remark in report.remarks)


def test_one_batch_that_fails_leaves_the_others(tmp_path: Path) -> None:
    fault = tmp_path / "fault"
    fault.touch()
    attacks = [Faulty(at=515, while_there=str(fault)), Shift()]
    for mode in ("full", "cascade"):
        store = tmp_path / mode
        with pytest.raises(EvaluationError, match=r"the rest is complete; run again") as caught:
            evaluate(Linear(), data(), THREAT, attacks, [Exact()], mode=mode, store=store, batch_size=5)
        report = caught.value.report
        assert report is not None
        whole = evaluate(Linear(), data(), THREAT, [Shift()], [Exact()], mode="full")
        assert report.summary()["worst_case"].item() == whole.summary()["worst_case"].item()
        assert len(Store(store).records()) == len(report.records)
        (part,) = report.unfinished
        assert 0 < part.samples <= (5 if mode == "full" else 9)  # a cascade cuts batches anew
    fault.unlink()
    fakes.CALLS.clear()
    evaluate(Linear(), data(), THREAT, attacks, [Exact()], store=tmp_path / "full", batch_size=5)
    assert sorted(asked("Shift 1")) == [*range(515, 520)]


class Moody(nn.Module):
    """Answers about no batch with a very bright image."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if bool((x[:, 0, 0, 0] > 0.995).any()):
            raise ZeroDivisionError("too bright")
        return Linear()(x)


def test_a_model_that_raises_on_one_batch_costs_its_samples_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = data()
    samples.images[:, :, 0, 0] = samples.images[:, :, 0, 0].clamp(max=0.9)
    samples.images[37, 0, 0, 0] = 1.0
    samples = Dataset("bright", "test", samples.images, samples.labels, samples.indices, 2)
    monkeypatch.setattr(runners, "LOOKED_AT", 20)  # the first look does not see the image
    message = r"Moody: clean failed on samples 515 .. 519 of bright: ZeroDivisionError: too bright"
    with pytest.raises(EvaluationError, match=message) as caught:
        evaluate(Moody(), samples, THREAT, [Shift(0.1)], batch_size=5)
    report = caught.value.report
    assert report is not None
    (row,) = (row for _, row in report.summary().iterrows())
    assert (row["n"], row["verdict"]) == (35, "doubtful")  # of samples without an answer nothing is said
    assert set(report.records["index"]) == {*range(20), *range(500, 515)}
    assert "clean: 5 samples open: error" in report.flags[-1].evidence


def test_nothing_answered_is_an_error() -> None:
    samples = data()
    samples.images[:, 0, 0, 0] = 0.5
    model = Hungry(0)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        evaluate(model, samples, THREAT)


@pytest.mark.parametrize("whole", [True, False])
def test_an_attack_that_returns_nan_breaks_nothing(whole: bool) -> None:
    report = evaluate(Linear(), data(), THREAT, [NotANumber(whole), Shift()], [Exact()])
    found = rows(report, f"NotANumber{'' if whole else '(whole=False)'}")
    wrong = ~rows(report, "clean")["correct"].astype(bool)
    assert found["success"].astype(bool).equals(wrong.rename("success"))  # misclassified from the start, no other
    assert np.isfinite(found["margin"]).all()
    assert report.verdict == "doubtful" and not report.violations


def test_an_attack_that_claims_success_at_nan_is_refuted() -> None:
    @dataclass(frozen=True)
    class Claims(Liar):
        def __call__(self, model: Any, x: torch.Tensor, *args: Any, **rest: Any) -> Any:
            result = super().__call__(model, x, *args, **rest)
            result.x_adv[:] = torch.nan
            return result

    report = evaluate(Linear(), data(), THREAT, [Claims(outside=True)])
    assert not rows(report, "Claims(outside=True)")["success"].any()
    assert report.verdict == "invalid"


@pytest.mark.parametrize(("shortage", "mode"), [("cuda", "full"), ("cpu", "cascade"), ("python", "full")])
def test_a_batch_that_does_not_fit_is_halved_and_rows_are_the_same(shortage: str, mode: str) -> None:
    model = Hungry(3, shortage)
    methods: dict[str, Any] = {"attacks": [PGD(steps=2), Shift()], "mode": mode, "name": "net"}
    short = evaluate(model, data(), THREAT, **methods)
    assert model.largest == 3
    whole = evaluate(Hungry(1000), data(), THREAT, **methods)
    exact = ["kind", "method", "index", "prediction", "correct", "success", "forwards", "backwards", "first_success"]
    assert short.records[exact].equals(whole.records[exact])
    np.testing.assert_allclose(short.records["margin"], whole.records["margin"], atol=1e-5)
    assert not short.unfinished
    assert [remark for remark in short.remarks if remark.startswith("clean: 3 samples at a time")]
    assert len(short.remarks) == 3  # once for each method, not for each batch
    assert not whole.remarks


def test_one_sample_that_does_not_fit_is_named() -> None:
    @dataclass(frozen=True)
    class Greedy(Shift):
        def run(self, *args: Any) -> torch.Tensor:
            raise MemoryError("3 TiB")

    with pytest.raises(
        EvaluationError, match=r"Greedy failed .*out of memory with one sample: MemoryError: 3 TiB"
    ) as e:
        evaluate(Linear(), data(), THREAT, [Greedy(), Shift()])
    assert e.value.report is not None
    assert len(rows(e.value.report, "Shift")) == 40


def test_what_counts_as_a_lack_of_memory() -> None:
    for make in fault_fakes.SHORTAGES.values():
        assert ran_out(make())
        with pytest.raises(ValueError, match="cannot take") as chained:
            raise ValueError("the model cannot take this") from make()
        assert ran_out(chained.value)
    with pytest.raises(RuntimeError) as real:
        torch.empty(1 << 46)
    assert ran_out(real.value)
    assert not ran_out(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not ran_out(None)
    asked_about: list[int] = []

    def ask(size: int) -> int:
        asked_about.append(size)
        if size > 4:
            raise MemoryError
        return size

    assert fitting(ask, 33) == 3
    assert asked_about == [33, 17, 9, 5, 3]
    places = torch.arange(10)
    assert torch.equal(in_chunks(lambda part: places[part] + 0 * ask(len(places[part])), 10), places)


def test_a_probe_that_fails_leaves_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no probe today")

    monkeypatch.setattr(runners.InProcess, "probe", fail)
    with pytest.raises(EvaluationError, match="no probe today") as caught:
        evaluate(Linear(), data(), THREAT, [Shift()], probed=True)
    report = caught.value.report
    assert report is not None
    assert report.summary()["worst_case"].item() < 1
    assert report.verdict == "doubtful"
    whole = evaluate(Linear(), data(), THREAT, [Shift()]).summary()
    assert list(report.summary().columns) == list(whole.columns)  # a probe has no figure of its own
