"""Forecasts: what is to compute, what it costs, and that nothing is written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_fakes import Exact, Linear, Shift, two_blocks
from torch import nn

from robustbench_lite.attacks import PGD, Square
from robustbench_lite.certify import IBP
from robustbench_lite.core.threats import Lp
from robustbench_lite.data import load_data
from robustbench_lite.evaluation import evaluate, meter
from robustbench_lite.evaluation import forecast as forecasts
from robustbench_lite.evaluation.forecast import forecast
from robustbench_lite.evaluation.meter import Line, Taken
from robustbench_lite.zoo import load_defense

THREAT = Lp("linf", 0.05)


def by_method(found: forecasts.Forecast) -> dict[str, forecasts.Expected]:
    return {cell.method: cell for cell in found.cells}


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*")}


def test_passes_are_near_those_of_the_evaluation_and_the_store_is_only_read(tmp_path: Path) -> None:
    net, data, threat = load_defense("digits/pgd_at"), load_data("digits").sample(120, seed=3), Lp("linf", 0.1)
    methods: dict[str, Any] = {"attacks": [PGD(steps=10), Square(queries=20)], "certifiers": [IBP()]}
    nothing = tmp_path / "none"
    found = forecast(net, data, threat, **methods, store=nothing)
    assert not nothing.exists()
    report = evaluate(net, data, threat, **methods, store=tmp_path / "store")
    for method, cell in by_method(found).items():
        rows = report.records[report.records["method"] == method]
        assert (cell.stored, cell.missing) == (0, 120)
        for name in ("forwards", "backwards"):  # a mean of 64 of 120 samples
            truth = rows[name].fillna(0).to_numpy(dtype=float)
            error = 4 * truth.std() / np.sqrt(64) * 120
            assert abs(getattr(cell, name) - truth.sum()) <= error + 1
    before = contents(tmp_path)
    done = forecast(net, data, threat, **methods, store=tmp_path / "store")
    assert contents(tmp_path) == before
    assert {(cell.stored, cell.missing, cell.minutes) for cell in done.cells} == {(120, 0, 0.0)}
    evaluate(net, data.head(50), threat, [PGD(steps=10)], store=tmp_path / "part")
    part = by_method(forecast(net, data, threat, **methods, store=tmp_path / "part"))
    assert (part["PGD(steps=10)"].stored, part["PGD(steps=10)"].missing) == (50, 70)
    assert (part["IBP"].stored, part["IBP"].missing) == (0, 120)


def test_in_a_cascade_the_share_that_is_met_comes_from_the_calibration() -> None:
    data = two_blocks(400)
    methods: dict[str, Any] = {"attacks": [Shift(0.5), Shift()], "certifiers": [Exact()], "mode": "cascade"}
    found = by_method(forecast(Linear(), data, THREAT, **methods, audit=0.0))
    rows = evaluate(Linear(), data, THREAT, **methods, audit=0.0).records
    assert found["Exact"].missing == 400  # the first method meets all
    for method in ("Shift(reach=0.5)", "Shift"):
        own = rows[rows["method"] == method]
        right = own["first_success"].ne(1).sum() / 400  # those that are wrong from the start cost nothing
        tolerance = 4 * np.sqrt(right * (1 - right) / 64)
        assert abs(found[method].missing / 400 - right) <= tolerance
    assert found["Shift"].missing < found["Shift(reach=0.5)"].missing < 400


class Loops(nn.Module):
    """Nothing bounds a module whose control flow depends on values."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = Linear()(x) if float(x.sum()) >= 0 else x.flatten(1)[:, :2]
        return out


def test_a_method_that_does_not_apply_costs_nothing() -> None:
    found = by_method(forecast(Loops(), two_blocks(40), THREAT, [Shift()], [IBP()]))
    assert not found["IBP"].applies
    assert found["IBP"].minutes == 0
    assert found["Shift"].applies


def test_time_is_fixed_part_and_part_of_each_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(meter.time, "perf_counter", lambda: clock[0])

    @dataclass(frozen=True)
    class Slow(Shift):
        def __call__(self, model: Any, x: torch.Tensor, *rest: Any, **more: Any) -> Any:
            clock[0] += 0.5 + 0.01 * len(x)
            return super().__call__(model, x, *rest, **more)

    found = by_method(forecast(Linear(), two_blocks(100), THREAT, [Slow()], batch_size=20))
    batches = [20] * 5  # whatever blocks the indices lie in
    assert found["Slow"].minutes == pytest.approx(sum(0.5 + 0.01 * size for size in batches) / 60)


@pytest.mark.parametrize(("seconds", "sizes"), [(0.1, [1, 1, 4, 16, 50]), (6.0, [1, 1, 4]), (100.0, [1])])
def test_a_dear_method_is_run_on_few_samples(monkeypatch: pytest.MonkeyPatch, seconds: float, sizes: list[int]) -> None:
    clock, seen = [0.0], []
    monkeypatch.setattr(meter.time, "perf_counter", lambda: clock[0])

    @dataclass(frozen=True)
    class Dear(Shift):
        def __call__(self, model: Any, x: torch.Tensor, *rest: Any, **more: Any) -> Any:
            seen.append(len(x))
            clock[0] += seconds * len(x)
            return super().__call__(model, x, *rest, **more)

    found = by_method(forecast(Linear(), two_blocks(50), THREAT, [Dear()]))
    assert seen == sizes
    assert found["Dear"].minutes == pytest.approx(50 * seconds / 60)


def test_a_line_goes_through_the_last_two_points_and_never_falls() -> None:
    assert Line.through([(1, 9.0), (4, 5.0), (8, 7.0)]).at(20) == pytest.approx(3 + 0.5 * 20)
    assert Line.through([(2, 3.0)]).at(10) == pytest.approx(15.0)
    assert Line.through([(4, 5.0), (8, 4.0)]).at(100) == pytest.approx(4.0)  # noise: a fixed cost
    assert Line.through([(1, 1.0), (4, 8.0)]).at(4) == pytest.approx(8.0)  # what grows faster is taken as it was


def test_memory_is_that_of_the_largest_batch() -> None:
    class Wide(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            wide = x.flatten(1).repeat(1, 2**16)  # 4 MiB an image
            out: torch.Tensor = Linear()(x) + 0 * wide.sum(dim=1, keepdim=True)
            return out

    work = [torch.rand(n, 1, 4, 4) for n in (1, 40)]
    peaks = [meter.measured(lambda x=x: Wide()(x), len(x), torch.device("cpu"))[1].peak for x in work]
    if peaks[0] is None:
        pytest.skip("nothing tells the peak of a process here")
    assert peaks[1] - peaks[0] == pytest.approx(39 * 4 * 2**20, rel=0.25)
    assert Taken(3, 1.0, None).peak is None
