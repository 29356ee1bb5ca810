"""The fingerprint of a model: equal for models that answer alike by construction, different where anything differs.

It covers the names, shapes, dtypes and bytes of all parameters and buffers; every other attribute of every submodule
(sizes, strides, a wrapper's strength, lists of functions); hooks; the source of every class that is not torch's own;
and what the code of those classes and functions names: global functions, classes and values, in turn (`names`). So two
masks around one net differ, and a defense whose code, or a helper of it, was changed is evaluated anew. A callable that
is no module is covered likewise: closures, defaults, a partial's arguments, an object's attributes, a method's object.

It does not cover the code of installed packages, which a class or function of theirs stands for by its own source, nor
what a function imports when it runs, nor what it finds by a computed name: whoever changes those gives the model
another name or class.

Left out on purpose: train or eval mode, `requires_grad`, device, and `.grad`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import os
from collections.abc import Mapping
from enum import Enum
from functools import lru_cache, partial
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robustbench_lite.evaluation.names import code_of, codes_of, is_followed, named_by

__all__ = ["fingerprint"]

_BY_NAME = ("torch", "builtins", "functools", "typing", "abc")  # classes of these packages are covered by their names
_SKIPPED = {"training", "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "_is_full_backward_hook"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def fingerprint(model: Any, name: str | None = None) -> str:
    """Return 16 hex digits that stand for a model, the same in every process.

    A callable that is not a module may compute its answer elsewhere, where nobody can look: its `name` enters as well.

    Raises:
        ValueError: a callable without a name.
        TypeError: not callable.
    """
    digest = _Digest()
    if isinstance(model, nn.Module):
        digest.module(model)
    elif not callable(model):
        raise TypeError(f"a model must be an nn.Module or a callable from images to logits, got {type(model).__name__}")
    elif not name:
        raise ValueError("a callable that is not an nn.Module needs a name: evaluate(..., name='mine, weights of May')")
    else:
        digest.text("callable", name)
        digest.value(model)
    return digest.hash.hexdigest()[:16]


class _Digest:
    """A hash fed with values in an unambiguous, process-independent form."""

    def __init__(self) -> None:
        self.hash = hashlib.sha256()
        self._open: list[int] = []  # objects being fed: a cycle is cut where it closes
        self._followed: dict[int, Any] = {}  # functions and classes whose names were fed: once is enough

    def text(self, *parts: str) -> None:
        for part in parts:
            data = part.encode()
            self.hash.update(f"{len(data)}:".encode() + data)

    def module(self, module: nn.Module) -> None:
        module = getattr(module, "_orig_mod", module)  # a compiled module is the module
        own = _by_name(type(module))  # torch's private attributes come and go with its versions
        self._class("module", type(module))
        for kind, tensors in (("parameter", module._parameters), ("buffer", module._buffers)):
            for key, tensor in tensors.items():
                self.text(kind, key)
                self.value(tensor)
        for key, value in sorted(vars(module).items()):
            if key not in _SKIPPED and not (key.startswith("_") and (own or "hook" in key)):
                self.text("attribute", key)
                self.value(value)
        code = getattr(module, "code", None)  # traced and scripted modules keep what they do as text
        self.text(code if isinstance(code, str) else "")
        for kind in _HOOKS:
            for hook in getattr(module, kind, {}).values():
                self.text(kind)
                self.value(hook)
        for key, child in module._modules.items():
            self.text("child", key)
            self.value(child)

    def value(self, value: Any) -> None:
        if id(value) in self._open:
            self.text("cycle", str(len(self._open) - self._open.index(id(value))))
            return
        self._open.append(id(value))
        self._value(value)
        self._open.pop()

    def _value(self, value: Any) -> None:
        if value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype)):
            self.text(type(value).__name__, repr(value))
        elif isinstance(value, torch.device):
            self.text("device")
        elif isinstance(value, Tensor):
            self._tensor(value)
        elif isinstance(value, nn.Module):
            self.module(value)
        elif isinstance(value, (np.ndarray, np.generic)):
            self.text("numpy", str(value.dtype), str(value.shape))
            self.hash.update(np.ascontiguousarray(value).tobytes())
        elif isinstance(value, type):
            self._class("class", value)
        elif isinstance(value, ModuleType):
            self.text("python module", value.__name__)
        elif isinstance(value, (FunctionType, MethodType)):
            self._function(value)
        else:
            self._object(value)

    def _tensor(self, tensor: Tensor) -> None:
        data = tensor.detach().cpu().contiguous()
        data = data.to_dense() if data.layout is not torch.strided else data
        self.text("tensor", str(tuple(data.shape)), str(data.dtype))
        self.hash.update(data.reshape(-1).view(torch.uint8).numpy().tobytes() if data.numel() else b"")

    def _function(self, function: FunctionType | MethodType) -> None:
        self.text("function", function.__qualname__, _source(function))
        if isinstance(function, MethodType):
            self.value(function.__self__)
            return
        for cell in function.__closure__ or ():
            try:
                held = cell.cell_contents
            except ValueError:  # a name that is bound later, or never
                self.text("empty cell")
            else:
                self.value(held)
        self._names(function, [function])
        self.value(function.__defaults__)
        self.value(function.__kwdefaults__)

    def _class(self, kind: str, cls: type) -> None:
        self.text(kind, _described(cls))
        for base in cls.__mro__:
            if id(base) not in self._followed:
                self._names(base, codes_of(base) if is_followed(base) else [])

    def _names(self, owner: Any, functions: list[FunctionType]) -> None:
        """Feed what the code of a function, or of a class's methods, names."""
        if id(owner) in self._followed:
            return
        self._followed[id(owner)] = owner  # kept alive: an id must not come twice
        for function in functions if is_followed(owner) else []:
            for name, value in named_by(function):
                self.text("name", name)
                self.value(value)

    def _object(self, value: Any) -> None:
        """Feed a container, or any other object: its class, and what it holds."""
        self._class("object", type(value))
        self.text(str(getattr(value, "__qualname__", getattr(value, "__name__", ""))))
        if isinstance(value, partial):
            self.value((value.func, value.args, value.keywords))
        elif isinstance(value, Enum):
            self.text(value.name)
        elif isinstance(value, Mapping):
            for key, part in value.items():
                self.value(key)
                self.value(part)
        elif isinstance(value, (list, tuple)):
            self.text(str(len(value)))
            for part in value:
                self.value(part)
        elif isinstance(value, (set, frozenset)):
            self.text(*sorted(_alone(part) for part in value))
        elif dataclasses.is_dataclass(value):
            for field in dataclasses.fields(value):
                self.text(field.name)
                self.value(getattr(value, field.name))
        else:
            held = getattr(value, "__dict__", {})
            slots = [s for c in type(value).__mro__ for s in getattr(c, "__slots__", ()) if hasattr(value, s)]
            for key in sorted({*held, *slots} - {"__dict__", "__weakref__"}):
                self.text(key)
                self.value(getattr(value, key))


