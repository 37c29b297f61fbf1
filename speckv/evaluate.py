"""Compare policies by what they measured: rates, the best fixed gamma in hindsight, paired bootstrap, an oracle."""

from collections import defaultdict
from dataclasses import dataclass
from statistics import median

import numpy as np

from speckv.errors import InputError

RESAMPLES, SEED = 10_000, 0
PLAIN = "off"


@dataclass(frozen=True)
class Answer:
    """One prompt answered under one policy. steps holds (gamma, accepted, tokens, draft_ms, verify_ms, predicted)."""

    compression: str
    task: str
    prompt: int
    policy: str
    tokens: int
    seconds: float
    prefill_seconds: float
    steps: list
    difference: list | None = None  # where the text parts from plain decoding: [new token, gap of the top two logits]


@dataclass(frozen=True)
class Test:
    """How much faster one policy is than another over the same prompts: ratio of rates, 95 % interval, one-sided p."""

    ratio: float
    lower: float
    upper: float
    p_value: float


def rate(answers) -> float:
    """Tokens a second: all tokens over all seconds, prompts included."""
    return sum(answer.tokens for answer in answers) / sum(answer.seconds for answer in answers)


def select(answers, **wanted) -> list:
    """The answers with these attributes."""
    return [answer for answer in answers if all(getattr(answer, name) == value for name, value in wanted.items())]


def best_fixed(answers) -> str | None:
    """The fixed policy that was fastest over all of the answers, which is known in hindsight only."""
    fixed = {answer.policy for answer in answers if answer.policy.startswith("fixed:")}
    return max(sorted(fixed), key=lambda policy: rate(select(answers, policy=policy)), default=None)


def compare(answers, policy: str, rivals: dict) -> Test:
    """The paired bootstrap of a policy against rivals[compression], the one it is compared with at each compression.

    Prompts are drawn anew within each compression and task, and each brings the times of both: what is easy for one is
    easy for the other. The mean of the logarithms of compressions' ratios counts all compressions alike. p is the share
    of resamples in which the policy is no faster.
    """
    random = np.random.default_rng(SEED)
    logs, observed = np.zeros(RESAMPLES), 0.0
    for compression, rival in rivals.items():
        here = select(answers, compression=compression)
        own, other = (_by_prompt(select(here, policy=name)) for name in (policy, rival))
        if own.keys() != other.keys():
            raise InputError(f"{policy} and {rival} did not answer the same prompts at {compression}")
        totals = np.zeros((RESAMPLES, 4))
        whole = np.zeros(4)
        for task in sorted({task for task, _ in own}):
            rows = np.array([(own[key].tokens, own[key].seconds, other[key].tokens, other[key].seconds)
                             for key in sorted(own) if key[0] == task])
            whole += rows.sum(0)
            totals += rows[random.integers(0, len(rows), (RESAMPLES, len(rows)))].sum(1)
        logs += np.log(totals[:, 0] * totals[:, 3] / (totals[:, 1] * totals[:, 2])) / len(rivals)
        observed += float(np.log(whole[0] * whole[3] / (whole[1] * whole[2]))) / len(rivals)
    lower, upper = np.exp(np.quantile(logs, (0.025, 0.975)))
    return Test(float(np.exp(observed)), float(lower), float(upper), float((logs <= 0).mean()))


def _by_prompt(answers):
    return {(answer.task, answer.prompt): answer for answer in answers}


def figures(answers) -> dict:
    """What a policy did in some answers: tokens a second and a step, mean gamma, acceptance, where the time went."""
    steps = [step for answer in answers for step in answer.steps]
    drafted = sum(step[0] for step in steps)
    seconds = sum(answer.seconds for answer in answers)
    spent = {"draft": sum(step[3] for step in steps) / 1e3, "verify": sum(step[4] for step in steps) / 1e3,
             "prompt": sum(answer.prefill_seconds for answer in answers)}
    return {
        "tokens_per_second": rate(answers), "tokens_per_step": sum(step[2] for step in steps) / len(steps),
        "mean_gamma": drafted / len(steps), "acceptance_rate": sum(step[1] for step in steps) / max(1, drafted),
        "share_of_time": {name: value / seconds for name, value in spent.items()}
        | {"rest": 1 - sum(spent.values()) / seconds}}


def oracle_rate(answers) -> float | None:
    """Tokens a second of a policy that knows how many tokens will be accepted and drafts just those.

    Made of the answers with the longest fixed gamma: a step that accepted k tokens would have drafted k, at this run's
    median time a draft token, and verified k + 1 positions, at the median time of all steps of that length, on a
    straight line between lengths that were measured. None without fixed gammas.
    """
    lengths = {int(answer.policy.partition(":")[2]) for answer in answers if answer.policy.startswith("fixed:")}
    if not lengths:
        return None
    times = defaultdict(list)
    for answer in answers:
        for step in answer.steps:
            times[step[0]].append(step[4])
    measured = sorted(times)
    medians = [median(times[gamma]) for gamma in measured]
    longest = select(answers, policy=f"fixed:{max(lengths)}")
    draft_ms = median([step[3] / step[0] for answer in longest for step in answer.steps if step[0]] or [0.0])
    tokens, seconds = 0, 0.0
    for answer in longest:
        seconds += answer.prefill_seconds
        for _, accepted, emitted, *_ in answer.steps:
            tokens += emitted
            seconds += (float(np.interp(accepted, measured, medians)) + accepted * draft_ms) / 1e3
    return tokens / seconds
