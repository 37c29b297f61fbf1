"""The paper's policies scored by what its records really hold: logged tokens, and the time they took.

The paper scores a policy by its own predictor and in tokens per step, which makes long drafts look free. Here

- a policy's tokens are those logged in the steps whose gamma was the one it would have chosen. Within a compression and
  task a step counts inversely to how many were logged at its gamma, so a policy is not judged by what was logged most;
- a step takes draft_ms * gamma + verify_ms, both fitted per compression to the time the texts took. The time of the
  decision itself is not charged;
- every compression and task is given the same length of text: rates are total tokens over total steps or seconds;
- models are fitted without the prompts on which they choose, all gammas and compressions of a prompt being left out
  together.

The signals of a step describe tokens already drafted at its gamma, so a decoding loop cannot choose that gamma from
them: speckv-fast and speckv-accurate stay in hindsight even here. speckv-causal is what a loop can do: the same MLP
with the signals and the acceptance of the step before; a text's first step drafts 4.
"""

from dataclasses import dataclass

import numpy as np

from speckv.errors import InputError
from speckv.paper_fit import SEED, choose, fit_forest, fit_mlp, improvement, logged_gammas, predict, table_policies
from speckv.paper_records import COMPRESSION_CODES, Runs, Steps

FOLDS = 5
FIRST_GAMMA = 4
RESAMPLES = 5000


@dataclass(frozen=True)
class Score:
    """What a policy really gains: tokens a step, milliseconds a step, tokens a second."""

    tokens_per_step: float
    ms_per_step: float

    @property
    def tokens_per_second(self) -> float:
        return 1000 * self.tokens_per_step / self.ms_per_step


@dataclass(frozen=True)
class Honest:
    """scores[policy][compression or "all"]; costs[compression] = (draft_ms a token, verify_ms a pass)."""

    scores: dict
    gains: dict         # {policy: (lower, upper)}, 95 % of its tokens per second over fixed-4's, in percent
    costs: dict
    logged: dict        # {gamma: tokens a step, over all steps logged at it}
    measured: dict      # {compression: {gamma: tokens per second, mean over texts}}, no model of the time involved
    mean_gamma: dict    # {policy: its mean choice}
    correlation: dict   # of predicted with observed acceptance on prompts left out: same step, step before


def score(steps: Steps, runs: Runs) -> Honest:
    """Score fixed gammas, the paper's policies, and what of them a loop can run."""
    gammas, costs = logged_gammas(steps), fit_costs(runs)
    fixed = {f"fixed-{gamma}": np.full_like(steps.gamma, gamma) for gamma in gammas}
    fast, fast_correlation = left_out(fit_mlp, steps, runs, steps.inputs(), gammas)
    accurate, _ = left_out(fit_forest, steps, runs, steps.inputs(), gammas)
    causal, causal_correlation = left_out(fit_mlp, steps, runs, inputs_before(steps), gammas, steps.position > 0)
    chosen = {**fixed, **table_policies(steps, runs), "fixed-fastest": fastest(steps, gammas, costs),
              "speckv-fast": fast, "speckv-accurate": accurate, "speckv-causal": causal}
    return Honest(
        scores={policy: replay(policy, steps, gamma, costs) for policy, gamma in chosen.items()},
        gains=gain_intervals(steps, runs, chosen, costs),
        costs=costs,
        logged={int(gamma): float(steps.tokens[steps.gamma == gamma].mean()) for gamma in gammas},
        measured={name: {int(gamma): _mean_speed(runs, name, gamma) for gamma in gammas} for name in costs},
        mean_gamma={policy: float(gamma.mean()) for policy, gamma in chosen.items()},
        correlation={"same_step": fast_correlation, "step_before": causal_correlation})


def _mean_speed(runs, compression, gamma):
    here = (runs.compression == compression) & (runs.gamma == gamma)
    return float((1000 * runs.tokens[here] / runs.milliseconds[here]).mean())


def fit_costs(runs: Runs) -> dict:
    """{compression: (draft_ms, verify_ms)} by least squares: a text takes (gamma * draft_ms + verify_ms) * steps."""
    costs = {}
    for compression in sorted(set(runs.compression), key=COMPRESSION_CODES.get):
        here = runs.compression == compression
        drafted_and_verified = np.column_stack([runs.gamma * runs.steps, runs.steps])[here]
        (draft_ms, verify_ms), _, rank, _ = np.linalg.lstsq(drafted_and_verified, runs.milliseconds[here], rcond=None)
        if rank < 2 or draft_ms <= 0 or verify_ms <= 0:
            raise InputError(f"the times of the {compression} texts do not tell the cost of drafting from that of "
                             "verifying: records of at least two gammas are needed")
        costs[str(compression)] = (float(draft_ms), float(verify_ms))
    return costs


def fastest(steps: Steps, gammas: np.ndarray, costs: dict) -> np.ndarray:
    """The fixed gamma [N] with the most tokens per second at each compression, known in hindsight."""
    chosen = np.zeros_like(steps.gamma)
    scores = {gamma: replay("fixed", steps, np.full_like(steps.gamma, gamma), costs) for gamma in gammas}
    for compression in costs:
        chosen[steps.compression == compression] = max(
            gammas, key=lambda gamma: scores[gamma][compression].tokens_per_second)
    return chosen


def inputs_before(steps: Steps) -> np.ndarray:
    """Inputs [N, 7] a loop has before it drafts: the last step's signals, compression, the last step's acceptance,
    gamma. Rows of first steps hold another text's and are not to be used."""
    inputs = steps.inputs()
    before = np.column_stack([inputs[:, :5], steps.acceptance])
    before[1:, :4], before[1:, 5] = inputs[:-1, :4], steps.acceptance[:-1]
    return np.column_stack([before, steps.gamma])


