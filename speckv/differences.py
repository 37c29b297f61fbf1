"""Where two greedy texts part, and whether rounding can have done it."""

import torch

from speckv.records import SpecOutput

NEAR_TIE = 0.25  # of the target's top two logits: what bf16 rounds away over 30 layers


@torch.inference_mode()
def first_difference(target, plain: SpecOutput, speculative: SpecOutput):
    """Where two greedy outputs part: (number of the new token, gap between the target's top two logits there), or None.

    The gap is measured in a pass over the shared text; a small one means that rounding chose.
    """
    length = min(plain.sequences.shape[1], speculative.sequences.shape[1])
    different = (plain.sequences[0, :length] != speculative.sequences[0, :length]).nonzero()
    if len(different) == 0:
        return None
    position = different[0].item()
    best = target(plain.sequences[:, :position], logits_to_keep=1).logits[0, -1].float().topk(2).values
    return position - plain.prompt_length, (best[0] - best[1]).item()
