"""Logits processors and stopping criteria of transformers, in a loop that looks at several positions at once.

A processor is taken for a function of (ids, scores), as in transformers' assisted generation. It is asked about
positions behind draft tokens that are rejected in the end, and about one position more than once; one that counts its
calls would count those too.
"""

import math

import torch

from speckv.errors import InputError


def process_rows(processors, ids, logits):
    """What the processors make of each row: [1, m, V] f32.

    logits [1, m, V] are those behind the last m tokens of ids [1, n]: the processors see row i with the tokens before
    it, ids[:, :n - m + 1 + i], as if it were the only one. They may write to what they are given.
    """
    first = ids.shape[1] - logits.shape[1] + 1
    return torch.stack([process(processors, ids[:, :first + i], logits[:, i].to(torch.float32, copy=True))
                        for i in range(logits.shape[1])], dim=1)


def process(processors, ids, scores):
    """What the processors make, in turn, of scores [B, V] behind ids [B, n]; InputError where the shape is another."""
    shape = scores.shape
    for processor in processors:
        scores = processor(ids, scores)
        if not isinstance(scores, torch.Tensor) or scores.shape != shape:
            found = list(scores.shape) if isinstance(scores, torch.Tensor) else type(scores).__name__
            raise InputError(f"logits processor {_name(processor)} returned {found}: it must return the scores "
                             f"{list(shape)}")
    return scores


def process_draft(processors, ids, row):
    """The drafter's logits [1, V] behind ids [1, n], processed as the target's will be, so that more is accepted.

    None where all that the drafter proposes is ruled out. Some processors make NaN of the -inf that a drafter gives to
    tokens it cannot propose; there the logits stay the drafter's: verifying asks what a token was drawn from, whatever
    that is.
    """
    processed = process_rows(processors, ids, row.unsqueeze(1)).squeeze(1)
    highest = processed.amax().item()
    if highest == -math.inf:
        return None
    return processed if math.isfinite(highest) else row.float()


def ends_text(criteria, ids) -> bool:
    """Whether one of the stopping criteria ends the text ids [1, n] here."""
    # All are asked, as in transformers: one may keep count, or show progress.
    return any([bool(criterion(ids, None)) for criterion in criteria])


def checked_callables(name, given) -> tuple:
    """The processors or criteria of an argument of speckv.generate; raises InputError where they cannot be called."""
    try:
        given = () if given is None else tuple(given)
    except TypeError:
        given = (None,)
    if not all(callable(one) for one in given):
        raise InputError(f"{name} must be a list of callables, as transformers' {name} is")
    return given


def _name(processor):
    return getattr(processor, "__name__", type(processor).__name__)
