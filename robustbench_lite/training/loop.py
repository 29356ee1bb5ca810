"""The one training loop: it runs every objective, and a killed run resumes to the same weights."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import nn

from robustbench_lite.core.models import frozen, predict
from robustbench_lite.data.base import Dataset
from robustbench_lite.defenses.base import Objective
from robustbench_lite.training.augment import Augment
from robustbench_lite.training.checkpoint import load_checkpoint, save_checkpoint
from robustbench_lite.training.progress import progress_bar
from robustbench_lite.training.run import Run, reproducible
from robustbench_lite.training.schedules import Schedule, schedule_named
from robustbench_lite.training.settings import Settings, identity_of

__all__ = ["train"]

log = logging.getLogger(__name__)


def train(
    model: nn.Module,
    data: Dataset,
    objective: Objective,
    *,
    epochs: int,
    batch_size: int = 128,
    optimizer: str = "adam",
    learning_rate: float = 1e-3,
    weight_decay: float = 0.0,
    momentum: float = 0.9,
    schedule: str | Schedule = "constant",
    augment: Augment | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
    precision: str = "float32",
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 1,
    validation: Dataset | None = None,
    calibration: Dataset | None = None,
    progress: bool = False,
) -> nn.Module:
    """Train `model` in place on `data` by `objective` and return the defense.

    Guaranteed: a run that is killed at any moment and started again with the same arguments and `checkpoint` ends in
    the weights of an uninterrupted one, bit for bit, on the same machine, torch and number of threads (on a GPU as
    far as the operators of model and objective are deterministic). Torch's global generators are left as they were.

    Args:
        model: images to logits; it moves to `device`, its gradients are cleared, and it ends in eval mode.
        data: the samples to learn from.
        objective: how to learn from them.
        epochs: passes over the data; 0 only sets up and finishes the objective.
        batch_size: samples a step; the last step of an epoch takes what is left.
        optimizer: "adam", "adamw" or "sgd".
        learning_rate: the rate that the schedule scales.
        weight_decay: the optimiser's.
        momentum: of "sgd".
        schedule: "constant", "one_cycle", "cosine", "steps", or a function from progress in [0, 1) to a factor.
        augment: changes each batch of images, given one random stream a sample.
        seed: of the shuffling, of the objective's randomness and of torch's global generators while this runs; the
            weights are the caller's to initialise, under the same seed if the run is to be resumed.
        device: "auto" takes a CUDA device where there is one.
        precision: "float32", or "bfloat16" for autocast forward passes over float32 weights.
        checkpoint: file to resume from if it exists, and to write to; `schedule`, `augment` and `objective` then need
            names, which a lambda or local function has not.
        checkpoint_every: epochs between two checkpoints; the last epoch always writes one.
        validation: samples whose clean accuracy is logged after every epoch.
        calibration: samples, none of them in `data`, that a defense sets its thresholds by.
        progress: whether to draw a progress bar on the standard error.

    Returns:
        What the objective's `finish` makes of the model, in eval mode.

    Raises:
        FloatingPointError: the loss stopped being finite.
        ValueError: a setting out of range, a model with nothing to train, or a checkpoint of another run.
    """
    place = _device(device)
    settings = Settings(
        epochs, batch_size, optimizer, learning_rate, weight_decay, momentum,
        schedule_named(schedule), augment, seed, place, precision,
    )  # fmt: skip
    if checkpoint_every < 1:
        raise ValueError(f"checkpoint_every must be at least 1 epoch, got {checkpoint_every}")
    model.to(place)
    with reproducible(place, seed):
        identity = identity_of(settings, model, data, objective) if checkpoint else {}
        run = Run(model, data, objective, settings)
        path = Path(checkpoint) if checkpoint else None
        if path is not None and (saved := load_checkpoint(path, identity)) is not None:
            run.load_state_dict(saved)
            log.info("resumed from %s after epoch %d", path, run.epoch)
        with progress_bar(progress, run.epoch * run.steps_per_epoch, run.total) as update:
            while run.epoch < epochs:
                loss = run.train_epoch(lambda done: update(completed=done))
                if path is not None and (run.epoch % checkpoint_every == 0 or run.epoch == epochs):
                    save_checkpoint(path, identity, run.state_dict())
                news = _news(run, loss, validation)
                update(description=news)
                log.info(news)
        if run.optimizer is not None:
            run.optimizer.zero_grad()
        return objective.finish(model.eval(), data, run.state, calibration).eval()


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


def _news(run: Run, loss: float, validation: Dataset | None) -> str:
    news = f"epoch {run.epoch}/{run.settings.epochs}: loss {loss:.4f}"
    if validation is None:
        return news
    hits = 0
    with frozen(run.model), torch.no_grad():
        for rows in torch.split(torch.arange(len(validation)), 1000):
            answers = predict(run.model, validation.images[rows].to(run.settings.device))
            hits += int((answers.cpu() == validation.labels[rows]).sum())
    return f"{news}, clean accuracy {hits / len(validation):.4f}"
