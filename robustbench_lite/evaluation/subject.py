"""The subject of an evaluation: the deployed model, its names, and what it answers."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from robustbench_lite.core.checks import check_logits
from robustbench_lite.core.goals import Untargeted
from robustbench_lite.core.insides import Rejecting
from robustbench_lite.core.losses import margin
from robustbench_lite.core.models import (
    Model,
    answers_of,
    frozen,
    is_stochastic,
    own_predict,
    predict,
    rejects,
    surely_finite,
)
from robustbench_lite.evaluation.fingerprint import fingerprint
from robustbench_lite.evaluation.records import TIE
from robustbench_lite.evaluation.samples import Samples
from robustbench_lite.evaluation.scarcity import ran_out

__all__ = ["EOT_SAMPLES", "Subject"]

EOT_SAMPLES = 20  # draws that a knowing attacker averages over, where the model declares itself stochastic

_DTYPES = {"float32": torch.float32, "float64": torch.float64}
_NO_FLOAT64 = (RuntimeError, TypeError, ValueError, NotImplementedError, AttributeError)


@dataclass(frozen=True, eq=False)
class Subject:
    """A model under evaluation, on its device and in its precision.

    Attributes:
        name: what tables call it.
        fingerprint: what identifies it.
        model: the deployed model.
        view: what an attacker differentiates; None for the model itself.
        view_samples: draws that the view averages over; None without a view.
        device: where it runs.
        precision: "float32" or "float64".
    """

    name: str
    fingerprint: str
    model: Model
    view: Model | None
    view_samples: int | None
    device: torch.device
    precision: str

    @classmethod
    def of(cls, model: Any, name: str | None, device: str, precision: str) -> Subject:
        """Look at a model; one that must change device or precision is copied, never changed.

        Raises:
            TypeError: not callable.
            ValueError: BatchNorm or Dropout in train mode, a callable without a name, an unknown precision.
        """
        _refuse_train_mode(model)
        identity = fingerprint(model, name)
        place, kind = _place(model, device), _precision(model, precision)
        deployed = _moved(model, place, _DTYPES[kind])
        samples = (EOT_SAMPLES if is_stochastic(model) else 1) if hasattr(model, "attack_view") else None
        view = None if samples is None else deployed.attack_view(samples)
        title = name or type(model).__name__
        return cls(title, identity, deployed, view, samples, place, kind)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of images."""
        return _DTYPES[self.precision]

    @property
    def stochastic(self) -> bool:
        """Whether the model declares that two calls may differ."""
        return is_stochastic(self.model)

    @property
    def decides(self) -> bool:
        """Whether the model's own `predict` decides, rather than its largest logit."""
        return own_predict(self.model) is not None

    def images(self, x: Tensor) -> Tensor:
        """Return images on the model's device and in its precision."""
        return x.to(self.device, self.dtype)

    @torch.no_grad()
    def suspicion(self, x: Tensor) -> Tensor | None:
        """Return a detector's scores (B,) of images, larger for what looks less like data; None of any other model."""
        model: object = self.model
        if not isinstance(model, Rejecting):
            return None
        with frozen(self.model):
            return model.answer(x)[1].double()

    def achieved(self, prediction: Tensor, y: Tensor) -> Tensor:
        """Return bool (B,): the answer is what an untargeted attacker wants."""
        return Untargeted(y).achieved(prediction, rejects(self.model))

    @torch.no_grad()
    def answer(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the deployed labels, int64 (B,), and the lead of the true class, float64 (B,).

        The lead is positive where the logits are right, -inf where they are not finite. Where they are wrong it is
        computed in float64, on a copy of the model, if there it runs; if not, a lead that rounding could make is 0.

        Raises:
            TypeError: the model's answer is no floating-point tensor.
            ValueError: it has the wrong shape.
        """
        with frozen(self.model):
            logits = self.model(x)
            check_logits(logits, x)
            labels = predict(self.model, x) if self.decides else answers_of(logits)
        if labels.shape != y.shape:
            raise ValueError(f"predict must return labels of shape {tuple(y.shape)}, got {tuple(labels.shape)}")
        lead = _lead(logits, y)
        wrong = (labels != y).nonzero().flatten()
        if len(wrong):
            lead[wrong] = self._exact_lead(x[wrong], y[wrong], lead[wrong])
        return labels, lead

    def _exact_lead(self, x: Tensor, y: Tensor, lead: Tensor) -> Tensor:
        if self.precision == "float64" or self.stochastic:
            return lead
        logits = None
        if self._double is not None:
            try:
                with frozen(self._double):
                    logits = self._double(x.double())
            except _NO_FLOAT64 as error:
                if ran_out(error):
                    raise
                logits = None
        if logits is None or logits.dtype != torch.float64 or logits.shape[0] != len(x):
            return torch.where(lead.abs() < TIE, 0.0, lead)
        return _lead(logits, y)

    @cached_property
    def _double(self) -> Model | None:
        if not isinstance(self.model, nn.Module) or self.device.type == "mps":
            return None
        try:
            return copy.deepcopy(self.model).double()
        except _NO_FLOAT64:
            return None

    @contextmanager
    def seeded(self, seed: int, part: Samples | None = None) -> Iterator[None]:
        """Seed the global generators, for models that draw from them, and restore them; TF32 is off inside.

        A stochastic model meets other draws with each `part`: else all batches would see one net of `WeightNoise`.
        """
        devices = [self.device] if self.device.type == "cuda" else []
        backends: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul) if devices else ()
        allowed = [backend.allow_tf32 for backend in backends]
        with torch.random.fork_rng(devices=devices):
            self._seed(_mixed(seed, part) if self.stochastic and part is not None else seed)
            try:
                for backend in backends:
                    backend.allow_tf32 = False
                yield
            finally:
                for backend, before in zip(backends, allowed, strict=True):
                    backend.allow_tf32 = before

    def _seed(self, seed: int) -> None:
        """Seed all global generators; of a net on the CPU its own, as `torch.manual_seed` takes longer than a batch."""
        at_home = self.device.type == "cpu" and isinstance(self.model, nn.Module)
        (torch.default_generator.manual_seed if at_home else torch.manual_seed)(seed)


def _mixed(seed: int, part: Samples) -> int:
    """Return a seed of 63 bits for the batch that begins with this sample."""
    digest = hashlib.blake2b(f"{seed} {part.indices[0]}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _lead(logits: Tensor, y: Tensor) -> Tensor:
    lead = -margin(logits, Untargeted(y)).double()
    return lead if surely_finite(logits) else torch.where(logits.isfinite().all(dim=1), lead, -torch.inf)


def _refuse_train_mode(model: Any) -> None:
    if not isinstance(model, nn.Module):
        return
    for path, part in model.named_modules():
        if part.training and isinstance(part, (_BatchNorm, _DropoutNd)):
            raise ValueError(
                f"the model is in train mode, and its {type(part).__name__} ({path or 'the model itself'}) answers "
                "otherwise there: call model.eval() before evaluate"
            )


def _place(model: Any, device: str) -> torch.device:
    parameters = model.parameters() if isinstance(model, nn.Module) else iter(())
    own = next(parameters, torch.empty(0)).device
    if device != "auto":
        place = torch.device(device)
        bare = place.type == "cuda" and place.index is None
        return torch.device("cuda", torch.cuda.current_device()) if bare else place
    if own.type != "cpu" or not torch.cuda.is_available() or not isinstance(model, nn.Module):
        return own
    return torch.device("cuda", torch.cuda.current_device())


def _precision(model: Any, precision: str) -> str:
    if precision in _DTYPES:
        return precision
    if precision != "auto":
        raise ValueError(f"precision must be 'auto', 'float32' or 'float64', got {precision!r}")
    parameters = model.parameters() if isinstance(model, nn.Module) else iter(())
    kinds = {str(p.dtype).removeprefix("torch.") for p in parameters if p.is_floating_point()}
    if not kinds <= set(_DTYPES) or len(kinds) > 1:
        raise ValueError(
            f"the model's parameters are {', '.join(sorted(kinds))}: verdicts are float32 or float64, "
            "give precision='float32'"
        )
    return kinds.pop() if kinds else "float32"


def _moved(model: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Return the model, or a copy on the device whose tensors of the parameters' dtypes have another.

    A buffer of a dtype that no parameter has keeps it: a float32 net may have linear algebra in float64 behind it.
    """
    if not isinstance(model, nn.Module):
        return model
    tensors = [*model.parameters(), *model.buffers()]
    foreign = {t.dtype for t in [*model.parameters()] or tensors if t.is_floating_point()} - {dtype}
    if all(t.device == device and t.dtype not in foreign for t in tensors):
        return model
    moved = copy.deepcopy(model).to(device)
    for tensor in (t for t in [*moved.parameters(), *moved.buffers()] if t.dtype in foreign):
        tensor.data = tensor.data.to(dtype)
    return moved
