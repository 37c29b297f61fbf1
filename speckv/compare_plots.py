"""Plots of a comparison: speed, chosen gamma, where time goes, predicted against observed acceptance."""

from pathlib import Path

import numpy as np

from speckv.evaluate import select
from speckv.training_plot import can_draw

BINS = 8  # of predicted acceptance, of equal numbers of steps
SPEED, GAMMA, TIME, CALIBRATION = "speed.png", "gamma.png", "time.png", "calibration.png"


def draw(result: dict, answers: list, folder: Path) -> list:
    """Write the plots into folder and return their names; none without matplotlib."""
    if not can_draw():
        return []
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as pyplot

    drawn = []
    for name, plot in ((SPEED, _speed), (GAMMA, _gamma), (TIME, _time), (CALIBRATION, _calibration)):
        figure = plot(pyplot, result, answers)
        if figure is not None:
            figure.savefig(Path(folder) / name, dpi=120, bbox_inches="tight")
            pyplot.close(figure)
            drawn.append(name)
    return drawn


def _speed(pyplot, result, answers):
    compressions = result["compressions"]
    names = list(next(iter(compressions.values()))["policies"])
    figure, axes = pyplot.subplots(figsize=(8, 0.42 * len(names) + 1.5))
    height = 0.8 / len(compressions)
    for i, (compression, one) in enumerate(compressions.items()):
        axes.barh(np.arange(len(names)) + i * height, [one["policies"][name]["ratio"]["all"] for name in names],
                  height, label=compression)
    axes.set_yticks(np.arange(len(names)) + 0.4 - height / 2, names)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("tokens per second, in multiples of plain decoding")
    axes.legend(title="target held in", loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _gamma(pyplot, result, answers):
    if "adaptive" not in result["settings"]["policies"]:
        return None
    figure, axes = pyplot.subplots(figsize=(7, 3.5))
    compressions = result["compressions"]
    width = 0.8 / len(compressions)
    for i, (compression, one) in enumerate(compressions.items()):
        by_task = one["policies"]["adaptive"]["gamma_by_task"]
        axes.bar(np.arange(len(by_task)) + i * width, list(by_task.values()), width, label=compression)
    axes.set_xticks(np.arange(len(by_task)) + 0.4 - width / 2, list(by_task))
    axes.set_ylabel("mean draft tokens a step (γ)")
    axes.set_title("what 'adaptive' chose, one controller")
    axes.legend(title="target held in", loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _time(pyplot, result, answers):
    compressions = result["compressions"]
    names = list(next(iter(compressions.values()))["policies"])
    figure, all_axes = pyplot.subplots(1, len(compressions), figsize=(3.6 * len(compressions), 0.3 * len(names) + 1.8),
                                       sharey=True, squeeze=False)
    for axes, (compression, one) in zip(all_axes[0], compressions.items(), strict=True):
        left = np.zeros(len(names))
        for part in ("verify", "draft", "prompt", "rest"):
            shares = np.array([100 * one["policies"][name]["share_of_time"][part] for name in names])
            axes.barh(names, shares, left=left, label=part)
            left += shares
        axes.set_title(compression)
        axes.set_xlabel("% of the time")
        axes.set_xlim(0, 100)
    all_axes[0][0].invert_yaxis()
    all_axes[0][-1].legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _calibration(pyplot, result, answers):
    steps = [step for answer in select(answers, policy="adaptive") for step in answer.steps if step[5] is not None]
    if len(steps) < 2 * BINS:
        return None
    predicted = np.array([step[5] / step[0] for step in steps])
    observed = np.array([step[1] / step[0] for step in steps])
    order = np.array_split(predicted.argsort(), BINS)
    figure, axes = pyplot.subplots(figsize=(4.5, 4.2))
    axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
    middle = [observed[rows].mean() for rows in order]
    error = [observed[rows].std() / len(rows) ** 0.5 for rows in order]
    axes.errorbar([predicted[rows].mean() for rows in order], middle, error, marker="o", linestyle="none")
    axes.set_xlabel("predicted acceptance rate of a step")
    axes.set_ylabel("observed, mean ± standard error")
    axes.set_title(f"{len(steps):,} steps, correlation {np.corrcoef(predicted, observed)[0, 1]:.2f}")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    return figure
