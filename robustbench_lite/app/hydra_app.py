"""Running a Hydra application inside `rbl`: its arguments, the zoo among its configs, and its exit status."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from robustbench_lite import zoo
from robustbench_lite.app.arguments import WITH_VALUE
from robustbench_lite.app.errors import explain
from robustbench_lite.app.launching import above_launchers
from robustbench_lite.app.sweeps import folder_for

__all__ = ["CONFIG_PATH", "register", "run"]

CONFIG_PATH = "pkg://robustbench_lite.conf"
_RANKED = ("evaluate", "leaderboard")  # their sweeps end in a table, made from what the jobs leave in a folder
_FORECAST = {"forecast=true", "forecast=True"}  # then nothing is written
_DATA = "RBL_DATA"
ZOO_OF = {"mnist5k": "mnist"}  # data sets that are slices of another one, whose defenses they judge


def run(job: Callable[[DictConfig], float], command: str, arguments: Sequence[str]) -> int:
    """Run a job, or a sweep of jobs, as a Hydra application over `conf/<command>.yaml`; return its exit status.

    What goes wrong is raised here, where Hydra would print it. In a sweep a job takes care of its own errors.
    """
    ends: list[float | Exception] = []
    home, folder, data = os.getpid(), os.getcwd(), os.environ.get(_DATA)

    def guarded(config: DictConfig) -> float | Exception:
        if os.getpid() != home:
            _come_to(folder, data)
        try:
            ended: float | Exception = job(config)
        except Exception as error:  # one of another process must survive being pickled
            ended = error if os.getpid() == home else RuntimeError(explain(error) or f"{type(error).__name__}: {error}")
        ends.append(ended)
        return ended

    register()
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    aside = Path(tempfile.gettempdir()) / f"rbl-{command}-{name}"
    ranked = command in _RANKED and not _FORECAST & {*arguments}
    sweep = f"'${{sweep_folder:${{store}},{name}}}'" if ranked else aside.as_posix()
    with _process_state(["rbl " + command, *_arranged(arguments, sweep)]), above_launchers(ends):
        try:
            hydra.main(version_base="1.3", config_path=CONFIG_PATH, config_name=command)(guarded)()
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else int(end.code is not None)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    for ended in ends:
        if isinstance(ended, Exception):
            raise ended
    return max((ended for ended in ends if isinstance(ended, int)), default=0)


def _arranged(arguments: Sequence[str], sweep: str) -> list[str]:
    """Return flags first and overrides together, as Hydra's parser needs them, with the folder of a sweep.

    That is one of its own in the store, unless the user names one.
    """
    flags: list[str] = []
    overrides: list[str] = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        (flags if argument.startswith("-") or before in WITH_VALUE else overrides).append(argument)
    if not any(override.startswith("hydra.sweep.dir=") for override in overrides):
        overrides.append(f"hydra.sweep.dir={sweep}")
    return [*flags, *overrides]


def register() -> None:
    """Make the zoo's entries known to Hydra: `defense=<data>/<name>`, `${zoo_entries:<data>,<which>}` in configs."""
    store = ConfigStore.instance()
    for name in zoo.names():
        data, _, entry = name.partition("/")
        node = {
            "defaults": ["_self_", {"override /data@_global_.data": data}],
            "_target_": "robustbench_lite.zoo.load_defense",
            "name": name,
        }
        store.store(group=f"defense/{data}", name=entry, node=node, provider="zoo")
    OmegaConf.register_new_resolver("zoo_entries", _zoo_entries, replace=True)
    OmegaConf.register_new_resolver("sweep_folder", _sweep_folder, replace=True)


@cache  # one folder a sweep; a function of this module by its own name, since resolvers travel to the jobs
def _sweep_folder(store: str | None, name: str) -> str:
    return folder_for(store, name)


def _zoo_entries(data: str, which: str) -> str:
    """Return the zoo's defenses of a data set as a sweep: "digits/ibp,digits/standard"."""
    if which not in ("nets", "all"):
        raise ValueError(
            f"entries must be nets or all, got {which}; for some of them: defense=digits/ibp,digits/trades"
        )
    found = zoo.names(ZOO_OF.get(data, data))
    found = [name for name in found if which == "all" or zoo.card(name)["wrapper"] is None]
    if not found:
        there = ", ".join(sorted({name.partition("/")[0] for name in zoo.names()})) or "none yet"
        raise ValueError(
            f"the zoo has no defenses for data {data!r}; it has some for: {there}. "
            "For a net of your own: rbl evaluate model._target_=..."
        )
    return ",".join(found)


def _come_to(folder: str, data: str | None) -> None:
    """Make the process of a launcher, perhaps on another machine, read and write where the command does."""
    os.chdir(folder)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    if data is not None:
        os.environ.setdefault(_DATA, data)


@contextmanager
def _process_state(argv: list[str]) -> Iterator[None]:
    """Give Hydra the arguments and make it raise what goes wrong; both are put back afterwards."""
    before, full = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv, os.environ["HYDRA_FULL_ERROR"] = argv, "1"
    working_directory = os.getcwd()
    added = working_directory not in sys.path
    if added:
        sys.path.insert(0, working_directory)  # a net of the user's is found beside the command
    try:
        yield
    finally:
        sys.argv = before
        if added:
            sys.path.remove(working_directory)
        if full is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = full
