"""Records on disk are what was recorded; a file that is not is refused by name; the CSV is the paper's."""

import csv
import sys

import pyarrow
import pyarrow.parquet
import pytest
from tiny_models import noisy_copy, prompt_ids, tiny_model

import speckv
from speckv.errors import InputError
from speckv.record_files import (
    STEP_COLUMNS,
    TOKEN_COLUMNS,
    Text,
    join,
    make_records,
    read_steps,
    read_tokens,
    write_csv,
    write_table,
)
from speckv.records import StepRecord
from speckv.signals import Signal

TEXT = Text(sequence=7, prompt=3, task="math", compression="bf16", drafter="lookup", temperature=0.5, gamma=4)
STEPS = [
    StepRecord(4, 1, 2, 10.5, 20.25, (Signal(1.0, 0.5), Signal(3.0, 0.25), Signal(2.0, 0.75), Signal(2.0, 0.5))),
    StepRecord(0, 0, 1, 0.5, 19.0, ()),
    StepRecord(3, 1, 1, 3.0, 21.0, (Signal(0.5, 0.875, True), Signal(0.25, 0.9375, True), Signal(0.125, 1.0, True))),
]
HEADER = ("compression,gamma,task,step,accepted,acceptance_rate,tokens_produced,mean_draft_entropy,"
          "mean_draft_confidence,max_draft_entropy,min_draft_confidence")


@pytest.fixture
def records():
    return make_records(TEXT, STEPS)


def test_records_are_the_steps_and_their_tokens(records):
    assert records.tokens.column_names == list(TOKEN_COLUMNS) and records.steps.column_names == list(STEP_COLUMNS)
    of_text = {"sequence": 7, "prompt": 3, "task": "math", "compression": "bf16", "drafter": "lookup",
               "temperature": 0.5, "gamma": 4}
    assert records.steps.to_pylist() == [
        of_text | {"step": 0, "drafted": 4, "accepted": 1, "acceptance_rate": 0.25, "tokens_produced": 2,
                   "mean_draft_entropy": 2.0, "mean_draft_confidence": 0.5, "max_draft_entropy": 3.0,
                   "min_draft_confidence": 0.25, "draft_ms": 10.5, "verify_ms": 20.25},
        of_text | {"step": 1, "drafted": 0, "accepted": 0, "acceptance_rate": 0.0, "tokens_produced": 1,
                   "mean_draft_entropy": None, "mean_draft_confidence": None, "max_draft_entropy": None,
                   "min_draft_confidence": None, "draft_ms": 0.5, "verify_ms": 19.0},
        of_text | {"step": 2, "drafted": 3, "accepted": 1, "acceptance_rate": 1 / 3, "tokens_produced": 1,
                   "mean_draft_entropy": 0.875 / 3, "mean_draft_confidence": 2.8125 / 3, "max_draft_entropy": 0.5,
                   "min_draft_confidence": 0.875, "draft_ms": 3.0, "verify_ms": 21.0}]
    told = ("step", "position", "entropy", "confidence", "is_estimate", "accepted")
    assert [tuple(row[name] for name in told) for row in records.tokens.to_pylist()] == [
        (0, 1, 1.0, 0.5, False, True), (0, 2, 3.0, 0.25, False, False), (0, 3, 2.0, 0.75, False, False),
        (0, 4, 2.0, 0.5, False, False),
        # The text ended with an accepted token: whether the two behind it would stand, nobody knows.
        (2, 1, 0.5, 0.875, True, True)]
    assert all(row.items() >= of_text.items() for row in records.tokens.to_pylist())


def test_files_give_back_what_was_written(records, tmp_path):
    write_table(records.tokens, tmp_path / "tokens.parquet")
    write_table(records.steps, tmp_path / "steps.parquet")
    assert read_tokens(tmp_path / "tokens.parquet").equals(records.tokens)
    assert read_steps(tmp_path / "steps.parquet").equals(records.steps)
    assert {file.name for file in tmp_path.iterdir()} == {"tokens.parquet", "steps.parquet"}


