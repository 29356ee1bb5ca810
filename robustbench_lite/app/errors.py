"""What goes wrong at the command line, said in one line with a hint; the traceback on request."""

from __future__ import annotations

import difflib
import os
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from sysconfig import get_path

from robustbench_lite.core.errors import suggest

__all__ = ["Outcome", "explain", "report_errors"]

CANNOT_RUN = 2
_DEBUG = "--debug shows the traceback"
_OURS = ("robustbench_lite", *(f"robustbench_lite.{part}" for part in ("attacks", "certify", "conf", "defenses")))
_METHODS = {"attack": "attacks", "certifier": "certifiers"}
_EXTRAS = {  # configs that plugins of Hydra bring
    "hydra/sweeper/optuna": "optuna",
    "hydra/launcher/joblib": "joblib",
    "hydra/launcher/ray": "ray",
    "hydra/launcher/submitit_local": "slurm",
    "hydra/launcher/submitit_slurm": "slurm",
}
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
    place = _users_place(error)
    if isinstance(error, _INTERNAL):
        return None if place is None else _one_line(f"{place}: {type(error).__name__}: {error} ({_DEBUG})")
    return _one_line(str(error) or f"{place + ': ' if place else ''}{type(error).__name__}")


def _users_place(error: BaseException) -> str | None:
    """Return the innermost place in code that is neither ours nor installed: "Net.forward (nets.py, line 12)"."""
    installed = {os.path.realpath(get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    ours = [os.path.realpath(folder) for part in _OURS for folder in _folders(part)]
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        code = frame.f_code
        file = os.path.realpath(code.co_filename)
        if os.path.isfile(file) and not any(file.startswith(folder + os.sep) for folder in (*installed, *ours)):
            return f"{code.co_qualname} ({os.path.basename(file)}, line {line})"
    return None


def _folders(part: str) -> list[str]:
    spec = find_spec(part)
    return list(spec.submodule_search_locations or ()) if spec else []


def _explain_config(error: BaseException) -> str:
    from hydra.errors import ConfigCompositionException, InstantiationException, MissingConfigException
    from omegaconf.errors import InterpolationKeyError, InterpolationResolutionError, MissingMandatoryValue

    cause = error.__cause__
    group = re.match(r"Could not override '(attack|certifier)s?'", str(error))
    if group and "@defense." not in str(error):
        return _method_alone(group[1], str(error))
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


def _method_alone(group: str, text: str) -> str:
    """Explain `attack=pgd`: methods are added to a suite, under a name."""
    from robustbench_lite.core import registry

    names = list(registry.groups(group))
    given = re.search(r"\+\w+=(\w+)", text)
    value = given[1] if given else ""
    guess = next(iter(difflib.get_close_matches(value, names, n=1, cutoff=0.5)), f"<{group}>")
    said = f"{suggest(value, names, group)}; " if value and value not in names else ""
    name = "mine" if guess in names else "<name>"
    return f"{said}{group}s belong to the suite: +{group}@suite.{_METHODS[group]}.{name}={guess}"


def _missing_config(path: str, options: Sequence[str]) -> str:
    if path in _EXTRAS:
        return f"{path} needs an extra: pip install 'robustbench_lite[{_EXTRAS[path]}]'"
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

    groups = [group for group, _ in GROUPS.values() if group not in _METHODS] if not prefix else []
    names = [*known, *groups]
    kind = next((kind for kind, plural in _METHODS.items() if key in (kind, plural)), None)
    if kind and not prefix:
        return f"{kind}s belong to the suite: +{kind}@suite.{kind}s.<name>=<{kind}>"
    if not names:
        return f"unknown config key {key!r}{f' in {prefix.rstrip(chr(46))}' if prefix else ''}: there are none"
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
