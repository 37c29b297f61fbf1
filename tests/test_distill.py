"""Distilling learns, can be interrupted anywhere without a trace, and leaves a drafter that loads."""

import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import multiprocessing.forkserver
import os
import random
import shutil
import time
from pathlib import Path

import distill_worker
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_chat import tiny_tokenizer
from tiny_models import prompt_ids, tiny_model

import speckv
from speckv import (
    InputError,
    ModelError,
    distill,
    distill_settings,
    distill_text,
    drafter_folder,
    memory,
    model_card,
    pruned,
    training_plot,
)
from speckv.corpus import ROLE_ANSWER, ROLE_QUESTION, Corpus, CorpusSettings, write_shard
from speckv.distill import DistillSettings
from speckv.files import locked

ROWS, LENGTH = 16, 40
SETTINGS = DistillSettings(
    kind="lm", num_layers=1, head_tokens=50, epochs=3, batch_rows=4, warmup_steps=2, evaluate_every=6,
    corpus=CorpusSettings(tokens=2 * ROWS * LENGTH, rows=ROWS, length=LENGTH), checkpoint_seconds=0.05)


@pytest.fixture(scope="module", autouse=True)
def few_held_out_rows():
    patch = pytest.MonkeyPatch()
    patch.setattr(distill_settings, "HELD_OUT_ROWS", distill_worker.HELD_OUT_ROWS)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def target():
    model = tiny_model("llama")
    model.generation_config.eos_token_id = distill_worker.END_OF_TURN
    return model


class Interrupted(Exception):
    pass


def run(target, folder, work, stop_after=None, settings=SETTINGS, **options):
    """Distill, interrupted at the n-th report of progress where asked for."""
    calls = []

    def on_progress(progress):
        calls.append(progress)
        if len(calls) == stop_after:
            raise Interrupted
    return distill.distill(target, tiny_tokenizer(), folder, work, settings, "tiny", on_progress, **options), calls


@pytest.fixture(scope="module", params=["lm", "head"])
def settings(request):
    return dataclasses.replace(SETTINGS, kind=request.param)


@pytest.fixture(scope="module")
def finished(target, settings, tmp_path_factory):
    root = tmp_path_factory.mktemp("finished")
    best, calls = run(target, root / "drafter", root / "work", settings=settings)
    return root, best, calls


def test_the_target_writes_questions_and_answers_in_its_own_format(target):
    shard = write_shard(target, tiny_tokenizer(), SETTINGS.corpus, 0, (1, -1))
    tokens, roles, hidden = shard["tokens"], shard["roles"], shard["hidden"]
    assert tokens.shape == roles.shape == (ROWS, LENGTH)
    assert (tokens[:, 0] == 1).all(), "every row starts with the user's turn"
    assert {ROLE_QUESTION, ROLE_ANSWER} <= set(roles.unique().tolist())
    logits = target.lm_head(hidden[..., 32:].float())
    expected = target(tokens.long()).logits
    torch.testing.assert_close(logits, expected, rtol=0.05, atol=0.05)  # hidden states are stored in bf16


def test_a_shard_depends_on_nothing_but_its_number(target):
    first, again, other = (write_shard(target, tiny_tokenizer(), SETTINGS.corpus, index, (-1,)) for index in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["tokens"], other["tokens"])


def test_training_lowers_the_loss_and_reports_progress(finished):
    _, best, calls = finished
    losses = [call.loss for call in calls if call.stage == "training" and call.loss is not None]
    assert len(losses) > 8 and sum(losses[-4:]) < sum(losses[:4])
    assert calls[-1].done == calls[-1].total
    assert 0 <= best["match"] <= 1 and 0 <= best["accepted_at_4"] <= 4
    assert [call.done for call in calls if call.stage == "text"][-1] == 2 * ROWS * LENGTH - ROWS


