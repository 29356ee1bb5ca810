"""One job: evaluate one defense as a configuration says, or take the answer from the store without importing torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from robustbench_lite import zoo
from robustbench_lite.app import receipts
from robustbench_lite.app.devices import check_device, require_device, use_own_gpu
from robustbench_lite.app.digests import (
    LIBRARIES,
    digest,
    digest_file,
    digest_module,
    digest_sources,
    library_versions,
    stamp,
)
from robustbench_lite.app.unkept import is_read_only, unkept
from robustbench_lite.evaluation.budget import Budget
from robustbench_lite.evaluation.report import Report
from robustbench_lite.evaluation.shards import check_shard, check_shards
from robustbench_lite.zoo.cards import WEIGHTS, entry_folder

__all__ = ["OWN", "Done", "checked_config", "evaluate_job", "key_of", "plain_config", "served"]

OWN = "own"  # model.weights of a net that loads them itself
_SETTINGS = (
    "seed", "mode", "audit", "probed", "adaptive", "batch_size", "device", "max_queries", "time_limit", "precision",
)  # fmt: skip
_PRECISIONS = ("auto", "float32", "float64")
_IGNORED = ("attack", "attacks", "certifier", "certifiers")  # at the top level nobody would read them
_NOT_KEYED = (  # no answer depends on them; what a limit or a budget leaves unfinished is not served
    "store", "device", "batch_size", "usual_eps", "experiment", "shards", "shard", "time_limit", "budget", "forecast",
    "objective",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Done:
    """A finished job.

    Attributes:
        report: its result.
        served: whether it came from the store alone.
        receipt: names its rows; None where the store does not hold them all.
        problem: what is not finished, and what could not be written, in words.
        note: the same of a store that can only be read, and already holds the rows.
    """

    report: Report
    served: bool
    receipt: receipts.Receipt | None
    problem: str = ""
    note: str = ""


def evaluate_job(config: DictConfig, number: int = 0) -> Done:
    """Run one evaluation, or a shard of it, or serve it from the store.

    Args:
        config: of the job.
        number: of the job in a sweep: of several GPUs on a machine, each takes its own.

    Raises:
        ValueError: neither a defense nor a model, or settings that make no sense.
        Exception: what the evaluation raises.
    """
    plain = checked_config(config)
    done = served(plain)
    if done is not None:
        return done
    require_device(plain["device"])
    use_own_gpu(plain["device"], number)
    if plain["shard"] is None:
        return _compute(plain, Path(plain["store"]) if plain["store"] else None)
    report, problem = _evaluate(plain)
    return Done(report, False, None, problem)


def served(plain: Mapping[str, Any]) -> Done | None:
    """Return the answer to a job that the store holds already; None where it does not.

    Args:
        plain: the resolved configuration.
    """
    store = Path(plain["store"]) if plain["store"] else None
    key = key_of(plain) if store else None
    receipt = receipts.find(store, key) if store and key else None
    report = receipts.report_of(receipt, store) if store and receipt else None
    return None if report is None else Done(report, True, receipt)


def checked_config(config: DictConfig) -> dict[str, Any]:
    """Return a job's configuration as plain data, once it makes sense; raises what `evaluate_job` does."""
    plain = plain_config(config)
    _check(plain)
    return plain


def plain_config(config: DictConfig) -> dict[str, Any]:
    """Return a job's configuration as plain data, every interpolation resolved.

    Raises:
        omegaconf.errors.OmegaConfBaseException: a mandatory value is missing, or an interpolation leads nowhere.
    """
    plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    if not isinstance(plain, dict):
        raise TypeError(f"expected a mapping as configuration, got {type(plain).__name__}")
    return {str(key): value for key, value in plain.items()}


def key_of(plain: Mapping[str, Any]) -> str | None:
    """Return the name of the receipt of a job; None where something it depends on cannot be told without importing it.

    A net that loads its own weights (model.weights=own) is such a thing.

    Args:
        plain: the resolved configuration.
    """
    if not plain["defense"] and plain["model"].get("weights") == OWN:
        return None
    kept = {name: value for name, value in plain.items() if name not in _NOT_KEYED}
    modules: dict[str, str] = {}
    for target in sorted(_targets(kept)):
        top = target.partition(".")[0]
        if top == __name__.partition(".")[0] or top in LIBRARIES:
            continue
        code = digest_module(target)
        if code is None:
            return None
        modules[top] = code
    material = {
        "config": kept,
        "sources": digest_sources(),
        "libraries": library_versions() | {"python": sys.version},
        "modules": modules,
        "weights": _weights(kept),
        "data": _data_files(kept["data"]),
    }
    return digest(material)