def _alone(value: Any) -> str:
    digest = _Digest()
    digest.value(value)
    return digest.hash.hexdigest()


def _by_name(cls: type) -> bool:
    return cls.__module__.partition(".")[0] in _BY_NAME


def _described(cls: type) -> str:
    """Return a class's name, with the sources of it and its bases where they are not torch's own."""
    sources = [_source(c) for c in cls.__mro__ if not _by_name(c)]
    return "\n".join([f"{cls.__module__}.{cls.__qualname__}" if not sources else cls.__qualname__, *sources])


def _source(thing: Any) -> str:
    """Return the source of a class or function; where no file holds it, what its code does."""
    try:
        state = _state_of_file(thing) if isinstance(thing, type) else None
        return inspect.getsource(thing) if state is None else _class_source(thing, state)
    except (OSError, TypeError):
        codes = (
            {k: f.__code__ for k, f in vars(thing).items() if isinstance(f, FunctionType)}
            if isinstance(thing, type)
            else {"": code_of(thing)}
        )
        return "\n".join(f"{key} {_code(code)}" for key, code in sorted(codes.items()) if isinstance(code, CodeType))


@lru_cache(maxsize=1024)
def _class_source(cls: type, state: tuple[str, int, int]) -> str:
    """Return a class's source while its file is in this state: Python parses the whole file for each class."""
    return inspect.getsource(cls)


def _state_of_file(cls: type) -> tuple[str, int, int] | None:
    """Return what changes with a class's file; None where it lies in none, as in a notebook."""
    try:
        path = inspect.getfile(cls)
        seen = os.stat(path)
    except (OSError, TypeError):
        return None
    return path, seen.st_mtime_ns, seen.st_size


def _code(code: CodeType) -> str:
    constants = [_code(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts]
    return f"{code.co_code.hex()} {code.co_names} {constants}"
