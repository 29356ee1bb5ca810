"""What is said of a method that does not apply, and of names nobody knows: what came, what was meant, what there is."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")

__all__ = ["NotApplicableError", "lookup", "suggest"]


class NotApplicableError(ValueError):
    """A method can say nothing about a model, whatever the sample: a table prints n/a."""


def suggest(name: str, known: Iterable[str], what: str) -> str:
    """Return the message for an unknown `name` of kind `what`, with the nearest known name and the whole list."""
    names = sorted(known)
    near = difflib.get_close_matches(name.lower(), [n.lower() for n in names], n=1, cutoff=0.5)
    nearest = next((n for n in names if near and n.lower() == near[0]), None)
    guess = f"; did you mean {nearest!r}?" if nearest else ";"
    return f"unknown {what} {name!r}{guess} there are: {', '.join(names)}"


def lookup(name: str, table: Mapping[str, T], what: str) -> T:
    """Return `table[name]`.

    Raises:
        ValueError: the name is not in the table; the message names the nearest one and lists all.
    """
    if name not in table:
        raise ValueError(suggest(name, table, what))
    return table[name]
