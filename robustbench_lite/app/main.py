"""The console script `rbl`: chooses the command, and imports nothing that a command does not need."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from robustbench_lite.app.errors import report_errors
from robustbench_lite.core.errors import suggest

__all__ = ["COMMANDS", "HELP", "main"]

COMMANDS = ("evaluate", "leaderboard", "train", "list", "table", "diff", "verify", "submit", "store", "selftest")

HELP = """\
rbl: attack and proof in one honest, per-sample, audited table

  rbl leaderboard [data=mnist ...]       rank the zoo's defenses of a data set
  rbl evaluate defense=digits/standard   one row: clean, attacked, certified accuracy
  rbl evaluate model._target_=my_package.nets.Net model.weights=net.safetensors
  rbl train defense=ibp_training         train a net by an objective
  rbl list [attacks]                     what there is: attacks, certifiers, defenses, threats, data, models, suites
  rbl table [STORE]                      the tables of all that a store holds; also as files
  rbl diff STORE_A STORE_B               what changed between two stores, and whether it is significant
  rbl verify [STORE]                     re-check every stored record and adversarial example, and every table
  rbl submit FILE.npz --defense NAME     judge adversarial examples from outside; keep those that beat the store
  rbl store compact [STORE]              merge the small files of a store
  rbl selftest                           planted masks: each must be flagged, and fall

Settings are Hydra overrides: threat.eps=8/255, suite.attacks.pgd.steps=100, +attack@suite.attacks.mine=bim.
'rbl COMMAND --help' shows a command's settings, '--cfg job' the composed ones, '--multirun' sweeps over
a=1,2,3, and '--debug' shows the traceback of an error. Your own configs: hydra.searchpath=[file:///path/to/conf].
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `rbl` and return its exit status.

    0: done. 1: done, but a row is invalid or not finished, a job failed, or a stored example does not hold. 2: the
    command cannot run.

    Args:
        argv: the arguments after `rbl`; default those of the process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    if arguments[0] == "--version":
        from robustbench_lite import __version__

        print(f"rbl {__version__}")
        return 0
    # OpenMP threads that spin for each other stand still where another process has one of the cores: 250 s for a row
    # that takes 21 s when they sleep. It is read when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with report_errors(debug) as outcome:
        outcome.status = _run(arguments[0], arguments[1:])
    return outcome.status


def _run(command: str, arguments: list[str]) -> int:
    if command not in COMMANDS:
        raise ValueError(suggest(command, COMMANDS, "command"))
    module = importlib.import_module(f"robustbench_lite.app.{'listing' if command == 'list' else command}")
    return int(module.main(arguments))
