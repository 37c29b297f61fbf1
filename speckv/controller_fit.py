"""Fit the adaptive controller to logged steps: how many tokens of a draft stand, and whether one more would.

From the signals after i draft tokens the MLP's f(signals, gamma) is fitted so that f(·, i) · i is the number of them
that are accepted and f(·, i + 1) · (i + 1) exceeds it by 1 where token i + 1 would be accepted too, both in squared
error, whose minimum is the probability. That difference is what plan_gamma weighs against a token's cost. Sequences are
left out whole to judge the fit, with all others of the same prompt: their steps are alike.
"""

from dataclasses import dataclass

import numpy as np
import torch

from speckv.compression import compression_level
from speckv.controller import Controller, fold_standardisation, from_arrays
from speckv.draft_state import LONGEST_COUNTED, SIGNALS, DraftState
from speckv.errors import InputError
from speckv.kernels.reference import update_signals

HIDDEN = 32
STEPS, LEARNING_RATE = 3000, 5e-3
HELD_OUT_EVERY = 5  # of the sequences, one in so many judges the fit
LEAST_SEQUENCES = 10
LEVEL_WEIGHT = 0.3  # of the number accepted, beside whether one more is


@dataclass(frozen=True)
class Examples:
    """A row for each draft token: signals [N, F] after it, its number in the draft, what became of the draft."""

    signals: np.ndarray
    number: np.ndarray    # [N], from 1
    accepted: np.ndarray  # [N], how many of the first `number` tokens were accepted
    more: np.ndarray      # [N], whether the next token was accepted, all before it included; NaN if none was drafted
    sequence: np.ndarray  # [N]


def examples(sequences) -> Examples:
    """Of sequences [(compression, [StepRecord])], in the order they were decoded."""
    rows = []
    for index, (compression, steps) in enumerate(sequences):
        state = DraftState(compression_level(compression))
        signals = torch.zeros(1, len(SIGNALS))
        for step in steps:
            state.begin()
            for i, signal in enumerate(step.signals):
                state.write(signals.numpy()[0], i, (signal.entropy, signal.confidence) if signal.is_estimate else None)
                # What draft_step measures of a proposal of lookup, which is one-hot, is 0 bits and confidence 1.
                measured = (0.0, 1.0) if signal.is_estimate else (signal.entropy, signal.confidence)
                signals = update_signals(signals, torch.tensor([i]), *(torch.tensor([x]) for x in measured))
                state.after(signal.confidence)
                number = i + 1
                more = float(step.accepted > number) if number < step.gamma else np.nan
                rows.append((signals[0].tolist(), number, min(step.accepted, number), more, index))
            state.record(step)
    if not rows:
        raise InputError("there are no draft tokens to learn from: profile with drafting policies")
    columns = [np.array(column) for column in zip(*rows, strict=True)]
    return Examples(*columns)


def select(data: Examples, chosen) -> Examples:
    """Some of the rows."""
    return Examples(*(getattr(data, name)[chosen] for name in Examples.__dataclass_fields__))


