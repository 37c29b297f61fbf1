"""A profile can be interrupted anywhere without a trace, is never mixed with another, and its damage is named."""

import contextlib
import dataclasses
import json
import multiprocessing
import multiprocessing.forkserver
import os
import random
import time
from pathlib import Path

import profile_worker
import pytest
import torch
from profile_worker import PROMPTS, SETTINGS, TEXTS, encode, load
from test_cli import run_main
from tiny_chat import tiny_tokenizer
from tiny_models import noisy_copy, tiny_model

from speckv import InputError, ModelError, files
from speckv.files import locked
from speckv.profile import ProfileSettings, profile, read_records
from speckv.prompts import PROMPTS as OWN_PROMPTS
from speckv.prompts import TASKS, read_prompts
from speckv.record_files import Records

TIMINGS = ["draft_ms", "verify_ms"]


def run(folder, settings=SETTINGS, prompts=PROMPTS, load=load, **options):
    return profile(load, prompts, settings, folder, **options)


def untimed(records):
    return Records(records.tokens, records.steps.drop_columns(TIMINGS))


def assert_same(records, expected):
    for table, wanted in zip(untimed(records), untimed(expected), strict=True):
        assert table.equals(wanted)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder and the records of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, run(folder)


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of the finished folder, to be damaged."""
    for file in finished[0].rglob("*"):
        if file.is_file():
            copy = tmp_path / file.relative_to(finished[0])
            copy.parent.mkdir(exist_ok=True)
            copy.write_bytes(file.read_bytes())
    return tmp_path


def test_every_cell_is_there_once_and_in_order(finished):
    steps = finished[1].steps.to_pylist()
    cells = dict.fromkeys((row["sequence"], row["compression"], row["prompt"], row["task"], row["gamma"])
                          for row in steps)
    assert [cell[0] for cell in cells] == list(range(TEXTS))
    assert [cell[1:] for cell in cells][:6] == [
        ("bf16", 0, "code", 2), ("bf16", 0, "code", 3), ("bf16", 0, "chat", 2), ("bf16", 0, "chat", 3),
        ("bf16", 1, "code", 2), ("bf16", 1, "code", 3)]
    assert [cell[1] for cell in cells] == ["bf16"] * 6 + ["nf4"] * 6
    for sequence in range(TEXTS):
        of_text = [row for row in steps if row["sequence"] == sequence]
        assert [row["step"] for row in of_text] == list(range(len(of_text)))
        assert sum(row["tokens_produced"] for row in of_text) == SETTINGS.max_new_tokens
    assert {row["drafter"] for row in steps} == {"noisy"} and {row["temperature"] for row in steps} == {0.7}
    assert 0 < sum(row["accepted"] for row in steps) < sum(row["drafted"] for row in steps)
    assert finished[1].tokens.num_rows == sum(row["drafted"] for row in steps)


def test_a_text_depends_on_its_seed(finished, tmp_path):
    other = run(tmp_path, dataclasses.replace(SETTINGS, seed=6))
    assert not other.tokens.equals(finished[1].tokens)


def test_a_finished_run_is_read_and_not_written_again(finished):
    def load_nothing(compression):
        raise AssertionError("a model is loaded")
    assert run(finished[0], load=load_nothing).steps.equals(finished[1].steps)
    assert read_records(finished[0]).tokens.equals(finished[1].tokens)


class Crash(BaseException):
    """The end of the process, as far as a test can bring it about within it: no handler may catch it."""


# Each text moves three files into place: its steps, its tokens, the manifest. The first move of all is a check that the
# folder can be written to, the second to fourth are those of the first text, and so on.
@pytest.mark.parametrize("moves", range(1, 10))
def test_a_crash_before_any_write_leaves_no_trace(moves, finished, tmp_path, monkeypatch):
    replace, count = os.replace, 0

    def crashing(source, destination):
        nonlocal count
        count += 1
        if count == moves:
            raise Crash
        replace(source, destination)
    monkeypatch.setattr(files.os, "replace", crashing)
    with pytest.raises(Crash):
        run(tmp_path)
    monkeypatch.undo()
    done = []
    assert_same(run(tmp_path, on_progress=lambda progress: done.append(progress.done)), finished[1])
    assert done == list(range(max(0, moves - 2) // 3, TEXTS + 1))


@pytest.fixture(scope="module")
def processes():
    """Where profiles get processes of their own: forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["profile_worker"])
    with pytest.MonkeyPatch.context() as patch:  # not every Python tells the server where to import from
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        multiprocessing.forkserver.ensure_running()
    return context


