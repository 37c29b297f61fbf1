"""The SpecKV paper's step records, read from its released CSV files and checked, and its published figures."""

import csv
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from speckv.errors import InputError

STEPS_FILE = "phase2_step_results.csv"
RUNS_FILE = "phase2_experiment_results.csv"
NUMBERS_FILE = "paper_numbers.json"
TABLE1_FILE = "paper_table1_policy_comparison.csv"
TABLE2_FILE = "paper_table2_detailed_breakdown.csv"
INTERVALS_FILE = "paper_confidence_intervals.csv"
FILES = (STEPS_FILE, RUNS_FILE, NUMBERS_FILE, TABLE1_FILE, TABLE2_FILE, INTERVALS_FILE)
COMPRESSION_CODES = {"fp16": 0, "int8": 1, "nf4": 2}  # the paper's fifth input
# The names of --json, and the paper's own.
POLICIES = {"fixed-4": "Fixed-4", "fixed-best": "Fixed-best", "task-oracle": "Task-oracle",
            "speckv-fast": "SpecKV-fast", "speckv-accurate": "SpecKV-accurate"}


@dataclass(frozen=True, eq=False)
class Steps:
    """One entry a speculation step, in the order logged; all arrays [N].

    signals [N, 4] are mean entropy, mean confidence, max entropy, min confidence of the tokens drafted in that very
    step. acceptance is accepted over the tokens really drafted, fewer than gamma where a text ended; run is the index
    of the step's text in Runs, and position its place in that text.
    """

    compression: np.ndarray
    task: np.ndarray
    gamma: np.ndarray
    tokens: np.ndarray
    acceptance: np.ndarray
    signals: np.ndarray
    run: np.ndarray
    position: np.ndarray

    def inputs(self) -> np.ndarray:
        """The MLP's six inputs [N, 6]: the signals, the compression's code, gamma."""
        codes = [COMPRESSION_CODES[name] for name in self.compression]
        return np.column_stack([self.signals, codes, self.gamma])


@dataclass(frozen=True, eq=False)
class Runs:
    """One entry a text written: one prompt at one compression and one gamma; all arrays [R]."""

    compression: np.ndarray
    task: np.ndarray
    gamma: np.ndarray
    prompt: np.ndarray
    tokens: np.ndarray
    steps: np.ndarray
    milliseconds: np.ndarray


@dataclass(frozen=True)
class Published:
    """What the paper prints: tokens per step by policy, in all and by compression; Table 2; intervals; figures."""

    tokens_per_step: dict
    table1: dict       # {compression: {policy: tokens per step}}
    table2: dict       # {(compression, task): (fixed-4, speckv-fast, improvement in %)}
    intervals: dict    # {policy: (lower, upper)}
    improvement_pct: float
    correlation: float
    forest_correlation: float
    mse: float
    p_value: float


def read(folder: Path) -> tuple:
    """Steps, Runs and Published of a folder; raises InputError naming file, line and way out where one does not fit."""
    folder = Path(folder)
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise InputError(f"{folder} has no {', '.join(missing)}: give the folder that holds the results released with "
                         "the SpecKV paper (arXiv 2605.02888)")
    runs = _runs(folder / RUNS_FILE)
    return _steps(folder / STEPS_FILE, runs), runs, _published(folder)


def _rows(file, parse):
    """What `parse` makes of each row of a CSV file, given as a dictionary."""
    parsed = []
    try:
        with open(file, newline="", encoding="utf-8") as stream:
            reader = csv.DictReader(stream)
            for row in reader:
                parsed.append(parse(row))
    except KeyError as error:
        raise InputError(f"{file}, line {reader.line_num}: no column or value {error}") from error
    except (ValueError, TypeError, csv.Error) as error:
        raise InputError(f"{file}, line {reader.line_num}: {error}") from error
    if not parsed:
        raise InputError(f"{file} holds no records")
    return parsed


