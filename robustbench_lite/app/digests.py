"""Digests of what a result depends on, taken without importing any of it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

__all__ = ["digest", "digest_file", "digest_module", "digest_sources", "library_versions", "stamp"]

LIBRARIES = ("torch", "torchvision", "numpy", "scipy", "pandas", "scikit-learn", "foolbox", "mlxtend", "safetensors")
_PARTS = ("robustbench_lite", *(f"robustbench_lite.{part}" for part in ("attacks", "certify", "conf", "defenses")))
_DEPTHS = ("*", "*/*", "*/*/*")  # train/<class>/<image>, MNIST/raw/<file>
_MANY = 2000  # files: beyond them a folder is no package of somebody's nets


def digest(value: Any) -> str:
    """Return 32 hex digits over plain data: equal for equal values, whatever the order of keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def digest_file(path: Path) -> str:
    """Return 32 hex digits over a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:32]


def stamp(path: Path) -> list[list[Any]]:
    """Return path, size and time of change of a file, or of all files at most three folders deep in a folder."""
    found = [path] if path.is_file() else sorted(file for depth in _DEPTHS for file in path.glob(depth))
    files = [(p, p.stat()) for p in found if p.is_file()]
    return [[os.path.abspath(p), about.st_size, about.st_mtime_ns] for p, about in files]


@cache
def digest_sources() -> str:
    """Return a digest over every Python file of this package, wherever its folders are installed."""
    files: dict[str, tuple[str, Path]] = {}
    for part in _PARTS:
        spec = find_spec(part)  # imports the parent package alone, which imports nothing
        for root in (spec.submodule_search_locations or ()) if spec else ():
            for path in _python_files(Path(root)):
                name = f"{part}/{path.relative_to(root).as_posix()}"
                files.setdefault(os.path.realpath(path), (name, path))  # once, also where a symlink leads to it
    return digest(sorted([name.replace("/", "."), digest_file(path)] for name, path in files.values()))


def digest_module(target: str) -> str | None:
    """Return a digest over the code that a dotted name belongs to, or None where it cannot be found.

    That is every Python file of its top-level package; for a module outside packages every one beside it, which it may
    import.
    """
    top = target.partition(".")[0]
    try:
        spec = PathFinder.find_spec(top)
    except (ImportError, ValueError):
        return None
    if spec is None or not (spec.origin or spec.submodule_search_locations):
        return None
    roots = [Path(root) for root in spec.submodule_search_locations or ()]
    files = [file for root in roots for file in _python_files(root)]
    if not roots and spec.origin:
        files = sorted(Path(spec.origin).parent.glob("*.py"))
    if not files or len(files) > _MANY:
        return None
    return digest([[file.name, digest_file(file)] for file in files])


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that answers depend on; imports none of them."""
    return dict(_versions(LIBRARIES))


def _versions(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    for name in names:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            continue


def _python_files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*.py") if path.is_file())
