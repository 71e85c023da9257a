"""What a decomposition returns: a matrix held as a few small ones, one form per family, and a report of the fit."""

from lowrank.factors.base import Factors as Factors
from lowrank.factors.base import LoRAExport as LoRAExport
from lowrank.factors.base import StructuredFactors as StructuredFactors
from lowrank.factors.base import load_factors as load_factors
from lowrank.factors.hadamard import HadamardFactors as HadamardFactors
from lowrank.factors.khatri_rao import KhatriRaoFactors as KhatriRaoFactors
from lowrank.factors.khatri_rao import LowRankKhatriRaoFactors as LowRankKhatriRaoFactors
from lowrank.factors.kronecker import KroneckerFactors as KroneckerFactors
from lowrank.factors.report import Decomposition as Decomposition
from lowrank.factors.report import FitReport as FitReport
from lowrank.factors.stacked import CPFactors as CPFactors
from lowrank.factors.stacked import TuckerFactors as TuckerFactors
from lowrank.factors.svd import LowRankFactors as LowRankFactors
from lowrank.factors.svd import SVDFactors as SVDFactors
