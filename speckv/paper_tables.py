"""What `speckv paper` prints for people: the paper's tables with the published figures beside, and the honest one."""

from rich.console import Console
from rich.table import Table

from speckv.paper_fit import DIFFERENCE_RESAMPLES, improvement
from speckv.paper_records import POLICIES

TABLE_WIDTH = 124
HONEST_COLUMNS = ("policy", "mean γ", "tokens/step", "ms/step")


def print_tables(report) -> None:
    """Print a speckv.paper.Report."""
    console = Console(highlight=False)
    console.width = max(console.width, TABLE_WIDTH)  # folded to 80 columns, as in a log, they cannot be read
    for table in (_table1(report), _table2(report), _figures(report), _honest(report), _measured(report)):
        console.print(table)
        console.print()
    console.print(_conclusion(report))


def _table(title, *columns, text=1):
    table = Table(title=title, title_justify="left", title_style="bold")
    for position, column in enumerate(columns):
        table.add_column(column, justify="left" if position < text else "right", no_wrap=True)
    return table


def _beside(recomputed, published, digits=2):
    return f"{recomputed:.{digits}f} [dim]({published:.{digits}f})[/]"


def _table1(report):
    recomputed, published, steps = report.recomputed, report.published, report.steps
    table = _table("Table 1: tokens per step that the predictor expects of itself, recomputed (published)",
                   "compression", *POLICIES.values())
    of_test = steps.compression[recomputed.test]
    for compression, row in published.table1.items():
        table.add_row(compression, *(_beside(recomputed.expected[policy][of_test == compression].mean(), row[policy])
                                     for policy in POLICIES))
    table.add_section()
    table.add_row("all", *(_beside(recomputed.tokens_per_step[policy], published.tokens_per_step[policy])
                           for policy in POLICIES), style="bold")
    table.add_row("95 % interval", *("{:.3f} – {:.3f}".format(*recomputed.intervals[policy]) for policy in POLICIES))
    table.add_row("[dim](published)[/]", *("[dim]({:.3f} – {:.3f})[/]".format(*published.intervals[policy])
                                           for policy in POLICIES))
    return table


def _table2(report):
    recomputed, steps = report.recomputed, report.steps
    table = _table("Table 2: by task, recomputed (published)",
                   "compression", "task", "Fixed-4", "SpecKV-fast", "gain %", text=2)
    of_test = [values[recomputed.test] for values in (steps.compression, steps.task)]
    for (compression, task), (fixed, speckv, gain) in report.published.table2.items():
        here = (of_test[0] == compression) & (of_test[1] == task)
        means = [recomputed.expected[policy][here].mean() for policy in ("fixed-4", "speckv-fast")]
        table.add_row(compression, task, _beside(means[0], fixed), _beside(means[1], speckv),
                      _beside(improvement(*means), gain, 1))
    return table


def _figures(report):
    recomputed, published = report.recomputed, report.published
    p_value = f"{recomputed.p_value:.4f}" if recomputed.p_value else f"< 1/{DIFFERENCE_RESAMPLES:,}"
    rows = [
        ("SpecKV-fast over Fixed-4, %", _beside(recomputed.improvement_pct, published.improvement_pct, 1)),
        ("correlation on test steps, MLP-16", _beside(recomputed.correlation, published.correlation, 4)),
        ("correlation on test steps, RF-100", _beside(recomputed.forest_correlation, published.forest_correlation, 4)),
        ("MSE on test steps, MLP-16", _beside(recomputed.mse, published.mse, 4)),
        ("p, paired bootstrap, one-sided", f"{p_value} [dim]({published.p_value})[/]"),
    ]
    table = _table("Figures, recomputed (published)", "figure", "value")
    for row in rows:
        table.add_row(*row)
    return table


def _honest(report):
    honest = report.honest
    compressions = list(honest.costs)
    table = _table("The same policies by what was logged: tokens per second at each compression, and over all",
                   *HONEST_COLUMNS, *compressions, "all", "against fixed-4", "95 %")
    baseline = honest.scores["fixed-4"]["all"].tokens_per_second
    for policy, scores in honest.scores.items():
        one = scores["all"]
        table.add_row(
            policy, f"{honest.mean_gamma[policy]:.2f}", f"{one.tokens_per_step:.2f}", f"{one.ms_per_step:.1f}",
            *(f"{scores[name].tokens_per_second:.1f}" for name in (*compressions, "all")),
            f"{improvement(baseline, one.tokens_per_second):+.1f} %", _interval(honest.gains[policy]),
            style=_style(policy))
    return table


def _interval(ends):
    return "{:+.1f} to {:+.1f}".format(*ends)


def _style(policy):
    return "bold" if policy.startswith("speckv") else None


def _measured(report):
    honest = report.honest
    gammas = list(honest.logged)
    table = _table("Measured tokens per second, mean over texts, and the times fitted to them",
                   "compression", *(f"γ = {gamma}" for gamma in gammas), "draft ms a token", "verify ms a step")
    for name, (draft_ms, verify_ms) in honest.costs.items():
        fastest = max(honest.measured[name].values())
        table.add_row(name, *(f"[bold]{speed:.1f}[/]" if speed == fastest else f"{speed:.1f}"
                              for speed in honest.measured[name].values()), f"{draft_ms:.1f}", f"{verify_ms:.1f}")
    table.add_section()
    table.add_row("tokens a step", *(f"{tokens:.2f}" for tokens in honest.logged.values()), "", "")
    return table


def _conclusion(report):
    recomputed, honest = report.recomputed, report.honest
    largest = recomputed.chosen.max()
    real = {policy: scores["all"] for policy, scores in honest.scores.items()}
    gain = improvement(real["fixed-4"].tokens_per_second, real["speckv-fast"].tokens_per_second)
    return (
        f"SpecKV-fast is promised {recomputed.improvement_pct:+.1f} % by the predictor it maximises, in tokens per "
        f"step, and takes γ = {largest} in {(recomputed.chosen == largest).mean():.0%} of its decisions. By the logged "
        f"tokens and the time they took it is {gain:+.1f} % tokens per second against fixed-4, "
        f"{_interval(honest.gains['speckv-fast'])} with 95 % confidence over prompts. Its signals are of the tokens "
        "whose number it decides; with those of the step before (speckv-causal) a loop could run it, and the "
        f"correlation on prompts left out falls from {honest.correlation['same_step']:.2f} to "
        f"{honest.correlation['step_before']:.2f}. fixed-best is the paper's, the most tokens per step; fixed-fastest "
        "and task-oracle, the most tokens per second, are known in hindsight only.")
