"""What a defense is made of: an objective (how a net is trained) and a wrapper (what is deployed around it)."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

from torch import Tensor, nn

from robustbench_lite.core.checks import explain_mismatch
from robustbench_lite.core.models import labels_of

if TYPE_CHECKING:
    from robustbench_lite.attacks.base import Attack
    from robustbench_lite.certify.base import Certifier
    from robustbench_lite.core.rng import Streams
    from robustbench_lite.core.threats import Threat

__all__ = ["Batch", "Descend", "Objective", "State", "Step", "TrainingData", "Wrapper"]

Answer = TypeVar("Answer", Tensor, tuple[Tensor, Tensor])

State = nn.Module | dict[str, Tensor] | None
"""What an objective keeps between steps; it is checkpointed, and a module's trainable parameters are trained too."""

Descend = Callable[[Tensor], None]
"""One optimiser step on a loss: clear the gradients, go backward, step. Inputs that require a gradient get theirs."""


@dataclass(frozen=True)
class Batch:
    """The samples of one training step.

    Args:
        x: images (B, C, H, W), after augmentation.
        y: labels, int64 (B,).
        indices: the samples' own numbers in their data set, int64 (B,); they name the random streams.
    """

    x: Tensor
    y: Tensor
    indices: Tensor


@dataclass(frozen=True)
class Step:
    """Where in the training a batch comes.

    Args:
        index: number of this step, from 0.
        total: number of steps of the whole training.
        epoch: number of this pass over the data, from 0.
    """

    index: int
    total: int
    epoch: int

    @property
    def progress(self) -> float:
        """Share of the training that lies behind this step, in [0, 1): schedules are functions of it."""
        return self.index / self.total


class TrainingData(Protocol):
    """What `setup` and `finish` see of a data set."""

    @property
    def images(self) -> Tensor:
        """Float32 (N, C, H, W) in [0, 1]."""
        ...

    @property
    def labels(self) -> Tensor:
        """Int64 (N,)."""
        ...

    @property
    def indices(self) -> Tensor:
        """Int64 (N,): the samples' numbers in the whole data set."""
        ...

    @property
    def num_classes(self) -> int:
        """Number of classes K."""
        ...


@dataclass(frozen=True)
class Objective(ABC):
    """How a net is trained: a frozen dataclass whose fields are the hyper-parameters. Most define `loss` alone.

    The training loop calls `setup` once, then for every batch `update` and `after_step`, and in the end `finish`.
    It runs `setup` before a resumed training as well and then loads the saved state over its answer. The model is in
    train mode in `loss`. All randomness comes from `streams` or from torch's global generator, which the loop seeds
    and checkpoints.
    """

    def setup(self, model: nn.Module, data: TrainingData) -> State:
        """Make what is kept between steps: a module, a dict of tensors that steps may change in place, or None.

        Parameters of a module that require gradients are trained with the model's; a module's mode is the
        objective's to set.
        """
        return None

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch, step: Step, state: Any, streams: Streams) -> Tensor:
        """Return the loss of one batch, a scalar."""

    def update(
        self, model: nn.Module, batch: Batch, step: Step, state: Any, streams: Streams, descend: Descend
    ) -> Tensor:
        """Learn from one batch and return its loss, detached.

        The default is one descent on `loss`. An objective that descends more than once a batch, or wants the
        gradient that the same backward pass leaves on its inputs (free adversarial training), writes its own.
        """
        loss = self.loss(model, batch, step, state, streams)
        descend(loss)
        return loss.detach()

    def after_step(self, model: nn.Module, state: Any) -> None:  # noqa: B027  (a hook, not a forgotten method)
        """Bring weights or state back to where they must lie (projections), after every step."""

    def finish(
        self, model: nn.Module, data: TrainingData, state: Any, calibration: TrainingData | None = None
    ) -> nn.Module:
        """Return the defense to deploy; by default the model itself.

        `calibration` are samples that the training has not seen, for thresholds; None where there are none.
        """
        return model


