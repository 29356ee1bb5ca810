"""Checkpoints: written atomically, read without unpickling, and refused where they belong to another run."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

__all__ = ["load_checkpoint", "save_checkpoint", "seconds_in"]

FORMAT = 1


def save_checkpoint(path: Path, identity: Mapping[str, str], content: Mapping[str, Any]) -> None:
    """Write a checkpoint to a temporary name beside `path` and rename it: a kill leaves the old one or the new one.

    Args:
        path: where the checkpoint goes; folders are made.
        identity: what names the run, as text.
        content: tensors, numbers, text, and lists and dicts of them.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save({"format": FORMAT, "identity": dict(identity), "content": dict(content)}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path: Path, identity: Mapping[str, str]) -> dict[str, Any] | None:
    """Return the content of the checkpoint at `path`, on the CPU; None if there is no such file.

    Raises:
        ValueError: the file is no checkpoint of this package, or one of another run; the message says what differs.
    """
    if not path.exists():
        return None
    saved = _read(path)
    theirs: dict[str, str] = saved["identity"]
    keys = [key for key in {**identity, **theirs} if theirs.get(key) != identity.get(key)]
    if keys:
        differences = "; ".join(f"{key} {_difference(theirs.get(key), identity.get(key))}" for key in keys)
        raise ValueError(
            f"{path} belongs to another training: {differences}. "
            "Delete it to start anew, choose another path, or restore the configuration (and the seed of the weights)"
        )
    content: dict[str, Any] = saved["content"]
    return content


def seconds_in(path: Path) -> float:
    """Return the wall time of the epochs behind a checkpoint, in seconds; 0 if there is no such file.

    Raises:
        ValueError: the file is no checkpoint of this package.
    """
    return float(_read(path)["content"].get("seconds", 0.0)) if path.exists() else 0.0


def _read(path: Path) -> dict[str, Any]:
    written = path.read_bytes()
    try:
        saved = torch.load(io.BytesIO(written), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:  # what broken files raise
        raise ValueError(f"{path} is no readable training checkpoint: delete it to start anew ({error})") from error
    if not isinstance(saved, dict) or saved.get("format") != FORMAT:
        raise ValueError(f"{path} is no training checkpoint of format {FORMAT}: delete it or choose another path")
    return saved


def _difference(theirs: str | None, ours: str | None) -> str:
    """Say how two texts differ, by the first line that does."""
    lines = zip_longest(str(theirs).splitlines(), str(ours).splitlines())
    was, now = next(((a, b) for a, b in lines if a != b), (theirs, ours))
    return f"was {str(was).strip()} and is {str(now).strip()}"