@pytest.mark.parametrize("stop_after", [1, 50, 79, 86, 95])
def test_an_interrupted_run_goes_on_and_ends_with_the_same_weights(target, settings, finished, tmp_path, stop_after):
    root, best, calls = finished
    assert stop_after < len(calls)
    with pytest.raises(Interrupted):
        run(target, tmp_path / "drafter", tmp_path / "work", stop_after, settings)
    resumed, _ = run(target, tmp_path / "drafter", tmp_path / "work", settings=settings)
    assert resumed == best
    assert_same_run(root, tmp_path)


def checkpoint(work):
    (file,) = work.glob("checkpoint-*.safetensors")
    return file


def card(place):
    return json.loads((place / "drafter/drafter.json").read_text())


def history(place):
    return json.loads((place / "drafter/history.json").read_text())


def stored_state(place):
    with safe_open(checkpoint(place / "work"), "pt") as stored:
        return json.loads(stored.metadata()["state"])


def assert_same_run(root, other):
    expected, got = (load_file(checkpoint(place / "work")) for place in (root, other))
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[key], got[key]) for key in expected)
    cards = [card(place) for place in (root, other)]
    for trained in (found["trained"] for found in cards):
        assert trained.pop("seconds").keys() == {"text", "training"}
    assert cards[0] == cards[1], "the best drafter is the same, weights included"
    histories = [history(place) for place in (root, other)]
    for entry in itertools.chain(*histories):
        del entry["seconds"]
    assert histories[0] == histories[1]
    shards = [json.loads((place / "work/corpus.json").read_text())["shards"] for place in (root, other)]
    assert shards[0] == shards[1] and len(shards[0]) == SETTINGS.corpus.num_shards
    left = [file.name for file in other.rglob(".*") if file.name != ".lock"]
    assert not left, "nothing half-written stays behind"


