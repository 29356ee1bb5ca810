"""Arguments as people type them, as Hydra overrides: `rbl verify DIR --device cpu` is `store=DIR device=cpu`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import islice

__all__ = ["WITH_VALUE", "as_overrides", "quoted"]

WITH_VALUE = (
    "--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd",
    "--experimental-rerun",
)  # fmt: skip
"""Hydra's flags that a value follows."""

_CHOICES = ("defense", "data", "model", "threat", "suite")  # names of configs: Hydra takes them without quotes


def as_overrides(arguments: Sequence[str], positional: Sequence[str], options: Sequence[str] = ()) -> list[str]:
    """Return the arguments with bare words and long options as overrides; all else passes.

    Args:
        arguments: what stands behind the command.
        positional: the keys that bare words are values of, in their order.
        options: keys that may also be given as `--key value` or `--key=value`.

    Raises:
        ValueError: more bare words than keys, or an option without a value.
    """
    found: list[str] = []
    left = list(positional)
    words = iter(arguments)
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        if word.startswith("--") and name in options:
            given = value if equals else next(words, None)
            if given is None:
                raise ValueError(f"--{name} needs a value")
            found.append(_override(name, given))
        elif word in WITH_VALUE:
            found += [word, *islice(words, 1)]
        elif word.startswith(("-", "+", "~")) or "=" in word:
            found.append(word)
        elif left:
            found.append(_override(left.pop(0), word))
        else:
            expected = " ".join(name.upper() for name in positional) or "no bare words"
            raise ValueError(f"{word!r} is one argument too many: expected {expected}, and settings as key=value")
    return found


def quoted(value: str) -> str:
    """Return a text as Hydra's grammar takes it whole, whatever stands in it: backslashes count before a quote only.

    >>> quoted("a = b")
    "'a = b'"
    """
    doubled = re.sub(r"(\\*)('|$)", lambda end: end[1] * 2 + ("\\'" if end[2] else ""), value)
    return f"'{doubled}'"


def _override(name: str, value: str) -> str:
    return f"{name}={value if name in _CHOICES else quoted(value)}"
