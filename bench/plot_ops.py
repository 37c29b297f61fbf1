"""Draws what bench/run.py measured: draft_sample against the vocabulary, and the ops over their floors."""

from speckv.files import atomic_file

PLOT = "ops.png"
GOAL = 1.6  # times the floor, see docs/limits.md


def draw(groups, file):
    """A PNG from run.groups()."""
    from matplotlib.figure import Figure  # not pyplot, which would look for a screen

    figure = Figure(figsize=(14, 6.5), layout="constrained")
    greedy, sampled, over = figure.subplots(1, 3, width_ratios=(1, 1, 1.1))
    for axes, mode in ((greedy, "greedy"), (sampled, "T=0.8")):
        _against_vocabulary(axes, mode, groups.values())
    _over_floor(over, groups)
    with atomic_file(file) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _against_vocabulary(axes, mode, rows):
    rows = [row for row in rows if row["info"].get("op") == "draft_sample" and row["info"]["mode"] == mode
            and row["info"]["dtype"] == "bf16" and row["info"]["rows"] == 1]
    rows.sort(key=lambda row: row["info"]["vocabulary"])
    for name in ("reference", "torch.compile", "speckv", "floor"):
        points = [(row["info"]["vocabulary"], row[name]) for row in rows if name in row]
        if points:
            axes.plot(*zip(*points, strict=True), label=name, marker=None if name == "floor" else "o",
                      color="black" if name == "floor" else None, linestyle="--" if name == "floor" else "-")
    axes.set_yscale("log")
    axes.set_title(f"draft_sample, {mode}, one bf16 row")
    axes.set_xlabel("vocabulary")
    axes.set_ylabel("median of a call (µs)")
    axes.grid(alpha=0.3, which="both")
    if axes.get_legend_handles_labels()[0]:
        axes.legend()


def _over_floor(axes, groups):
    names = [name for name, row in groups.items() if row["floor"] and "speckv" in row]
    ratios = [groups[name]["speckv"] / groups[name]["floor"] for name in names]
    colours = ["tab:blue" if groups[name]["bound"] == "exp" else "tab:green" for name in names]
    axes.barh(names, ratios, color=colours)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.axvline(GOAL, color="tab:red", linewidth=0.8, linestyle="--")
    axes.tick_params(axis="y", labelsize=7)
    axes.invert_yaxis()
    axes.set_title("times the floor (blue: exp, green: reading)", loc="right")
