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

NESTS = ("state_dict", "model_state_dict", "model", "net", "params", "weights")  # where checkpoints keep the state dict
PREFIXES = ("module.", "_orig_mod.", "model.", "net.")  # of DataParallel, torch.compile, and modules that hold the net


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
    own = model.state_dict()
    state = _bare(read_weights(path), own)
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
    bare or where a checkpoint keeps it: under one of `NESTS`, the first that is there, or as its only state dict. What
    data-parallel nets put before all keys, "module.", is taken off.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or holds something else.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"no file of weights {file}")
    content = _read_safetensors(file) if file.suffix == ".safetensors" else _read_torch(file)
    state = _state_in(content)
    if state is None:
        found = f" but {', '.join(map(str, list(content)[:8]))}" if isinstance(content, Mapping) and content else ""
        raise ValueError(f"{file} holds no state dict{found}: {_explain()}")
    return _without(state, PREFIXES[0])


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


def _state_in(content: Any) -> dict[str, Tensor] | None:
    """Return the state dict in what a file holds; None where there is none, or several and no usual name."""
    if not isinstance(content, Mapping) or not content:
        return None
    if all(map(_is_entry, content.items())):
        return dict(content)
    named = next((key for key in NESTS if isinstance(content.get(key), Mapping)), None)
    if named is not None:
        return _state_in(content[named])
    inside = [value for value in content.values() if isinstance(value, Mapping)]
    states = [dict(value) for value in inside if value and all(map(_is_entry, value.items()))]
    return states[0] if len(states) == 1 else None


def _bare(state: dict[str, Tensor], own: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return a state dict without prefixes that all its keys have and the model's do not."""
    for _ in PREFIXES:  # one may stand before another
        for prefix in PREFIXES:
            if not all(key.startswith(prefix) for key in own):
                state = _without(state, prefix)
    return state


def _without(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    cut = len(prefix) if all(key.startswith(prefix) for key in state) else 0
    return {key[cut:]: value for key, value in state.items()}


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
