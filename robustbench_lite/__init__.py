"""Adversarial robustness: attack and proof in one honest, per-sample, audited table.

The names below are imported when first used, so that the command line starts without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from robustbench_lite.core.goals import Targeted as Targeted
    from robustbench_lite.core.goals import Untargeted as Untargeted
    from robustbench_lite.core.spatial import Deformation as Deformation
    from robustbench_lite.core.spatial import RotationTranslation as RotationTranslation
    from robustbench_lite.core.threats import Lp as Lp
    from robustbench_lite.data import load_data as load_data
    from robustbench_lite.evaluation import evaluate as evaluate
    from robustbench_lite.zoo import load_defense as load_defense

__version__ = "0.1.0"

_HOMES = {
    "Deformation": "core.spatial",
    "Lp": "core.threats",
    "RotationTranslation": "core.spatial",
    "Targeted": "core.goals",
    "Untargeted": "core.goals",
    "evaluate": "evaluation",
    "load_data": "data",
    "load_defense": "zoo",
}

__all__ = [
    "Deformation",
    "Lp",
    "RotationTranslation",
    "Targeted",
    "Untargeted",
    "evaluate",
    "load_data",
    "load_defense",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