def fit(data: Examples, seed: int = 0, about: dict | None = None, steps: int = STEPS) -> Controller:
    """An MLP fitted on all of the rows."""
    mean, scale = data.signals.mean(0), data.signals.std(0)
    scale[scale < 1e-6] = 1.0  # such as the compression, where all records are of one
    middle, spread = (1 + LONGEST_COUNTED) / 2, LONGEST_COUNTED / 2
    x = torch.tensor((data.signals - mean) / scale, dtype=torch.float32)
    here = torch.tensor(np.minimum(data.number, LONGEST_COUNTED), dtype=torch.float32)
    # A pair beyond what is counted is judged as the last one.
    pair = here.clamp(max=LONGEST_COUNTED - 1)
    level = torch.tensor(data.accepted / data.number, dtype=torch.float32)
    more = torch.tensor(data.more, dtype=torch.float32)
    is_known = ~more.isnan()
    generator = torch.Generator().manual_seed(seed)
    inputs = len(SIGNALS) + 1
    weights = [torch.randn(inputs, HIDDEN, generator=generator) / inputs ** 0.5, torch.zeros(HIDDEN),
               torch.randn(HIDDEN, 1, generator=generator) / HIDDEN ** 0.5, torch.full((1,), 0.4)]
    for weight in weights:
        weight.requires_grad_(True)
    optimizer = torch.optim.Adam(weights, lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def rate(rows, gamma):
        w1, b1, w2, b2 = weights
        joined = torch.cat([x[rows], ((gamma - middle) / spread).unsqueeze(1)], dim=1)
        return (torch.relu(joined @ w1 + b1) @ w2 + b2).squeeze(1)
    for _ in range(steps):
        rows = torch.randint(len(x), (1024,), generator=generator)
        known = rows[is_known[rows]]
        gain = rate(known, pair[known] + 1) * (pair[known] + 1) - rate(known, pair[known]) * pair[known]
        loss = (gain - more[known]).square().mean() if len(known) else 0.0
        loss = loss + LEVEL_WEIGHT * ((rate(rows, here[rows]) - level[rows]) * here[rows]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    w1, b1, w2, b2 = (weight.detach().double().numpy() for weight in weights)
    w1, b1 = fold_standardisation(w1, b1, np.append(mean, middle), np.append(scale, spread))
    return from_arrays(w1, b1, w2, b2, about)


def predict(controller: Controller, data: Examples) -> tuple:
    """The controller's answers through plan_gamma, [N] each: tokens accepted of those drafted, how likely the last of
    them is among those, and how likely one more would be."""
    signals = torch.tensor(data.signals, dtype=torch.float32)
    gammas = torch.arange(LONGEST_COUNTED + 1)
    acceptance = controller.plan(signals, gammas)[1].clamp(0, 1).double().numpy()
    tokens, rows = acceptance * gammas.numpy(), np.arange(len(signals))
    here = np.minimum(data.number, LONGEST_COUNTED)
    pair = np.minimum(here, LONGEST_COUNTED - 1)
    return (tokens[rows, here] * data.number / here, tokens[rows, here] - tokens[rows, here - 1],
            tokens[rows, pair + 1] - tokens[rows, pair])


@dataclass(frozen=True)
class Fit:
    """A controller fitted on all sequences, and how one fitted without the held-out ones did on those."""

    controller: Controller
    figures: dict  # correlation and mean squared error, of one more token and of the number accepted; counts


def fit_and_judge(sequences, groups=None, seed: int = 0, about: dict | None = None, steps: int = STEPS) -> Fit:
    """Fit on [(compression, [StepRecord])]; raises InputError where they are too few to leave some out.

    groups numbers what a sequence belongs to, such as its prompt; those of a group are left out together.
    """
    if len(sequences) < LEAST_SEQUENCES:
        raise InputError(f"{len(sequences)} sequences are too few: profile at least {LEAST_SEQUENCES}")
    data = examples(sequences)
    groups = np.arange(len(sequences)) if groups is None else np.array(groups)
    held_out = groups[data.sequence] % HELD_OUT_EVERY == 0
    judged = select(data, held_out)
    accepted, last, more = predict(fit(select(data, ~held_out), seed, steps=steps), judged)
    known = ~np.isnan(judged.more)
    stood = judged.accepted == judged.number
    figures = {
        # Of a token by the distributions up to its own, and of the one after it, whose own is not known yet.
        "correlation_draft_token": _correlation(last, stood),
        "correlation_next_token": _correlation(more[known], judged.more[known]),
        "correlation_accepted_tokens": _correlation(accepted, judged.accepted),
        "correlation_acceptance_rate": _correlation(accepted / judged.number, judged.accepted / judged.number),
        "mse_next_token": float(((more[known] - judged.more[known]) ** 2).mean()),
        "draft_tokens": len(data.number), "held_out_draft_tokens": len(judged.number), "sequences": len(sequences),
        "held_out_acceptance": float(stood.mean()),
    }
    words = {key: f"{value:.4g}" for key, value in figures.items()}
    return Fit(fit(data, seed, (about or {}) | words | {"inputs": " ".join((*SIGNALS, "gamma"))}, steps), figures)


def _correlation(predicted, observed):
    return float(np.corrcoef(predicted, observed)[0, 1])
