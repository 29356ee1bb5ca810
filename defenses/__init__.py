"""Defenses: objectives that train a net, wrappers that are deployed around one. Every public name here is exported."""

if __name__ != "robustbench_lite.defenses":
    raise ImportError("this folder is the package robustbench_lite.defenses: write 'import robustbench_lite.defenses'")

from typing import TYPE_CHECKING

from robustbench_lite.core.exports import export_all

if TYPE_CHECKING:  # for type checkers and editors; a file that is not named here is exported all the same
    from robustbench_lite.defenses.adversarial_training import AdversarialTraining as AdversarialTraining
    from robustbench_lite.defenses.base import Objective as Objective
    from robustbench_lite.defenses.base import Wrapper as Wrapper
    from robustbench_lite.defenses.ibp_training import IBPTraining as IBPTraining
    from robustbench_lite.defenses.standard import StandardTraining as StandardTraining

globals().update(export_all(__name__, __path__))
