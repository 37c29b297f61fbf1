"""Schemas, shape functions and which backend runs where.

Each op has one schema. The dispatcher picks the backend by the device of the tensors: CPU tensors go to the C++
extension, CUDA and ROCm tensors to Triton, everything else, and whatever has no kernel, to the reference. The functions
here call the extension past the dispatcher where nobody could tell, which takes half the time.
SPECKV_BACKEND=reference|triton|cpu forces one; a forced backend that is missing is an error.
"""

import importlib.util
import os
import warnings
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.autograd import profiler as _profiler

from speckv.kernels import checks, reference

_FILTERS = "Tensor? top_k=None, Tensor? top_p=None, Tensor? min_p=None"
SCHEMAS = {
    "draft_sample": f"(Tensor logits, Tensor temperature, Tensor uniform, {_FILTERS})"
                    " -> (Tensor token, Tensor prob, Tensor entropy, Tensor confidence)",
    "plan_gamma": "(Tensor signals, Tensor w1, Tensor b1, Tensor w2, Tensor b2, Tensor gammas, Tensor seconds,"
                  " float rate=0.0)"
                  " -> (Tensor gamma, Tensor acceptance)",
    "draft_step": "(Tensor logits, Tensor temperature, Tensor uniform, Tensor signals, Tensor drafted,"
                  " Tensor w1, Tensor b1, Tensor w2, Tensor b2, Tensor gammas, Tensor seconds,"
                  f" float rate=0.0, {_FILTERS})"
                  " -> (Tensor token, Tensor prob, Tensor entropy, Tensor confidence, Tensor signals, Tensor gamma)",
    "verify_chain": "(Tensor target_logits, Tensor draft_logits, Tensor draft_tokens, Tensor num_draft,"
                    f" Tensor temperature, Tensor uniform, {_FILTERS}) -> (Tensor tokens, Tensor accepted)",
    "linear_int8": "(Tensor x, Tensor weight, Tensor scale) -> Tensor",
    "decode_attention": "(Tensor query, Tensor key, Tensor value, float scale) -> Tensor",
}
TRITON_OPS = ("draft_sample", "plan_gamma", "draft_step", "verify_chain")  # the others run in the reference on a GPU
SHORT_WAY_OPS = TRITON_OPS  # the C++ extension has them as plain functions, too
BACKENDS = ("reference", "triton", "cpu")
VECTOR_UNITS = ("plain", "avx2", "avx512", "bf16", "amx")  # each has what those before it have, see csrc/units.h
BUILD_ADVICE = "build it with 'pip install --no-build-isolation -e .' in the source tree (needs a C++17 compiler)"

_library = torch.library.Library("speckv", "DEF")
_serving = {}  # device -> (backend, why), the same for all ops that the backend has


def _token_shapes(logits):
    rows = logits.shape[0]
    return (logits.new_empty(rows, dtype=torch.int64), *(logits.new_empty(rows, dtype=torch.float32) for _ in range(3)))


def _draft_sample_shapes(logits, temperature, uniform, top_k=None, top_p=None, min_p=None):
    checks.draft_sample(logits, temperature, uniform, top_k, top_p, min_p)
    return _token_shapes(logits)


def _plan_gamma_shapes(signals, w1, b1, w2, b2, gammas, seconds, rate=0.0):
    checks.plan_gamma(signals, w1, b1, w2, b2, gammas, seconds, rate)
    return gammas.new_empty(signals.shape[0]), signals.new_empty(signals.shape[0], gammas.shape[0])


def _draft_step_shapes(logits, temperature, uniform, signals, drafted, w1, b1, w2, b2, gammas, seconds, rate=0.0,
                       top_k=None, top_p=None, min_p=None):
    checks.draft_step(logits, temperature, uniform, signals, drafted, w1, b1, w2, b2, gammas, seconds, rate,
                      top_k, top_p, min_p)
    return (*_token_shapes(logits), signals.new_empty(signals.shape), gammas.new_empty(signals.shape[0]))


def _verify_chain_shapes(target_logits, draft_logits, draft_tokens, num_draft, temperature, uniform,
                         top_k=None, top_p=None, min_p=None):
    checks.verify_chain(target_logits, draft_logits, draft_tokens, num_draft, temperature, uniform,
                        top_k, top_p, min_p)
    batch, width, _ = target_logits.shape
    return draft_tokens.new_empty(batch, width), draft_tokens.new_empty(batch)


def _linear_int8_shapes(x, weight, scale):
    checks.linear_int8(x, weight, scale)
    return x.new_empty(x.shape[0], weight.shape[0])


def _decode_attention_shapes(query, key, value, scale):
    checks.decode_attention(query, key, value, scale)
    batch, heads, tokens, _ = query.shape
    return query.new_empty(batch, tokens, heads, value.shape[3])


_SHAPES = {
    "draft_sample": _draft_sample_shapes,
    "plan_gamma": _plan_gamma_shapes,
    "draft_step": _draft_step_shapes,
    "verify_chain": _verify_chain_shapes,
    "linear_int8": _linear_int8_shapes,
    "decode_attention": _decode_attention_shapes,
}


def _triton_op(name):
    """The Triton launcher of an op, imported at its first call: importing Triton takes half a second."""
    def launch(*args):
        from speckv.kernels import draft, verify
        return getattr(verify if name == "verify_chain" else draft, name)(*args)
    return launch


def _serve_triton(key):
    for name in TRITON_OPS:
        _library.impl(name, _triton_op(name), key)


def _extension_file():
    """The compiled extension beside this file, or None."""
    return next(iter(sorted(Path(__file__).parent.glob("_C*.so"))), None)


