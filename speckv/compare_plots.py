"""Plots of a comparison: speed, chosen gamma, where time goes, predicted against observed acceptance."""

from pathlib import Path

import numpy as np

from speckv.evaluate import select
from speckv.files import atomic_file
from speckv.training_plot import INSTALL, can_draw

BINS = 8  # of predicted acceptance, of equal numbers of steps
SPEED, GAMMA, TIME, CALIBRATION = "speed.png", "gamma.png", "time.png", "calibration.png"
OURS = "adaptive"
PARTS = ("verify", "draft", "prompt", "rest")  # of the time, in the order of the bars
GROUP = 0.8  # the share of a row that its bars fill


def draw(result: dict, answers: list, folder: Path) -> list:
    """Write the plots that the answers allow into folder and return their names; none without matplotlib."""
    if not can_draw():
        return []
    from matplotlib.figure import Figure  # not pyplot, which would look for a screen

    drawn = []
    for name, plot in ((SPEED, _speed), (GAMMA, _gamma), (TIME, _time), (CALIBRATION, _calibration)):
        figure = Figure(layout="constrained")
        if plot(figure, result, answers):
            with atomic_file(Path(folder) / name) as temporary:
                figure.savefig(temporary, format="png", dpi=120)
            drawn.append(name)
    return drawn


def left_out(drawn: list) -> str:
    """Why some plots are not among those drawn; empty where all are."""
    if not drawn:
        return f"no plots without matplotlib: {INSTALL}, and the same command draws them"
    reasons = {GAMMA: f"'{OURS}' was not among the policies",
               CALIBRATION: f"too few steps of '{OURS}' say how many tokens they expected to be accepted"}
    return "; ".join(f"no {name}: {reason}" for name, reason in reasons.items() if name not in drawn)


def _policies(result):
    return list(next(iter(result["compressions"].values()))["policies"])


def _speed(figure, result, answers):
    compressions, names = result["compressions"], _policies(result)
    figure.set_size_inches(3.4 * len(compressions) + 1.5, 0.3 * len(names) + 1.8)
    all_axes = figure.subplots(1, len(compressions), sharey=True, squeeze=False)[0]
    for axes, (compression, one) in zip(all_axes, compressions.items(), strict=True):
        speeds = [one["policies"][name]["tokens_per_second"] for name in names]
        plain = one["plain_tokens_per_second"]
        colours = ["tab:orange" if name == OURS else "tab:blue" if name == one["best_fixed"] else "lightsteelblue"
                   for name in names]
        bars = axes.barh(names, speeds, color=colours)
        axes.bar_label(bars, [f"{speed / plain:.2f}×" for speed in speeds], padding=3, fontsize=8,
                       bbox={"color": "white", "pad": 0.5})  # where a policy is slower the line runs through the label
        axes.axvline(plain, color="black", linewidth=0.8)
        axes.set_xlim(0, 1.2 * max(speeds))
        axes.set_title(compression)
        axes.set_xlabel("tokens per second")
    all_axes[0].invert_yaxis()
    figure.suptitle(f"orange: {OURS}; dark blue: best fixed γ in hindsight\n×: multiples of plain decoding, the line",
                    fontsize=9)
    return True


def _gamma(figure, result, answers):
    if OURS not in _policies(result):
        return False
    compressions = result["compressions"]
    figure.set_size_inches(7.5, 3.8)
    axes = figure.subplots()
    width = GROUP / len(compressions)
    for i, (compression, one) in enumerate(compressions.items()):
        by_task = one["policies"][OURS]["gamma_by_task"]
        bars = axes.bar(np.arange(len(by_task)) + i * width, list(by_task.values()), width, label=compression)
        axes.bar_label(bars, fmt="%.1f", padding=2, fontsize=8)
    axes.set_xticks(np.arange(len(by_task)) + (GROUP - width) / 2, list(by_task))
    axes.margins(y=0.12)
    axes.set_ylabel("mean draft tokens a step (γ)")
    axes.set_title(f"what '{OURS}' chose")
    figure.legend(title="target held in", loc="outside right upper")
    return True


def _time(figure, result, answers):
    compressions, names = result["compressions"], _policies(result)
    figure.set_size_inches(3.2 * len(compressions) + 2.5, 0.3 * len(names) + 1.4)
    all_axes = figure.subplots(1, len(compressions), sharey=True, squeeze=False)[0]
    for axes, (compression, one) in zip(all_axes, compressions.items(), strict=True):
        left = np.zeros(len(names))
        for part in PARTS:
            shares = np.array([100 * one["policies"][name]["share_of_time"][part] for name in names])
            axes.barh(names, shares, left=left, label=part)
            left += shares
        axes.set_title(compression)
        axes.set_xlabel("share of the time (%)")
        axes.set_xlim(0, 100)
        axes.set_xticks(range(0, 100, 20))  # a 100 would run into the next panel's 0
    all_axes[0].invert_yaxis()
    figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside right upper")
    return True


def _calibration(figure, result, answers):
    steps = [step for answer in select(answers, policy=OURS) for step in answer.steps
             if step[0] and step[5] is not None]
    if len(steps) < 2 * BINS:
        return False
    predicted = np.array([step[5] / step[0] for step in steps])
    observed = np.array([step[1] / step[0] for step in steps])
    bins = np.array_split(predicted.argsort(), BINS)
    figure.set_size_inches(4.8, 4.6)
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
    axes.errorbar([predicted[rows].mean() for rows in bins], [observed[rows].mean() for rows in bins],
                  [observed[rows].std() / len(rows) ** 0.5 for rows in bins], marker="o", linestyle="none", capsize=3)
    title = f"{len(steps):,} steps of '{OURS}'"
    if predicted.std() and observed.std():
        title += f", correlation {np.corrcoef(predicted, observed)[0, 1]:.2f}"
    axes.set_title(title)
    axes.set_xlabel("predicted acceptance rate of a step")
    axes.set_ylabel("observed acceptance rate, mean ± standard error")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_aspect("equal")
    return True
