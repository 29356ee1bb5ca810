"""`rbl train`: train a net by an objective, and keep its weights; as an entry of the zoo, with a card."""

from __future__ import annotations

import re
import shlex
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from robustbench_lite.app.console import console
from robustbench_lite.app.devices import check_device, require_device
from robustbench_lite.app.digests import digest
from robustbench_lite.app.hydra_app import run
from robustbench_lite.app.jobs import plain_config
from robustbench_lite.app.listing import entries

if TYPE_CHECKING:
    from torch import nn

    from robustbench_lite.data import Dataset

__all__ = ["job", "main"]

_LOOP = (
    "epochs", "batch_size", "optimizer", "learning_rate", "weight_decay", "momentum", "schedule", "seed", "device",
    "precision", "checkpoint_every",
)  # fmt: skip
_NOT_THE_RUN = (
    "store",
    "zoo",
    "zoo_root",
    "weights",
    "description",
    "source",
    "progress",
    "device",
    "checkpoint_every",
)


def main(arguments: Sequence[str]) -> int:
    """Run `rbl train`."""
    command = shlex.join(["rbl", "train", *arguments])
    return run(partial(job, command=command), "train", arguments)


def job(config: DictConfig, command: str) -> int:
    """Train as configured, from the checkpoint of a killed run if there is one.

    Raises:
        ValueError: an entry of the zoo in place of an objective, or what the training refuses.
    """
    plain = plain_config(config)
    check_device(plain["device"])
    if "_target_" not in plain["defense"] or plain["defense"]["_target_"].startswith("robustbench_lite.zoo"):
        raise ValueError(
            f"defense={plain['defense'].get('name')} is trained already; choose an objective: "
            f"{', '.join(entry.name for entry in entries('defenses'))}"
        )
    if plain["zoo"] and str(plain["zoo"]).count("/") != 1:
        raise ValueError(
            f"a zoo name is <data>/<name>, such as {plain['data'].get('name')}/standard, got {plain['zoo']}"
        )
    require_device(plain["device"])
    import torch  # from here on

    from robustbench_lite.app import building
    from robustbench_lite.training import train
    from robustbench_lite.training.checkpoint import seconds_in

    samples = building.data(plain | {"data": plain["data"] | {"split": "train"}})
    objective = building.build(plain["defense"], "defense")
    node = building.complete(plain["model"], samples)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(plain["seed"])
        net = building.net(node, samples)
    checkpoint = _checkpoint(plain)
    if checkpoint.exists():
        print(f"going on from {checkpoint}", file=sys.stderr)
    before, start = seconds_in(checkpoint), time.perf_counter()
    defense = train(
        net,
        samples,
        objective,
        **{name: plain[name] for name in _LOOP},
        augment=building.build(plain["augment"], "augment") if plain["augment"] else None,
        checkpoint=checkpoint,
        calibration=building.data(plain | {"data": plain["data"] | {"split": "calibration"}, "limit": None}),
        progress=plain["progress"] and sys.stderr.isatty(),
    )
    hours = (before + time.perf_counter() - start) / 3600
    accuracy = _accuracy(defense, building.data(plain | {"limit": None}))
    where = _keep(plain, defense, node, samples, command, hours, accuracy)
    _remove(checkpoint)
    split = plain["data"].get("split", "test")
    console().print(
        f"clean accuracy {100 * accuracy:.2f} % on {samples.name} {split}; kept in {where}", highlight=False
    )
    return 0


def _checkpoint(plain: dict[str, Any]) -> Path:
    """Return the checkpoint of exactly this run: another configuration has another one."""
    run_itself = {name: value for name, value in plain.items() if name not in _NOT_THE_RUN}
    return Path(plain["store"] or "results") / "training" / f"{digest(run_itself)}.pt"


def _remove(checkpoint: Path) -> None:
    checkpoint.unlink(missing_ok=True)
    for folder in (checkpoint.parent, checkpoint.parent.parent):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _accuracy(defense: nn.Module, samples: Dataset) -> float:
    import torch

    from robustbench_lite.core.models import predict

    place = next((parameter.device for parameter in defense.parameters()), torch.device("cpu"))
    hits = 0
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # for defenses that draw
        for start in range(0, len(samples), 1000):
            rows = slice(start, start + 1000)
            hits += int((predict(defense, samples.images[rows].to(place)).cpu() == samples.labels[rows]).sum())
    return hits / len(samples)


def _keep(
    plain: dict[str, Any],
    defense: nn.Module,
    node: dict[str, Any],
    samples: Dataset,
    command: str,
    hours: float,
    accuracy: float,
) -> Path:
    """Write the weights, as a file or as an entry of the zoo, and return where."""
    from robustbench_lite.models import save_weights
    from robustbench_lite.zoo import save_entry

    choices: dict[str, Any] = HydraConfig.get().runtime.choices
    defense = defense.cpu()
    if not plain["zoo"]:
        default = (
            Path(plain["store"] or "results") / "weights" / f"{samples.name}-{choices['defense']}-{choices['model']}"
        )
        return save_weights(defense, plain["weights"] or default.with_suffix(".safetensors"))
    if plain["weights"]:
        save_weights(defense, plain["weights"])
    description, source = _about(str(choices["defense"]), plain)
    return save_entry(
        plain["zoo"],
        defense,
        description=description,
        source=source,
        data=samples,
        model=node,
        command=command,
        seed=plain["seed"],
        epochs=plain["epochs"],
        hours=hours,
        figures={"clean": {"accuracy": accuracy, "command": command}},
        root=Path(plain["zoo_root"]) if plain["zoo_root"] else None,
    )


def _about(objective: str, plain: dict[str, Any]) -> tuple[str, str]:
    """Return what defends and its source: as given, or from the first line of the objective's config."""
    heading = next((entry.summary for entry in entries("defenses") if entry.name == objective), objective)
    source = re.search(r"\(([^()]*\d{4}[^()]*)\)", heading)
    description = re.sub(r"\s*\([^()]*\)", "", heading)
    return plain["description"] or description, plain["source"] or (source[1] if source else "none")
