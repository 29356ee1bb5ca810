"""Export every public name of a package's modules, so that a new method is one new file and no edited one."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable
from typing import Any

__all__ = ["export_all"]


def export_all(package: str, path: Iterable[str]) -> dict[str, Any]:
    """Import the public modules of `package` and return the names in their `__all__`.

    Args:
        package: dotted name of the package.
        path: its `__path__`.

    Raises:
        ImportError: two modules export one name.
    """
    exported: dict[str, Any] = {}
    for module in pkgutil.iter_modules(path):
        if module.name.startswith("_") or module.ispkg:
            continue
        loaded = importlib.import_module(f"{package}.{module.name}")
        for name in getattr(loaded, "__all__", ()):
            if name in exported:
                raise ImportError(f"{loaded.__name__} and {exported[name].__module__} both export {name}")
            exported[name] = getattr(loaded, name)
    return exported