def _targets(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        if isinstance(value.get("_target_"), str):
            yield value["_target_"]
        for part in value.values():
            yield from _targets(part)
    elif isinstance(value, list):
        for part in value:
            yield from _targets(part)


def _weights(plain: Mapping[str, Any]) -> dict[str, str]:
    """Return the digests of the files that hold weights: the zoo's, and whatever file the configuration names."""
    found = {}
    if plain["defense"]:
        path = entry_folder(plain["defense"]["name"]) / WEIGHTS
        found["zoo"] = digest_file(path) if path.exists() else "missing"
    for text in _texts({name: value for name, value in plain.items() if name != "data"}):
        named = _there(text)
        if named is not None and named.is_file():
            found[text] = digest_file(named)
    return found


def _there(text: str) -> Path | None:
    """Return the file or folder that a text names, as the loaders read it; None where it names none."""
    try:
        path = Path(text).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError, ValueError):  # too long for a name, the home of nobody, a zero byte
        return None


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _texts(part)
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part)


def _data_files(node: Mapping[str, Any]) -> list[list[Any]]:
    """Return path, size and time of change of the files a data set may read."""
    named = {key: value for key, value in node.items() if key not in ("_target_", "name", "split")}
    if "data_dir" in node:  # as in data/vision.py, which imports torch
        named["data_dir"] = node["data_dir"] or os.environ.get("RBL_DATA") or "data_cache"
    found = (_there(text) for text in sorted(_texts(named)))
    return [entry for path in found if path is not None for entry in stamp(path)]


def _check(plain: Mapping[str, Any]) -> None:
    _check_settings(plain)
    _check_subject(plain)


def _check_settings(plain: Mapping[str, Any]) -> None:
    for group in _IGNORED:
        if group in plain:
            kind = group.removesuffix("s")
            raise ValueError(
                f"+{group}=... would change nothing: methods belong to the suite, +{kind}@suite.{kind}s.<name>=<{kind}>"
            )
    if plain["precision"] not in _PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(_PRECISIONS)}, got {plain['precision']!r}")
    check_device(plain["device"])
    limit = plain["time_limit"]
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, (int, float)) or not limit > 0):
        raise ValueError(f"time_limit must be a positive number of seconds, or null for no limit, got {limit!r}")
    budget = Budget(**(plain["budget"] or {}))
    check_shards(plain["shards"])
    if budget.limited and plain["shards"] != 1:
        raise ValueError("a budget is that of one job, which chooses what pays: give budget or shards, not both")
    if plain["shard"] is not None:
        check_shard(plain["shard"], plain["shards"])
    for name in ("seed", "batch_size", "limit", "max_queries"):
        value = plain[name]
        if not (isinstance(value, int) or (value is None and name in ("limit", "max_queries"))):
            raise ValueError(f"{name} must be a whole number, got {value!r}")


def _check_subject(plain: Mapping[str, Any]) -> None:
    defense, model = plain["defense"], plain["model"]
    own = bool(model) and bool(model.get("_target_"))
    if not defense and not own:
        raise ValueError(
            "say what to evaluate: an entry of the zoo by defense=<data>/<name> ('rbl list defenses' names them), or a "
            "net of yours by model._target_=my_package.nets.Net model.weights=net.safetensors"
        )
    if defense and own:
        raise ValueError("give defense=... or model._target_=..., not both: an entry of the zoo brings its own net")
    if defense and "name" not in defense:
        raise ValueError(
            f"{defense.get('_target_')} is an objective of 'rbl train'; to evaluate, choose an entry of the zoo: "
            f"{', '.join(zoo.names())}"
        )


def _evaluate(plain: dict[str, Any]) -> tuple[Report, str]:
    """Return the report, and in words what of it could not be written, or failed."""
    from robustbench_lite.app import building  # torch, from here on
    from robustbench_lite.evaluation import EvaluationError, UnsavedError, evaluate

    model = building.model(plain)
    try:
        report = evaluate(
            model,
            building.data(plain),
            building.threats(plain),
            building.methods(plain, "attacks"),
            building.methods(plain, "certifiers"),
            store=plain["store"] or None,
            name=building.row_name(plain, model),
            progress=sys.stderr.isatty(),
            shard=None if plain["shard"] is None else (plain["shard"], plain["shards"]),
            budget=Budget(**(plain["budget"] or {})),
            **{name: plain[name] for name in _SETTINGS},
        )
    except UnsavedError as error:
        return error.report, str(error)
    except EvaluationError as error:
        if error.report is None:
            raise
        return error.report, str(error)
    return report, _left(report)


def _left(report: Report) -> str:
    """Say what a time limit or a budget left open."""
    reasons = " and ".join(sorted({part.reason for part in report.unfinished}))
    if not reasons:
        return ""
    return f"not finished ({reasons}): the table is about what was computed; the same command goes on from the store"


def _compute(plain: dict[str, Any], store: Path | None) -> Done:
    key = key_of(plain) if store else None  # of the code and weights as they are now, not as they will be then
    report, problem = _evaluate(plain)
    receipt = None if store is None or report.unsaved else receipts.receipt_of(report, plain, store)
    note = ""
    if store and receipt:
        try:
            receipts.keep(store, key, receipt)
        except OSError as error:
            note = unkept("the receipt", error)
            if not is_read_only(error):
                problem, note = "; ".join(part for part in (problem, note) if part), ""
    return Done(report, False, receipt, problem, note)
