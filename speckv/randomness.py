"""The uniform numbers that a sampled text is drawn with: with a seed one for every position, else some for every step.

Without a seed a step accepts and rejects its draft as Leviathan et al. (arXiv 2211.17192) do, which keeps as much of a
draft as can be kept: token x with probability min(1, p(x) / q(x)). What is written then depends on where drafts begin
and end, and a policy that goes by measured time decides that anew in every run.

With a seed every position of the text has a number of its own. Drafter and target both invert their own distribution's
cumulative sum at it, and a draft token stands where the two agree: what is written is what the target alone draws with
these numbers, with any drafter, any policy, in any batch. The two agree less often than they could: nearly as often as
rejection accepts at low temperatures, little more than half as often at 1 (bench/seeds.py). What the target draws at a
position depends on its own number and the text before alone, so the distribution is the target's.
"""

import torch

from speckv.kernels import draft_sample

BLOCK = 64  # numbers drawn together, so that they do not depend on how long a text may become


def random_numbers(settings):
    """The source of a text's numbers; of_step(position, gamma) gives those of a step that starts there.

    They are those to draft with [1, gamma] and those to verify with [1, gamma + 1], f32 on the CPU.
    """
    if settings.temperature == 0:
        return _NoNumbers()
    return _OfSteps() if settings.seed is None else _OfPositions(settings.seed)


class _NoNumbers:
    """For greedy decoding, which draws nothing: the ops want numbers and do not look at them."""

    are_of_positions = False

    def __init__(self):
        self._zeros = {}  # gamma: the same two every time

    def of_step(self, position, gamma):
        if gamma not in self._zeros:
            self._zeros[gamma] = torch.zeros(1, gamma), torch.zeros(1, gamma + 1)
        return self._zeros[gamma]


class _OfSteps:
    are_of_positions = False

    def __init__(self):
        self._generator = torch.Generator().manual_seed(torch.randint(2 ** 63 - 1, ()).item())

    def of_step(self, position, gamma):
        # Fresh numbers for every step: reusing those of a rejected draft would tie the policy's choices to them.
        numbers = torch.rand(1, 2 * gamma + 1, generator=self._generator)
        return numbers[:, gamma + 1:], numbers[:, :gamma + 1]


class _OfPositions:
    are_of_positions = True

    def __init__(self, seed):
        self._generator = torch.Generator().manual_seed(seed)
        self._numbers = torch.empty(1, 0)

    def of_step(self, position, gamma):
        end = position + gamma + 1
        while self._numbers.shape[1] < end:
            self._numbers = torch.cat([self._numbers, torch.rand(1, BLOCK, generator=self._generator)], dim=1)
        numbers = self._numbers[:, position:end]
        return numbers[:, :gamma], numbers


def verify_coupled(target_logits, draft_tokens, temperature, uniform, **filters) -> list:
    """The tokens a step emits: what the target draws at each position, up to the first that was not drafted.

    target_logits [1, n + 1, V], draft_tokens [1, n] i64, uniform [1, n + 1] f32; temperature and filters [1] as in
    verify_chain. Raises what draft_sample raises; where it cannot, on a GPU, bad logits are token -1.
    """
    emitted = []
    for i, drafted in enumerate([*draft_tokens[0].tolist(), None]):
        # One after the other: what lies behind a rejected token is nobody's text, and need not be a distribution.
        token, _, _, _ = draft_sample(target_logits[:, i], temperature, uniform[:, i], **filters)
        emitted.append(token.item())
        if emitted[-1] != drafted:
            break
    return emitted