def start_process(processes, folder):
    reports, sent = processes.Pipe(duplex=False)
    process = processes.Process(target=profile_worker.run_reported, args=(sent, torch.get_num_threads(), folder))
    process.start()
    sent.close()
    return process, reports


def received(reports):
    with contextlib.suppress(EOFError):
        while True:
            yield reports.recv()


def test_a_run_killed_at_any_moment_goes_on_and_ends_the_same(processes, finished, tmp_path):
    draw = random.Random(0)
    done = 0
    for texts in (0, 1, 2, 3):
        process, reports = start_process(processes, tmp_path)
        first = reports.recv()
        assert first >= done  # nothing of what was reported is lost
        for done in received(reports) if texts else [first]:
            if done >= first + texts:
                break
        time.sleep(0.03 * draw.random())
        process.kill()
        process.join()
        assert process.exitcode < 0 and done < TEXTS
    process, reports = start_process(processes, tmp_path)
    assert list(received(reports))[-1] == TEXTS
    process.join()
    assert process.exitcode == 0
    assert_same(read_records(tmp_path), finished[1])
    assert {file.name for file in (tmp_path / "parts").iterdir()} == {
        file.name for file in (finished[0] / "parts").iterdir()}


def test_what_an_interrupted_run_has_can_be_read(finished, tmp_path):
    def stop(progress):
        if progress.done == 3:
            raise Crash
    with pytest.raises(Crash):
        run(tmp_path, on_progress=stop)
    steps = untimed(read_records(tmp_path)).steps
    assert steps.num_rows and steps.equals(untimed(finished[1]).steps.slice(0, steps.num_rows))
    assert set(steps["sequence"].to_pylist()) == {0, 1, 2}


@pytest.mark.parametrize("changes, words", [
    ({"gammas": (2, 4)}, "gammas was [2, 3], is [2, 4]"),
    ({"compressions": ("bf16",)}, "compressions was ['bf16', 'nf4'], is ['bf16']"),
    ({"temperature": 0.0}, "temperature was 0.7, is 0.0"),
    ({"seed": 1}, "seed was 5, is 1"),
    ({"max_new_tokens": 11}, "max_new_tokens was 10, is 11"),
    ({"target": "small"}, "target was tiny, is small"),
    ({"draft": "lookup"}, "draft was noisy, is lookup"),
    ({"draft_sha256": "abc"}, "draft_sha256 was None, is abc"),
], ids=lambda value: next(iter(value)) if isinstance(value, dict) else "")
def test_other_settings_are_refused_by_name(finished, changes, words):
    with pytest.raises(InputError) as refused:
        run(finished[0], dataclasses.replace(SETTINGS, **changes))
    assert words in str(refused.value) and str(finished[0]) in str(refused.value)


def test_other_prompts_and_threads_are_refused_by_name(finished, monkeypatch):
    with pytest.raises(InputError, match="prompts of chat was 1 with hash"):
        run(finished[0], prompts=PROMPTS | {"chat": ("another",)})
    with pytest.raises(InputError, match="prompts of math was None"):
        run(finished[0], prompts=PROMPTS | {"math": ("another",)})
    with pytest.raises(InputError, match=r"prompts of chat was 1 with hash .*, is None"):
        run(finished[0], prompts={"code": PROMPTS["code"]})
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    with pytest.raises(InputError, match=r"threads was .*, is 99"):
        run(finished[0])


def test_other_weights_of_the_same_name_are_refused(folder):
    next(folder.glob("parts/steps-000001.parquet")).unlink()
    with pytest.raises(InputError, match="weights at bf16 was"):
        run(folder, load=lambda compression: load("nf4"))


def cut_in_half(file):
    file.write_bytes(file.read_bytes()[:file.stat().st_size // 2])


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [cut_in_half, flip_a_bit, Path.unlink], ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("kind", ["steps", "tokens"])
def test_a_damaged_part_is_named_and_made_anew(finished, folder, kind, damage):
    file = folder / "parts" / f"{kind}-000004.parquet"
    damage(file)
    with pytest.raises(InputError, match="missing or damaged") as refused:
        read_records(folder)
    assert str(file) in str(refused.value) and "'speckv profile' again" in str(refused.value)
    done = []
    assert_same(run(folder, on_progress=lambda progress: done.append(progress.done)), finished[1])
    assert done == [TEXTS - 1, TEXTS]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"settings": {}}', '{"settings": {}, "weights": {}, "parts": '
                                     '{"0": {"steps": 1}}}'], ids=["empty", "half", "list", "short", "no-hash"])
