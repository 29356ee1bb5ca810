"""Names in code: which globals of its module a function refers to, for the fingerprint.

Only code of this package and of the user's own files is followed: what is installed, the standard library and torch
stand for themselves.
"""

from __future__ import annotations

import inspect
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch

__all__ = ["code_of", "codes_of", "is_followed", "named_by"]

_OWN = "robustbench_lite"
_INSTALLED = tuple({sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib", "platstdlib")})
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.Tensor, np.ndarray, np.generic)
_HOLDERS = (dict, list, tuple, set, frozenset, partial, MethodType, torch.nn.Module)


def is_followed(thing: Any) -> bool:
    """Say whether the code of a function or class is looked into."""
    home = str(getattr(thing, "__module__", None) or "")
    top = home.partition(".")[0]
    if top == _OWN:
        return True  # wherever it is installed: a fingerprint must not depend on that
    if top in sys.stdlib_module_names and top != "__main__":
        return False
    code = code_of(thing) if isinstance(thing, FunctionType) else None
    file = code.co_filename if code else str(getattr(sys.modules.get(home), "__file__", None) or "")
    path = Path(file)
    return not (any(path.is_relative_to(folder) for folder in _INSTALLED) or "site-packages" in path.parts)


def code_of(thing: Any) -> CodeType | None:
    """Return the code of a function, through its decorators' `__wrapped__`; None where there is none."""
    return getattr(_unwrapped(thing), "__code__", None)


def codes_of(cls: type) -> list[FunctionType]:
    """Return the functions a class defines and whose outcome is not in its instances already, in their order."""
    found = []
    for name, member in vars(cls).items():
        for part in (member.fget, member.fset) if isinstance(member, property) else (member,):
            function = _unwrapped(getattr(part, "__func__", part))
            if isinstance(function, FunctionType) and name != "__init__":
                found.append(function)
    return found


def named_by(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """Yield (name, value) of the globals that a function refers to, those behind `module.name` too."""
    bare = _unwrapped(function)
    yield from _resolve(_names(bare.__code__), bare.__globals__, "", 0)


def _unwrapped(thing: Any) -> Any:
    """Return the function inside its decorators and caches, whose own text its source shows."""
    return inspect.unwrap(thing) if callable(thing) and not isinstance(thing, (type, torch.nn.Module)) else thing


def _names(code: CodeType) -> list[str]:
    """Return all names in a piece of code and the pieces inside it, sorted."""
    inner = [name for part in code.co_consts if isinstance(part, CodeType) for name in _names(part)]
    return sorted({*code.co_names, *inner})


def _resolve(names: list[str], space: Mapping[str, Any], prefix: str, depth: int) -> Iterator[tuple[str, Any]]:
    for name in names:
        if name not in space or name.startswith("__"):
            continue
        value = _unwrapped(space[name])
        if isinstance(value, ModuleType):
            if depth < 3 and _is_file_followed(value):
                yield from _resolve(names, vars(value), f"{prefix}{name}.", depth + 1)
        elif _tells(value):
            yield prefix + name, value


def _is_file_followed(module: ModuleType) -> bool:
    probe = type("_", (), {"__module__": module.__name__})
    return is_followed(probe)


def _tells(value: Any) -> bool:
    """Say whether a global is part of what the code does; loggers, locks and typing's forms are not."""
    if isinstance(value, (FunctionType, type)):
        return is_followed(value)
    return isinstance(value, (*_PLAIN, *_HOLDERS, BuiltinFunctionType)) or is_followed(type(value))
