"""The zoo: shipped defenses, a card and a weights file each, under `<data>/<name>`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from robustbench_lite.zoo.cards import card, names

if TYPE_CHECKING:
    from robustbench_lite.zoo.entries import load_defense, save_entry

__all__ = ["card", "load_defense", "names", "save_entry"]


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is first asked for: listing the zoo must stay quick."""
    if name in ("load_defense", "save_entry"):
        from robustbench_lite.zoo import entries

        return getattr(entries, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
