"""Token and step records on disk: one schema, in Parquet files; the step records also as the paper's CSV.

Every record names the text it comes from: `sequence` is the text's number among all that were written together,
`prompt` that of its prompt within the task. gamma is the length that was asked for, and `drafted` what was really
drafted: less where a text was about to end, or where the drafter had nothing to propose.
"""

import csv
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from speckv.errors import InputError
from speckv.files import atomic_file

OF_A_TEXT = {"sequence": "int64", "prompt": "int64", "task": "string", "compression": "string", "drafter": "string",
             "temperature": "double", "gamma": "int64"}
TOKEN_COLUMNS = OF_A_TEXT | {"step": "int64", "position": "int64", "entropy": "double", "confidence": "double",
                             "is_estimate": "bool", "accepted": "bool"}
# Of the draft tokens of a step; empty where nothing was drafted.
STEP_SIGNALS = ("mean_draft_entropy", "mean_draft_confidence", "max_draft_entropy", "min_draft_confidence")
STEP_COLUMNS = OF_A_TEXT | {"step": "int64", "drafted": "int64", "accepted": "int64", "acceptance_rate": "double",
                            "tokens_produced": "int64"} | dict.fromkeys(STEP_SIGNALS, "double") | {
                                "draft_ms": "double", "verify_ms": "double"}
# As in phase2_step_results.csv of the release of arXiv 2605.02888.
PAPER_COLUMNS = ("compression", "gamma", "task", "step", "accepted", "acceptance_rate", "tokens_produced",
                 *STEP_SIGNALS)
CSV_DECIMALS = 6


@dataclass(frozen=True)
class Text:
    """What all records of one text have in common."""

    sequence: int
    prompt: int
    task: str
    compression: str
    drafter: str
    temperature: float
    gamma: int


class Records(NamedTuple):
    """Two pyarrow tables, with TOKEN_COLUMNS and STEP_COLUMNS."""

    tokens: object
    steps: object


def make_records(text: Text, steps) -> Records:
    """The records of a text from its StepRecords.

    A token row is accepted if it stands in the text; position counts from 1 within the step. Of the tokens behind the
    first that is not accepted the target said nothing, and those behind an accepted end of the text are left out: so
    that first one was always tried, and rejected.
    """
    tokens, rows = [], []
    for number, step in enumerate(steps):
        has_ended_in_draft = step.tokens == step.accepted
        for position, signal in enumerate(step.signals[:step.accepted if has_ended_in_draft else None], start=1):
            tokens.append(asdict(text) | {
                "step": number, "position": position, "entropy": signal.entropy, "confidence": signal.confidence,
                "is_estimate": signal.is_estimate, "accepted": position <= step.accepted})
        rows.append(asdict(text) | {
            "step": number, "drafted": step.gamma, "accepted": step.accepted, "acceptance_rate": step.acceptance_rate,
            "tokens_produced": step.tokens, "mean_draft_entropy": step.mean_entropy,
            "mean_draft_confidence": step.mean_confidence, "max_draft_entropy": step.max_entropy,
            "min_draft_confidence": step.min_confidence, "draft_ms": step.draft_ms, "verify_ms": step.verify_ms})
    table = _pyarrow().Table.from_pylist
    return Records(table(tokens, _schema(TOKEN_COLUMNS)), table(rows, _schema(STEP_COLUMNS)))


def join(parts) -> Records:
    """The records of several texts, in the order given."""
    parts = [Records(_schema(TOKEN_COLUMNS).empty_table(), _schema(STEP_COLUMNS).empty_table()), *parts]
    concatenated = _pyarrow().concat_tables
    return Records(concatenated([part.tokens for part in parts]), concatenated([part.steps for part in parts]))


def write_table(table, file: Path) -> None:
    """Write token or step records to a Parquet file, atomically, with checksums."""
    parquet = _pyarrow().parquet
    with atomic_file(file) as temporary:
        parquet.write_table(table, temporary, write_page_checksum=True)


def read_tokens(file: Path):
    """Token records of a Parquet file; raises InputError where it holds no such thing, or is damaged."""
    return _read(file, "token", TOKEN_COLUMNS)


def read_steps(file: Path):
    """Step records of a Parquet file; raises InputError where it holds no such thing, or is damaged."""
    return _read(file, "step", STEP_COLUMNS)


def write_csv(steps, file: Path) -> None:
    """Write step records as CSV with the paper's columns, atomically; signals of a step without a draft are empty.

    compression is written as it is: "bf16" where the paper has "fp16".
    """
    with atomic_file(file) as temporary, open(temporary, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(PAPER_COLUMNS)
        for row in steps.select(PAPER_COLUMNS).to_pylist():
            writer.writerow(round(value, CSV_DECIMALS) if isinstance(value, float) else value
                            for value in row.values())


def check_installed() -> None:
    """Raise InputError where pyarrow is missing."""
    _pyarrow()


def _pyarrow():
    """pyarrow, with its Parquet part; loaded when first needed, as most of speckv does without."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError("records are kept in Parquet files, which takes pyarrow: pip install 'speckv[records]'"
                         ) from None
    return pyarrow


def _schema(columns):
    pyarrow = _pyarrow()
    return pyarrow.schema([pyarrow.field(name, pyarrow.type_for_alias(kind), nullable=name in STEP_SIGNALS)
                           for name, kind in columns.items()])


def _read(file, kind, columns):
    pyarrow = _pyarrow()
    if not Path(file).is_file():
        raise InputError(f"{file} is no file: give a Parquet file of {kind} records that 'speckv profile' wrote")
    try:
        with pyarrow.parquet.ParquetFile(file, page_checksum_verification=True) as stored:
            table = stored.read()
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{file} is damaged, or no Parquet file ({error}): make it anew with 'speckv profile'"
                         ) from error
    problems = _problems(table, columns)
    if problems:
        raise InputError(f"{file} does not hold {kind} records of this version ({'; '.join(problems)}): make it anew "
                         "with 'speckv profile'")
    return table.select(list(columns)).cast(_schema(columns))


def _problems(table, columns):
    """What keeps a table from being records with these columns."""
    found = {field.name: field.type for field in table.schema}
    wanted = {field.name: field.type for field in _schema(columns)}
    problems = [f"column {name} is missing" for name in wanted if name not in found]
    problems += [f"column {name} is unknown" for name in found if name not in wanted]
    problems += [f"column {name} is {found[name]}, not {wanted[name]}" for name in wanted
                 if name in found and found[name] != wanted[name]]
    if len(table.schema) != len(found):
        problems.append("a column is there twice")
    return problems or [f"column {name} has empty entries" for name in wanted
                        if name not in STEP_SIGNALS and table[name].null_count]
