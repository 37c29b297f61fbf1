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
    """How much faster one policy is than another over the same prompts: ratio of rates, 95 % interval, one-sided p.

    Interval and p are None where every task has a single prompt: drawing it anew gives the same one, and says nothing.
    """

    ratio: float
    lower: float | None
    upper: float | None
    p_value: float | None


def rate(answers) -> float:
    """Tokens a second: all tokens over all seconds, prompts included."""
    return sum(answer.tokens for answer in answers) / sum(answer.seconds for answer in answers)


def ratios(own, other) -> dict:
    """{task or "all": how many times as fast the first answers are as the others}."""
    tasks = dict.fromkeys(answer.task for answer in own)
    by_task = {task: rate(select(own, task=task)) / rate(select(other, task=task)) for task in tasks}
    return by_task | {"all": rate(own) / rate(other)}


def select(answers, **wanted) -> list:
    """The answers with these attributes."""
    return [answer for answer in answers if all(getattr(answer, name) == value for name, value in wanted.items())]


def best_fixed(answers) -> str | None:
    """The fixed policy that was fastest over all of the answers, which is known in hindsight only.

    Of several compressions each counts alike: by the mean of the logarithms of its rates there.
    """
    fixed = {answer.policy for answer in answers if answer.policy.startswith("fixed:")}
    compressions = {answer.compression for answer in answers}

    def speed(policy):
        return sum(np.log(rate(select(answers, policy=policy, compression=name))) for name in sorted(compressions))
    return max(sorted(fixed), key=speed, default=None)


def compare(answers, policy: str, rivals: dict) -> Test:
    """The paired bootstrap of a policy against rivals[compression], the one it is compared with at each compression.

    Prompts are drawn anew within each task, and each brings the times of both, at every compression: what is easy for
    one is easy for the other, so compressions drawn apart would count one prompt as several and make the interval too
    narrow. The mean of the logarithms of compressions' ratios counts all compressions alike. p is the share of
    resamples in which the policy is no faster. Raises InputError where some prompt was not answered by both throughout.
    """
    pairs = {name: _pairs(select(answers, compression=name), policy, rival) for name, rival in rivals.items()}
    prompts = sorted(next(iter(pairs.values())))
    for name, pair in pairs.items():
        if sorted(pair) != prompts:
            raise InputError(f"{policy} did not answer the same prompts at {name} as at {next(iter(pairs))}: finish "
                             "the run first")
    # [R, P] how often a resample holds each prompt; the first row is the sample itself.
    draws = np.vstack([np.ones(len(prompts)), _draws([task for task, _ in prompts])])
    logs = np.zeros(len(draws))
    for pair in pairs.values():
        totals = draws @ np.array([pair[prompt] for prompt in prompts])
        logs += np.log(totals[:, 0] * totals[:, 3] / (totals[:, 1] * totals[:, 2])) / len(pairs)
    observed, resampled = logs[0], logs[1:]
    if len({task for task, _ in prompts}) == len(prompts):
        return Test(float(np.exp(observed)), None, None, None)
    lower, upper = np.exp(np.quantile(resampled, (0.025, 0.975)))
    return Test(float(np.exp(observed)), float(lower), float(upper), float((resampled <= 0).mean()))


def _pairs(answers, policy, rival):
    """{(task, prompt): (tokens, seconds of the policy, tokens, seconds of its rival)}."""
    own, other = ({(answer.task, answer.prompt): (answer.tokens, answer.seconds)
                   for answer in select(answers, policy=name)} for name in (policy, rival))
    if own.keys() != other.keys() or not own:
        raise InputError(f"{policy} and {rival} did not answer the same prompts: finish the run first")
    return {prompt: own[prompt] + other[prompt] for prompt in own}


def _draws(tasks):
    """How often each of the prompts [P] of these tasks is drawn [R, P], each task keeping its number of prompts."""
    random, tasks = np.random.default_rng(SEED), np.array(tasks)
    draws = np.zeros((RESAMPLES, len(tasks)))
    for task in np.unique(tasks):
        members = np.flatnonzero(tasks == task)
        draws[:, members] = random.multinomial(len(members), np.full(len(members), 1 / len(members)), RESAMPLES)
    return draws


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
