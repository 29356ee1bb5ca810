"""Each experiment runs, on a few digits, and gives the tables that its head promises; a search finds what it should."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import pytest

from robustbench_lite import Lp, evaluate, load_data
from robustbench_lite.app.objective import value_of
from robustbench_lite.attacks import PGD
from robustbench_lite.core import registry
from robustbench_lite.models import load_weights

QUICK = ("suite.attacks.pgd.steps=2", "suite.attacks.random_noise.draws=2", "suite.certifiers.cascade=null")
NET = ("defense=digits/pgd_at",)
SMALL_PGD = ("data=digits", "suite.attacks.pgd.steps=2", "suite.attacks.pgd.restarts=1")
CASES = {  # command, overrides that make it small, number of tables, of rows in each, of attacks in each row
    "eps_sweep": ("evaluate", (*NET, *QUICK), 6, 1, 3),
    "norm_sweep": ("evaluate", (*NET, *QUICK), 3, 1, 3),
    "seeds": ("evaluate", (*NET, *QUICK), 1, 5, 3),
    "attack_ablation": ("evaluate", NET, 1, 1, 10),
    "defense_comparison": ("evaluate", ("max_queries=12",), 3, 5, 1),
    "rejection": ("evaluate", ("defense=digits/deep_rbf", "adaptive=false", *QUICK), 1, 3, 3),
    "mnist_pgd": ("leaderboard", (*SMALL_PGD, "defense=digits/ibp"), 1, 1, 1),
    "mnist_certify": ("leaderboard", ("data=digits", "defense=digits/ibp,digits/standard"), 1, 2, 0),
    "attack_search": ("evaluate", (*NET, "hydra.sweeper.n_trials=3", "suite.attacks.pgd.steps=2"), 1, 3, 1),
}

needs_optuna = pytest.mark.skipif(find_spec("optuna") is None, reason="needs the extra optuna")


def test_every_experiment_has_a_case() -> None:
    assert set(CASES) == set(registry.groups("experiment"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:::sqlalchemy", "ignore:::optuna")
@pytest.mark.parametrize("name", [pytest.param(n, marks=needs_optuna) if n == "attack_search" else n for n in CASES])
def test_an_experiment_gives_its_tables(rbl, folder: Path, name: str) -> None:
    command, overrides, tables, rows, attacks = CASES[name]
    multirun = () if name == "attack_ablation" else ("--multirun",)
    status, _, err = rbl(command, *multirun, f"experiment={name}", "limit=5", *overrides)
    assert status == 0, err
    if not multirun:
        from robustbench_lite.evaluation.store import Store

        assert Store("results").records(["kind", "method"]).query("kind == 'attack'")["method"].nunique() == attacks
        return
    found = [pd.read_csv(path) for path in sorted((folder / "results" / "tables").glob("*.csv"))]
    assert [len(table) for table in found] == [rows] * tables
    for table in found:
        assert table["clean"].notna().all()
        tried = [c for c in table if re.match("(PGD|FGSM|RandomNoise|APGD|FAB|Square|AutoAttack|MIFGSM)", str(c))]
        assert len(tried) >= attacks
        assert (
            (table["worst_case"].dropna() <= table["clean"].max()).all()
            if attacks
            else table["certified"].notna().all()
        )


SEARCH = (
    "evaluate", "--multirun", "experiment=attack_search",
    "model._target_=users_net.Net", "model.weights=net.safetensors",
    "limit=20", "threat.eps=0.2", "suite.attacks.pgd.random_start=false",
)  # fmt: skip
SPACE = ("suite.attacks.pgd.loss=ce", "suite.attacks.pgd.step_size=choice(0.0005,0.05,0.2)")


@needs_optuna
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:::sqlalchemy", "ignore:::optuna")
def test_a_search_is_told_the_robust_accuracy_and_finds_its_least(rbl, folder: Path) -> None:
    few = ("hydra.sweeper.n_trials=5", "suite.attacks.pgd.steps=3", *SPACE)
    status, out, err = rbl(*SEARCH, *few)
    assert status == 0, err
    from users_net import Net

    net, data = Net().eval(), load_data("digits").head(20)
    load_weights(net, "net.safetensors")
    said = {float(size): float(v) for v, size in re.findall(r"^ +([\d.]+) %.*step_size=([\d.]+)", out, re.M)}
    assert len(said) > 1
    for size, value in said.items():
        attack = PGD(steps=3, restarts=1, loss="ce", step_size=size, random_start=False)
        expected = value_of(evaluate(net, data, Lp("linf", 0.2), [attack], name="x"), "worst_case")
        assert value == pytest.approx(100 * expected, abs=0.06)
    assert len(set(said.values())) > 1
    best = re.search(r"best: worst_case ([\d.]+) % with .*step_size=([\d.]+)", out)
    assert best
    assert float(best[1]) == said[float(best[2])] == min(said.values())
    assert rbl(*SEARCH, *few)[1] == out  # the same trials, from the store


@needs_optuna
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:::sqlalchemy", "ignore:::optuna")
def test_a_trial_that_fails_is_not_taken_for_a_figure(rbl) -> None:
    status, out, err = rbl(
        *SEARCH, "hydra.sweeper.n_trials=6", "suite.attacks.pgd.loss=ce", "suite.attacks.pgd.step_size=0.05",
        "suite.attacks.pgd.steps=choice(0,3)", "hydra.sweeper.direction=maximize",
    )  # fmt: skip
    assert status == 1
    assert "steps must be a whole number" in err
    assert re.search(r"best: worst_case .*steps=3", out)
    assert "steps=0" not in out


def test_objectives_are_checked(rbl) -> None:
    status, _, err = rbl("evaluate", "--multirun", "defense=digits/standard", "objective=robustness")
    assert status == 2
    assert "objective must be one of worst_case, clean, certified, gap" in err


@pytest.mark.skipif(find_spec("optuna") is not None, reason="the extra optuna is installed")
def test_without_optuna_the_extra_is_named(rbl) -> None:
    status, _, err = rbl("evaluate", "--multirun", "experiment=attack_search", *NET)
    assert status == 2
    assert "pip install 'robustbench_lite[optuna]'" in err
