"""Data by name: what is known is what has a YAML file in `conf/data`."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from robustbench_lite.core import registry
from robustbench_lite.data.base import Dataset

__all__ = ["load_data"]


def load_data(
    name: str = "digits",
    split: str = "test",
    *,
    data_dir: str | Path | None = None,
    download: bool = False,
    **options: Any,
) -> Dataset:
    """Return a split of a data set, as images float32 (N, C, H, W) in [0, 1] with int64 labels.

    >>> load_data("digits").images.shape
    torch.Size([500, 1, 8, 8])

    Args:
        name: the name of a file in `conf/data` ("digits", "mnist", "cifar10", ...), or the path of a `.npz` file.
        split: "train", "calibration" (held out from training, for thresholds and the like) or "test".
        data_dir: where downloaded data lies; default the environment variable RBL_DATA, else `data_cache` in the
            working directory. Data that needs no folder takes no notice of it.
        download: fetch the data if it is missing. Data that is always there takes no notice of it.
        options: further options of that data set, such as `path` and `image_size` of "image_folder".

    Raises:
        ValueError: an unknown name or split, or files that are not what they should be.
        TypeError: an option that the data set does not have.
        FileNotFoundError: the data set is missing; the message says how to get it.
    """
    if str(name).endswith(".npz"):
        name, options = "npz", {"path": name, **options}
    config = registry.load("data", name)
    load = registry.resolve(config.pop("_target_"))
    known = inspect.signature(load).parameters
    unknown = [option for option in options if option not in known]
    if unknown:
        raise TypeError(f"data {name!r} has no option {', '.join(unknown)}; it has: {', '.join(known)}")
    given = {"split": split, **({"data_dir": data_dir} if data_dir else {}), **({"download": True} if download else {})}
    arguments = {**config, **{key: value for key, value in given.items() if key in known}, **options}
    missing = [option for option, value in arguments.items() if value == "???"]
    if missing:
        raise TypeError(f"data {name!r} needs {', '.join(missing)}: load_data({name!r}, {missing[0]}=...)")
    data: Dataset = load(**arguments)
    return data
