"""speckv: speculative decoding for quantized language models, with the speculation length chosen at every step."""

import importlib

__version__ = "0.1.0"

# Loaded when first used: whoever wants only speckv.kernels should not wait for transformers.
_HOMES = {
    "InputError": "errors",
    "ModelError": "errors",
    "NumericalError": "errors",
    "SpecKVError": "errors",
    "SpecOutput": "records",
    "StepRecord": "records",
    "custom_generate": "drop_in",
    "generate": "decode",
    "generate_batch": "batch",
    "load_drafter": "models",
    "load_target": "models",
}
__all__ = [*_HOMES]


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module 'speckv' has no attribute {name!r}")
    return getattr(importlib.import_module(f"speckv.{_HOMES[name]}"), name)


def __dir__():
    return [*globals(), *_HOMES]
