"""The oracle: all that an attack sees of a model.

It answers questions up to an access level, counts what each answer costs each sample, and judges each candidate by the
deployed model alone. An attack that lies, overspends or leaves the threat can therefore not flatter itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from enum import IntEnum
from typing import Literal, Self, TypeVar

import torch
from torch import Tensor, nn

from robustbench_lite.core.checks import (
    check_labels,
    check_logits,
    check_predictions,
    check_untouched,
    explain_mismatch,
    version_of,
)
from robustbench_lite.core.convolutions import image_gradients
from robustbench_lite.core.errors import NotApplicableError
from robustbench_lite.core.goals import Goal
from robustbench_lite.core.incumbent import UNKNOWN, Incumbent
from robustbench_lite.core.ledger import Ledger
from robustbench_lite.core.losses import Loss, margin
from robustbench_lite.core.memory import Memory
from robustbench_lite.core.models import (
    Model,
    answers_of,
    forward_passes,
    frozen,
    is_stochastic,
    own_predict,
    rejects,
    surely_finite,
)
from robustbench_lite.core.threats import Threat

__all__ = ["Access", "AccessDeniedError", "Oracle", "OutOfBudgetError", "Stop", "Transform"]

T = TypeVar("T")
Transform = Callable[[Tensor, slice], Tensor]
"""Images (m, C, H, W) at the positions `slice` of a question to changed images; differentiable."""
Stop = Literal["success", "never"]
VOTES = (20, 80)  # fresh draws that decide whether a randomised model has fallen: most of each round


class Access(IntEnum):
    """What an attacker sees of the model; each level includes those below."""

    LABEL = 0
    TOPK = 1
    SCORES = 2
    GRADIENT = 3


class AccessDeniedError(RuntimeError):
    """An attack asked for more than its access level allows."""


class OutOfBudgetError(RuntimeError):
    """An attack asked on behalf of samples that cannot pay; `still` and `standing` say who can."""


class Oracle:
    """Answers about one batch, under one goal and one threat. Use it as a context: the models are frozen inside.

    A question has `points` (n, ...), images for an Lp threat and parameters for a parametric one, and the `rows` of the
    batch, int64 (n,), they belong to. Points that may be the attack's answer are *candidates*: they are judged by the
    deployed model and offered to `found`. Probes around them are not.

    Args:
        model: the deployed model; its `predict` (or largest logit) decides success.
        x: clean images (B, C, H, W).
        goal: what counts as success.
        threat: where points must lie.
        view: a differentiable stand-in for gradients; None: the model itself. A view whose call costs several forward
            passes of the model says so in its attribute `cost`, or holds a module that does. A view with
            `screens = True` claims to be the model itself, computed faster: it answers all questions, and only
            candidates that fool it are put to the model (unless the model has a `predict` of its own).
        access: the level above which questions are refused.
        max_queries: forward passes that each sample may spend; None for no limit.
        stop: "success": a sample is done once it has fallen; "never": all go on and keep their highest loss.
        memory_budget: bytes that the images of one question and the model's activations may take; larger questions
            are asked in chunks. None: 1 GiB (an eighth of a GPU's memory) for questions without gradients, no limit
            for gradients. A chunk that does not fit in the memory of a GPU is halved until it does.

    Attributes:
        found: the best point of each sample, and which samples have fallen.
        measure: what ranks candidates that do not succeed, or that all do; None: the loss of the question. An attack of
            several parts sets one measure for all, or losses of different scales would be compared.
        stochastic: whether the model declares that two calls may differ.
        rejects: whether the model declares that it may refuse an input, which is no success.
        verdict: bool (n,) which candidates of the last question fooled the deployed model, inside the threat or not.
        losses: (n,) the loss of the candidates of the last question of `scores` or `gradient`.
    """

    def __init__(
        self,
        model: Model,
        x: Tensor,
        goal: Goal,
        threat: Threat,
        *,
        view: Model | None = None,
        access: Access = Access.GRADIENT,
        max_queries: int | None = None,
        stop: Stop = "success",
        memory_budget: int | None = None,
    ) -> None:
        self.x, self.goal, self.threat, self.access = x, goal, threat, access
        self.max_queries = max_queries
        self.found = Incumbent(x, threat, keep_first=stop == "success")
        self.measure: Loss | None = None
        self.verdict = torch.zeros(0, dtype=torch.bool, device=x.device)
        self.losses = torch.zeros(0, dtype=x.dtype, device=x.device)
        self._ledger = Ledger(len(x), x.device)
        self._everyone: tuple[Tensor, int | None, int, Tensor] | None = None
        self._aimed: tuple[Tensor, int | None, Goal] | None = None
        self._model, self._view = model, model if view is None else view
        self._own_predict = own_predict(model)
        self._screens = bool(getattr(self._view, "screens", False)) and self._own_predict is None
        # One pass serves loss, success and gradient.
        self._one_pass = self._screens or (self._view is model and self._own_predict is None)
        self._view_cost = forward_passes(self._view)
        self.stochastic, self.rejects = is_stochastic(model), rejects(model)
        self.memory_budget = memory_budget
        self._memory = Memory(memory_budget, x, watch=not hasattr(model, "_orig_mod"), passes=self._view_cost)
        self._labels_checked = False
        self._failures = True
        self._context = ExitStack()

    def __enter__(self) -> Self:
        self._context.enter_context(frozen(self._model, self._view))
        return self

    def __exit__(self, *exception: object) -> None:
        self._context.close()

    @property
    def forwards(self) -> Tensor:
        """Forward passes spent on each sample, those that judge candidates included, int64 (B,)."""
        return self._ledger.forwards

    @property
    def backwards(self) -> Tensor:
        """Backward passes spent on each sample, int64 (B,)."""
        return self._ledger.backwards

    @property
    def best(self) -> Tensor:
        """The best point found for each sample, (B, ...); the clean one where nothing better was."""
        return self.found.points

    @property
    def compact_every(self) -> int:
        """Steps between two looks at who still stands; in between, samples that have fallen go on, and pay.

        On a GPU a look makes the host wait; a budget needs each one.
        """
        return 1 if self.x.device.type == "cpu" or self.max_queries is not None else 8

    @property
    def capacity(self) -> int:
        """Probe images that an attack should build at a time, so that the memory budget holds; at least 1."""
        return self._memory.capacity

    @property
    def gradient_cost(self) -> int:
        """Forward passes of one `gradient` question about a candidate."""
        return self._view_cost + (0 if self._one_pass else 1)

    @property
    def probe_cost(self) -> int:
        """Forward passes of one `gradient` or `curvature` question about a probe."""
        return self._view_cost

    @property
    def scores_cost(self) -> int:
        """Forward passes of one `scores` or `topk` question about a candidate."""
        return 1 if self._screens or self._own_predict is None else 2

    def standing(self, queries: int = 1) -> Tensor:
        """Return the rows, int64 (n,), that still search and can pay for `queries` more forward passes."""
        return self.still(torch.arange(len(self.x), device=self.x.device), queries)

    def still(self, rows: Tensor, queries: int = 1) -> Tensor:
        """Return the positions within `rows` of those that still search and can pay."""
        if self.max_queries is not None:
            able = ~self.found.done[rows] & (self.forwards[rows] + queries <= self.max_queries)
            return able.nonzero().flatten()
        version, finished, last = version_of(rows), self.found.finished, self._everyone
        if last is not None and last[0] is rows and version is not None and last[1:3] == (version, finished):
            return last[3]  # nobody has left since all these were standing
        able = (~self.found.done[rows]).nonzero().flatten()
        self._everyone = (rows, version, finished, able) if able.numel() == rows.numel() and finished >= 0 else None
        return able

    def gradient(
        self,
        points: Tensor,
        rows: Tensor,
        loss: Loss,
        aim: Goal | None = None,
        *,
        candidate: bool = True,
        transform: Transform | None = None,
        through: nn.Module | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the loss (n,) and its gradient (n, ...) at `points`, from the view; `gradient_cost` forward passes.

        Args:
            points: (n, ...).
            rows: int64 (n,).
            loss: the function to ascend.
            aim: the goal that the loss sees, one label a point; None: the goal of the oracle.
            candidate: whether the points may be the answer; False for probes around it.
            transform: a differentiable change of the images before the view sees them; only for probes.
            through: a module, made of parts of the deployed model, that is asked in the view's place and whose answers
                (n, anything) the loss is of; only for probes. Its attribute `cost` is paid, as a view's is.

        Raises:
            AccessDeniedError: the access level is below GRADIENT.
            OutOfBudgetError: a row cannot pay.
            ValueError: a candidate that should be judged `through` something else than the model.
        """
        self._require(Access.GRADIENT)
        if through is not None and candidate:
            raise ValueError("what `through` answers judges no candidate: ask with candidate=False, and judge")
        aims = self._goal(rows) if aim is None else aim

        def ask(part: slice) -> tuple[Tensor, ...]:
            leaf = points[part].detach().requires_grad_()
            with torch.enable_grad():
                logits = self._logits(self._view, leaf, rows[part], part, transform, through)
                value = loss(logits, aims.take(part))
                slope = _input_gradient(value, leaf)
            return value.detach(), slope, logits.detach()

        probe = self._view_cost if through is None else forward_passes(through)
        self._pay(rows, self.gradient_cost if candidate else probe, backwards=1)
        value, slope, logits = self._memory.ask(ask, rows.numel(), graph=True)
        if candidate:
            self._offer(points, rows, value, logits, self._one_pass)
        return value, _finite(slope)

    def pullback(
        self, points: Tensor, rows: Tensor, loss: Loss = margin, *, candidate: bool = True
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Return the view's logits (n, K) at `points` and their pullback, for losses that only the caller knows.

        The pullback maps weights (n, K) on the logits to their gradient (n, ...), a backward pass a call. `loss` says
        how good a candidate is that does not succeed. Costs as `gradient`; the graph of all points is alive at once.

        Raises:
            AccessDeniedError: the access level is below GRADIENT.
            OutOfBudgetError: a row cannot pay.
        """
        self._require(Access.GRADIENT)
        self._pay(rows, self.gradient_cost if candidate else self._view_cost)
        leaf = points.detach().requires_grad_()
        with torch.enable_grad():
            graph = self._logits(self._view, leaf, rows)
        logits = graph.detach()
        if candidate:
            self._offer(points, rows, loss(logits, self._goal(rows)), logits, self._one_pass)

        def pull(weights: Tensor) -> Tensor:
            self._ledger.pay(rows, 0, 1)
            return _input_gradient(graph, leaf, weights, retain_graph=True).nan_to_num(0.0, 0.0, 0.0)

        return logits, pull

    def curvature(self, points: Tensor, rows: Tensor, loss: Loss, directions: Tensor) -> Tensor:
        """Return the products (n, ...) of the loss's Hessian at probes with `directions`; one pass forward, two back.

        Raises:
            AccessDeniedError: the access level is below GRADIENT.
            OutOfBudgetError: a row cannot pay.
        """
        self._require(Access.GRADIENT)
        goal = self._goal(rows)

        def ask(part: slice) -> tuple[Tensor, ...]:
            leaf = points[part].detach().requires_grad_()
            with torch.enable_grad():
                value = loss(self._logits(self._view, leaf, rows[part]), goal.take(part))
                slope = _input_gradient(value, leaf, create_graph=True)
                return (_input_gradient((slope * directions[part]).flatten(1).sum(dim=1), leaf).detach(),)

        self._pay(rows, self._view_cost, backwards=2)
        return self._memory.ask(ask, rows.numel(), graph=True)[0].nan_to_num(0.0, 0.0, 0.0)

    def scores(
        self,
        points: Tensor,
        rows: Tensor,
        loss: Loss = margin,
        aim: Goal | None = None,
        *,
        candidate: bool = True,
    ) -> Tensor:
        """Return the deployed model's logits (n, K) at `points`; `scores_cost` forward passes for candidates, else one.

        A view that screens answers in the model's place. `loss` (and `aim`, as in `gradient`) says how good a candidate
        is that does not succeed.

        Raises:
            AccessDeniedError: the access level is below SCORES.
            OutOfBudgetError: a row cannot pay.
        """
        self._require(Access.SCORES)
        return self._scores(points, rows, loss, aim, candidate)

    def ranks_by(self, loss: Loss) -> bool:
        """Say whether candidates that fail are ranked by this loss in questions that state it."""
        return self.measure is None or self.measure is loss

    @contextmanager
    def only_successes(self) -> Iterator[None]:
        """Note no candidates that fail, inside: a search that holds its best ones itself gives them to `keep` later.

        That is less work than to note one after the other.
        """
        before, self._failures = self._failures, False
        try:
            yield
        finally:
            self._failures = before

    def keep(self, points: Tensor, rows: Tensor, values: Tensor) -> None:
        """Take in candidates (n, ...) that were asked about within `only_successes`, each with its loss (n,); no pass.

        They count as failures, whatever they are: a success was noted when it was asked about. That they were asked
        about is taken on trust; no success can come of it.
        """
        self.found.offer(points, rows, torch.zeros_like(rows, dtype=torch.bool), values, self._spent)

    def topk(self, points: Tensor, rows: Tensor, k: int, *, candidate: bool = True) -> tuple[Tensor, Tensor]:
        """Return the k largest probabilities, float64, and their classes, in descending order; costs as `scores`.

        Each is (n, k), or (n, K) where there are fewer than k classes.

        Raises:
            AccessDeniedError: the access level is below TOPK.
            OutOfBudgetError: a row cannot pay.
        """
        self._require(Access.TOPK)
        logits = self._scores(points, rows, margin, None, candidate)
        top = logits.double().softmax(dim=1).topk(min(k, logits.shape[1]), dim=1)
        return top.values, top.indices

    def labels(self, points: Tensor, rows: Tensor, *, candidate: bool = True) -> Tensor:
        """Return the deployed model's answers, int64 (n,): one forward pass.

        A candidate that fails ranks below any whose loss is known: a search by labels that finds nothing leaves the
        clean input.

        Raises:
            OutOfBudgetError: a row cannot pay.
        """
        self._pay(rows, 1)
        labels = self._predict(points, rows)
        if candidate:
            self._judge(points, rows, labels, self._constant(rows, UNKNOWN))
        return labels

    def judge_clean(self) -> None:
        """Judge the clean inputs: one forward pass each. As failures they rank below any whose loss is known."""
        rows = self.standing()
        self._pay(rows, 1)
        self._judge(self.best, rows, self._predict(self.best, rows), self._constant(rows, UNKNOWN))

    def judge(self, points: Tensor, rows: Tensor, loss: Loss = margin) -> None:
        """Offer candidates and nothing else; the question that the access level allows is the one that is asked."""
        if self.access >= Access.SCORES:
            self._scores(points, rows, loss, None, candidate=True)
        else:
            self.labels(points, rows)

    @property
    def judge_cost(self) -> int:
        """Forward passes of one `judge`."""
        return self.scores_cost if self.access >= Access.SCORES else 1

    @staticmethod
    def _constant(rows: Tensor, value: float) -> Tensor:
        return torch.full((len(rows),), value, dtype=torch.float64, device=rows.device)

    def _scores(self, points: Tensor, rows: Tensor, loss: Loss, aim: Goal | None, candidate: bool) -> Tensor:
        self._pay(rows, self.scores_cost if candidate else 1)
        with torch.no_grad():
            asked = self._view if self._screens else self._model
            (logits,) = self._memory.ask(lambda part: (self._logits(asked, points[part], rows[part]),), rows.numel())
        if candidate:
            value = loss(logits, self._goal(rows) if aim is None else aim)
            self._offer(points, rows, value, logits, self._screens or self._own_predict is None)
        return logits

    def _offer(self, points: Tensor, rows: Tensor, value: Tensor, logits: Tensor, decide: bool) -> None:
        """Judge candidates: by these logits where they `decide`, else by asking the deployed model (already paid)."""
        self.losses = value
        if self.measure is not None:
            value = self._loss(self.measure)(logits, self._goal(rows))
        if not self._screens or not decide:
            labels = answers_of(logits) if decide else self._predict(points, rows)
            return self._judge(points, rows, labels, value)
        apparent = self._goal(rows).achieved(answers_of(logits), self.rejects)
        success = self._confirm(points, rows, apparent, VOTES if self.stochastic else (1,))
        return self._record(points, rows, success, value)

    def _loss(self, loss: Loss) -> Loss:
        """Return the function of the model's logits that `loss` stands for."""
        return loss

    def _judge(self, points: Tensor, rows: Tensor, labels: Tensor, value: Tensor) -> None:
        success = self._goal(rows).achieved(labels, self.rejects)
        if self.stochastic:
            success = self._confirm(points, rows, success, VOTES)
        self._record(points, rows, success, value)

    def _record(self, points: Tensor, rows: Tensor, success: Tensor, value: Tensor) -> None:
        self.verdict = success
        self.found.offer(points, rows, success, value, self._spent, self._failures)

    def _spent(self, rows: Tensor) -> Tensor:
        return self.forwards[rows]

    def _confirm(self, points: Tensor, rows: Tensor, success: Tensor, rounds: Sequence[int]) -> Tensor:
        """Confirm apparent successes: most answers of each round must be ones too. Who cannot pay has not fallen.

        A search puts many candidates up, and a short vote is lost by luck every so often: who loses it has another,
        longer one, whose draws are fresh. Points outside the threat are never kept, and have the short one alone.
        """
        confirmed = torch.zeros_like(success)
        lucky = success.nonzero().flatten()
        for number, draws in enumerate(rounds):
            if number:
                inside = self._within(points[lucky], rows[lucky])
                confirmed[lucky[~inside]] = True
                lucky = lucky[inside]
            lucky = lucky[self.still(rows[lucky], draws)]
            if len(lucky) == 0:
                return confirmed
            lucky = lucky[self._most_succeed(points[lucky], rows[lucky], draws)]
        confirmed[lucky] = True
        return confirmed

    def _most_succeed(self, points: Tensor, rows: Tensor, draws: int) -> Tensor:
        """Say which points (n,) succeed in most of `draws` answers; a vote that is decided is not gone on with.

        Half of the answers decide nothing, unless all are failures: up to there nobody looks.
        """
        half = draws // 2
        wins, undecided = self._wins(points, rows, half), torch.arange(len(rows), device=rows.device)
        for to_come in range(draws - half, 0, -1):
            so_far = wins[undecided]
            undecided = undecided[(so_far <= half) & (so_far + to_come > half)]
            if len(undecided) == 0:
                break
            wins[undecided] += self._wins(points[undecided], rows[undecided], 1)
        return wins > half

    def _wins(self, points: Tensor, rows: Tensor, draws: int) -> Tensor:
        """Return how many of `draws` fresh answers to each point succeed, int64 (n,); each is a forward pass."""
        self._pay(rows, draws)
        goal, wins = self.goal.take(rows), torch.zeros_like(rows)
        for _ in range(draws):
            wins += goal.achieved(self._predict(points, rows), self.rejects)
        return wins

    def _within(self, points: Tensor, rows: Tensor) -> Tensor:
        return self.threat.take(rows).contains(points, self.x[rows])

    def _predict(self, points: Tensor, rows: Tensor) -> Tensor:
        def ask(part: slice) -> tuple[Tensor, ...]:
            if self._own_predict is None:
                return (answers_of(self._logits(self._model, points[part], rows[part])),)
            images = self._image(points[part], rows[part])
            version = version_of(images)
            labels = self._own_predict(images)
            check_untouched(images, version)
            check_predictions(labels, images)
            return (labels,)

        with torch.no_grad():
            return self._memory.ask(ask, rows.numel())[0]

    def _goal(self, rows: Tensor) -> Goal:
        """Return the goal of `rows`; a search asks about the same ones again and again."""
        version = version_of(rows)
        if self._aimed is None or self._aimed[0] is not rows or version is None or self._aimed[1] != version:
            self._aimed = rows, version, self.goal.take(rows)
        return self._aimed[2]

    def _image(self, points: Tensor, rows: Tensor) -> Tensor:
        return self.threat.take(rows).apply(self.x[rows], points) if self.threat.parametric else points

    def inside(self, kind: type[T]) -> T:
        """Return the deployed model as a `kind`, for attacks that know what is inside a defense (`Attack.needs`).

        Whatever they ask of its parts goes by `gradient(..., through=...)`, and is paid.

        Raises:
            AccessDeniedError: the access level is below GRADIENT.
            NotApplicableError: the model is no `kind`.
        """
        self._require(Access.GRADIENT)
        if not isinstance(self._model, kind):
            raise NotApplicableError(f"needs a {kind.__name__}, and {type(self._model).__name__} is none")
        return self._model

    def _logits(
        self,
        model: Model,
        points: Tensor,
        rows: Tensor,
        part: slice = slice(None),
        transform: Transform | None = None,
        through: nn.Module | None = None,
    ) -> Tensor:
        images = self._image(points, rows)
        images = images if transform is None else transform(images, part)
        version = version_of(images)
        if through is not None:
            with frozen(through), image_gradients(images):
                return _checked_values(through(images), images, version)
        try:
            with image_gradients(images):
                logits = model(images)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            mismatch = explain_mismatch(model, images)
            if mismatch is None:
                raise
            raise ValueError(mismatch) from error
        check_untouched(images, version)
        check_logits(logits, images)
        if not self._labels_checked:  # the first answer tells the number of classes
            check_labels(self.goal.labels, self.x, logits.shape[1])
            self._labels_checked = True
        return logits

    def _require(self, access: Access) -> None:
        if self.access < access:
            raise AccessDeniedError(f"this needs {access.name} access, but the attack declared {self.access.name}")

    def _pay(self, rows: Tensor, forwards: int, backwards: int = 0) -> None:
        if self.max_queries is not None:
            spent = self.forwards.index_add(0, rows, torch.full_like(rows, forwards))  # a row may come several times
            short = rows[spent[rows] > self.max_queries]
            if len(short):
                raise OutOfBudgetError(
                    f"samples {sorted(set(short.tolist()))} cannot pay {forwards} more forward passes within "
                    f"max_queries = {self.max_queries}: ask still() or standing() first"
                )
        self._ledger.pay(rows, forwards, backwards)


def _checked_values(values: Tensor, images: Tensor, version: int | None) -> Tensor:
    check_untouched(images, version)
    if values.ndim != 2 or len(values) != len(images):
        raise ValueError(f"what is asked `through` must give ({len(images)}, anything), got {tuple(values.shape)}")
    return values


def _finite(slope: Tensor) -> Tensor:
    """Return the slope with 0 for what is not finite."""
    return slope if surely_finite(slope) else slope.nan_to_num(0.0, 0.0, 0.0)


def _input_gradient(
    value: Tensor,
    leaf: Tensor,
    weights: Tensor | None = None,
    *,
    retain_graph: bool = False,
    create_graph: bool = False,
) -> Tensor:
    """Return the gradient of the (weighted) sum of `value`; zeros where it does not depend on the input at all."""
    if not value.requires_grad:
        return torch.zeros_like(leaf)
    total = value.sum() if weights is None else value
    (slope,) = torch.autograd.grad(
        total, leaf, weights, allow_unused=True, retain_graph=retain_graph or create_graph, create_graph=create_graph
    )
    return torch.zeros_like(leaf) if slope is None else slope
