"""Weights on disk: safetensors, or a plain state dict that PyTorch reads without running anything from the file."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from robustbench_lite.core.files import write_atomically

__all__ = ["load_weights", "read_weights", "save_weights"]

NESTS = ("state_dict", "model", "model_state_dict")  # keys under which checkpoints keep the state dict
PREFIX = "module."  # what DataParallel puts before every key


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load a file of weights into a model. Every key and shape must fit; if one does not, the model stays as it was.

    Counters that BatchNorm keeps (`num_batches_tracked`), which older files lack, may be missing.

    Args:
        model: gets the weights, in its own precision and on its own device.
        path: what `read_weights` reads.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read as weights, or they are not those of this model.
    """
    state, own = read_weights(path), model.state_dict()
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in own]
    shapes = [
        f"{key} is {tuple(state[key].shape)} in the file, {tuple(value.shape)} in the model"
        for key, value in own.items()
        if key in state and isinstance(value, Tensor) and state[key].shape != value.shape
    ]
    faults = [
        f"{what}: {', '.join(items[:8])}{f' and {len(items) - 8} more' if len(items) > 8 else ''}"
        for what, items in (("missing", missing), ("unexpected", unexpected), ("other shapes", shapes))
        if items
    ]
    if faults:
        raise ValueError(f"{path} does not fit {type(model).__name__}: {'; '.join(faults)}")
    model.load_state_dict(state, strict=False)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Return the state dict of a file, on the CPU.

    A name that ends in .safetensors is read as such; anything else as a file of `torch.save` with a state dict in it,
    bare or under "state_dict", "model" or "model_state_dict". A prefix "module." before all keys is taken off.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or holds something else.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"no file of weights {file}")
    content = _read_safetensors(file) if file.suffix == ".safetensors" else _read_torch(file)
    nest = next((key for key in NESTS if isinstance(content, Mapping) and isinstance(content.get(key), Mapping)), None)
    state = content if nest is None else content[nest]
    if not isinstance(state, Mapping) or not state or not all(map(_is_entry, state.items())):
        raise ValueError(f"{file} holds no state dict: {_explain()}")
    cut = len(PREFIX) if all(key.startswith(PREFIX) for key in state) else 0
    return {key[cut:]: value for key, value in state.items()}


def save_weights(model: nn.Module, path: str | Path) -> Path:
    """Write a model's state dict as safetensors, whole or not at all: to a temporary name first, then renamed.

    Args:
        model: may be on any device; tied weights are written once for each name.
        path: must end in .safetensors; its folder is made if need be.

    Raises:
        ValueError: another ending.
    """
    file = Path(path).expanduser()
    if file.suffix != ".safetensors":
        raise ValueError(f"weights are written as safetensors: the name must end in .safetensors, got {file.name!r}")
    state = {key: value.detach().cpu().contiguous().clone() for key, value in model.state_dict().items()}
    write_atomically(file, save(state))
    return file


def _read_safetensors(file: Path) -> Any:
    try:
        return load_file(file, device="cpu")
    except SafetensorError as error:
        raise ValueError(f"{file} is no safetensors file or is damaged ({error}): {_explain()}") from error


def _read_torch(file: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's advice on what it then refuses; ours is below
            return torch.load(file, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} holds objects that only its own code could load, such as the whole net of torch.save(net); "
            f"that code is never run: {_explain()}"
        ) from error
    except (RuntimeError, EOFError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{file} is damaged, or no file of torch.save: {_explain()}") from error


def _is_entry(item: tuple[Any, Any]) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], Tensor)


def _explain() -> str:
    return (
        "weights must be safetensors or a plain state dict, written with save_weights(model, 'net.safetensors') "
        "or torch.save(model.state_dict(), 'net.pt')"
    )
