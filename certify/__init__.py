"""Certifiers: each proves that a threat holds no adversarial example. Every public name of the files is exported."""

if __name__ != "robustbench_lite.certify":
    raise ImportError("this folder is the package robustbench_lite.certify: write 'import robustbench_lite.certify'")

from typing import TYPE_CHECKING

from robustbench_lite.core.exports import export_all

if TYPE_CHECKING:  # for type checkers and editors; a file that is not named here is exported all the same
    from robustbench_lite.certify.base import Certifier as Certifier
    from robustbench_lite.certify.bounds import bounds as bounds
    from robustbench_lite.certify.errors import UnsupportedOperator as UnsupportedOperator
    from robustbench_lite.certify.graph import graph_of as graph_of
    from robustbench_lite.certify.ibp import IBP as IBP

globals().update(export_all(__name__, __path__))
