"""The registry of methods: one YAML file `conf/<group>/<name>.yaml` each, whose `_target_` says what to build.

Reading it needs no torch, so that lists and tab completion are quick. It works from a wheel, an editable installation
and the source tree alike, because the files are found as resources of the package `robustbench_lite.conf`.
"""

from __future__ import annotations

import importlib
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any

from omegaconf import OmegaConf

from robustbench_lite.core.errors import lookup, suggest

__all__ = ["groups", "load", "resolve", "target"]


def groups(group: str) -> dict[str, Traversable]:
    """Return the YAML files of a config group (``"attack"``, ``"data"``, ...) by name, sorted.

    Raises:
        ValueError: there is no such group.
    """
    root = files("robustbench_lite.conf")
    known = {folder.name: folder for folder in root.iterdir() if folder.is_dir() and not folder.name.startswith("_")}
    found = {file.name.removesuffix(".yaml"): file for file in lookup(group, known, "config group").iterdir()}
    return {name: found[name] for name in sorted(found) if found[name].name.endswith(".yaml")}


def load(group: str, name: str) -> dict[str, Any]:
    """Return the content of `conf/<group>/<name>.yaml` as Hydra reads it (1e-3 is a number), nothing interpolated.

    Raises:
        ValueError: no such group or name (with the nearest one), or the file is not a mapping.
    """
    file = lookup(name, groups(group), group)
    content = OmegaConf.to_container(OmegaConf.create(file.read_text(encoding="utf-8")), resolve=False)
    if not isinstance(content, dict):
        raise ValueError(f"conf/{group}/{name}.yaml must be a mapping, got {type(content).__name__}")
    return {str(key): value for key, value in content.items()}


def target(group: str, name: str) -> str:
    """Return the `_target_` of `conf/<group>/<name>.yaml`: the dotted path of a class or function.

    Raises:
        ValueError: no such group or name, or the file has no `_target_`.
    """
    content = load(group, name)
    if not isinstance(content.get("_target_"), str):
        raise ValueError(f"conf/{group}/{name}.yaml has no _target_: the dotted path of what to build")
    return str(content["_target_"])


def resolve(path: str) -> Any:
    """Import what a dotted path such as ``"my.module.Net"`` names (nested classes too).

    Raises:
        ImportError: no such module, or the module has no such name. A module that is there but itself fails to import
            raises its own error.
    """
    parts = path.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:cut])
        try:
            found: Any = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not (module == error.name or module.startswith(f"{error.name}.")):
                raise
            continue
        for position, name in enumerate(parts[cut:], start=cut):
            if not hasattr(found, name):
                owner = ".".join(parts[:position])
                known = [known for known in vars(found) if not known.startswith("_")]
                raise ImportError(suggest(name, known, f"name in {owner}"))
            found = getattr(found, name)
        return found
    hint = "is its folder on PYTHONPATH?" if len(parts) > 1 else "expected a dotted path such as 'my.module.Net'"
    raise ImportError(f"cannot import {path!r}: no module {parts[0]!r}; {hint}")
