"""Where two greedy texts part, and whether rounding can have done it."""

import torch

from speckv.records import SpecOutput

NEAR_TIE = 0.25  # of the target's top two logits: what bf16 rounds away over 30 layers


@torch.inference_mode()
def first_difference(target, plain: SpecOutput, speculative: SpecOutput):
    """Where two greedy outputs part: (number of the new token, gap between the target's top two logits there), or None.

    The gap is measured in a pass over the shared text; a small one means that rounding chose. A text that ends where
    the other goes on parts from it there.
    """
    lengths = plain.sequences.shape[1], speculative.sequences.shape[1]
    different = (plain.sequences[0, :min(lengths)] != speculative.sequences[0, :min(lengths)]).nonzero()
    if len(different) == 0 and lengths[0] == lengths[1]:
        return None
    position = different[0].item() if len(different) else min(lengths)
    best = target(plain.sequences[:, :position], logits_to_keep=1).logits[0, -1].float().topk(2).values
    return position - plain.prompt_length, (best[0] - best[1]).item()
