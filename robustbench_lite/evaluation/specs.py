"""Specs: a threat or a method as plain JSON that names it exactly and rebuilds it.

`{"_target_": "robustbench_lite.core.threats.Lp", "norm": "linf", "eps": 0.3, "bounds": [0.0, 1.0]}`: the class and
every field of a frozen dataclass. A stored result carries the spec of what made it.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from enum import Enum
from typing import Any

__all__ = ["build", "canonical", "spec", "title"]

_PACKAGE = "robustbench_lite."


def spec(obj: Any) -> dict[str, Any]:
    """Return the spec of a dataclass instance: its class path and all its fields, as JSON.

    A model among the fields (a surrogate, say) is named by its fingerprint: such a spec identifies, but cannot be
    built.

    Raises:
        TypeError: not a dataclass instance, or a field that JSON cannot hold, such as a tensor.
    """
    if isinstance(obj, type) or not dataclasses.is_dataclass(obj):
        raise TypeError(f"threats, attacks and certifiers must be instances of dataclasses, got {obj!r}")
    fields = {f.name: getattr(obj, f.name) for f in dataclasses.fields(obj) if f.init}
    owner = type(obj)
    return {"_target_": _path(owner)} | {k: _plain(v, f"{owner.__name__}.{k}") for k, v in fields.items()}


def build(spec: Any) -> Any:
    """Return the object that a spec describes.

    Raises:
        ValueError: the spec names no dataclass of this package, or a model.
    """
    if isinstance(spec, list):
        return tuple(build(part) for part in spec)
    if not isinstance(spec, dict):
        return spec
    if "_fingerprint_" in spec:
        raise ValueError(f"a model cannot be rebuilt from its fingerprint {spec['_fingerprint_']}")
    if "_target_" not in spec:
        return {key: build(value) for key, value in spec.items()}
    cls = _resolve(spec["_target_"])
    return cls(**{key: build(value) for key, value in spec.items() if key != "_target_"})


def canonical(value: Any) -> str:
    """Return JSON text that is equal for equal values: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def title(obj: Any, **extra: Any) -> str:
    """Return the short name for tables: the class and the fields that differ from their defaults.

    `extra` are further settings, shown where they are not None.
    """
    shown = []
    for field in dataclasses.fields(obj):
        value = getattr(obj, field.name)
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if field.init and field.repr and not (type(value) is type(default) and value == default):
            shown.append(f"{field.name}={_short(value)}")
    shown += [f"{key}={value}" for key, value in extra.items() if value is not None]
    return type(obj).__name__ + (f"({', '.join(shown)})" if shown else "")


def _short(value: Any) -> str:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return title(value)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_short(part) for part in value) + "]"
    if _is_module(value):
        from robustbench_lite.evaluation.fingerprint import fingerprint

        return f"{type(value).__name__} {fingerprint(value)[:6]}"  # two nets of one class are two methods
    return str(value)


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _plain(value: Any, where: str) -> Any:
    if isinstance(value, Enum):
        return _plain(value.value, where)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(part, where) for part in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _plain(part, f"{where}[{key!r}]") for key, part in value.items()}
    if _is_module(value):
        from robustbench_lite.evaluation.fingerprint import fingerprint

        return {"_fingerprint_": fingerprint(value)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return spec(value)
    hint = "; a stored evaluation takes one number for all samples" if _is_tensor(value) else ""
    raise TypeError(f"{where} is a {type(value).__name__}, which has no place in a stored identity{hint}")


def _is_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")  # not imported: then nothing is a tensor
    return torch is not None and isinstance(value, torch.Tensor)


def _is_module(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.nn.Module)


def _resolve(target: str) -> type:
    module, _, name = target.rpartition(".")
    if not module.startswith(_PACKAGE):
        raise ValueError(f"{target} is outside {_PACKAGE}*: a store builds classes of this package only")
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"no class {target}: {error}") from error
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls) and cls.__module__.startswith(_PACKAGE)):
        raise ValueError(f"{target} is not a dataclass of this package")
    return cls
