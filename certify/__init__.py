"""Certifiers: each proves that a threat holds no adversarial example. Every public name of the files is exported."""

if __name__ != "robustbench_lite.certify":
    raise ImportError("this folder is the package robustbench_lite.certify: write 'import robustbench_lite.certify'")

from typing import TYPE_CHECKING

from robustbench_lite.core.exports import export_all

if TYPE_CHECKING:  # for type checkers and editors; a file that is not named here is exported all the same
    from robustbench_lite.certify.alpha_crown import AlphaCROWN as AlphaCROWN
    from robustbench_lite.certify.base import Certifier as Certifier
    from robustbench_lite.certify.bounds import LinearForms as LinearForms
    from robustbench_lite.certify.bounds import bounds as bounds
    from robustbench_lite.certify.cascade import Cascade as Cascade
    from robustbench_lite.certify.cost_sensitive import CostReport as CostReport
    from robustbench_lite.certify.cost_sensitive import CostSensitive as CostSensitive
    from robustbench_lite.certify.cost_sensitive import cost_report as cost_report
    from robustbench_lite.certify.cost_sensitive import seed_class_costs as seed_class_costs
    from robustbench_lite.certify.cost_sensitive import small_large_costs as small_large_costs
    from robustbench_lite.certify.crown import CROWN as CROWN
    from robustbench_lite.certify.crown import CROWNIBP as CROWNIBP
    from robustbench_lite.certify.curves import CertifiedAccuracy as CertifiedAccuracy
    from robustbench_lite.certify.curves import log_rank as log_rank
    from robustbench_lite.certify.errors import CannotCertify as CannotCertify
    from robustbench_lite.certify.errors import UnsupportedOperator as UnsupportedOperator
    from robustbench_lite.certify.exact import Exact as Exact
    from robustbench_lite.certify.exact_margins import exact_margins as exact_margins
    from robustbench_lite.certify.exact_margins import relaxation_bounds as relaxation_bounds
    from robustbench_lite.certify.falsifier import Falsifier as Falsifier
    from robustbench_lite.certify.graph import graph_of as graph_of
    from robustbench_lite.certify.ibp import IBP as IBP
    from robustbench_lite.certify.inside import Inside as Inside
    from robustbench_lite.certify.laplace_smoothing import LaplaceSmoothing as LaplaceSmoothing
    from robustbench_lite.certify.linear_bounds import LinearBounds as LinearBounds
    from robustbench_lite.certify.lines import Lines as Lines
    from robustbench_lite.certify.majority_certifier import AddedNoiseCertifier as AddedNoiseCertifier
    from robustbench_lite.certify.majority_certifier import MajorityCertifier as MajorityCertifier
    from robustbench_lite.certify.margin_certifier import Findings as Findings
    from robustbench_lite.certify.margin_certifier import MarginCertifier as MarginCertifier
    from robustbench_lite.certify.noise import GaussianNoise as GaussianNoise
    from robustbench_lite.certify.noise import LaplaceNoise as LaplaceNoise
    from robustbench_lite.certify.noise import Noise as Noise
    from robustbench_lite.certify.noise import UniformNoise as UniformNoise
    from robustbench_lite.certify.pixel_dp import PixelDP as PixelDP
    from robustbench_lite.certify.randomized_ablation import RandomizedAblation as RandomizedAblation
    from robustbench_lite.certify.randomized_smoothing import RandomizedSmoothing as RandomizedSmoothing
    from robustbench_lite.certify.renyi_smoothing import RenyiSmoothing as RenyiSmoothing
    from robustbench_lite.certify.smoothing_certifier import SmoothingCertifier as SmoothingCertifier
    from robustbench_lite.certify.stopping import EarlyStopping as EarlyStopping
    from robustbench_lite.certify.stopping import FixedSampleSize as FixedSampleSize
    from robustbench_lite.certify.stopping import Stopping as Stopping
    from robustbench_lite.certify.top_two_certifier import TopTwoCertifier as TopTwoCertifier
    from robustbench_lite.certify.uniform_smoothing import UniformSmoothing as UniformSmoothing
    from robustbench_lite.certify.votes import Votes as Votes
    from robustbench_lite.certify.whole_set import bonferroni as bonferroni
    from robustbench_lite.certify.whole_set import holm as holm

globals().update(export_all(__name__, __path__))
