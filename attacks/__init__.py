"""Attacks: each searches a threat for adversarial examples. Every public class of the files here is exported."""

if __name__ != "robustbench_lite.attacks":
    raise ImportError("this folder is the package robustbench_lite.attacks: write 'import robustbench_lite.attacks'")

from typing import TYPE_CHECKING

from robustbench_lite.core.exports import export_all

if TYPE_CHECKING:  # for type checkers and editors; a file that is not named here is exported all the same
    from robustbench_lite.attacks.adef import ADef as ADef
    from robustbench_lite.attacks.apgd import APGD as APGD
    from robustbench_lite.attacks.auto_attack import AutoAttack as AutoAttack
    from robustbench_lite.attacks.bandits import Bandits as Bandits
    from robustbench_lite.attacks.base import Attack as Attack
    from robustbench_lite.attacks.basis import DCT as DCT
    from robustbench_lite.attacks.basis import Basis as Basis
    from robustbench_lite.attacks.basis import Pixels as Pixels
    from robustbench_lite.attacks.basis import Tiles as Tiles
    from robustbench_lite.attacks.bim import BIM as BIM
    from robustbench_lite.attacks.boundary import Boundary as Boundary
    from robustbench_lite.attacks.boundary import LowFrequencyBoundary as LowFrequencyBoundary
    from robustbench_lite.attacks.bpda import BPDA as BPDA
    from robustbench_lite.attacks.deep_knn_attack import DeepKNNAttack as DeepKNNAttack
    from robustbench_lite.attacks.difgsm import DIFGSM as DIFGSM
    from robustbench_lite.attacks.difgsm import InputDiversity as InputDiversity
    from robustbench_lite.attacks.ensemble import Ensemble as Ensemble
    from robustbench_lite.attacks.envelope_attack import EnvelopeAttack as EnvelopeAttack
    from robustbench_lite.attacks.eot import EOT as EOT
    from robustbench_lite.attacks.eot import ExpectedGradient as ExpectedGradient
    from robustbench_lite.attacks.estimators import FiniteDifferenceEstimator as FiniteDifferenceEstimator
    from robustbench_lite.attacks.estimators import NESEstimator as NESEstimator
    from robustbench_lite.attacks.estimators import ScoreEstimator as ScoreEstimator
    from robustbench_lite.attacks.estimators import SPSAEstimator as SPSAEstimator
    from robustbench_lite.attacks.evolution_strategy import EvolutionStrategy as EvolutionStrategy
    from robustbench_lite.attacks.fabt import FABT as FABT
    from robustbench_lite.attacks.far_fmn import FarFMN as FarFMN
    from robustbench_lite.attacks.fast import Fast as Fast
    from robustbench_lite.attacks.fgsm import FGSM as FGSM
    from robustbench_lite.attacks.finite_differences import FiniteDifferences as FiniteDifferences
    from robustbench_lite.attacks.flow_pgd import FlowPGD as FlowPGD
    from robustbench_lite.attacks.fmn import FMN as FMN
    from robustbench_lite.attacks.foolbox_attack import FoolboxAttack as FoolboxAttack
    from robustbench_lite.attacks.frozen import Frozen as Frozen
    from robustbench_lite.attacks.gallery import Gallery as Gallery
    from robustbench_lite.attacks.hclu import HighConfidenceLowUncertainty as HighConfidenceLowUncertainty
    from robustbench_lite.attacks.hop_skip_jump import HopSkipJump as HopSkipJump
    from robustbench_lite.attacks.iterative import Ascent as Ascent
    from robustbench_lite.attacks.iterative import Autograd as Autograd
    from robustbench_lite.attacks.iterative import Estimator as Estimator
    from robustbench_lite.attacks.iterative import IterativeAttack as IterativeAttack
    from robustbench_lite.attacks.lagrangian import LagrangianAttack as LagrangianAttack
    from robustbench_lite.attacks.latent_descent import LatentDescent as LatentDescent
    from robustbench_lite.attacks.local_variance import LocalVariance as LocalVariance
    from robustbench_lite.attacks.low_frequency import LowFrequencyNES as LowFrequencyNES
    from robustbench_lite.attacks.low_frequency import LowFrequencyPGD as LowFrequencyPGD
    from robustbench_lite.attacks.mifgsm import MIFGSM as MIFGSM
    from robustbench_lite.attacks.nearest_neighbour_attack import NearestNeighbourAttack as NearestNeighbourAttack
    from robustbench_lite.attacks.nes import NES as NES
    from robustbench_lite.attacks.nes_label_only import NESLabelOnly as NESLabelOnly
    from robustbench_lite.attacks.nes_partial_information import NESPartialInformation as NESPartialInformation
    from robustbench_lite.attacks.pgd import PGD as PGD
    from robustbench_lite.attacks.quick_auto_attack import QuickAutoAttack as QuickAutoAttack
    from robustbench_lite.attacks.random_noise import RandomNoise as RandomNoise
    from robustbench_lite.attacks.rejection_aware import RejectionAware as RejectionAware
    from robustbench_lite.attacks.rotation_translation_grid import RotationTranslationGrid as RotationTranslationGrid
    from robustbench_lite.attacks.rotation_translation_pgd import RotationTranslationPGD as RotationTranslationPGD
    from robustbench_lite.attacks.rounding import survives_rounding as survives_rounding
    from robustbench_lite.attacks.second_order import NoiseAveraged as NoiseAveraged
    from robustbench_lite.attacks.second_order import PowerIteration as PowerIteration
    from robustbench_lite.attacks.second_order import SecondOrder as SecondOrder
    from robustbench_lite.attacks.security_curve import SecurityCurve as SecurityCurve
    from robustbench_lite.attacks.security_curve import security_curve as security_curve
    from robustbench_lite.attacks.simba import SimBA as SimBA
    from robustbench_lite.attacks.smooth_adv import SmoothAdv as SmoothAdv
    from robustbench_lite.attacks.smooth_adv import SmoothedGradient as SmoothedGradient
    from robustbench_lite.attacks.spsa import SPSA as SPSA
    from robustbench_lite.attacks.square import Square as Square
    from robustbench_lite.attacks.stadv import STAdv as STAdv
    from robustbench_lite.attacks.strategies import CMAES as CMAES
    from robustbench_lite.attacks.strategies import OpenAIES as OpenAIES
    from robustbench_lite.attacks.strategies import RankNES as RankNES
    from robustbench_lite.attacks.strategies import Strategy as Strategy
    from robustbench_lite.attacks.tifgsm import TIFGSM as TIFGSM
    from robustbench_lite.attacks.tifgsm import TranslationInvariant as TranslationInvariant
    from robustbench_lite.attacks.transfer import Transfer as Transfer
    from robustbench_lite.attacks.transfer import transfer_matrix as transfer_matrix
    from robustbench_lite.attacks.universal import AdamUpdate as AdamUpdate
    from robustbench_lite.attacks.universal import FixedPerturbation as FixedPerturbation
    from robustbench_lite.attacks.universal import Perturbation as Perturbation
    from robustbench_lite.attacks.universal import SteepestUpdate as SteepestUpdate
    from robustbench_lite.attacks.universal import UniversalPerturbation as UniversalPerturbation
    from robustbench_lite.attacks.universal import Update as Update

globals().update(export_all(__name__, __path__))