def left_out(fit, steps: Steps, runs: Runs, inputs: np.ndarray, gammas: np.ndarray, usable=None) -> tuple:
    """Gamma [N] chosen by models fitted on other prompts, and the correlation of what they predict with what was seen.

    Where `usable` [N] is False the choice is FIRST_GAMMA.
    """
    from sklearn.model_selection import GroupKFold

    rows = np.arange(len(inputs)) if usable is None else np.flatnonzero(usable)
    prompt = runs.prompt[steps.run[rows]]
    if len(set(prompt)) < FOLDS:
        raise InputError(f"the records hold {len(set(prompt))} prompts: at least {FOLDS} are needed to leave some out")
    chosen, predicted = np.full_like(steps.gamma, FIRST_GAMMA), np.zeros(len(inputs))
    for train, test in GroupKFold(FOLDS).split(rows, groups=prompt):
        model = fit(inputs[rows[train]], steps.acceptance[rows[train]])
        chosen[rows[test]], _ = choose(model, inputs[rows[test], :-1], gammas)
        predicted[rows[test]] = np.clip(predict(model, inputs[rows[test]]), 0, 1)
    return chosen, float(np.corrcoef(predicted[rows], steps.acceptance[rows])[0, 1])


def replay(policy: str, steps: Steps, chosen: np.ndarray, costs: dict) -> dict:
    """{compression or "all": Score} of a policy that would choose gamma `chosen` [N]."""
    cells = {compression: [_replay_cell(policy, steps, chosen, compression, task, costs[compression])
                           for task in np.unique(steps.task[steps.compression == compression])]
             for compression in costs}
    return {name: _same_text(scores) for name, scores in cells.items()} | {
        "all": _same_text([one for scores in cells.values() for one in scores])}


def _replay_cell(policy, steps, chosen, compression, task, cost):
    cell = (steps.compression == compression) & (steps.task == task)
    gamma, tokens, matches = steps.gamma[cell], steps.tokens[cell], (chosen == steps.gamma)[cell]
    if not matches.any():
        raise InputError(f"no step of {compression} {task} was logged at the gamma that {policy} chooses: the records "
                         "are too few to score it")
    _, which, logged = np.unique(gamma, return_inverse=True, return_counts=True)
    weight = (matches / logged[which]) / (matches / logged[which]).sum()
    draft_ms, verify_ms = cost
    return Score(float(weight @ tokens), float(weight @ (gamma * draft_ms + verify_ms)))


def _same_text(scores):
    """All of them writing equally much: steps and time add up, tokens being one each."""
    num_steps = sum(1 / one.tokens_per_step for one in scores)
    milliseconds = sum(one.ms_per_step / one.tokens_per_step for one in scores)
    return Score(len(scores) / num_steps, milliseconds / num_steps)


def gain_intervals(steps: Steps, runs: Runs, chosen: dict, costs: dict) -> dict:
    """{policy: (lower, upper)}: 95 % of what it gains over fixed-4 in tokens per second, in percent, over all cells.

    Prompts are drawn anew within each task, the same ones for both policies, and with a prompt all its texts.
    """
    random = np.random.RandomState(SEED)
    prompts = np.unique(runs.prompt)
    task_of = dict(zip(runs.prompt, runs.task, strict=True))
    tasks = np.array([task_of[prompt] for prompt in prompts])
    draws = np.zeros((RESAMPLES, len(prompts)))
    for task in np.unique(tasks):
        members = np.flatnonzero(tasks == task)
        draws[:, members] = random.multinomial(len(members), np.full(len(members), 1 / len(members)), RESAMPLES)
    speeds = {policy: speeds_of(steps, runs, gamma, costs, draws) for policy, gamma in chosen.items()}
    intervals = {}
    for policy, speed in speeds.items():
        gains = improvement(speeds["fixed-4"], speed)
        # A draw in which the policy's gamma was never logged says nothing.
        intervals[policy] = tuple(np.percentile(gains[np.isfinite(gains)], [2.5, 97.5]).tolist())
    return intervals


def speeds_of(steps: Steps, runs: Runs, chosen: np.ndarray, costs: dict, draws: np.ndarray) -> np.ndarray:
    """Tokens per second [R] over all cells, as replay gives them, of R draws; draws [R, P] counts each prompt."""
    prompt = np.unique(runs.prompt, return_inverse=True)[1][steps.run]

    def drawn(which, values=None):
        return draws @ np.bincount(prompt[which], values, draws.shape[1])

    milliseconds, num_cells = np.zeros(len(draws)), 0
    for compression, (draft_ms, verify_ms) in costs.items():
        here = steps.compression == compression
        for task in np.unique(steps.task[here]):
            cell = here & (steps.task == task)
            cell_tokens, cell_ms = np.zeros(len(draws)), np.zeros(len(draws))
            for gamma in np.unique(steps.gamma[cell]):
                logged = cell & (steps.gamma == gamma)
                matches = logged & (chosen == gamma)
                num_logged = np.maximum(drawn(logged), 1)
                cell_tokens += drawn(matches, steps.tokens[matches]) / num_logged
                cell_ms += drawn(matches) / num_logged * (gamma * draft_ms + verify_ms)
            with np.errstate(invalid="ignore"):
                milliseconds += cell_ms / cell_tokens
            num_cells += 1
    return 1000 * num_cells / milliseconds
