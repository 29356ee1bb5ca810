"""First lines of docstrings, read from the source: importing the class would import torch, or foolbox."""

from __future__ import annotations

import ast
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path

__all__ = ["summary_of"]


def summary_of(target: str) -> str:
    """Return the first line of the docstring of a class or function by its dotted name; "" where there is none.

    A name that a package exports is looked for in the package's modules.
    """
    module, _, name = target.rpartition(".")
    for file in _files(module):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == name:
                return (ast.get_docstring(node) or "").partition("\n")[0]
    return ""


def _files(module: str) -> list[Path]:
    spec = _spec(module)
    if spec is None:
        return []
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if folders:
        return [file for folder in folders for file in sorted(folder.glob("*.py"))]
    return [Path(spec.origin)] if spec.origin and spec.origin.endswith(".py") else []


def _spec(module: str) -> ModuleSpec | None:
    """Find a module without importing the packages around it, whose `__init__` may import everything."""
    parent, _, name = module.rpartition(".")
    if not parent or parent == "robustbench_lite":  # that one imports nothing
        return find_spec(module) if parent or _importable(name) else None
    around = _spec(parent)
    if around is None or not around.submodule_search_locations:
        return None
    from importlib.machinery import PathFinder

    return PathFinder.find_spec(module, list(around.submodule_search_locations))


def _importable(name: str) -> bool:
    return name.isidentifier()
