"""`shards=N`: several jobs in place of one, above any launcher, and nothing lost but what failed."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, OmegaConf

from robustbench_lite import load_data
from robustbench_lite.app import devices, launching, sweeps
from robustbench_lite.app.launchers import each_awaited, ended
from robustbench_lite.evaluation.samples import Samples, as_samples
from robustbench_lite.evaluation.shards import share
from robustbench_lite.evaluation.store import Store

NET = ("model._target_=users_net.Net", "model.weights=net.safetensors", "limit=20", "batch_size=4")
ONE = ("suite.attacks.random_noise=null", "suite.attacks.pgd=null", "suite.certifiers.cascade=null")
RUN = ("evaluate", "--multirun", *NET, *ONE)


def rows(store: str) -> pd.DataFrame:
    names = ["fingerprint", "kind", "method", "threat", "eps", "index"]
    return Store(store).records().drop(columns="seconds").sort_values(names, ignore_index=True)


def written(store: str) -> int:
    """The rows on the disk, each as often as it was written."""
    return sum(len(pd.read_parquet(path, columns=["index"])) for path in Path(store).glob("cells/*/*.parquet"))


def tables(store: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted(Path(store, "tables").iterdir())]


def test_shards_equal_one_job(rbl, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers: list[int] = []
    monkeypatch.setattr("robustbench_lite.app.jobs.use_own_gpu", lambda device, number: numbers.append(number))
    whole, split = rbl(*RUN, "store=whole"), rbl(*RUN, "shards=3", "store=split")
    assert numbers == [0, 0, 1, 2, 3]
    check_equal(whole, split)
    assert split[2].count(" of 3: ") == 3
    again = rbl(*RUN, "shards=3", "store=split")
    assert again[:2] == split[:2]
    assert " of 3: " not in again[2]  # the store answers: no shards are launched
    assert not Path("split/sweeps").exists()


def test_more_shards_than_batches_in_a_cascade(rbl, folder: Path) -> None:
    few = ("limit=5", "mode=cascade", "audit=0.5")
    check_equal(rbl(*RUN, *few, "store=whole"), rbl(*RUN, *few, "shards=6", "store=split"))


def check_equal(whole: tuple[int, str, str], split: tuple[int, str, str]) -> None:
    """The same table, the same rows, each computed once."""
    assert whole[0] == split[0] == 0, split[2]
    assert split[1] == whole[1].replace("whole/", "split/")
    pd.testing.assert_frame_equal(rows("split"), rows("whole"), check_exact=True)
    assert written("split") == len(rows("split"))
    assert tables("split") == tables("whole")


def test_shards_by_hand(rbl, folder: Path) -> None:
    status, out, err = rbl("evaluate", *NET, *ONE, "shards=2", "shard=0")
    assert status == 0, err
    assert f"shard 0 of 2: {written('results')} rows kept in results" in out
    status, out, err = rbl(*RUN, "shards=2", "shard=0,1")
    assert status == 0, err
    assert "2 shards are in the store" in err
    before = sorted(Path("results").glob("cells/*/*"))
    assert "20 samples" in rbl("evaluate", *NET, *ONE)[1]
    assert sorted(Path("results").glob("cells/*/*")) == before


FRAGILE = """
import os
from pathlib import Path

import torch
import users_net

VICTIM = torch.load("victim.pt")


class Fragile(users_net.Net):
    def forward(self, x):
        if not Path("mended").exists() and bool((x == VICTIM).flatten(1).all(dim=1).any()):
            {end}
        return super().forward(x)