def test_a_damaged_manifest_is_named(folder, content):
    (folder / "profile.json").write_text(content)
    for attempt in (run, read_records):
        with pytest.raises(InputError, match=r"profile\.json is damaged"):
            attempt(folder)


def test_a_folder_without_records_is_named(tmp_path):
    with pytest.raises(InputError, match="holds no records"):
        read_records(tmp_path)


def test_a_second_run_in_the_same_folder_is_refused(tmp_path):
    with locked(tmp_path, "profiling", wait=True), pytest.raises(InputError, match="another process is profiling"):
        run(tmp_path)


def test_a_prompt_that_does_not_fit_is_named_before_any_work(tmp_path):
    with pytest.raises(InputError, match="prompt 2 of 'code' has 125 tokens, which makes 135 with 10 new ones; the "
                                         "models have room for 128"):
        run(tmp_path, prompts={"code": ("short", "x" * 125)})
    assert not (tmp_path / "profile.json").exists()


@pytest.mark.parametrize("changes, error, words", [
    ({"gammas": ()}, InputError, "gammas are none"),
    ({"gammas": (2, 2)}, InputError, "each once"),
    ({"gammas": (-1,)}, InputError, "gamma is -1"),
    ({"compressions": ("int3",)}, ModelError, "unknown compression 'int3'"),
    ({"max_new_tokens": 0}, InputError, "max_new_tokens is 0"),
    ({"temperature": -1.0}, InputError, "temperature is -1"),
    ({"temperature": float("nan")}, InputError, "temperature is nan"),
], ids=lambda value: str(value) if isinstance(value, dict) else "")
def test_settings_that_make_no_sense_are_refused(changes, error, words):
    with pytest.raises(error, match=words):
        ProfileSettings("tiny", "noisy", **changes)


@pytest.mark.parametrize("fast", [False, True])
def test_every_text_is_written_as_fast_as_asked_for(tmp_path, monkeypatch, fast):
    from speckv import profile as module
    asked, generate = [], module.generate
    monkeypatch.setattr(module, "generate", lambda *args, **settings: asked.append(settings["fast"]) or (
        generate(*args, **settings)))
    records = run(tmp_path, dataclasses.replace(SETTINGS, fast=fast))
    assert records.steps.num_rows > 0 and set(asked) == {fast}
    manifest = json.loads((tmp_path / "profile.json").read_text())
    assert ("fast" in json.dumps(manifest)) == fast


def test_plain_decoding_can_be_profiled(tmp_path):
    settings = dataclasses.replace(SETTINGS, gammas=(0,), compressions=("bf16",))
    records = run(tmp_path, settings, load=lambda compression: (tiny_model(), None, encode))
    assert records.tokens.num_rows == 0 and records.steps.num_rows == 3 * SETTINGS.max_new_tokens
    assert set(records.steps["mean_draft_entropy"].to_pylist()) == {None}


def write_lines(file, *entries):
    file.write_text("\n".join(entry if isinstance(entry, str) else json.dumps(entry) for entry in entries))
    return file


def entry(category, *turns):
    return {"question_id": 1, "category": category, "turns": list(turns)}


def test_prompts_of_spec_benchs_categories_find_their_tasks(tmp_path):
    file = write_lines(
        tmp_path / "prompts.jsonl", entry("writing", "w1", "second turn"), entry("writing", "w2\u2028in two lines"),
        entry("qa", "q1"), "", entry("translation", "t1"), entry("humaneval", "h1"), entry("math_reasoning", "m1"),
        entry("rag", "r1"), entry("extraction", "e1"), entry("summarization", "s1"), entry("gardening", "g1"),
        entry("writing", "w3"), entry("coding", "c1"), entry("math", "m2"))
    assert read_prompts(file) == {
        "code": ("h1", "c1"), "math": ("m1", "m2"), "chat": ("w1", "q1", "w2\u2028in two lines", "w3"),
        "summarization": ("r1", "e1", "s1")}
    assert list(read_prompts(file)) == list(TASKS)


