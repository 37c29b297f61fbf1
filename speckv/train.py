"""Make controllers of the records that 'speckv profile' wrote."""

from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from speckv import paper_fit
from speckv.compression import compression_level
from speckv.controller import Controller
from speckv.controller_fit import HELD_OUT_EVERY, fit_and_judge
from speckv.errors import InputError
from speckv.records import StepRecord
from speckv.signals import Signal

KINDS = ("adaptive", "paper")


@dataclass(frozen=True)
class Trained:
    """A controller, and the figures of its fit."""

    controller: Controller
    figures: dict


def sequences(records) -> list:
    """The texts of profile.read_records in their order: [(compression, [StepRecord])].

    Of a draft that reached the end of its text only the tokens up to there are in the records, and count as drafted.
    """
    signals = defaultdict(list)
    for row in records.tokens.to_pylist():
        signals[row["sequence"], row["step"]].append(Signal(row["entropy"], row["confidence"], row["is_estimate"]))
    texts = {}
    for row in records.steps.to_pylist():
        drawn = tuple(signals[row["sequence"], row["step"]])
        _, steps = texts.setdefault(row["sequence"], (row["compression"], []))
        steps.append(StepRecord(len(drawn), row["accepted"], row["tokens_produced"], row["draft_ms"], row["verify_ms"],
                                drawn))
    return list(texts.values())


def prompts(records) -> list:
    """The number of each text's prompt, the same for all texts that answer it."""
    numbers, of_text = {}, {}
    for row in records.steps.select(["sequence", "task", "prompt"]).to_pylist():
        of_text[row["sequence"]] = numbers.setdefault((row["task"], row["prompt"]), len(numbers))
    return list(of_text.values())


def train(records, kind: str = "adaptive") -> Trained:
    """A controller for the policy `kind`, judged on prompts left out, then fitted on all.

    Raises InputError where the kind is unknown or the records are too few; "paper" needs scikit-learn.
    """
    if kind not in KINDS:
        raise InputError(f"unknown kind of controller {kind!r}: choose one of {', '.join(KINDS)}")
    about = {"policy": kind, "step_records": str(len(records.steps))}
    if kind == "adaptive":
        fitted = fit_and_judge(sequences(records), prompts(records), about=about)
        return Trained(fitted.controller, fitted.figures)
    paper_fit.check_installed()
    inputs, acceptance, sequence = _paper_rows(sequences(records))
    held_out = np.array(prompts(records))[sequence] % HELD_OUT_EVERY == 0
    if not held_out.any() or held_out.all():
        raise InputError("the records hold too few texts with two steps or more: profile more prompts")
    judged = paper_fit.fit_mlp(inputs[~held_out], acceptance[~held_out])
    predicted = np.clip(paper_fit.predict(judged, inputs[held_out]), 0, 1)
    correlation = float(np.corrcoef(predicted, acceptance[held_out])[0, 1])
    controller = paper_fit.fit_mlp(inputs, acceptance)
    about |= {"correlation_acceptance_rate": f"{correlation:.4g}"}
    return Trained(Controller(**controller.tensors(), about=controller.about | about),
                   {"correlation_acceptance_rate": correlation, "steps": len(inputs)})


def _paper_rows(texts):
    """The paper's inputs [N, 6], made causal: the signals of the step before, the compression, this step's gamma; its
    acceptance rate [N], and the number of its text [N]."""
    rows = []
    for number, (compression, steps) in enumerate(texts):
        drafting = [step for step in steps if step.gamma]
        for before, step in pairwise(drafting):
            rows.append((before.mean_entropy, before.mean_confidence, before.max_entropy, before.min_confidence,
                         compression_level(compression), step.gamma, step.acceptance_rate, number))
    if not rows:
        raise InputError("the records hold no text with two steps that drafted: profile more prompts")
    table = np.array(rows, dtype=np.float64)
    return table[:, :6], table[:, 6], table[:, 7].astype(int)
