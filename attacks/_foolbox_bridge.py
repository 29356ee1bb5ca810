"""One sample between foolbox and the oracle. Importing this file imports foolbox, which takes a second."""

from __future__ import annotations

import inspect
import random
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from robustbench_lite.attacks._foolbox_catalogue import Entry
from robustbench_lite.core.errors import suggest
from robustbench_lite.core.goals import Goal, Targeted
from robustbench_lite.core.oracle import Access, Oracle
from robustbench_lite.core.threats import Lp

# Warnings that foolbox raises by itself and that say nothing to our user.
KNOWN_WARNINGS = (
    r".*scipy\.ndimage\.filters",  # on import: attacks/blur.py uses an old place in scipy
    "The given NumPy array is not writable",  # eagerpy's numpy() arrays, handed back to torch and only read
    "LinearSearchBlendedUniformNoiseAttack failed to draw",  # no start was found, which `search` handles
    "At the first initialisation the optimizer needs to be compiled",  # Brendel and Bethge, by numba
)


@contextmanager
def _known_warnings_silenced() -> Iterator[None]:
    with warnings.catch_warnings():
        for message in KNOWN_WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        yield


with _known_warnings_silenced():
    import foolbox
    from eagerpy.astensor import astensor, astensor_
    from foolbox.attacks.base import FlexibleDistanceMinimizationAttack
    from foolbox.criteria import Misclassification, TargetedMisclassification
    from foolbox.models.base import Model
    from foolbox.types import Bounds

__all__ = ["build", "search"]


def build(name: str, entry: Entry, options: Mapping[str, Any], norm: str) -> Any:
    """Return a foolbox attack; one that leaves the distance open is given `norm`.

    Raises:
        ImportError: a package that the attack needs is missing.
        ValueError: an option that the attack does not have.
    """
    kind = getattr(foolbox.attacks, name)
    known = [option for option in inspect.signature(kind.__init__).parameters if option not in ("self", "distance")]
    for option in options:
        if option not in known:
            raise ValueError(suggest(option, known, f"option of foolbox's {name}"))
    try:
        with _known_warnings_silenced():
            attack = kind(**options)
    except ImportError as error:
        raise ImportError(f"foolbox's {name} needs {entry.needs}: pip install {entry.needs}") from error
    if issubclass(kind, FlexibleDistanceMinimizationAttack):
        attack._distance = getattr(foolbox.distances, norm)  # PointwiseAttack has no argument for it
    return attack


def search(attack: Any, entry: Entry, oracle: Oracle, row: Tensor, seed: int) -> Tensor | None:
    """Run `attack` on one row, int64 (1,), of the oracle's batch, until it ends, succeeds or cannot pay.

    Returns:
        The point (1, C, H, W) that foolbox returned, or None where the search was cut short. What it met on the way,
        the oracle has kept.
    """
    x = oracle.x[row]
    model = _OracleModel(oracle, row)
    kind = _Targeted if isinstance(oracle.goal, Targeted) else _Untargeted
    criterion = kind(oracle.goal.take(row), model)
    radius = cast(Lp, oracle.threat.take(row)).eps
    eps = None if radius is None else float(radius)
    budget = {"epsilon": eps} if entry.fixed else {"early_stop": eps}
    with _own_randomness(x.device, seed), _known_warnings_silenced():
        try:
            found: Tensor = attack.run(model, x.clamp(*model.bounds), criterion, **budget)
        except _SearchEnded:
            return None
        except (AssertionError, ValueError) as error:
            lost = oracle.stochastic or not model.met_success  # a start that the next draw takes back is none
            if entry.starts and lost and _raised_by_foolbox(error):
                return None  # nothing adversarial to start from: the attack fails on this sample
            raise
    return found.detach()


def _raised_by_foolbox(error: BaseException) -> bool:
    frames = list(traceback.walk_tb(error.__traceback__))
    return str(frames[-1][0].f_globals.get("__name__")).startswith("foolbox.")


