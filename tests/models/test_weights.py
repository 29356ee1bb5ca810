from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from robustbench_lite.models import MLP, PreActResNet18, load_weights, read_weights, save_weights


def net(seed: int = 0, **options: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MLP(**{"image_size": 4, "hidden": (5,), "num_classes": 3, **options})


def same(a: nn.Module, b: nn.Module) -> bool:
    mine, other = a.state_dict(), b.state_dict()
    return mine.keys() == other.keys() and all(torch.equal(mine[key], other[key]) for key in mine)


def test_a_round_trip_keeps_every_bit(tmp_path: Path) -> None:
    for model, fresh in ((net(0), net(1)), (PreActResNet18(width=2), PreActResNet18(width=2))):
        path = save_weights(model, tmp_path / "deep" / "net.safetensors")
        load_weights(fresh, path)
        assert same(model, fresh)
        assert [file.name for file in path.parent.iterdir()] == ["net.safetensors"]


@pytest.mark.parametrize("nest", [None, "state_dict", "model", "model_state_dict", "net", "last"])
@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.net.", "_orig_mod.module."])
@pytest.mark.parametrize("suffix", [".pt", ".th"])
def test_the_usual_checkpoints(tmp_path: Path, nest: str | None, prefix: str, suffix: str) -> None:
    model, fresh = net(0), net(1)
    state: dict[str, Any] = {prefix + key: value for key, value in model.state_dict().items()}
    torch.save(state if nest is None else {nest: state, "epoch": 3}, tmp_path / f"net{suffix}")
    load_weights(fresh, tmp_path / f"net{suffix}")
    assert same(model, fresh)


def test_what_lightning_keeps(tmp_path: Path) -> None:
    model, fresh = net(0), net(1)
    state = {f"net.{key}": value for key, value in model.state_dict().items()}
    steps = {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    kept = {"epoch": 3, "pytorch-lightning_version": "2.5", "state_dict": state, "optimizer_states": [steps]}
    torch.save(kept | {"hyper_parameters": {"lr": 0.1}}, tmp_path / "last.ckpt")
    load_weights(fresh, tmp_path / "last.ckpt")
    assert same(model, fresh)
    torch.save(kept | {"state_dict": state | {"loss.weight": torch.ones(3)}}, tmp_path / "more.ckpt")
    with pytest.raises(ValueError, match=r"unexpected: .*loss\.weight"):
        load_weights(fresh, tmp_path / "more.ckpt")


def test_a_prefix_of_the_models_own_stays(tmp_path: Path) -> None:
    model, fresh = (nn.Sequential() for _ in range(2))
    model.add_module("net", net(0))
    fresh.add_module("net", net(1))
    torch.save({f"module.{key}": value for key, value in model.state_dict().items()}, tmp_path / "net.pt")
    load_weights(fresh, tmp_path / "net.pt")
    assert same(model, fresh)


def test_which_of_several_is_not_guessed(tmp_path: Path) -> None:
    torch.save({"student": net(0).state_dict(), "teacher": net(1).state_dict()}, tmp_path / "two.pt")
    with pytest.raises(ValueError, match="holds no state dict but student, teacher"):
        load_weights(net(), tmp_path / "two.pt")


def test_weights_arrive_in_the_models_precision_and_frozen_as_it_was(tmp_path: Path) -> None:
    path = save_weights(net(0).half(), tmp_path / "net.safetensors")
    fresh = net(1).requires_grad_(False)
    load_weights(fresh, path)
    assert {p.dtype for p in fresh.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in fresh.parameters())


def test_tied_weights_are_written_under_both_names(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert set(load_file(save_weights(model, tmp_path / "tied.safetensors"))) == set(model.state_dict())


def test_old_batch_norms_lack_their_counter(tmp_path: Path) -> None:
    model, fresh = PreActResNet18(width=2), PreActResNet18(width=2)
    old = {key: value for key, value in model.state_dict().items() if not key.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "old.pt")
    load_weights(fresh, tmp_path / "old.pt")
    assert same(model, fresh)


def test_what_does_not_fit_is_named_and_nothing_is_loaded(tmp_path: Path) -> None:
    path = save_weights(net(0, hidden=(6,)), tmp_path / "wide.safetensors")
    model, untouched = net(1), net(1)
    with pytest.raises(ValueError, match=r"fit MLP: other shapes: 1.weight is \(6, 16\) in the file, \(5, 16\)"):
        load_weights(model, path)
    state = net(0).state_dict()
    state["head.weight"] = state.pop("3.weight")
    torch.save(state, tmp_path / "renamed.pt")
    with pytest.raises(ValueError, match=r"missing: 3\.weight; unexpected: head\.weight"):
        load_weights(model, tmp_path / "renamed.pt")
    assert same(model, untouched)


class Payload:
    """Would run code if it were unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("the file was unpickled",))


def test_a_pickled_model_or_payload_is_refused(tmp_path: Path) -> None:
    torch.save(net(), tmp_path / "whole.pt")
    torch.save({"state_dict": Payload()}, tmp_path / "payload.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Payload(), protocol=2))
    (tmp_path / "new.pt").write_bytes(pickle.dumps(Payload(), protocol=5))  # torch would warn of the protocol
    for name in ("whole.pt", "payload.pt", "plain.pt", "new.pt"):
        with pytest.raises(ValueError, match="weights must be safetensors or a plain state dict") as refused:
            load_weights(net(), tmp_path / name)
        text = str(refused.value)
        assert "that code is never run" in text
        assert text.isprintable()
        assert "WeightsUnpickler" not in text


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("content", [b"", b"hello, world", bytes(range(256)) * 20, b"PK\x03\x04 not a zip"])
def test_files_that_hold_no_weights(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"bad{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="weights must be safetensors or a plain state dict"):
        read_weights(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_half_a_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"half{suffix}"
    if suffix == ".pt":
        torch.save(net().state_dict(), path)
    else:
        save_weights(net(), path)
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(ValueError, match="weights must be safetensors or a plain state dict"):
        read_weights(path)


NO_STATE = [{}, {"epoch": 3}, [torch.zeros(2)], torch.zeros(2), {"state_dict": {"a": 1}}, {3: torch.zeros(2)}]


@pytest.mark.parametrize("content", NO_STATE)
def test_files_that_hold_something_else(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "else.pt")
    with pytest.raises(ValueError, match="holds no state dict"):
        read_weights(tmp_path / "else.pt")


def test_names(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no file of weights"):
        load_weights(net(), tmp_path / "gone.pt")
    with pytest.raises(ValueError, match=r"must end in \.safetensors, got 'net\.pt'"):
        save_weights(net(), tmp_path / "net.pt")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_weights(net(0), tmp_path / "net.safetensors")
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        save_weights(net(1), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
