"""The paper, recomputed from its own records: its figures beside what is published, then what its policies gain."""

import json
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from speckv import paper_fit, paper_honest, paper_records
from speckv.controller import check_name, save_controller
from speckv.paper_fit import Recomputed, improvement
from speckv.paper_honest import Honest
from speckv.paper_records import Published
from speckv.paper_tables import print_tables


@dataclass(frozen=True, eq=False)
class Report:
    """Everything `speckv paper` tells of a folder of records."""

    steps: paper_records.Steps
    published: Published
    recomputed: Recomputed
    honest: Honest


def report(folder: Path) -> Report:
    """Read, fit and score; raises InputError where the records do not allow it, or scikit-learn is missing."""
    paper_fit.check_installed()
    steps, runs, published = paper_records.read(folder)
    return Report(steps, published, paper_fit.recompute(steps, runs), paper_honest.score(steps, runs))


def as_dict(made: Report) -> dict:
    """What --json prints."""
    recomputed, published, honest = made.recomputed, made.published, made.honest
    speeds = {policy: {name: _rounded(score.tokens_per_second) for name, score in scores.items()}
              for policy, scores in honest.scores.items()}
    return {
        "recomputed": {
            "tokens_per_step": _rounded(recomputed.tokens_per_step),
            "improvement_pct": recomputed.improvement_pct,
            "correlation": _rounded(recomputed.correlation),
            "mse": _rounded(recomputed.mse),
            "p_value": recomputed.p_value,
        },
        "published": {
            "tokens_per_step": published.tokens_per_step,
            "improvement_pct": published.improvement_pct,
            "correlation": published.correlation,
            "mse": published.mse,
            "p_value": published.p_value,
        },
        "honest": {
            "tokens_per_step": {policy: _rounded(scores["all"].tokens_per_step)
                                for policy, scores in honest.scores.items()},
            "ms_per_step": {name: {"draft_ms_a_token": _rounded(draft_ms), "verify_ms": _rounded(verify_ms)}
                            for name, (draft_ms, verify_ms) in honest.costs.items()},
            "tokens_per_second": speeds,
            "improvement_pct": {policy: round(improvement(speeds["fixed-4"]["all"], speed["all"]), 1)
                                for policy, speed in speeds.items()},
            "improvement_interval": {policy: [round(end, 1) for end in ends] for policy, ends in honest.gains.items()},
            "mean_gamma": _rounded(honest.mean_gamma),
            "correlation": _rounded(honest.correlation),
            "logged_tokens_per_step": {f"fixed-{gamma}": _rounded(tokens) for gamma, tokens in honest.logged.items()},
            "measured_tokens_per_second": {
                name: {f"fixed-{gamma}": _rounded(speed) for gamma, speed in by_gamma.items()}
                for name, by_gamma in honest.measured.items()},
        },
    }


def _rounded(value):
    return {key: _rounded(one) for key, one in value.items()} if isinstance(value, dict) else round(value, 4)


def run(folder: Path, as_json: bool = False, save: Path | None = None) -> Report:
    """Print the report of a folder of records, and keep the retrained controller where `save` says."""
    if save is not None:
        check_name(save)
    with Console(stderr=True).status("fitting the paper's models to its records"):
        made = report(folder)
    if save is not None:
        save_controller(made.recomputed.controller, save)
    if as_json:
        print(json.dumps(as_dict(made), indent=2))
    else:
        print_tables(made)
    return made
