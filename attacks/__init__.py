"""Attacks: each searches a threat for adversarial examples. Every public class of the files here is exported."""

if __name__ != "robustbench_lite.attacks":
    raise ImportError("this folder is the package robustbench_lite.attacks: write 'import robustbench_lite.attacks'")

from typing import TYPE_CHECKING

from robustbench_lite.core.exports import export_all

if TYPE_CHECKING:  # for type checkers and editors; a file that is not named here is exported all the same
    from robustbench_lite.attacks.base import Attack as Attack
    from robustbench_lite.attacks.bim import BIM as BIM
    from robustbench_lite.attacks.fgsm import FGSM as FGSM
    from robustbench_lite.attacks.pgd import PGD as PGD
    from robustbench_lite.attacks.random_noise import RandomNoise as RandomNoise

globals().update(export_all(__name__, __path__))
