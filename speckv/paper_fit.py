"""The paper's method as released: split, fit, and the score its tables print, which is the predictor's own."""

from dataclasses import dataclass

import numpy as np
import torch

from speckv.controller import Controller, from_arrays
from speckv.errors import InputError
from speckv.paper_records import Runs, Steps

SEED = 42
HIDDEN = 16
TEST_SHARE = 0.2
MEAN_RESAMPLES, DIFFERENCE_RESAMPLES = 5000, 10_000


@dataclass(frozen=True, eq=False)
class Recomputed:
    """The paper's figures, from its records. expected [n] by policy is what the predictor promises on n test steps."""

    test: np.ndarray        # indices of the test steps
    expected: dict          # {policy: [n]}
    chosen: np.ndarray      # [n], speckv-fast's gamma
    correlation: float
    forest_correlation: float
    mse: float
    intervals: dict         # {policy: (lower, upper)}
    p_value: float
    controller: Controller  # the MLP behind speckv-fast, fitted on every step

    @property
    def tokens_per_step(self) -> dict:
        return {policy: float(expected.mean()) for policy, expected in self.expected.items()}

    @property
    def improvement_pct(self) -> float:
        """speckv-fast over fixed-4 in percent, of means rounded to two decimals and to one itself, as published."""
        means = {policy: round(mean, 2) for policy, mean in self.tokens_per_step.items()}
        return round(improvement(means["fixed-4"], means["speckv-fast"]), 1)


def improvement(baseline: float, value: float) -> float:
    """How much larger than baseline, in percent."""
    return (value / baseline - 1) * 100


def recompute(steps: Steps, runs: Runs) -> Recomputed:
    """Everything the paper prints of its policies.

    One step in five is set aside for testing, stratified by compression and task, though other steps of the same text
    stay in training. Correlation and MSE are of models fitted on the rest. For the tables the models are fitted again
    on every step, test steps included, and every policy is scored on the test steps by what the model expects of the
    gamma it chooses, clip(acceptance, 0, 1) * gamma + 1: the fixed ones and task-oracle by the MLP, speckv-fast by the
    MLP, speckv-accurate by a random forest. The signals are those of the step being decided.
    """
    inputs, gammas = steps.inputs(), logged_gammas(steps)
    train, test = _split(steps)
    mlp, forest = fit_mlp(inputs[train], steps.acceptance[train]), fit_forest(inputs[train], steps.acceptance[train])
    predicted = np.clip(predict(mlp, inputs[test]), 0, 1)
    observed = steps.acceptance[test]
    correlation = float(np.corrcoef(predicted, observed)[0, 1])
    forest_correlation = float(np.corrcoef(np.clip(forest.predict(inputs[test]), 0, 1), observed)[0, 1])
    mse = float(((predicted - observed) ** 2).mean())

    mlp, forest = fit_mlp(inputs, steps.acceptance), fit_forest(inputs, steps.acceptance)
    signals = inputs[test, :-1]
    chosen, by_mlp = choose(mlp, signals, gammas)
    _, by_forest = choose(forest, signals, gammas)
    fixed = {policy: by_mlp[np.arange(len(test)), np.searchsorted(gammas, gamma[test])]
             for policy, gamma in table_policies(steps, runs).items()}
    expected = fixed | {"speckv-fast": by_mlp.max(axis=1), "speckv-accurate": by_forest.max(axis=1)}
    intervals, p_value = bootstrap(expected)
    return Recomputed(test, expected, chosen, correlation, forest_correlation, mse, intervals, p_value, mlp)


def logged_gammas(steps: Steps) -> np.ndarray:
    """The candidates, ascending; 4 must be one."""
    gammas = np.unique(steps.gamma)
    if 4 not in gammas:
        raise InputError(f"the records hold gamma {', '.join(map(str, gammas))}: the baseline, 4, must be among them")
    return gammas


def table_policies(steps: Steps, runs: Runs) -> dict:
    """{policy: gamma [N]} of the policies that look at no signal.

    fixed-best takes the gamma with the most logged tokens a step at its compression; task-oracle the one whose texts
    were written fastest, in mean tokens per second, at its compression and task.
    """
    best, oracle = np.zeros_like(steps.gamma), np.zeros_like(steps.gamma)
    speed = runs.tokens / runs.milliseconds
    for compression in np.unique(steps.compression):
        here, logged = steps.compression == compression, runs.compression == compression
        best[here] = _best(steps.gamma[here], steps.tokens[here])
        for task in np.unique(steps.task[here]):
            cell = logged & (runs.task == task)
            oracle[here & (steps.task == task)] = _best(runs.gamma[cell], speed[cell])
    return {"fixed-4": np.full_like(steps.gamma, 4), "fixed-best": best, "task-oracle": oracle}


