"""The table of one threat has no column for a method that is meant for another, whatever a cascade left it to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from evaluation_fakes import Exact, Linear, Shift, two_blocks

from robustbench_lite.attacks import RotationTranslationGrid
from robustbench_lite.core.spatial import RotationTranslation
from robustbench_lite.core.threats import Lp
from robustbench_lite.evaluation import evaluate
from robustbench_lite.report import sheets, table_of

NEAR, TURNED = Lp("linf", 1e-4), RotationTranslation(10, 1)  # NEAR: proven of each sample that is right


@dataclass(frozen=True)
class Nowhere(Shift):
    """Supports no threat at all."""

    def supports(self, threat: Any) -> bool:
        return False


@pytest.mark.parametrize("mode", ["full", "cascade"])
def test_a_threat_shows_what_could_apply_to_it(mode: str) -> None:
    attacks = [Shift(), RotationTranslationGrid(), Nowhere()]
    report = evaluate(Linear(), two_blocks(20), [NEAR, TURNED], attacks, [Exact()], mode=mode, audit=0)
    linf, rotation = sheets([table_of(report)])
    for sheet, own in ((linf, "Shift"), (rotation, "RotationTranslationGrid")):
        assert set(sheet.headers) & {"Shift", "RotationTranslationGrid", "Nowhere", "Exact"} == {own, "Nowhere"}
        (row,) = sheet.rows
        cells = dict(zip(sheet.headers, (cell.text for cell in row), strict=True))
        assert cells["Nowhere"] == "n/a"  # it was asked for, and the report says why not
        assert (cells[own] == "n/a") == (mode == "cascade" and own == "Shift")  # proofs left it nothing
    assert report.elsewhere == {
        ("linf", NEAR.size): {"RotationTranslationGrid"},
        (TURNED.name, TURNED.size): {"Shift", "Exact"},
    }