def _number(row, name, low=0.0, high=float("inf")):
    value = float(row[name])
    if not low <= value <= high or value == float("inf"):
        raise ValueError(f"{name} is {row[name]}: it must lie between {low:g} and {high:g}")
    return value


def _whole(row, name, low):
    value = int(row[name])
    if value < low:
        raise ValueError(f"{name} is {value}: it must be {low} or more")
    return value


def _cell(row):
    if row["compression"] not in COMPRESSION_CODES:
        raise ValueError(f"compression is {row['compression']!r}: it must be one of {', '.join(COMPRESSION_CODES)}")
    if not row["task"]:
        raise ValueError("the task is missing")
    return row["compression"], row["task"], _whole(row, "gamma", 1)


def _runs(file):
    rows = _rows(file, lambda row: (*_cell(row), row["prompt"], _whole(row, "num_tokens", 1),
                                    _whole(row, "num_steps", 1), 1000 * _number(row, "elapsed_sec", 1e-9)))
    return Runs(*map(np.array, zip(*rows, strict=True)))


def _step(row):
    gamma = _whole(row, "gamma", 1)
    accepted, tokens = _whole(row, "accepted", 0), _whole(row, "tokens_produced", 1)
    if accepted > gamma or tokens != accepted + 1:
        raise ValueError(f"{accepted} accepted of {gamma} drafted made {tokens} tokens: a step makes one more than it "
                         "accepts")
    signals = (_number(row, "mean_draft_entropy"), _number(row, "mean_draft_confidence", 0, 1),
               _number(row, "max_draft_entropy"), _number(row, "min_draft_confidence", 0, 1))
    return *_cell(row), tokens, _number(row, "acceptance_rate", 0, 1), signals, _whole(row, "step", 0)


def _steps(file, runs):
    rows = _rows(file, _step)
    *columns, position = map(np.array, zip(*rows, strict=True))
    # The released steps do not name their text. They come text by text in the order of the runs, each from step 0 on.
    run = np.cumsum(position == 0) - 1
    steps = Steps(*columns, run=run, position=position)
    counts = np.bincount(run[run >= 0], minlength=len(runs.steps))
    in_order = (position[0] == 0 and np.array_equal(counts, runs.steps)
                and all(np.array_equal(getattr(steps, name), getattr(runs, name)[run])
                        for name in ("compression", "task", "gamma"))
                and np.array_equal(position, np.concatenate([np.arange(count) for count in counts])))
    if not in_order:
        raise InputError(f"{file} does not hold the steps of {RUNS_FILE}, text by text and in its order: take both "
                         "from one release")
    return steps


def _published(folder):
    table1 = dict(_rows(folder / TABLE1_FILE, lambda row: (
        row["compression"], {policy: _number(row, name) for policy, name in POLICIES.items()})))
    table2 = dict(_rows(folder / TABLE2_FILE, lambda row: (
        (row["compression"], row["task"]),
        tuple(_number(row, name, -100) for name in ("Fixed-4", "SpecKV", "improvement_pct")))))
    intervals = dict(_rows(folder / INTERVALS_FILE, lambda row: (
        row["policy"], (_number(row, "ci_lower"), _number(row, "ci_upper")))))
    try:
        numbers = json.loads((folder / NUMBERS_FILE).read_text(encoding="utf-8"))
        predictor = numbers["predictor"]
        return Published(
            table1.pop("Overall"), table1, table2, {policy: intervals[name] for policy, name in POLICIES.items()},
            float(numbers["results"]["overall_improvement_pct"]), float(predictor["fast_test_corr"]),
            float(predictor["reference_corr"]), float(predictor["fast_test_mse"]),
            float(numbers["statistical_test"]["p_value"]))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{folder}: the published figures in {NUMBERS_FILE}, {TABLE1_FILE} and {INTERVALS_FILE} "
                         f"cannot be read ({error!r})") from error
