"""The harness: evaluate, records and store, audit, flags, tables.

Names are imported when they are first used: reading a store and making a table of it needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from robustbench_lite.evaluation.budget import Budget as Budget
    from robustbench_lite.evaluation.flags import Flag as Flag
    from robustbench_lite.evaluation.harness import UnsavedError as UnsavedError
    from robustbench_lite.evaluation.harness import evaluate as evaluate
    from robustbench_lite.evaluation.intervals import clopper_pearson as clopper_pearson
    from robustbench_lite.evaluation.report import Report as Report
    from robustbench_lite.evaluation.store import Store as Store
    from robustbench_lite.evaluation.store import StoreError as StoreError
    from robustbench_lite.evaluation.summary import summarize as summarize
    from robustbench_lite.evaluation.unfinished import EvaluationError as EvaluationError
    from robustbench_lite.evaluation.unfinished import Unfinished as Unfinished

_HOMES = {  # public name: its module; a function and its module that share a name must not shadow each other
    "Budget": "budget",
    "EvaluationError": "unfinished",
    "Flag": "flags",
    "Report": "report",
    "Store": "store",
    "StoreError": "store",
    "Unfinished": "unfinished",
    "UnsavedError": "harness",
    "clopper_pearson": "intervals",
    "evaluate": "harness",
    "summarize": "summary",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
