"""Nets of RobustBench's zoo by name, through the package `robustbench`, which downloads their weights.

What it downloads is read by `torch.load(weights_only=True)` alone, whatever the package and timm ask for: PyTorch is
told so (TORCH_FORCE_WEIGHTS_ONLY_LOAD) for as long as the package is at work. A checkpoint with objects is refused.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robustbench_lite.core.errors import suggest

__all__ = ["load_robustbench"]

INSTALL = "pip install 'robustbench_lite[robustbench]'"
CLASSES = {"cifar10": 10, "cifar100": 100, "imagenet": 1000}
_FORCED, _NEVER = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
_MOVED = {"autoattack": "pyautoattack", "autoattack.state": "pyautoattack.state"}


def load_robustbench(
    model_name: str,
    *,
    dataset: str,
    threat_model: str = "Linf",
    model_dir: str | Path | None = None,
    num_classes: int | None = None,
) -> nn.Module:
    """Return a net of RobustBench's zoo, in eval mode: images (B, C, H, W) in [0, 1] to logits (B, K).

    Args:
        model_name: as RobustBench names it: "Carmon2019Unlabeled".
        dataset: cifar10, cifar100 or imagenet.
        threat_model: what the net was trained against: Linf, L2, corruptions or corruptions_3d. It chooses among the
            nets and says nothing of how one is judged.
        model_dir: where downloaded weights are kept; None: `robustbench` in torch.hub's folder, which TORCH_HOME moves.
        num_classes: of the data that it will be judged on, to be sure that they are meant; None: not checked.

    Raises:
        ImportError: the extra `robustbench` is not installed.
        ValueError: no net of that name, data set and threat model, or a checkpoint that holds more than weights.
        Exception: what stops the download.
    """
    utils = _package()
    names = _names(utils, dataset, threat_model)
    if num_classes not in (None, CLASSES.get(dataset)):
        raise ValueError(f"RobustBench's nets for {dataset} do not know the {num_classes} classes of these data")
    if model_name not in names:
        raise ValueError(suggest(model_name, names, f"RobustBench net for {dataset} and {threat_model}"))
    folder = Path(torch.hub.get_dir()) / "robustbench" if model_dir is None else Path(model_dir).expanduser()
    try:
        with _weights_only(), contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the package's own
            net = utils.load_model(model_name, model_dir=folder, dataset=dataset, threat_model=threat_model)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"the checkpoint of {model_name} in {folder} holds objects that only code of its own could load; that code "
            f"is never run ({str(error).splitlines()[0]})"
        ) from error
    if not isinstance(net, nn.Module):
        raise TypeError(f"robustbench gave a {type(net).__name__} for {model_name}, not a torch.nn.Module")
    return net.eval()


def _package() -> Any:
    """Return `robustbench.utils`.

    Release 1.1.1 imports `autoattack`, which its requirement pyautoattack has renamed; only its benchmark needs that.
    """
    aliased = []
    try:
        for name, moved in _MOVED.items():
            if name not in sys.modules and importlib.util.find_spec(name.partition(".")[0]) is None:
                sys.modules[name] = importlib.import_module(moved)
                aliased.append(name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pkg_resources and timm's old names
            return importlib.import_module("robustbench.utils")
    except ImportError as error:
        raise ImportError(f"nets of RobustBench need the extra robustbench ({error}): {INSTALL}") from error
    finally:
        for name in aliased:
            del sys.modules[name]


def _names(utils: Any, dataset: str, threat_model: str) -> list[str]:
    """Return the names of the zoo's nets for a data set and a threat model."""
    zoo = {getattr(key, "value", key): nets for key, nets in utils.all_models.items()}
    if dataset not in zoo:
        raise ValueError(f"RobustBench has nets for {', '.join(zoo)}, not for {dataset}: give model.dataset=...")
    threats = {getattr(key, "value", key): nets for key, nets in zoo[dataset].items()}
    if threat_model not in threats:
        raise ValueError(suggest(threat_model, list(threats), f"threat model of RobustBench for {dataset}"))
    return list(threats[threat_model])


@contextlib.contextmanager
def _weights_only() -> Iterator[None]:
    """Make every `torch.load` read weights only, even one that asks for more."""
    before = {name: os.environ.pop(name, None) for name in (_FORCED, _NEVER)}
    os.environ[_FORCED] = "1"
    try:
        yield
    finally:
        del os.environ[_FORCED]
        os.environ.update({name: value for name, value in before.items() if value is not None})
