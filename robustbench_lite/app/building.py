"""From configuration to objects: data, models, threats and methods. Importing this imports torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import PurePath
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from torch import nn

from robustbench_lite.data import Dataset
from robustbench_lite.defenses.detector import Detector
from robustbench_lite.models import load_model, shape_options

_NAMED_BY = {
    "robustbench_lite.models.onnx_net.load_onnx": "file",
    "robustbench_lite.models.robustbench_zoo.load_robustbench": "model_name",
}

__all__ = ["build", "complete", "data", "methods", "model", "net", "row_name", "threats"]


def build(node: Mapping[str, Any], what: str) -> Any:
    """Return the object of a node with `_target_`.

    Raises:
        ValueError: the node has no target, the target cannot be imported, or it refuses its arguments.
        Exception: what else the target raises.
    """
    if not node.get("_target_"):
        raise ValueError(f"{what} has no _target_: choose a config of the group, such as {what}=...")
    try:
        return instantiate(dict(node), _convert_="all")
    except InstantiationException as error:
        cause: BaseException | None = error
        while isinstance(cause, InstantiationException):
            cause = cause.__cause__
        if isinstance(cause, (ValueError, TypeError, ImportError)):
            raise ValueError(f"{what}: {cause}") from error
        raise (cause or error) from error


def data(plain: Mapping[str, Any]) -> Dataset:
    """Return the samples of a job: its data set, cut to the first `limit`."""
    whole = _load(json.dumps(plain["data"], sort_keys=True))
    return whole if plain["limit"] is None else whole.head(int(plain["limit"]))


@lru_cache(maxsize=2)  # the jobs of a sweep share their data set, and its calibration split
def _load(node: str) -> Dataset:
    loaded = build(json.loads(node), "data")
    if not isinstance(loaded, Dataset):
        raise TypeError(f"data must be a Dataset, its _target_ returned {type(loaded).__name__}")
    return loaded


def model(plain: Mapping[str, Any]) -> Any:
    """Return the model of a job: the zoo's entry, or the user's net with its weights, in eval mode.

    Where the job gives a false-positive rate, a detector's threshold is set by it on the calibration split.
    """
    built = build(plain["defense"], "defense") if plain["defense"] else _own(plain)
    rate = plain.get("fpr")  # receipts of an earlier version have none
    return built if rate is None else _at_rate(built, plain["data"], rate)


def _own(plain: Mapping[str, Any]) -> nn.Module:
    built = net(plain["model"], data(plain)).eval()
    if plain["model"].get("weights") is None and any(True for _ in built.parameters()):
        raise ValueError(
            f"{plain['model']['_target_']} has parameters and no weights, so it would be a random net: give "
            "model.weights=<file>; for a net that loads its own: model.weights=own"
        )
    return built


def _at_rate(defense: Any, data_node: Mapping[str, Any], rate: Any) -> Detector:
    if not isinstance(defense, Detector):
        raise ValueError(
            f"fpr sets the threshold of a defense that rejects inputs; {type(defense).__name__} rejects none: leave "
            "fpr out"
        )
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate < 1:
        raise ValueError(f"fpr is the share of clean inputs that may be rejected, in (0, 1), got {rate!r}")
    if "split" not in data_node:
        raise ValueError("fpr needs a calibration split, and this data set has no splits: calibrate the defense itself")
    defense.calibrate(_load(json.dumps({**data_node, "split": "calibration"}, sort_keys=True)), rate)
    defense.fpr = rate
    return defense


def net(node: Mapping[str, Any], samples: Dataset) -> nn.Module:
    """Return the net of a node, with its weights if it names a file of them."""
    options = complete(node, samples)
    return load_model(options.pop("_target_"), **instantiate(options, _convert_="all"))


def complete(node: Mapping[str, Any], samples: Dataset) -> dict[str, Any]:
    """Return a net's node with what it must know of the images and classes taken from the samples.

    Architectures of ours always fit the data. A net of the user's gets what it names as arguments and is not given.
    """
    options = {key: value for key, value in node.items() if key != "weights" or value not in (None, "own")}
    target = str(options["_target_"])
    channels, height, width = samples.images.shape[1:]
    size = height if height == width else (height, width)
    shape = shape_options(target, in_channels=channels, image_size=size, num_classes=samples.num_classes)
    ours = target.startswith("robustbench_lite.")
    return options | {name: value for name, value in shape.items() if ours or options.get(name) is None}


def threats(plain: Mapping[str, Any]) -> list[Any]:
    """Return the threat of a job, and those that its suite adds; each is judged alone."""
    more = (plain["suite"] or {}).get("threats") or {}
    added = [build(node, f"suite.threats.{name}") for name, node in more.items() if node is not None]
    first = build(plain["threat"], "threat")
    return [first, *(threat for threat in added if threat != first)]


def methods(plain: Mapping[str, Any], kind: str) -> list[Any]:
    """Return the attacks or the certifiers of a job's suite, in their order; a method set to null is left out."""
    nodes = (plain["suite"] or {}).get(kind) or {}
    return [build(node, f"suite.{kind}.{name}") for name, node in nodes.items() if node is not None]


def row_name(plain: Mapping[str, Any], built: Any) -> str:
    """Return what tables call the model of a job; a detector's rate of false positives belongs to its name."""
    if plain["name"]:
        return str(plain["name"])
    name = str(plain["defense"]["name"]) if plain["defense"] else _net_name(plain["model"])
    return f"{name}, fpr {100 * built.fpr:g} %" if isinstance(built, Detector) else name


def _net_name(node: Mapping[str, Any] | None) -> str:
    target = str(node["_target_"]) if node else ""
    if node and target in _NAMED_BY:  # one function loads them all
        return PurePath(str(node[_NAMED_BY[target]])).name.removesuffix(".onnx")
    return target.rpartition(".")[2]
