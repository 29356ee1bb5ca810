"""Hydra's launchers, and what has to be mended of them: jobs that are lost, a Ray cluster that is there already."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher

__all__ = ["each_awaited", "ended", "replaced"]


@contextmanager
def each_awaited(launcher: Launcher) -> Iterator[None]:
    """Have a launcher wait for all of its jobs, also when one of them is lost.

    Those of Ray and submitit ask one job after the other for its result and raise at the first that has none, although
    the others go on, on machines that nobody then waits for. Here the one that is lost returns a failure. (joblib loses
    all its workers with one: there it is right to raise.)
    """
    if _is(launcher, "ray"):
        import ray
        from hydra_plugins.hydra_ray_launcher import _core

        _leave_memory_alone(launcher)
        with replaced(_core, "ray", SimpleNamespace(get=_forgiving(ray.get, ended))):
            yield
    elif _is(launcher, "submitit"):
        import submitit

        with replaced(submitit.Job, "results", _forgiving(submitit.Job.results, lambda error: [ended(error)])):
            yield
    else:
        yield


def _is(launcher: Launcher, plugin: str) -> bool:
    return f".hydra_{plugin}_launcher." in type(launcher).__module__


def _leave_memory_alone(launcher: Any) -> None:
    """Ask no memory of a Ray cluster that runs already: the launcher does, which Ray refuses."""
    init = launcher.ray_cfg.init
    if init.get("address") or os.environ.get("RAY_ADDRESS"):
        init.setdefault("object_store_memory", None)


def ended(value: Any) -> JobReturn:
    """Return what Hydra expects of a job that returned this value, or failed with this exception."""
    job = JobReturn(status=JobStatus.FAILED if isinstance(value, Exception) else JobStatus.COMPLETED)
    job.return_value = value
    return job


def _forgiving(original: Callable[[Any], Any], lost: Callable[[Exception], Any]) -> Callable[[Any], Any]:
    def result(job: Any) -> Any:
        try:
            return original(job)
        except Exception as error:
            return lost(error)

    return result


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Give a module or class another attribute for a while."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