def _best(gamma, value):
    return max(np.unique(gamma), key=lambda candidate: value[gamma == candidate].mean())


def _split(steps):
    from sklearn.model_selection import train_test_split

    cells = [f"{compression}_{task}" for compression, task in zip(steps.compression, steps.task, strict=True)]
    try:
        return train_test_split(np.arange(len(cells)), test_size=TEST_SHARE, random_state=SEED, stratify=cells)
    except ValueError as error:
        raise InputError(f"the records are too few to be split by compression and task: {error}") from error


def check_installed() -> None:
    """Raise InputError unless scikit-learn is there."""
    try:
        import sklearn  # noqa: F401
    except ImportError:
        raise InputError("the paper's fits are scikit-learn's: pip install 'speckv[paper]'") from None


def fit_mlp(inputs: np.ndarray, acceptance: np.ndarray) -> Controller:
    """The paper's MLP-16: raw inputs, ReLU, squared error, Adam at scikit-learn's defaults, at most 500 epochs."""
    from sklearn.neural_network import MLPRegressor
    from threadpoolctl import threadpool_limits

    with threadpool_limits(limits=1):  # so that the last digits do not hang on the number of cores
        fitted = MLPRegressor(hidden_layer_sizes=(HIDDEN,), max_iter=500, random_state=SEED).fit(inputs, acceptance)
    return from_arrays(fitted.coefs_[0], fitted.intercepts_[0], fitted.coefs_[1], fitted.intercepts_[1],
                       {"fitted_on": f"{len(inputs)} steps", "epochs": str(fitted.n_iter_)})


def fit_forest(inputs: np.ndarray, acceptance: np.ndarray):
    """The paper's reference model, RF-100: a hundred trees, grown until they know their training steps by heart."""
    from sklearn.ensemble import RandomForestRegressor

    return RandomForestRegressor(n_estimators=100, random_state=SEED).fit(inputs, acceptance)


def predict(model, inputs: np.ndarray) -> np.ndarray:
    """Predicted acceptance [n] of inputs [n, F+1] whose last column is gamma."""
    if not isinstance(model, Controller):
        return model.predict(inputs)
    gammas, which = np.unique(inputs[:, -1].astype(np.int64), return_inverse=True)
    return _plan(model, inputs[:, :-1], gammas)[1][np.arange(len(inputs)), which]


def choose(model, signals: np.ndarray, gammas: np.ndarray) -> tuple:
    """The gamma [n] at which the model expects most tokens a step, and the tokens it expects at every gamma [n, G]."""
    if isinstance(model, Controller):
        chosen, acceptance = _plan(model, signals, gammas)
        return chosen, np.clip(acceptance, 0, 1) * gammas + 1
    acceptance = [predict(model, np.column_stack([signals, np.full(len(signals), gamma)])) for gamma in gammas]
    expected = np.clip(np.stack(acceptance, axis=1), 0, 1) * gammas + 1
    return gammas[expected.argmax(axis=1)], expected


def _plan(controller, signals, gammas):
    """plan_gamma on arrays: it is what decides."""
    signals = torch.from_numpy(np.ascontiguousarray(signals, dtype=np.float32))
    chosen, acceptance = controller.plan(signals, torch.from_numpy(gammas.astype(np.int64)))
    return chosen.numpy(), acceptance.double().numpy()


def bootstrap(expected: dict) -> tuple:
    """95 % intervals of every policy's mean, and the one-sided p-value of speckv-fast not beating fixed-4.

    p is the share of resampled mean differences that are not positive; 0 means fewer than one in 10,000. The generator,
    its seed and the order of the draws are the paper's, so the intervals are too.
    """
    random = np.random.RandomState(SEED)
    intervals = {}
    for policy, values in expected.items():
        means = np.sort(_resampled_means(values, MEAN_RESAMPLES, random))
        intervals[policy] = (float(means[int(0.025 * MEAN_RESAMPLES)]), float(means[int(0.975 * MEAN_RESAMPLES)]))
    differences = _resampled_means(expected["speckv-fast"] - expected["fixed-4"], DIFFERENCE_RESAMPLES, random)
    return intervals, float((differences <= 0).mean())


def _resampled_means(values, resamples, random):
    return np.array([values[random.randint(0, len(values), len(values))].mean() for _ in range(resamples)])