"""


VICTIM = 895


def samples() -> Samples:
    return as_samples(load_data("digits").head(20), (0, 1)).in_batches(4)


def shard_of_victim() -> int:
    return next(k for k in (0, 1) if VICTIM in samples().indices[share(samples().batch, k, 2)])


def fragile(folder: Path, end: str) -> tuple[str, ...]:
    """A net that ends so at one image, until a file `mended` is there."""
    image = samples().x[samples().indices.tolist().index(VICTIM)]
    torch.save(image, folder / "victim.pt")
    (folder / "users_fragile.py").write_text(FRAGILE.format(end=end))
    return ("model._target_=users_fragile.Fragile,users_net.Net", "shards=2")


@pytest.mark.parametrize(
    "end", ["raise RuntimeError('a bad image')", pytest.param("raise SystemExit(3)", marks=pytest.mark.slow)]
)
def test_a_failing_shard_leaves_the_others(rbl, folder: Path, end: str) -> None:
    sweep = fragile(folder, end)
    status, out, err = rbl(*RUN, *sweep)
    assert status == 1
    assert "Fragile" not in out
    assert "Net" in out
    told = err[err.index("Traceback") :]
    assert "users_fragile.py" in told
    assert told.count("failed: ") == 1
    assert f"shard={shard_of_victim()}" in told
    assert "run the command again" in told
    kept = rows("results")
    kept = kept[kept["defense"] == "Fragile"]
    missing = set(load_data("digits").head(20).indices.tolist()) - set(kept["index"])
    assert VICTIM in missing
    assert missing <= set(samples().indices[share(samples().batch, shard_of_victim(), 2)].tolist())
    (folder / "mended").touch()
    status, out, err = rbl(*RUN, *sweep)
    assert status == 0, err
    assert "Fragile" in out
    assert written("results") == len(rows("results")) == 2 * 2 * 20


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["shards=0"], "shards must be a whole number of at least 1, got 0"),
        (["shards=two"], "shards must be a whole number of at least 1, got 'two'"),
        (["shards=1.5"], "got 1.5"),
        (["shards=2,0"], "got 0"),
        (["shards=4", "shard=4"], "from 0 to 3, got 4"),
        (["shard=-1"], "from 0 to 0, got -1"),
    ],
)
def test_bad_values(rbl, folder: Path, given: list[str], words: str) -> None:
    status, _, err = rbl(*RUN, *given)
    assert status == 2
    assert words in err
    assert not Path("results/cells").exists()


def test_shards_without_a_sweep(rbl, folder: Path) -> None:
    status, _, err = rbl("evaluate", *NET, *ONE, "shards=4")
    assert status == 2
    assert "add --multirun" in err


class Fake(Launcher):
    """Runs jobs one after the other, two of them at once begun. A job named "kill" ends without a word: with all
    workers, as in joblib, or alone, as in Ray."""

    def __init__(self, folder: Path, breaks: bool) -> None:
        self.folder, self.breaks, self.done, self.numbers = folder, breaks, list[str](), list[int]()

    def setup(self, **kwargs: Any) -> None: ...

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        found = []
        for place, job in enumerate(job_overrides):
            number, name = initial_job_idx + place, job[0]
            self.numbers.append(number)
            sweeps.begin(self.folder, number)
            if name == "kill" and self.breaks:
                if place + 1 < len(job_overrides):
                    sweeps.begin(self.folder, number + 1)  # the neighbour goes down with it
                raise RuntimeError("a worker was killed\nby SIGKILL")
            if name == "kill":
                found.append(ended(RuntimeError("a worker was killed")))
                continue
            self.done.append(name)
            sweeps.record(self.folder, sweeps.Ended(number, list(job)))
            found.append(ended(0))
        return found


def above(inner: Launcher, folder: Path) -> launching.ShardLauncher:
    config = OmegaConf.create(
        {"shards": 1, "shard": None, "forecast": False, "objective": None, "hydra": {"overrides": {"task": []}}}
    )
    config.hydra.sweep = {"dir": str(folder)}
    launcher = launching.ShardLauncher(inner, [])
    context: Any = SimpleNamespace(config_loader=None)
    launcher.setup(hydra_context=context, task_function=lambda config: None, config=config)
    return launcher


@pytest.mark.parametrize("breaks", [True, False])
@pytest.mark.parametrize("jobs", [["a", "kill", "b", "c", "kill", "d"], ["kill", "a"], ["kill"], ["a", "b"]])
def test_a_lost_job_is_named_and_all_others_run_once(tmp_path: Path, breaks: bool, jobs: list[str]) -> None:
    inner = Fake(tmp_path, breaks)
    found = above(inner, tmp_path).launch([[job] for job in jobs], 0)
    assert [job.return_value for job in found] == [int(job == "kill") for job in jobs]
    assert sorted(inner.done) == sorted(set(jobs) - {"kill"})
    assert len(set(inner.numbers)) == len(inner.numbers)
    ends = [end for end, _ in sweeps.outcomes(tmp_path)]
    failed = [end for end in ends if end.error]
    assert [end.overrides for end in failed] == [["kill"]] * jobs.count("kill")
    assert all("its process is gone: a worker was killed" in end.error for end in failed)
    assert sorted(name for end in ends if not end.error for name in end.overrides) == sorted(inner.done)


def test_a_launcher_that_cannot_start_is_an_error(tmp_path: Path) -> None:
    class Down(Fake):
        def launch(self, job_overrides: Any, initial_job_idx: int) -> Any:
            raise ConnectionError("no cluster at this address")

    with pytest.raises(ConnectionError, match="no cluster"):
        above(Down(tmp_path, True), tmp_path).launch([["a"], ["b"]], 0)
    assert sweeps.outcomes(tmp_path) == []


def test_each_job_of_submitit_is_awaited(monkeypatch: pytest.MonkeyPatch) -> None:
    submitit = pytest.importorskip("submitit")
    plugin = pytest.importorskip("hydra_plugins.hydra_submitit_launcher.submitit_launcher")

    def results(job: Any) -> list[Any]:
        raise RuntimeError(f"no output of {job}")

    monkeypatch.setattr(submitit.Job, "results", results)
    with each_awaited(plugin.LocalLauncher(submitit_folder="x")):
        (job,) = submitit.Job.results("4_0")
    assert job.status == JobStatus.FAILED
    assert submitit.Job.results is results


LAUNCHERS = {
    "joblib": ("joblib", ["hydra.launcher.n_jobs=2"]),
    "submitit": ("submitit_local", []),
    "ray": ("ray", ["+hydra.launcher.ray.init.num_cpus=2", "+hydra.launcher.ray.remote.max_retries=0"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("plugin", list(LAUNCHERS))
def test_a_killed_worker(rbl, folder: Path, plugin: str) -> None:
    pytest.importorskip(f"hydra_plugins.hydra_{plugin}_launcher")
    launcher, settings = LAUNCHERS[plugin]
    sweep = fragile(folder, f"os.kill(os.getpid(), {int(signal.SIGKILL)})")
    code = "import sys; from robustbench_lite.app.main import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *RUN, *sweep, f"hydra/launcher={launcher}", *settings]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "Net" in done.stdout
    assert done.stderr.count("failed: ") == 1
    assert f"shard={shard_of_victim()}: its process is gone" in done.stderr
    (folder / "mended").touch()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert rbl(*RUN, *sweep, "shards=1", "store=whole")[0] == 0
    pd.testing.assert_frame_equal(rows("results"), rows("whole"), check_exact=True)
    assert written("results") == len(rows("results"))


@pytest.mark.parametrize(
    ("device", "count", "chosen"),
    [
        ("auto", 3, [0, 1, 2, 0]),
        ("cuda", 3, [0, 1, 2, 0]),
        ("cuda:1", 3, []),
        ("cpu", 3, []),
        ("auto", 1, []),
        ("auto", 0, []),
    ],
)
def test_several_gpus_take_a_job_each(monkeypatch, device: str, count: int, chosen: list[int]) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    for number in range(4):
        devices.use_own_gpu(device, number)
    assert taken == chosen


def test_the_folder_of_a_sweep_is_settled(folder: Path) -> None:
    config: DictConfig = OmegaConf.create({"hydra": {"sweep": {"dir": "it's"}, "overrides": {"hydra": ["a=b"]}}})
    launching._settle(config)
    assert config.hydra.sweep.dir == (folder / "it's").as_posix()
    assert list(config.hydra.overrides.hydra) == ["a=b", f"hydra.sweep.dir='{folder.as_posix()}/it\\'s'"]
