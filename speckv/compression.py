"""The compression levels a target can be held at, and the paper's numbers for them."""

COMPRESSIONS = ("bf16", "fp16", "fp32", "int8", "nf4")


def compression_level(compression: str | None) -> int:
    """The paper's number for a compression: 0 for 16 bits and more, 1 for int8, 2 for nf4 (arXiv 2605.02888)."""
    return {"int8": 1, "nf4": 2}.get(compression, 0)
