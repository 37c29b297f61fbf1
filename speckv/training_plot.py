"""How good a drafter became over its training, drawn from the history that distilling keeps."""

import importlib.util
from pathlib import Path

from speckv.files import atomic_file

PLOT_FILE = "training.png"
INSTALL = "pip install 'speckv[plots]'"


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(history: list, file: Path, title: str) -> bool:
    """Write a PNG of held-out match and accepted tokens over the tokens trained on; False without matplotlib."""
    if not can_draw() or not history:
        return False
    from matplotlib.figure import Figure  # not pyplot, which would look for a screen

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    matches, accepted = figure.subplots(1, 2)
    unit, divisor = ("millions", 1e6) if history[-1]["tokens"] >= 1e6 else ("thousands", 1e3)
    tokens = [entry["tokens"] / divisor for entry in history]
    for axes, key, factor, label in ((matches, "match_by_depth", 100, "token {} of a draft"),
                                     (accepted, "accepted_by_gamma", 1, "drafts of {}")):
        for number, curve in enumerate(zip(*(entry[key] for entry in history), strict=True), start=1):
            axes.plot(tokens, [factor * value for value in curve], marker="o", markersize=3, linewidth=1.5,
                      label=label.format(number))
        axes.set_xlabel(f"tokens trained on ({unit}, repeats counted)")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right")
    matches.set_title("drafter's first choice is the target's")
    matches.set_ylabel("held-out positions (%)")
    accepted.set_title("draft tokens accepted, greedy target")
    accepted.set_ylabel("held-out mean (tokens a step)")
    figure.suptitle(title)
    with atomic_file(file) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    return True
