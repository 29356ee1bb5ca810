from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate

from robustbench_lite.core import registry
from robustbench_lite.data import load_data


def test_unknown_names_and_options() -> None:
    with pytest.raises(ValueError, match="unknown data 'digit'; did you mean 'digits'"):
        load_data("digit")
    with pytest.raises(ValueError, match="unknown data 'mnits'; did you mean 'mnist'"):
        load_data("mnits")
    with pytest.raises(ValueError, match="unknown split 'tets'; did you mean 'test'"):
        load_data("digits", "tets")
    with pytest.raises(TypeError, match=r"data 'digits' has no option image_size; it has: split, name"):
        load_data("digits", image_size=3)
    with pytest.raises(TypeError, match=r"data 'npz' needs path: load_data\('npz', path=...\)"):
        load_data("npz")


def test_data_that_is_always_there_ignores_where_to_look(tmp_path: Path) -> None:
    assert load_data("digits", data_dir=tmp_path, download=True).content_hash == load_data("digits").content_hash


def test_hydra_and_load_data_agree() -> None:
    for split in ("train", "calibration", "test"):
        node = {**registry.load("data", "digits"), "split": split}
        assert torch.equal(instantiate(node).images, load_data("digits", split).images)


@pytest.mark.parametrize("name", list(registry.groups("data")))
def test_every_config_names_the_arguments_of_its_target(name: str) -> None:
    import inspect

    config = registry.load("data", name)
    parameters = inspect.signature(registry.resolve(config.pop("_target_"))).parameters
    assert set(config) == set(parameters)
    defaults = {k: p.default for k, p in parameters.items() if p.default is not inspect.Parameter.empty and k != "name"}
    assert {k: config[k] for k in defaults} == defaults