def test_an_interruption_inside_an_update_leaves_no_half_of_it(target, settings, finished, tmp_path, monkeypatch):
    root, _, _ = finished
    update, updates = torch.optim.AdamW.step, []

    def interrupted(self, *args):
        update(self, *args)
        updates.append(None)
        if len(updates) == 7:
            raise KeyboardInterrupt  # parameters have moved, the step is not counted
    monkeypatch.setattr(torch.optim.AdamW, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(target, tmp_path / "drafter", tmp_path / "work", settings=settings)
    monkeypatch.undo()
    run(target, tmp_path / "drafter", tmp_path / "work", settings=settings)
    assert_same_run(root, tmp_path)


def test_a_finished_run_fills_an_output_folder_that_was_lost(target, settings, finished, tmp_path):
    root, best, _ = finished
    again, _ = run(target, tmp_path / "elsewhere", root / "work", settings=settings)
    assert again == best
    assert speckv.load_drafter(str(tmp_path / "elsewhere"), target) is not None


def empty_checkpoint(work):
    checkpoint(work).write_bytes(b"")


def wrong_bit(work):
    content = bytearray(checkpoint(work).read_bytes())
    content[-1] ^= 1
    checkpoint(work).write_bytes(content)


def empty_manifest(work):
    (work / "corpus.json").write_text("{}")


def half_a_manifest(work):
    (work / "corpus.json").write_text("[")


@pytest.mark.parametrize("damage", [empty_checkpoint, wrong_bit, empty_manifest, half_a_manifest])
def test_a_damaged_work_folder_is_named(target, settings, finished, tmp_path, damage):
    root, _, _ = finished
    shutil.copytree(root / "work", tmp_path / "work")
    damage(tmp_path / "work")
    with pytest.raises(ModelError, match=r"is damaged.*delete"):
        run(target, tmp_path / "drafter", tmp_path / "work", settings=settings)


def test_an_output_folder_that_cannot_be_written_is_refused_before_any_work(target, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written to"):
        run(target, tmp_path / "file", tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_the_text_of_another_model_of_the_same_name_is_refused(target, finished, tmp_path):
    root, _, _ = finished
    other = tiny_model("llama", seed=8)
    with pytest.raises(ModelError, match="choose another folder"):
        run(other, tmp_path / "drafter", root / "work")


def test_a_second_run_in_the_same_work_folder_is_refused(target, tmp_path):
    with locked(tmp_path / "work", "distilling", wait=False), pytest.raises(InputError, match="another process"):
        run(target, tmp_path / "drafter", tmp_path / "work")


@pytest.mark.parametrize("changes", [{"epochs": float("nan")}, {"epochs": -1}, {"warmup_steps": 0}], ids=str)
def test_settings_that_make_no_sense_are_refused(changes):
    with pytest.raises(InputError, match="must be positive"):
        dataclasses.replace(SETTINGS, **changes)


def test_a_damaged_shard_is_written_again(target, tmp_path):
    corpus = Corpus(tmp_path, SETTINGS.corpus, "tiny", (-1,))
    for index in range(SETTINGS.corpus.num_shards):
        corpus.add(index, {"tokens": torch.full((2, 2), index)})
    corpus.file(1).write_bytes(b"damaged")
    assert Corpus(tmp_path, SETTINGS.corpus, "tiny", (-1,)).missing() == [1]


def test_a_work_folder_of_another_run_is_refused(target, settings, finished):
    root, _, _ = finished
    other = dataclasses.replace(settings, corpus=CorpusSettings(rows=ROWS, length=LENGTH, seed=9))
    with pytest.raises(ModelError, match="choose another folder"):
        run(target, root / "other", root / "work", settings=other)
    other = dataclasses.replace(settings, epochs=5)
    with pytest.raises(ModelError, match="other settings"):
        run(target, root / "other", root / "work", settings=other)


@pytest.fixture(scope="module")
def processes():
    """Where distillations get processes of their own: forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["distill_worker"])
    with pytest.MonkeyPatch.context() as patch:  # not every Python tells the server where to import from
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        multiprocessing.forkserver.ensure_running()
    return context


def start_process(processes, work, *arguments):
    """A process in distill_worker, and the end of the pipe on which it reports."""
    reports, sent = processes.Pipe(duplex=False)
    process = processes.Process(target=work, args=(sent, torch.get_num_threads(), *arguments))
    process.start()
    sent.close()
    return process, reports


def received(reports):
    with contextlib.suppress(EOFError):
        while True:
            yield reports.recv()


def test_a_run_killed_at_any_moment_goes_on_and_ends_the_same(processes, settings, finished, tmp_path):
    root, best, _ = finished
    draw = random.Random(settings.kind)
    # Of 39 reports a shard and 18 of training: in the first shard, in the second, and three times in training.
    for stop_after in (draw.randint(1, 38), draw.randint(40, 60), draw.randint(40, 43), draw.randint(1, 4),
                       draw.randint(1, 4)):
        process, reports = start_process(processes, distill_worker.distill_tiny, tmp_path, settings, 0.01)
        for count, _ in enumerate(received(reports), start=1):
            if count == stop_after:
                break
        time.sleep(0.03 * draw.random())
        process.kill()
        process.join()
        assert process.exitcode < 0
    process, reports = start_process(processes, distill_worker.distill_tiny, tmp_path, settings)
    *_, resumed = received(reports)
    process.join()
    assert process.exitcode == 0 and resumed == best
    assert stored_state(tmp_path)["step"] == settings.num_steps
    assert_same_run(root, tmp_path)


def test_two_processes_never_write_the_same_shard(processes, tmp_path):
    settings = dataclasses.replace(SETTINGS, corpus=dataclasses.replace(SETTINGS.corpus, tokens=6 * ROWS * LENGTH))
    started = [start_process(processes, distill_worker.write_tiny, tmp_path, settings) for _ in range(2)]
    written = [list(received(reports)) for _, reports in started]
    for process, _ in started:
        process.join()
        assert process.exitcode == 0
    assert sorted(itertools.chain(*written)) == list(range(6)) and all(written)
    corpus = json.loads((tmp_path / "work/corpus.json").read_text())
    assert len(corpus["shards"]) == 6


def test_a_shard_that_another_process_is_writing_is_waited_for(target, tmp_path, monkeypatch):
    monkeypatch.setattr(distill_text, "POLL_SECONDS", 0.01)
    notes = []
    with contextlib.ExitStack() as another:
        layers = distill.head.feature_layers(target)
        corpus = Corpus(tmp_path / "work", SETTINGS.corpus, distill.target_identity(target), layers)
        assert another.enter_context(corpus.claim(0))
        assert distill.write_only(target, tiny_tokenizer(), tmp_path / "work", SETTINGS) == 1

        def on_progress(progress):
            if progress.note:
                notes.append(progress.note)
                another.close()  # it dies
        distill.distill(target, tiny_tokenizer(), tmp_path / "drafter", tmp_path / "work", SETTINGS,
                        on_progress=on_progress)
    assert notes == ["waiting for shards of other processes: 1"]


def test_a_run_by_time_takes_its_time_over_all_sittings(target, settings, tmp_path):
    seconds = 2.5
    settings = dataclasses.replace(settings, hours=seconds / 3600, checkpoint_seconds=100)
    settings = dataclasses.replace(settings, corpus=dataclasses.replace(settings.corpus, tokens=10**6))
    reports = []

    def on_progress(progress):
        reports.append(progress)
        if sum(report.stage == "training" for report in reports) == 8:
            raise Interrupted
    with pytest.raises(Interrupted):
        distill.distill(target, tiny_tokenizer(), tmp_path / "drafter", tmp_path / "work", settings,
                        on_progress=on_progress)
    first = stored_state(tmp_path)
    best, calls = run(target, tmp_path / "drafter", tmp_path / "work", settings=settings)
    assert {call.stage for call in calls} == {"training"}, "no time is left to write more text"
    state, trained = stored_state(tmp_path), card(tmp_path)["trained"]
    spent = trained["seconds"]["text"] + state["seconds"]
    assert seconds - 0.1 <= spent < 2 * seconds
    assert first["step"] == 8 and state["step"] > 8 and first["seconds"] < state["seconds"]
    assert 1 <= trained["tokens_of_text"] // (ROWS * LENGTH) < settings.corpus.num_shards
    assert calls[-1].done == calls[-1].total
    assert history(tmp_path)[-1]["step"] == state["step"]
    assert speckv.load_drafter(str(tmp_path / "drafter"), target) is not None
    again, calls = run(target, tmp_path / "drafter", tmp_path / "work", settings=settings)
    assert again == best and not calls


def test_a_shard_that_would_take_too_long_is_left(target, finished, tmp_path, monkeypatch):
    root, _, _ = finished
    shutil.copytree(root / "work", tmp_path / "work")

    def slow(*arguments):
        def on_step(count):
            time.sleep(0.02)
            arguments[-1](count)
        return write_shard(*arguments[:-1], on_step)
    monkeypatch.setattr(distill_text, "write_shard", slow)
    settings = dataclasses.replace(SETTINGS, hours=1 / 3600)
    settings = dataclasses.replace(settings, corpus=dataclasses.replace(settings.corpus, tokens=10**6))
    run(target, tmp_path / "drafter", tmp_path / "work", settings=settings, resume=False)
    trained = card(tmp_path)["trained"]
    assert trained["tokens_of_text"] == 2 * ROWS * LENGTH, "there was time for a part of a third shard only"
    assert trained["seconds"]["text"] < distill_text.TEXT_SHARE


def test_training_starts_from_a_drafter_and_ends_no_worse(target, settings, finished, tmp_path):
    root, best, _ = finished
    shutil.copytree(root / "work", tmp_path / "work")
    settings = dataclasses.replace(settings, epochs=1)
    with pytest.raises(ModelError, match=r"epochs was 3, is 1; start_from was , is .*--no-resume --start-from"):
        run(target, tmp_path / "drafter", tmp_path / "work", settings=settings, start_from=root / "drafter")
    further, calls = run(target, tmp_path / "drafter", tmp_path / "work", settings=settings,
                         start_from=root / "drafter", resume=False)
    assert {call.stage for call in calls} == {"training"}
    assert history(tmp_path)[0]["step"] == 0
    assert history(tmp_path)[0]["accepted_at_4"] == pytest.approx(best["accepted_at_4"], abs=0.05)  # stored in bf16
    assert further["accepted_at_4"] >= history(tmp_path)[0]["accepted_at_4"]
    assert card(tmp_path)["trained"]["settings"]["start_from"] == card(root)["sha256"]


def test_a_drafter_that_cannot_be_trained_further_is_named(target, settings, finished, tmp_path):
    root, _, _ = finished
    other = {"lm": "head", "head": "lm"}[settings.kind]
    places = {"folder": tmp_path / "drafter", "work": tmp_path / "work"}
    with pytest.raises(InputError, match=f"say --kind {settings.kind}"):
        run(target, **places, settings=dataclasses.replace(settings, kind=other), start_from=root / "drafter")
    with pytest.raises(InputError, match="choose another output folder"):
        run(target, root / "drafter", tmp_path / "work", settings=settings, start_from=root / "drafter")
    if settings.kind == "lm":
        with pytest.raises(InputError, match="say --layers 1"):
            run(target, **places, settings=dataclasses.replace(settings, num_layers=2), start_from=root / "drafter")


def test_a_head_is_given_more_layers_and_starts_as_good_as_it_was(target, tmp_path):
    one = dataclasses.replace(SETTINGS, kind="head", epochs=1, evaluate_every=100)
    two = dataclasses.replace(one, num_layers=2)
    work = tmp_path / "work"
    run(target, tmp_path / "first", work, settings=one)
    runs = {"same": one, "grown": two}
    for name, settings in runs.items():
        run(target, tmp_path / name / "drafter", work, settings=settings, start_from=tmp_path / "first", resume=False)
    starts = [history(tmp_path / name)[0] for name in runs]
    assert [start.pop("seconds") >= 0 for start in starts] == [True, True] and starts[0] == starts[1]
    assert [card(tmp_path / name)["num_layers"] for name in runs] == [1, 2]
    assert "--kind head --layers 2" in (tmp_path / "grown/drafter/README.md").read_text()
    again, calls = run(target, tmp_path / "again", work, settings=two, start_from=tmp_path / "first")
    assert not calls and again == card(tmp_path / "grown")["held_out"], "a run of another depth has its own checkpoint"
    drafter = speckv.load_drafter(str(tmp_path / "grown/drafter"), target)
    assert drafter.num_layers == 2
    output = speckv.generate(target, drafter, prompt_ids(), max_new_tokens=30, policy="fixed:3", eos_token_id=[])
    plain = speckv.generate(target, None, prompt_ids(), max_new_tokens=30, policy="off", eos_token_id=[])
    assert torch.equal(output.sequences, plain.sequences)
    few = dataclasses.replace(one, head_tokens=20)
    run(target, tmp_path / "few/drafter", work, settings=few, start_from=tmp_path / "first", resume=False)
    assert "--head-tokens 20" in (tmp_path / "few/drafter/README.md").read_text()
    ids = [speckv.load_drafter(str(folder), target).token_ids
           for folder in (tmp_path / "first", tmp_path / "few/drafter")]
    assert [len(each) for each in ids] == [50, 20] and set(ids[1].tolist()) < set(ids[0].tolist())
    with pytest.raises(InputError, match="say --layers 2"):
        run(target, tmp_path / "fewer", work, settings=one, start_from=tmp_path / "grown/drafter")


def test_the_number_of_layers_goes_with_the_kind(tmp_path):
    assert [DistillSettings(kind=kind).num_layers for kind in ("head", "lm")] == [1, 2]
    settings = [DistillSettings(kind=kind, num_layers=count) for kind in ("head", "lm") for count in (1, 2)]
    places = [distill_settings.places(tmp_path, each) for each in settings]
    assert places[0] == tuple(tmp_path / name for name in ("checkpoint-head.safetensors", "best-head",
                                                            "text-head.json"))
    assert len(set(itertools.chain(*places))) == 12
    with pytest.raises(InputError, match="must be positive"):
        DistillSettings(num_layers=0)


def test_the_figures_of_every_evaluation_lie_beside_the_drafter(settings, finished):
    root, best, _ = finished
    entries = history(root)
    assert [entry["step"] for entry in entries] == [6, 12, 18]
    assert [entry["tokens"] for entry in entries] == [step * 4 * LENGTH for step in (6, 12, 18)]
    assert max(entry["accepted_at_4"] for entry in entries) == best["accepted_at_4"] == best["accepted_by_gamma"][3]
    assert best["match"] == best["match_by_depth"][0]
    assert best["accepted_by_gamma"] == sorted(best["accepted_by_gamma"])
    assert entries[0]["loss"] > entries[-1]["loss"]


def test_the_drafter_has_a_readme(settings, finished):
    root, best, _ = finished
    text = (root / "drafter/README.md").read_text()
    assert text == model_card.render(card(root))
    assert f"speckv distill --target tiny --output FOLDER --kind {settings.kind}" in text
    assert f"{best['match']:.1%}" in text and "1,280 tokens" in text and "licence" in text


def test_the_training_is_drawn(settings, finished, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib")
    root, _, _ = finished
    assert (root / "drafter/training.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(training_plot, "can_draw", lambda: False)
    assert not training_plot.draw(history(root), tmp_path / "plot.png", "none")
    assert not (tmp_path / "plot.png").exists()


def test_a_disk_without_room_is_refused_before_any_work(target, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    little = usage._replace(free=distill_text.ROOM_FOR_TRAINING + 9)
    monkeypatch.setattr(distill_text.shutil, "disk_usage", lambda folder: little)
    with pytest.raises(InputError, match=r"has room for 0\.0: choose another work folder, or fewer tokens"):
        run(target, tmp_path / "drafter", tmp_path / "work")
    assert not list((tmp_path / "work").glob("*.safetensors"))


def test_memory_is_kept_where_there_is_glibc(monkeypatch):
    assert memory.keep_freed_memory() in (True, False)

    def missing(name):
        raise OSError(name)
    monkeypatch.setattr(memory.ctypes, "CDLL", missing)
    assert memory.keep_freed_memory() is False


def test_the_drafter_loads_shares_the_targets_weights_and_is_lossless(target, finished):
    root, _, _ = finished
    drafter = speckv.load_drafter(str(root / "drafter"), target)
    assert all(parameter.requires_grad for parameter in target.parameters()), "the target is as it was"
    decoder = getattr(drafter, "decoder", drafter)
    assert decoder.get_input_embeddings() is target.get_input_embeddings()
    assert decoder.get_output_embeddings() is target.get_output_embeddings()
    assert len(decoder.model.layers) == 1
    ids = prompt_ids()
    output = speckv.generate(target, drafter, ids, max_new_tokens=30, policy="fixed:3", eos_token_id=[])
    assert torch.equal(output.sequences, target.generate(ids, do_sample=False, max_new_tokens=30, eos_token_id=None))


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2", "gemma", "mistral-sliding"])
def test_the_first_layers_of_many_architectures_make_a_drafter(architecture):
    target = tiny_model(architecture)
    drafter = pruned.prune(target, 2)
    pruned.fill(drafter, pruned.first_layers(target, 2), torch.float32, "cpu")
    assert not any(tensor.is_meta for tensor in [*drafter.parameters(), *drafter.buffers()])
    ids = prompt_ids()
    states = target(ids, output_hidden_states=True).hidden_states[2]
    drafted = drafter(ids, output_hidden_states=True).hidden_states
    # The input of the final norm is the target's own state after two layers.
    torch.testing.assert_close(drafted[1], target(ids, output_hidden_states=True).hidden_states[1])
    norm = next(child for child in drafter.base_model.children() if pruned._is_norm(child))
    torch.testing.assert_close(drafted[-1], norm(states))
    output = speckv.generate(target, drafter, ids, max_new_tokens=15, policy="fixed:3")
    assert torch.equal(output.sequences, target.generate(ids, do_sample=False, max_new_tokens=15, pad_token_id=0))


@pytest.fixture
def folder(target, tmp_path):
    drafter_folder.write(tmp_path / "drafter", pruned.KIND, pruned.first_layers(target, 1), {"num_layers": 1})
    return tmp_path / "drafter"


def weights(folder):
    (file,) = folder.glob("*.safetensors")
    return file


def truncate(folder):
    weights(folder).write_bytes(weights(folder).read_bytes()[:-10])


def flip_a_bit(folder):
    content = bytearray(weights(folder).read_bytes())
    content[-1] ^= 1
    weights(folder).write_bytes(content)


def swap(folder):
    save_file({"layers.0.x": torch.zeros(3)}, weights(folder))


def remove_weights(folder):
    weights(folder).unlink()


def change_card(**changes):
    def damage(folder):
        card = json.loads((folder / "drafter.json").read_text())
        (folder / "drafter.json").write_text(json.dumps(card | changes))
    damage.__name__ = str(changes)
    return damage


def break_card(folder):
    (folder / "drafter.json").write_text("{")


def make_card_a_list(folder):
    (folder / "drafter.json").write_text("[]")


def nest_card(folder):
    (folder / "drafter.json").write_text("[" * 100_000)


@pytest.mark.parametrize("damage, words", [
    (truncate, "is corrupt"), (flip_a_bit, "is corrupt"), (swap, "is corrupt"), (remove_weights, "is missing"),
    (break_card, "cannot be read"), (make_card_a_list, "cannot be read"), (nest_card, "cannot be read"),
    (change_card(kind="tree"), "kind 'tree'"), (change_card(file="../drafter.safetensors"), "no such file"),
    (change_card(file=3), "no such file"), (change_card(bytes=1), "is corrupt"),
    (change_card(num_layers=10 ** 9), "choose 1 to 2"), (change_card(num_layers="1"), "choose 1 to 2"),
    (change_card(num_layers=None), "choose 1 to 2"), (change_card(num_layers=2), "do not fit this target"),
], ids=lambda value: getattr(value, "__name__", ""))
def test_a_damaged_drafter_is_refused_by_name(target, folder, damage, words):
    damage(folder)
    with pytest.raises(ModelError, match=words):
        speckv.load_drafter(str(folder), target)


def test_a_drafter_made_for_another_target_is_refused(folder):
    with pytest.raises(ModelError, match="do not fit this target"):
        speckv.load_drafter(str(folder), tiny_model("llama", hidden_size=64, head_dim=16))


def test_too_many_layers_are_refused(target):
    with pytest.raises(ModelError, match="choose 1 to 2"):
        pruned.prune(target, 3)


@pytest.mark.parametrize("architecture, num_layers", [
    ("qwen2", 1), ("gpt2", 1), ("gpt2", 2), ("gemma", 1), ("gemma2", 2), ("mistral-sliding", 1)])
def test_a_head_is_distilled_from_targets_of_other_kinds(architecture, num_layers, tmp_path):
    target = tiny_model(architecture)
    target.generation_config.eos_token_id = distill_worker.END_OF_TURN
    settings = dataclasses.replace(SETTINGS, kind="head", num_layers=num_layers)
    _, calls = run(target, tmp_path / "drafter", tmp_path / "work", settings=settings)
    losses = [call.loss for call in calls if call.loss is not None]
    assert sum(losses[-3:]) < sum(losses[:3])
    drafter = speckv.load_drafter(str(tmp_path / "drafter"), target)
    assert drafter.num_layers == num_layers
    output = speckv.generate(target, drafter, prompt_ids(), max_new_tokens=12, policy="fixed:3", eos_token_id=[])
    plain = speckv.generate(target, None, prompt_ids(), max_new_tokens=12, policy="off", eos_token_id=[])
    assert torch.equal(output.sequences, plain.sequences)