def _load_extension():
    """The C++ kernels, loaded, and None; or None and why that could not be done. Raises ImportError where SPECKV_UNITS
    asks for what they, or this machine, do not have."""
    if _extension_file() is None:
        return None, f"the C++ extension is not built: {BUILD_ADVICE}"
    try:
        extension = importlib.import_module("speckv.kernels._C")
    except ImportError as error:
        return None, f"the C++ extension does not load, or was built from an older source ({error}): {BUILD_ADVICE}"
    vector_units()
    return extension, None


def vector_units():
    """Which build of its loops the C++ extension runs, one of VECTOR_UNITS: the widest of this machine, or what
    SPECKV_UNITS in the environment names. Raises ImportError where that is none, or not here."""
    try:
        return VECTOR_UNITS[torch.ops.speckv.vector_units()]
    except RuntimeError as error:
        raise ImportError(str(error)) from error


def _why_no_triton():
    """None where Triton can run, else the reason."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install 'speckv[triton]'"
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton needs a CUDA or ROCm GPU, or TRITON_INTERPRET=1 to run in its interpreter"
    return None


def _refuse_gpu(*args):
    raise RuntimeError("SPECKV_BACKEND=cpu serves CPU tensors only: unset it, or move the tensors to the CPU")


def _register():
    """Defines the ops and their backends; returns the C++ extension, or None where it does not serve."""
    for name, schema in SCHEMAS.items():
        _library.define(name + schema)
        _library.impl(name, getattr(reference, name), "CompositeExplicitAutograd")
        torch.library.register_fake(f"speckv::{name}", _SHAPES[name], lib=_library)

    forced = os.environ.get("SPECKV_BACKEND") or None
    if forced is not None and forced not in BACKENDS:
        raise ImportError(f"SPECKV_BACKEND={forced}: must be one of {', '.join(BACKENDS)}")
    why_forced = f"SPECKV_BACKEND={forced}"
    if forced == "reference":
        _serving.update(cpu=("reference", why_forced), cuda=("reference", why_forced))
        return None
    if forced == "triton":
        if why := _why_no_triton():
            raise ImportError(f"SPECKV_BACKEND=triton: {why}")
        _serve_triton("CPU")
        _serve_triton("CUDA")
        _serving.update(cpu=("triton", why_forced), cuda=("triton", why_forced))
        return None

    extension, why = _load_extension()
    if extension is not None:
        why = why_forced if forced else "the C++ extension is loaded"
        _serving["cpu"] = ("cpu", f"{why}, its {vector_units()} loops")
    elif forced == "cpu":
        raise ImportError(f"SPECKV_BACKEND=cpu: {why}")
    else:
        _serving["cpu"] = ("reference", why)
        warnings.warn(f"speckv runs its CPU ops in the slower PyTorch reference: {why}", stacklevel=2)
    if forced == "cpu":
        for name in SCHEMAS:
            _library.impl(name, _refuse_gpu, "CUDA")
        _serving["cuda"] = ("none", why_forced)
    elif why := _why_no_triton():
        _serving["cuda"] = ("reference", why)
    else:
        _serve_triton("CUDA")
        _serving["cuda"] = ("triton", "Triton is installed")
    return extension


def serving():
    """Which backend serves each device and why: {"cpu": (backend, reason), "cuda": (backend, reason)}.

    Triton serves TRITON_OPS, the reference the other ops.
    """
    return dict(_serving)


_extension = _register()
# The overloads themselves: finding the only one there is takes 0.6 µs a call.
_dispatched = SimpleNamespace(**{name: getattr(torch.ops.speckv, name).default for name in SCHEMAS})
# Functions that say whether a mode or a tracer is to see the ops.
WATCHERS = (torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack, torch._C._is_tracing)
_short = _dispatched
if _extension is not None and _extension.open(torch.Tensor, WATCHERS, vars(_dispatched)):
    # Its plain functions take half as long, and send on to the dispatcher what is not for them (csrc/python.cpp).
    _short = SimpleNamespace(**vars(_dispatched) | {name: getattr(_extension, name) for name in SHORT_WAY_OPS})
_is_compiled = torch.compiler.is_dynamo_compiling  # other compilers are modes


def _calls():
    """What the functions below call: torch.compile cannot look into the extension, and profilers are to see the op."""
    return _dispatched if _is_compiled() or _profiler._is_profiler_enabled else _short


def draft_sample(logits, temperature, uniform, top_k=None, top_p=None, min_p=None):
    return _calls().draft_sample(logits, temperature, uniform, top_k, top_p, min_p)


def plan_gamma(signals, w1, b1, w2, b2, gammas, seconds, rate=0.0):
    return _calls().plan_gamma(signals, w1, b1, w2, b2, gammas, seconds, rate)


def draft_step(logits, temperature, uniform, signals, drafted, w1, b1, w2, b2, gammas, seconds, rate=0.0,
               top_k=None, top_p=None, min_p=None):
    return _calls().draft_step(
        logits, temperature, uniform, signals, drafted, w1, b1, w2, b2, gammas, seconds, rate, top_k, top_p, min_p)


def verify_chain(target_logits, draft_logits, draft_tokens, num_draft, temperature, uniform,
                 top_k=None, top_p=None, min_p=None):
    return _calls().verify_chain(
        target_logits, draft_logits, draft_tokens, num_draft, temperature, uniform, top_k, top_p, min_p)


def linear_int8(x, weight, scale):
    return _calls().linear_int8(x, weight, scale)


def decode_attention(query, key, value, scale):
    return _calls().decode_attention(query, key, value, scale)


for _op in (draft_sample, plan_gamma, draft_step, verify_chain, linear_int8, decode_attention):
    _op.__doc__ = getattr(reference, _op.__name__).__doc__
