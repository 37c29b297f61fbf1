"""speckv: speculative decoding for quantized language models, with the speculation length chosen at every step."""

from speckv.decode import generate
from speckv.errors import InputError, ModelError, NumericalError, SpecKVError
from speckv.models import load_drafter, load_target
from speckv.records import SpecOutput, StepRecord

__version__ = "0.1.0"
__all__ = [
    "InputError",
    "ModelError",
    "NumericalError",
    "SpecKVError",
    "SpecOutput",
    "StepRecord",
    "generate",
    "load_drafter",
    "load_target",
]
