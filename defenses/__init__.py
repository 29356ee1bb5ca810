"""Defenses: objectives that train a net, wrappers that are deployed around one. Every public name here is exported."""

if __name__ != "robustbench_lite.defenses":
    raise ImportError("this folder is the package robustbench_lite.defenses: write 'import robustbench_lite.defenses'")

from typing import TYPE_CHECKING

from robustbench_lite.core.exports import export_all

if TYPE_CHECKING:  # for type checkers and editors; a file that is not named here is exported all the same
    from robustbench_lite.defenses.abs import ABS as ABS
    from robustbench_lite.defenses.abs import BinaryABS as BinaryABS
    from robustbench_lite.defenses.abs import Explanation as Explanation
    from robustbench_lite.defenses.abs_bound import ABSBound as ABSBound
    from robustbench_lite.defenses.abs_training import ABSTraining as ABSTraining
    from robustbench_lite.defenses.adversarial_training import AdversarialTraining as AdversarialTraining
    from robustbench_lite.defenses.alp import ALP as ALP
    from robustbench_lite.defenses.base import Batch as Batch
    from robustbench_lite.defenses.base import Descend as Descend
    from robustbench_lite.defenses.base import Objective as Objective
    from robustbench_lite.defenses.base import State as State
    from robustbench_lite.defenses.base import Step as Step
    from robustbench_lite.defenses.base import TrainingData as TrainingData
    from robustbench_lite.defenses.base import Wrapper as Wrapper
    from robustbench_lite.defenses.bit_depth import BitDepth as BitDepth
    from robustbench_lite.defenses.certified_training import Box as Box
    from robustbench_lite.defenses.certified_training import CertifiedTraining as CertifiedTraining
    from robustbench_lite.defenses.clp import CLP as CLP
    from robustbench_lite.defenses.consistency_training import ConsistencyTraining as ConsistencyTraining
    from robustbench_lite.defenses.cost_sensitive_training import CostSensitiveTraining as CostSensitiveTraining
    from robustbench_lite.defenses.crown_ibp_training import CROWNIBPTraining as CROWNIBPTraining
    from robustbench_lite.defenses.deep_knn import DeepKNN as DeepKNN
    from robustbench_lite.defenses.deep_rbf import DeepRBF as DeepRBF
    from robustbench_lite.defenses.deep_rbf import DeepRBFTraining as DeepRBFTraining
    from robustbench_lite.defenses.deploy import Deploy as Deploy
    from robustbench_lite.defenses.detector import Detector as Detector
    from robustbench_lite.defenses.dustbin import Dustbin as Dustbin
    from robustbench_lite.defenses.dustbin import DustbinTraining as DustbinTraining
    from robustbench_lite.defenses.ensemble_adversarial_training import (
        EnsembleAdversarialTraining as EnsembleAdversarialTraining,
    )
    from robustbench_lite.defenses.fast_adversarial_training import FastAdversarialTraining as FastAdversarialTraining
    from robustbench_lite.defenses.free_adversarial_training import FreeAdversarialTraining as FreeAdversarialTraining
    from robustbench_lite.defenses.gaussian_augmentation import GaussianAugmentation as GaussianAugmentation
    from robustbench_lite.defenses.gaussian_process_head import GaussianProcessHead as GaussianProcessHead
    from robustbench_lite.defenses.ibp_training import IBPTraining as IBPTraining
    from robustbench_lite.defenses.input_noise import InputNoise as InputNoise
    from robustbench_lite.defenses.jpeg import JPEG as JPEG
    from robustbench_lite.defenses.logit_squeezing import LogitSqueezing as LogitSqueezing
    from robustbench_lite.defenses.mart import MART as MART
    from robustbench_lite.defenses.mtl_ibp_training import MTLIBPTraining as MTLIBPTraining
    from robustbench_lite.defenses.nearest_neighbour import NearestNeighbour as NearestNeighbour
    from robustbench_lite.defenses.nearest_neighbour import NearestNeighbourCertificate as NearestNeighbourCertificate
    from robustbench_lite.defenses.nearest_neighbour import NoTraining as NoTraining
    from robustbench_lite.defenses.pixel_deflection import PixelDeflection as PixelDeflection
    from robustbench_lite.defenses.pixel_dp_classifier import PixelDPClassifier as PixelDPClassifier
    from robustbench_lite.defenses.pixel_dp_training import PixelDPTraining as PixelDPTraining
    from robustbench_lite.defenses.pixel_dp_vote import PixelDPVote as PixelDPVote
    from robustbench_lite.defenses.random_resize_pad import RandomResizePad as RandomResizePad
    from robustbench_lite.defenses.sabr_training import SABRTraining as SABRTraining
    from robustbench_lite.defenses.short_schedule import ShortSchedule as ShortSchedule
    from robustbench_lite.defenses.smooth_adv_training import SmoothAdvTraining as SmoothAdvTraining
    from robustbench_lite.defenses.smoothed_classifier import SmoothedClassifier as SmoothedClassifier
    from robustbench_lite.defenses.smoothed_vote import ClearWinner as ClearWinner
    from robustbench_lite.defenses.smoothed_vote import SmoothedVote as SmoothedVote
    from robustbench_lite.defenses.standard import StandardTraining as StandardTraining
    from robustbench_lite.defenses.trades import TRADES as TRADES
    from robustbench_lite.defenses.transformed import Transformed as Transformed
    from robustbench_lite.defenses.universal_adversarial_training import (
        UniversalAdversarialTraining as UniversalAdversarialTraining,
    )
    from robustbench_lite.defenses.voting import Draw as Draw
    from robustbench_lite.defenses.voting import Voting as Voting
    from robustbench_lite.defenses.weight_noise import WeightNoise as WeightNoise

globals().update(export_all(__name__, __path__))
