"""Above Hydra's launchers: a job of a sweep becomes several shards, and one that is lost leaves the others alone.

Which machine a job runs on is the launcher's affair (basic, joblib, ray, submitit_local, submitit_slurm), and what jobs
there are is the sweeper's. This layer stands between the two. Of a job with `shards=4` it makes four, `shard=0` to
`shard=3`, which fill the store; when all are done the job itself finds its rows there, looks at the whole, and answers
the sweeper.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from robustbench_lite.app import sweeps
from robustbench_lite.app.jobs import plain_config, served
from robustbench_lite.app.launchers import each_awaited, ended, replaced
from robustbench_lite.evaluation.shards import check_shard, check_shards

__all__ = ["FAILED", "ShardLauncher", "above_launchers"]

FAILED = 1  # what a job returns that has not done its work
_MAY_SPLIT = ("shards", "shard", "experiment")  # what a sweep may set so that some of its jobs are split


@contextmanager
def above_launchers(ends: list[Any]) -> Iterator[None]:
    """Put a `ShardLauncher` above whatever launcher a sweep chooses.

    Hydra instantiates plugins of its own namespaces only; so the launcher is wrapped where sweepers ask for it.

    Args:
        ends: gets what jobs return that ran in other processes.
    """
    original = Plugins.instantiate_launcher

    def instantiate(
        plugins: Plugins, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> Launcher:
        _settle(config)
        launcher = ShardLauncher(original(plugins, hydra_context, task_function, config), ends)
        launcher.setup(hydra_context=hydra_context, task_function=task_function, config=config)
        return launcher

    with replaced(Plugins, "instantiate_launcher", instantiate):  # of the class: the instance travels to the jobs
        yield


def _settle(config: DictConfig) -> None:
    """Write the sweep's folder into the configuration: on another machine it must not be looked for anew."""
    folder, key = Path(config.hydra.sweep.dir).absolute().as_posix(), "hydra.sweep.dir="
    quoted = folder.replace("'", "\\'")
    config.hydra.sweep.dir = folder
    others = [text for text in config.hydra.overrides.hydra if not text.startswith(key)]
    config.hydra.overrides.hydra = [*others, f"{key}'{quoted}'"]


class ShardLauncher(Launcher):
    """Launches through another launcher.

    Args:
        inner: set up.
        ends: gets what jobs return that ran in other processes.
    """

    def __init__(self, inner: Launcher, ends: list[Any]) -> None:
        self._inner, self._ends = inner, ends
        self._number = 0  # of the next job: shards are jobs too, so the sweeper's count is not ours

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what composes a job's configuration."""
        self._loader, self._config = hydra_context.config_loader, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run jobs and wait for all of them. One whose shards are not all done has failed, and is not run itself.

        Raises:
            ValueError: a number of shards, or of a shard, that makes no sense.
            Exception: the launcher cannot start a job.
        """
        if "shards" not in self._config or self._config.forecast:  # a command that keeps no rows
            with each_awaited(self._inner):
                done: Sequence[JobReturn] = self._inner.launch(job_overrides, initial_job_idx)
            self._ends += [] if self._ends else [job.return_value for job in done]
            return done
        jobs = [list(overrides) for overrides in job_overrides]
        split = {place: shards for place, job in enumerate(jobs) if (shards := self._shards(job))}
        first = {place: split.get(place, [job]) for place, job in enumerate(jobs)}
        parts = iter(self._run([part for group in first.values() for part in group]))
        found = [[next(parts) for _ in group] for group in first.values()]
        whole = [place for place in split if all(part.return_value == 0 for part in found[place])]
        joined = dict(zip(whole, self._run([jobs[place] for place in whole]), strict=True))
        worst = [next((part for part in group if part.return_value != 0), group[0]) for group in found]
        answers = [joined.get(place, part) for place, part in enumerate(worst)]
        return answers if self._config.objective is None else [_no_answer_of_the_failed(job) for job in answers]

    def _shards(self, job: list[str]) -> list[list[str]]:
        """Return the overrides of a job's shards; none of a job that is not split, or that the store answers."""
        common = set(self._config.hydra.overrides.task)
        own = [text.lstrip("+").partition("=")[0] for text in job if text not in common]
        if self._config.shards == 1 and self._config.shard is None and not any(key in _MAY_SPLIT for key in own):
            return []
        config = self._loader.load_sweep_config(self._config, job)  # a third of a second
        check_shards(config.shards)
        if config.shard is not None:
            check_shard(config.shard, config.shards)
        if config.shards == 1 or config.shard is not None or _is_served(config):
            return []
        return [[*job, f"shard={number}"] for number in range(config.shards)]

    def _run(self, jobs: list[list[str]]) -> list[JobReturn]:
        """Run jobs, each to its end; one that was lost gets an end that says so.

        Raises:
            Exception: the launcher cannot start a job.
        """
        if not jobs:
            return []
        first, self._number = self._number, self._number + len(jobs)
        try:
            with each_awaited(self._inner):
                found = self._inner.launch(jobs, first)
        except Exception as error:
            return self._rest(jobs, first, error)
        known = self._known()
        return [
            job if first + place in known else self._lost(first + place, jobs[place], job)
            for place, job in enumerate(found)
        ]

    def _rest(self, jobs: list[list[str]], first: int, error: Exception) -> list[JobReturn]:
        """Run what is left when a launcher has lost all its workers: what was under way alone, to see which fails.

        Raises:
            Exception: the launcher cannot start a job.
        """
        begun, known = sweeps.begun(self._folder), self._known()
        numbers = range(first, first + len(jobs))
        if not begun.intersection(numbers):
            raise error
        if len(jobs) == 1:
            return [known.get(first) or self._lost(first, jobs[0], ended(error))]
        waiting = [place for place, number in enumerate(numbers) if number not in begun and number not in known]
        found = {place: known[number] for place, number in enumerate(numbers) if number in known}
        found |= dict(zip(waiting, self._run([jobs[place] for place in waiting]), strict=True))
        alone = [place for place in range(len(jobs)) if place not in found]
        return [found[place] if place not in alone else self._run([jobs[place]])[0] for place in range(len(jobs))]

    def _known(self) -> dict[int, JobReturn]:
        """Return the jobs that left word of their end, by number."""
        return {end.num: ended(FAILED if end.error else 0) for end, _ in sweeps.outcomes(self._folder)}

    def _lost(self, number: int, job: list[str], returned: JobReturn) -> JobReturn:
        reason = returned._return_value if returned.status == JobStatus.FAILED else "it left no result"
        message = f"its process is gone: {str(reason).strip().splitlines()[0]}"
        sweeps.record(self._folder, sweeps.Ended(number, job, None, message, str(reason)))
        return ended(FAILED)

    @property
    def _folder(self) -> Path:
        return Path(self._config.hydra.sweep.dir)


def _no_answer_of_the_failed(job: JobReturn) -> JobReturn:
    """Return a job as a sweeper that searches must see it: an exit status is not a figure of merit."""
    return job if isinstance(job.return_value, float) else ended(None)


def _is_served(config: DictConfig) -> bool:
    """Say whether the store already holds the answer of a job."""
    before = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(config)
    try:
        with open_dict(config):
            own = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
        return served(plain_config(own)) is not None
    finally:
        HydraConfig.instance().cfg = before