class _FailedPassError(RuntimeError):
    """A net failed; the message names the images."""


class Wrapper(nn.Module, ABC):
    """What is deployed around a net, with its honest self-description.

    A subclass takes the net first, then its settings (plain data, kept as attributes of the same names), keeps what it
    learns as submodules and buffers (so that weights files carry them) and defines `forward`; it overrides the rest
    where the default is not the truth.

    Calls are checked: what has not four dimensions, and logits for a single class, are refused; an error of the net
    names the images that it failed on. A `predict` that does not call the defense asks through `_checked`.
    """

    stochastic: ClassVar[bool] = False
    """Whether two calls may differ."""
    rejects: ClassVar[bool] = False
    """Whether `predict` may refuse an input as suspicious (a detector); abstention for lack of votes is not that."""
    needs_data: ClassVar[bool] = False
    """Whether `restore` must bring back training data that a weights file is too small for."""

    def settings(self) -> dict[str, Any]:
        """Return the arguments that rebuild this wrapper around its net."""
        return {name: getattr(self, name) for name in list(inspect.signature(type(self)).parameters)[1:]}

    def fit(self, data: TrainingData, calibration: TrainingData | None) -> None:
        """Learn what must be known of the data, once, when the net is trained.

        Args:
            data: what the net was trained on.
            calibration: samples that it was not trained on, for thresholds; None where there are none.

        Raises:
            ValueError: samples that are missing or too few.
        """

    def restore(self, data: TrainingData) -> None:
        """Bring back from the training data what the weights file does not hold; for wrappers that `needs_data`."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, K) for images (B, C, H, W)."""

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return `forward(x, ...)`, hooks included.

        Raises:
            ValueError: no batch of images, or logits for a single class.
            RuntimeError: images that the net failed on, as those of another shape, dtype or device.
        """
        call: Callable[..., Tensor] = super().__call__
        return self._checked(lambda images: call(images, *args, **kwargs), x)

    def _checked(self, work: Callable[[Tensor], Answer], x: Tensor) -> Answer:
        """Return `work(x)`, which is logits (B, K) or begins with them; an error says what is wrong with it."""
        if not isinstance(x, Tensor):
            return work(x)  # torch.fx asks with stand-ins
        kind = type(self).__name__
        if x.ndim != 4:
            raise ValueError(
                f"{kind} answers batches of images (B, C, H, W), got {tuple(x.shape)}: a single image is x.unsqueeze(0)"
            )
        try:
            answer = work(x)
        except RuntimeError as error:
            if type(error) is not RuntimeError:  # explained already, no memory left, a trace that gave up
                raise
            guess = explain_mismatch(self, x) or "is its net made for images of another shape?"
            raise _FailedPassError(f"{kind} failed on images {tuple(x.shape)}: {error}; {guess}") from error
        logits = answer[0] if isinstance(answer, tuple) else answer
        if isinstance(logits, Tensor) and logits.ndim == 2 and logits.shape[1] < 2:
            raise ValueError(f"a classifier has at least 2 classes, {kind} has logits for {logits.shape[1]}")
        return answer

    def predict(self, x: Tensor) -> Tensor:
        """Return the deployed labels, int64 (B,): a class, `ABSTAIN` (-1), or `INVALID` (-2) where not finite."""
        return labels_of(self(x))

    predict.is_argmax = True  # type: ignore[attr-defined]  # one forward pass serves logits and labels

    def attack_view(self, samples: int = 1) -> nn.Module:
        """Return what a knowing attacker differentiates; `samples` is the number of draws of an average over noise.

        By default the defense itself, which is right where its gradients are.
        """
        return self

    def adaptive_attacks(self, threat: Threat) -> list[Attack]:
        """Return the attacks within `threat` that only this defense needs."""
        return []

    def certifiers(self) -> list[Certifier]:
        """Return the certifiers bound to this defense's inside (the inner net, sigma, the votes)."""
        return []
