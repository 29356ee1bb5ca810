"""Digests of what a result depends on, taken without importing any of it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, distributions, version
from importlib.util import find_spec
from pathlib import Path
from sysconfig import get_path
from typing import Any

__all__ = ["digest", "digest_file", "digest_module", "digest_sources", "library_versions", "stamp"]

LIBRARIES = ("torch", "torchvision", "numpy", "scipy", "pandas", "scikit-learn", "foolbox", "mlxtend", "safetensors")
_PARTS = ("robustbench_lite", *(f"robustbench_lite.{part}" for part in ("attacks", "certify", "conf", "defenses")))
_DEPTHS = ("*", "*/*", "*/*/*")  # train/<class>/<image>, MNIST/raw/<file>
_MANY = 2000  # files or folders: beyond them a folder is no home of somebody's nets, and takes long to read


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
    """Return a digest over the code that a dotted name belongs to, or None where it cannot be found, or is too much.

    That is every Python file in the folder of its top-level module or package, and in the folders below, since it may
    import any of them. Of what is installed it is that module or package alone, with the versions of all that is.
    """
    top = target.partition(".")[0]
    try:
        spec = PathFinder.find_spec(top)
    except (ImportError, ValueError):
        return None
    if spec is None or not (spec.origin or spec.submodule_search_locations):
        return None
    places = [Path(root) for root in spec.submodule_search_locations or [str(spec.origin)]]
    files: dict[str, Path] = {}
    for place in places:
        found = _importable_files(place if _installed(place) else place.parent)
        if found is None or len(files) + len(found) > _MANY:
            return None
        files |= {os.path.abspath(path): path for path in found}
    if not files:
        return None
    shared = os.path.commonpath([os.path.dirname(name) for name in files])
    return digest([_everything_installed(), *([os.path.relpath(n, shared), digest_file(p)] for n, p in files.items())])


def _installed(place: Path) -> bool:
    return any(os.path.realpath(place).startswith(os.path.realpath(get_path(name))) for name in ("purelib", "platlib"))


def _importable_files(place: Path) -> list[Path] | None:
    """Return the Python files of a folder that an import can reach, or the one file; None where there are too many."""
    if place.is_file():
        return [place]
    found: list[Path] = []
    for number, (folder, below, names) in enumerate(os.walk(place)):
        below[:] = sorted(name for name in below if name.isidentifier() and name != "__pycache__")
        found += [Path(folder, name) for name in sorted(names) if name.endswith(".py")]
        if len(found) > _MANY or number > _MANY:
            return None
    return found


@cache
def _everything_installed() -> list[list[str]]:
    """Return the names and versions of all distributions: a net from outside may import any."""
    return [list(pair) for pair in sorted({(str(found.name), found.version) for found in distributions()})]


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