@pytest.mark.parametrize("lines, words", [
    ([entry("qa", "q"), "{"], "line 2 is not a prompt"),
    ([{"turns": ["q"]}], r"line 1 is not a prompt \(KeyError\('category'\)\)"),
    ([{"category": "qa"}], "KeyError.'turns'"),
    ([entry("qa")], "IndexError"),
    ([entry("qa", " ")], "must be text"),
    ([{"category": "qa", "turns": "a word"}, {"category": "qa", "turns": [3]}], "line 2 .*must be text"),
    (["[1]"], "line 1 is not a prompt"),
    ([entry("translation", "q")], "no prompt"),
    ([], "no prompt"),
], ids=["half", "no-category", "no-turns", "no-turn", "blank", "number", "list", "unknown", "empty"])
def test_a_prompt_file_that_is_none_is_named(lines, words, tmp_path):
    file = write_lines(tmp_path / "prompts.jsonl", *lines)
    with pytest.raises(InputError, match=words) as refused:
        read_prompts(file)
    assert str(file) in str(refused.value) and '"turns"' in str(refused.value)


def test_a_prompt_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "latin").write_bytes(b'{"category": "qa", "turns": ["\xe9"]}')
    for file in (tmp_path / "missing", tmp_path, tmp_path / "latin"):
        with pytest.raises(InputError, match="cannot be read") as refused:
            read_prompts(file)
        assert str(file) in str(refused.value)


def test_our_own_prompts_are_enough_and_all_different():
    assert tuple(OWN_PROMPTS) == TASKS
    for task, prompts in OWN_PROMPTS.items():
        assert len(set(prompts)) == len(prompts) >= 30, task
    for prompt in OWN_PROMPTS["summarization"]:
        _, passage = prompt.split("\n\n")
        assert 80 <= len(passage.split()) <= 200 and "\n" not in passage and "  " not in passage


@pytest.fixture
def models(tmp_path):
    """Folders of a target and of a drafter."""
    target = tiny_model()
    for name, model in (("target", target), ("draft", noisy_copy(target))):
        model.save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    return ["--target", str(tmp_path / "target"), "--draft", str(tmp_path / "draft")]


def test_the_command_writes_records_and_csv_and_goes_on(models, tmp_path, monkeypatch, capsys):
    prompts = write_lines(tmp_path / "prompts.jsonl", entry("qa", "w1 w2"), entry("qa", "w3"), entry("math", "w4"))
    command = ["profile", *models, "--output", str(tmp_path / "records"), "--prompts", str(prompts), "--per-task", "1",
               "--gammas", "1,2", "--compressions", "fp32", "--max-new-tokens", "6"]
    status, printed = run_main(monkeypatch, capsys, *command, "--csv", str(tmp_path / "steps.csv"))
    assert status == 0, printed.err
    records = read_records(tmp_path / "records")
    assert set(records.steps["task"].to_pylist()) == {"chat", "math"}
    assert set(records.steps["sequence"].to_pylist()) == {0, 1, 2, 3}
    assert f"{records.steps.num_rows} steps, {records.tokens.num_rows} draft tokens" in printed.out
    lines = (tmp_path / "steps.csv").read_text().splitlines()
    assert len(lines) == 1 + records.steps.num_rows and lines[1].startswith("fp32,1,math,0,")
    status, printed = run_main(monkeypatch, capsys, *command)
    assert status == 0 and read_records(tmp_path / "records").steps.equals(records.steps)
    status, printed = run_main(monkeypatch, capsys, *command, "--seed", "3")
    assert status == 2 and "seed was 0, is 3" in printed.err and "Traceback" not in printed.err


@pytest.mark.parametrize("arguments, words", [
    (["--gammas", "2,x"], "--gammas is '2,x'"),
    (["--compressions", "int3"], "unknown compression 'int3'"),
    (["--prompts", "missing.jsonl"], "missing.jsonl cannot be read"),
], ids=lambda value: value[0] if isinstance(value, list) else "")
def test_a_command_that_makes_no_sense_is_refused_in_one_line(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status, printed = run_main(monkeypatch, capsys, "profile", "--output", "records", *arguments)
    assert status == 2 and words in printed.err and len(printed.err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_the_command_stopped_by_hand_tells_how_to_go_on(models, tmp_path, monkeypatch, capsys):
    def interrupted(*arguments):
        raise KeyboardInterrupt
    monkeypatch.setattr("speckv.profile.make_records", interrupted)
    prompts = write_lines(tmp_path / "prompts.jsonl", entry("qa", "w1 w2"))
    status, printed = run_main(monkeypatch, capsys, "profile", *models, "--output", str(tmp_path / "records"),
                               "--prompts", str(prompts), "--compressions", "fp32", "--max-new-tokens", "2")
    assert status == 130 and "the same command goes on from there" in printed.err