class _SearchEnded(Exception):  # noqa: N818
    """Raised through foolbox once the sample has fallen, or cannot pay for another question."""


class _OracleModel(Model):
    """A foolbox model whose every forward pass is a question to the oracle about one row."""

    data_format = "channels_first"

    def __init__(self, oracle: Oracle, row: Tensor) -> None:
        self._oracle, self._row = oracle, row
        # As numbers of the images' own precision: foolbox compares images with them exactly.
        low, high = torch.tensor(oracle.threat.bounds, dtype=oracle.x.dtype).tolist()
        self._bounds = Bounds(low, high)
        self.answer: Tensor | None = None
        self.met_success = False

    @property
    def bounds(self) -> Any:
        return self._bounds

    def __call__(self, inputs: Any) -> Any:
        points, restore = astensor_(inputs)
        if points.raw.requires_grad:
            self._settle(self._oracle.gradient_cost)
            logits, pull = self._oracle.pullback(points.raw.detach(), self._row)
            self._note(logits)
            return restore(astensor(_Differentiable.apply(points.raw, logits, pull)))
        logits = self._plain_answer(points.raw)
        self._note(logits)
        return restore(astensor(logits))

    def _plain_answer(self, point: Tensor) -> Tensor:
        oracle = self._oracle
        if oracle.access < Access.SCORES:
            self._settle(1)
            oracle.labels(point, self._row)
            return point.new_empty(1, 0)  # there are no logits to give: the criteria below know the verdict
        self._settle(oracle.scores_cost)
        logits = oracle.scores(point, self._row)
        if oracle.access == Access.SCORES:
            # GenAttack takes exp(logits), which overflows; log-probabilities carry the same information.
            return logits.log_softmax(dim=1).nan_to_num(-1e4, 0.0, -1e4)
        return logits

    def _settle(self, cost: int) -> None:
        if len(self._oracle.still(self._row, cost)) == 0:
            raise _SearchEnded

    def _note(self, logits: Tensor) -> None:
        self.answer = logits
        self.met_success |= bool(self._oracle.verdict.all())
        if bool(self._oracle.found.done[self._row]):
            raise _SearchEnded

    def verdict_on(self, outputs: Any) -> Any | None:
        """Return whether the deployed model fell for the image these outputs belong to; None if they were altered."""
        if self.answer is None or not torch.equal(outputs.raw.detach(), self.answer):
            return None
        return astensor(self._oracle.verdict)


class _Differentiable(torch.autograd.Function):
    """Hands foolbox logits whose backward pass is a question to the oracle, so that it is counted."""

    @staticmethod
    def forward(ctx: Any, point: Tensor, logits: Tensor, pull: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.pull = pull
        return logits.clone()

    @staticmethod
    def backward(ctx: Any, *weights: Tensor) -> Any:
        return ctx.pull(weights[0]), None, None


class _Verdict:
    """Makes a criterion of foolbox answer with the deployed model's verdict, not with the largest of a view's logits.

    Logits that the attack has altered (the confidence of Carlini and Wagner) are judged as they stand.
    """

    def __init__(self, goal: Goal, model: _OracleModel) -> None:
        super().__init__(goal.labels)  # type: ignore[call-arg]
        self._model = model

    def __call__(self, perturbed: Any, outputs: Any) -> Any:
        logits, restore = astensor_(outputs)
        verdict = self._model.verdict_on(logits)
        return super().__call__(perturbed, outputs) if verdict is None else restore(verdict)  # type: ignore[misc]


class _Untargeted(_Verdict, Misclassification):
    """The prediction is wrong."""


class _Targeted(_Verdict, TargetedMisclassification):
    """The prediction is the target."""


@contextmanager
def _own_randomness(device: torch.device, seed: int) -> Iterator[None]:
    """Seed the global generators of torch, numpy and Python inside, and put them back afterwards."""
    states = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(states[0])
            random.setstate(states[1])
