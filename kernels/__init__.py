"""speckv.kernels: the four ops of speculative decoding, each with a reference, a Triton and a C++ (CPU) backend."""

if __name__ != "speckv.kernels":
    # transformers and bitsandbytes look for Hugging Face's library of this name; from the repository root Python
    # would find this folder in its place and hide it.
    raise ImportError(
        "this folder is the source of speckv.kernels, not Hugging Face's 'kernels' library: import speckv.kernels, "
        "and run Python from outside the repository root (or with 'python -P') to import the library"
    )

from speckv.kernels.ops import draft_sample, draft_step, plan_gamma, serving, verify_chain

__all__ = ["draft_sample", "draft_step", "plan_gamma", "serving", "verify_chain"]
