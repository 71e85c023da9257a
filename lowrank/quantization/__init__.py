"""4-bit weights: the NF4 format, and methods that split a weight into a 4-bit and a low-rank part."""

from lowrank.quantization.nf4 import NF4Tensor as NF4Tensor
from lowrank.quantization.nf4 import quantize_nf4 as quantize_nf4
from lowrank.quantization.residual import METHODS as METHODS
from lowrank.quantization.residual import SplitWeight as SplitWeight
from lowrank.quantization.residual import split_weight as split_weight
