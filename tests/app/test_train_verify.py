"""`rbl train` keeps what can be evaluated; `rbl verify` finds what was tampered with."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from robustbench_lite.zoo import card, load_defense, names

TRAIN = ("train", "model=mlp", "model.hidden=[8]", "limit=200", "epochs=1", "progress=false", "device=cpu")
NET = ("model._target_=users_net.Net", "model.weights=net.safetensors")
SMALL = ("suite.attacks.pgd=null", "suite.attacks.random_noise=null", "limit=20", "threat.eps=0.2")


def test_trained_weights_are_evaluated(rbl, folder: Path) -> None:
    status, out, err = rbl(*TRAIN, "weights=net.safetensors")
    assert status == 0, err
    assert "clean accuracy" in out
    assert not (folder / "results").exists()
    status, out, _ = rbl("evaluate", "model=mlp", "model.hidden=[8]", "model.weights=net.safetensors", *SMALL)
    assert status == 0
    assert "MLP" in out


@pytest.mark.parametrize("objective", ["standard", "adversarial_training", "ibp_training"])
def test_an_entry_of_a_zoo(rbl, folder: Path, objective: str) -> None:
    attack = ["defense.attack.steps=2"] if objective == "adversarial_training" else []
    arguments = [*TRAIN, f"defense={objective}", *attack, "zoo=digits/mine", "zoo_root=zoo"]
    assert rbl(*arguments)[0] == 0
    root = folder / "zoo"
    assert names(root=root) == ["digits/mine"]
    about = card("digits/mine", root=root)
    assert about["command"].startswith("rbl train model=mlp 'model.hidden=[8]' limit=200")
    assert 0 <= about["figures"]["clean"]["accuracy"] <= 1
    assert about["defense"]
    assert (about["source"] == "none") == (objective == "standard")
    assert load_defense("digits/mine", root=root) is not None


def test_the_same_seed_gives_the_same_weights(rbl, folder: Path) -> None:
    for name in ("one", "two"):
        rbl(*TRAIN, f"weights={name}.safetensors")
    rbl(*TRAIN, "weights=three.safetensors", "seed=1")
    one, two, three = ((folder / f"{name}.safetensors").read_bytes() for name in ("one", "two", "three"))
    assert one == two != three


def test_a_killed_training_goes_on(rbl, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from robustbench_lite.training import run as training_run

    rbl(*TRAIN, "epochs=3", "weights=whole.safetensors")
    epoch = training_run.Run.train_epoch
    calls = []

    def killed(self, advance):  # type: ignore[no-untyped-def]
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return epoch(self, advance)

    monkeypatch.setattr(training_run.Run, "train_epoch", killed)
    assert rbl(*TRAIN, "epochs=3", "weights=resumed.safetensors")[0] == 130
    assert len(list((folder / "results" / "training").iterdir())) == 1
    status, _, err = rbl(*TRAIN, "epochs=3", "weights=resumed.safetensors")
    assert status == 0
    assert "going on from" in err
    assert len(calls) == 4
    assert (folder / "resumed.safetensors").read_bytes() == (folder / "whole.safetensors").read_bytes()


def test_verify(rbl, folder: Path) -> None:
    assert rbl("evaluate", *NET, *SMALL)[0] == 0
    status, out, err = rbl("verify")
    assert status == 0, out + err
    assert "all of it holds" in out
    examples = next(
        path for path in sorted((folder / "results" / "cells").glob("*/*.safetensors")) if len(load_file(path)["index"])
    )
    tensors = load_file(examples)
    tensors["x_adv"] = 1 - tensors["x_adv"]
    save_file(tensors, examples)
    status, out, _ = rbl("verify")
    assert status == 1
    assert "outside the threat" in out


def test_verify_without_the_model(rbl, folder: Path) -> None:
    assert rbl("evaluate", *NET, *SMALL)[0] == 0
    for receipt in (folder / "results" / "receipts").iterdir():
        receipt.unlink()
    status, out, _ = rbl("verify")
    assert status == 1
    assert "not at hand" in out
