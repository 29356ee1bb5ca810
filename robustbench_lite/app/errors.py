"""What goes wrong at the command line, said in one line with a hint; the traceback on request."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from robustbench_lite.core.errors import suggest

__all__ = ["Outcome", "explain", "report_errors"]

CANNOT_RUN = 2
_INTERNAL = (AssertionError, AttributeError, IndexError, KeyError, NameError, RecursionError, UnboundLocalError)


@dataclass
class Outcome:
    """How a command ended: its exit status."""

    status: int = 0


@contextmanager
def report_errors(debug: bool = False) -> Iterator[Outcome]:
    """Turn an exception into a message on the standard error and status 2; what looks like our own bug is raised."""
    outcome = Outcome()
    try:
        yield outcome
    except KeyboardInterrupt:
        print("\nstopped; what was finished is in the store", file=sys.stderr)
        outcome.status = 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has gone: nothing to tell
        outcome.status = CANNOT_RUN
    except Exception as error:
        message = explain(error)
        if message is None:
            raise
        if debug or os.environ.get("HYDRA_FULL_ERROR") == "1":
            traceback.print_exc()
        print(f"error: {message}", file=sys.stderr)
        outcome.status = CANNOT_RUN


def explain(error: BaseException) -> str | None:
    """Return an exception as one line for users; None where only a traceback helps."""
    module = type(error).__module__
    if module.startswith(("hydra.", "omegaconf.")):
        return _one_line(_explain_config(error))
    if isinstance(error, _INTERNAL):
        return None
    return _one_line(str(error) or type(error).__name__)


def _explain_config(error: BaseException) -> str:
    from hydra.errors import ConfigCompositionException, InstantiationException, MissingConfigException
    from omegaconf.errors import InterpolationKeyError, InterpolationResolutionError, MissingMandatoryValue

    cause = error.__cause__
    if isinstance(error, MissingConfigException):
        return _missing_config(error.missing_cfg_file or "", error.options or ())
    if isinstance(error, InstantiationException):
        return _instantiation(error)
    if isinstance(error, ConfigCompositionException) and getattr(cause, "parent_node", None) is not None:
        return _unknown_key(cause)
    if isinstance(error, (InterpolationKeyError, InterpolationResolutionError)):
        return _interpolation(error)
    if isinstance(error, MissingMandatoryValue):
        return f"give a value: {getattr(error, 'full_key', '')}=..."
    if cause is not None and type(cause).__module__.startswith("omegaconf."):
        return f"{str(error).splitlines()[0]} {str(cause).splitlines()[0]}"
    return str(error).split("\nSee https://")[0]


def _missing_config(path: str, options: Sequence[str]) -> str:
    group, _, name = path.partition("/")
    known = list(options)
    if group == "defense":
        from robustbench_lite import zoo

        known = sorted({*known, *zoo.names()})
    return suggest(name, known, group) if known else f"there are no configs {path!r}"


def _unknown_key(cause: BaseException | None) -> str:
    full_key, key = str(getattr(cause, "full_key", "")), str(getattr(cause, "key", ""))
    known = [str(name) for name in getattr(cause, "parent_node") if name != "hydra"]  # noqa: B009 (omegaconf sets it)
    prefix = full_key.removesuffix(key)
    from robustbench_lite.app.listing import GROUPS

    names = [*known, *([group for group, _ in GROUPS.values()] if not prefix else [])]
    where = f" in {prefix.rstrip('.')}" if prefix else ""
    return f"{suggest(key, set(names), 'config key')}{where} (a new key is added by +{full_key}=...)"


def _instantiation(error: BaseException) -> str:
    text = str(error)
    key = re.search(r"full_key: (\S+)", text)
    where = f"{key[1]}: " if key else ""
    cause: BaseException | None = error
    while cause is not None and type(cause).__module__.startswith("hydra."):
        cause = cause.__cause__
    return where + (_innermost(cause) if cause is not None else text.split("\nfull_key")[0])


def _innermost(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) or type(error).__name__


def _interpolation(error: BaseException) -> str:
    text, key = str(error).splitlines()[0], str(getattr(error, "full_key", ""))
    if key == "threat.eps":
        return "there is no usual budget for this data set and threat: give threat.eps=..."
    inner = re.search(r"raised while resolving interpolation: (.*)", text)
    return inner[1] if inner else f"{key}: {text}"


def _one_line(text: str) -> str:
    return " ".join(part.strip() for part in text.splitlines() if part.strip())
