"""The zoo's cards: what there is, and how each entry came about. Nothing here imports torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from robustbench_lite.core.errors import suggest

__all__ = ["CARD", "REQUIRED", "WEIGHTS", "card", "entry_folder", "names", "zoo_folder"]

ROOT = Path(__file__).parent
CARD, WEIGHTS = "card.yaml", "weights.safetensors"
REQUIRED = (
    "name", "defense", "source", "license", "data", "model", "wrapper", "command", "seed", "epochs", "hours",
    "versions", "weights", "figures",
)  # fmt: skip


def zoo_folder(root: str | Path | None) -> Path:
    """Return the folder of a zoo; None: the package's own."""
    return ROOT if root is None else Path(root)


def names(data: str | None = None, *, root: str | Path | None = None) -> list[str]:
    """Return the names of the entries, `<data>/<name>`, sorted.

    Args:
        data: only the entries of this data set; a name without entries gives an empty list.
        root: another zoo's folder; default the package's own.
    """
    root = zoo_folder(root)
    found = (path.parent.relative_to(root).as_posix() for path in root.glob(f"*/*/{CARD}"))
    return sorted(name for name in found if data is None or name.split("/")[0] == data)


def entry_folder(name: str, *, root: str | Path | None = None) -> Path:
    """Return the folder of an entry.

    Raises:
        ValueError: no entry has this name; the message names the nearest one and lists all.
    """
    known = names(root=root)
    if name not in known:
        raise ValueError(suggest(name, known, "zoo entry"))
    return zoo_folder(root) / name


def card(name: str, *, root: str | Path | None = None) -> dict[str, Any]:
    """Return an entry's card: defense, source, data, model, command, seed, epochs, hours, versions, weights, figures.

    Args:
        name: `<data>/<name>`.
        root: another zoo's folder; default the package's own.

    Raises:
        ValueError: no such entry, or its card is not what a card should be.
    """
    path = entry_folder(name, root=root) / CARD
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    missing = [key for key in REQUIRED if not isinstance(content, dict) or key not in content]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}: write cards with save_entry")
    return dict(content)
