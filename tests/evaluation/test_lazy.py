"""A table is served from a store without torch; and a package's public names come when asked for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from evaluation_fakes import Exact, Linear, Shift, two_blocks

import robustbench_lite.evaluation
from robustbench_lite.core.threats import Lp
from robustbench_lite.evaluation import evaluate

SCRIPT = """
import sys
from robustbench_lite.evaluation import Report, Store, clopper_pearson, summarize
store = Store(sys.argv[1])
print(summarize(store.records(), store.flags())["worst_case"].item())
list(store.parts())
print(sorted({"torch", "sklearn", "foolbox", "torchvision", "matplotlib"} & set(sys.modules)))
"""


def test_a_table_needs_no_torch(tmp_path: Path) -> None:
    report = evaluate(Linear(), two_blocks(20), Lp("linf", 0.05), [Shift()], [Exact()], store=tmp_path)
    child = subprocess.run([sys.executable, "-c", SCRIPT, tmp_path], capture_output=True, text=True, check=True)
    figure, modules = child.stdout.split("\n")[:2]
    assert float(figure) == report.summary()["worst_case"].item()
    assert modules == "[]"


def test_public_names() -> None:
    for name in robustbench_lite.evaluation.__all__:
        assert getattr(robustbench_lite.evaluation, name).__name__ == name
    with pytest.raises(AttributeError, match="nothing"):
        _ = robustbench_lite.evaluation.nothing
