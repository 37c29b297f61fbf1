"""speckv.kernels: the ops of speculative decoding, each with a reference, a Triton and a C++ (CPU) backend.

linear_int8 and decode_attention, which only a CPU needs, have no Triton backend.
"""

if __name__ == "speckv.kernels":
    from speckv.kernels.ops import (
        decode_attention,
        draft_sample,
        draft_step,
        linear_int8,
        plan_gamma,
        serving,
        verify_chain,
    )

    __all__ = ["decode_attention", "draft_sample", "draft_step", "linear_int8", "plan_gamma", "serving",
               "verify_chain"]
else:
    # Started in the repository root, Python finds this folder under the name of Hugging Face's library. Importing it
    # must not fail, since transformers imports what it finds to ask for its version; with none it takes the library
    # as absent. Using it must.
    def __getattr__(name):
        if name.startswith("__"):
            raise AttributeError(name)
        raise ImportError(
            "this folder is the source of speckv.kernels, not Hugging Face's 'kernels' library: import speckv.kernels, "
            "and to import the library start Python outside the repository root"
        )