def test_a_text_without_a_draft_has_files_too(tmp_path):
    records = make_records(TEXT, [STEPS[1]])
    write_table(records.tokens, tmp_path / "tokens.parquet")
    write_table(records.steps, tmp_path / "steps.parquet")
    assert read_tokens(tmp_path / "tokens.parquet").num_rows == 0
    assert read_steps(tmp_path / "steps.parquet").equals(records.steps)


def test_records_of_a_real_text_agree_with_its_output():
    target = tiny_model()
    output = speckv.generate(target, noisy_copy(target), prompt_ids(), max_new_tokens=30, policy="fixed:3")
    records = make_records(TEXT, output.steps)
    assert sum(records.steps["tokens_produced"].to_pylist()) == output.new_tokens
    assert sum(records.tokens["accepted"].to_pylist()) == output.accepted > 0
    assert records.tokens.num_rows == output.drafted > output.accepted


def test_records_are_joined_in_the_order_given(records):
    other = make_records(Text(8, 0, "code", "nf4", "lookup", 0.0, 2), STEPS[:1])
    joined = join([other, records])
    assert joined.steps["sequence"].to_pylist() == [8, 7, 7, 7]
    assert joined.tokens["sequence"].to_pylist() == [8] * 4 + [7] * 5
    nothing = join([])
    assert nothing.steps.schema == records.steps.schema and nothing.tokens.schema == records.tokens.schema


def renamed(table):
    return table.rename_columns(["length" if name == "gamma" else name for name in table.column_names])


def without_gamma(table):
    return table.drop_columns(["gamma"])


def with_text_for_gamma(table):
    return table.set_column(table.column_names.index("gamma"), "gamma", table["gamma"].cast("string"))


def with_an_empty_task(table):
    return table.set_column(table.column_names.index("task"), "task", pyarrow.array([None] * len(table), "string"))


@pytest.mark.parametrize("change, words", [
    (renamed, "column gamma is missing; column length is unknown"),
    (without_gamma, "column gamma is missing"),
    (with_text_for_gamma, "column gamma is string, not int64"),
    (with_an_empty_task, "column task has empty entries"),
], ids=lambda value: getattr(value, "__name__", ""))
@pytest.mark.parametrize("kind", ["tokens", "steps"])
def test_other_columns_are_refused_and_named(records, kind, change, words, tmp_path):
    file = tmp_path / "part.parquet"
    pyarrow.parquet.write_table(change(getattr(records, kind)), file)
    with pytest.raises(InputError) as refused:
        {"tokens": read_tokens, "steps": read_steps}[kind](file)
    assert str(file) in str(refused.value) and words in str(refused.value)


def test_steps_are_not_read_as_tokens(records, tmp_path):
    write_table(records.steps, tmp_path / "steps.parquet")
    with pytest.raises(InputError, match="token records of this version"):
        read_tokens(tmp_path / "steps.parquet")


@pytest.mark.parametrize("damage", ["truncated", "text", "empty", "flipped"])
def test_a_damaged_file_is_named(records, damage, tmp_path):
    file = tmp_path / "steps.parquet"
    write_table(records.steps, file)
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[whole.index(b"bf16")] ^= 1  # in the data, where nothing but the checksum tells
    file.write_bytes({"truncated": whole[:-20], "text": b"step,accepted\n", "empty": b"", "flipped": flipped}[damage])
    with pytest.raises(InputError, match="damaged") as refused:
        read_steps(file)
    assert str(file) in str(refused.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"steps\.parquet is no file"):
        read_steps(tmp_path / "steps.parquet")


def test_csv_has_the_papers_columns(records, tmp_path):
    write_csv(records.steps, tmp_path / "steps.csv")
    lines = (tmp_path / "steps.csv").read_text().split("\n")
    assert lines[0] == HEADER
    assert lines[1] == "bf16,4,math,0,1,0.25,2,2.0,0.5,3.0,0.25"
    assert lines[2] == "bf16,4,math,1,0,0.0,1,,,,"
    assert lines[3:] == ["bf16,4,math,2,1,0.333333,1,0.291667,0.9375,0.5,0.875", ""]
    with open(tmp_path / "steps.csv", newline="") as stream:
        assert [int(row["tokens_produced"]) for row in csv.DictReader(stream)] == [2, 1, 1]


def test_without_pyarrow_the_way_out_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"pip install 'speckv\[records\]'"):
        make_records(TEXT, STEPS)
