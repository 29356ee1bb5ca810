"""Loading and saving the zoo's defenses."""

from __future__ import annotations

import hashlib
import platform
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from robustbench_lite.core import registry
from robustbench_lite.core.files import write_atomically
from robustbench_lite.data import load_data
from robustbench_lite.data.base import Dataset
from robustbench_lite.defenses.base import Wrapper
from robustbench_lite.models import create_model, load_model
from robustbench_lite.zoo.cards import CARD, WEIGHTS, card, entry_folder, zoo_folder

__all__ = ["load_defense", "save_entry"]

MAX_BYTES = 1_000_000  # the package ships its weights: small nets, a megabyte each
LIBRARIES = ("robustbench_lite", "torch", "torchvision", "numpy")


def load_defense(
    name: str, device: str | torch.device = "cpu", *, root: str | Path | None = None, data_dir: str | Path | None = None
) -> nn.Module:
    """Rebuild a defense from its card and its weights.

    Args:
        name: `<data>/<name>`, such as "mnist/ibp_0.3"; `names()` lists them.
        device: where the defense goes.
        root: another zoo's folder; default the package's own.
        data_dir: folder of the data set that the entry was trained on, for a defense that needs it (neighbours);
            default as in `load_data`.

    Returns:
        The defense in eval mode; its parameters still require gradients, as those of any new module.

    Raises:
        FileNotFoundError: the card has no weights beside it.
        ValueError: no such entry, weights that are not those of the card or not safetensors, a card whose model does
            not fit them, or training data that are not those of the card.
    """
    about = card(name, root=root)
    path = entry_folder(name, root=root) / WEIGHTS
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: reinstall the package, or retrain with: {about['command']}")
    content = path.read_bytes()
    found, promised = hashlib.sha256(content).hexdigest(), about["weights"]["sha256"]
    if found != promised:
        raise ValueError(
            f"{path} is not the file of its card: sha256 {found[:16]}..., the card says {promised[:16]}...; "
            "it was changed or only partly written: reinstall the package, or save the entry again"
        )
    defense = _rebuild(about["model"], about["wrapper"], content, str(path)).to(device)
    if isinstance(defense, Wrapper) and defense.needs_data:
        defense.restore(_training_data(about["data"], data_dir))
    return defense


def save_entry(
    name: str,
    defense: nn.Module,
    *,
    description: str,
    source: str,
    data: Dataset,
    model: Mapping[str, Any],
    command: str,
    seed: int,
    epochs: int,
    hours: float,
    figures: Mapping[str, Any],
    root: str | Path | None = None,
) -> Path:
    """Write `<root>/<name>/weights.safetensors` and its card, and return their folder. An old entry is replaced.

    Args:
        name: `<data>/<name>`, lower case.
        defense: the trained defense; its weights are kept exactly.
        description: what defends, in a sentence.
        source: authors, year and number of the paper.
        data: the samples it was trained on.
        model: what rebuilds the net: `_target_` (a dotted path) or `name` (of `conf/model`), and the arguments.
        command: the exact `rbl train ...` line.
        seed: its seed.
        epochs: its passes over the data.
        hours: how long it took.
        figures: what was measured, each with the command that did: {"clean": {"accuracy": ..., "command": ...}}.
        root: another zoo's folder; default the package's own.

    Raises:
        ValueError: a name that is not `<data>/<name>`, weights over a megabyte, or a model config that does not
            rebuild the defense. Nothing is written then.
    """
    if not re.fullmatch(r"[a-z0-9_]+/[a-z0-9_.-]*[a-z0-9_]", name):
        raise ValueError(f"a zoo name is <data>/<name> in lower case, such as 'mnist/ibp_0.3', got {name!r}")
    content = save({key: value.detach().cpu().contiguous().clone() for key, value in defense.state_dict().items()})
    if len(content) > MAX_BYTES:
        raise ValueError(
            f"the weights of {name} take {len(content)} bytes, over the zoo's {MAX_BYTES}: use a smaller net"
        )
    wrapper = _wrapper_of(defense)
    _rebuild(model, wrapper, content, "the new weights")
    about = {
        "name": name,
        "defense": description,
        "source": source,
        "license": "MIT",
        "data": {"name": data.name, "split": data.split, "samples": len(data), "content_hash": data.content_hash},
        "model": dict(model),
        "wrapper": wrapper,
        "command": command,
        "seed": seed,
        "epochs": epochs,
        "hours": round(float(hours), 3),
        "versions": {"python": platform.python_version(), **{library: version(library) for library in LIBRARIES}},
        "weights": {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)},
        "figures": dict(figures),
    }
    text = yaml.safe_dump(about, sort_keys=False, allow_unicode=True, width=120)
    folder = zoo_folder(root) / name
    for file, written in ((WEIGHTS, content), (CARD, text.encode())):
        write_atomically(folder / file, written)
    return folder


def _wrapper_of(defense: nn.Module) -> dict[str, Any] | None:
    """Return what rebuilds a wrapper around its net; None for a bare net."""
    if not isinstance(defense, Wrapper):
        return None
    return {"_target_": f"{type(defense).__module__}.{type(defense).__qualname__}", **defense.settings()}


def _training_data(about: Mapping[str, Any], data_dir: str | Path | None) -> Dataset:
    """Return the samples that a card names.

    Raises:
        ValueError: the data at hand are others.
    """
    data = load_data(about["name"], split=about["split"], data_dir=data_dir).head(about["samples"])
    if data.content_hash != about["content_hash"]:
        raise ValueError(
            f"the {about['split']} split of {about['name']} at hand is not the card's: content hash "
            f"{data.content_hash}, the card says {about['content_hash']}; the defense compares with exactly those"
        )
    return data


def _rebuild(model: Mapping[str, Any], wrapper: Mapping[str, Any] | None, content: bytes, where: str) -> nn.Module:
    try:
        weights: dict[str, Tensor] = load(content)
    except SafetensorError as error:
        raise ValueError(f"{where}: not a safetensors file ({error}); other formats are never loaded") from error
    defense = _build(model) if wrapper is None else _wrapped(_build(model), wrapper, where)
    try:
        defense.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{where}: the model {dict(model)} does not fit the weights: {error}") from error
    return defense.eval()


def _wrapped(net: nn.Module, wrapper: Mapping[str, Any], where: str) -> nn.Module:
    arguments = dict(wrapper)
    target = arguments.pop("_target_")
    try:
        cls = registry.resolve(target)
    except ImportError as error:
        raise ValueError(
            f"{where}: this version of the package cannot rebuild the wrapper {target}: {error}"
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, Wrapper)):
        raise ValueError(f"{where}: {target} is no defenses.Wrapper")
    return cls(net, **arguments)


def _build(model: Mapping[str, Any]) -> nn.Module:
    arguments = dict(model)
    if "_target_" in arguments:
        return load_model(arguments.pop("_target_"), **arguments)
    if "name" in arguments:
        return create_model(arguments.pop("name"), **arguments)
    raise ValueError(f"a model's config needs _target_ (a dotted path) or name, got {arguments}")
