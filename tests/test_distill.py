"""Distilling learns, can be interrupted anywhere without a trace, and leaves a drafter that loads."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_chat import tiny_tokenizer
from tiny_models import prompt_ids, tiny_model

import speckv
from speckv import InputError, ModelError, distill, drafter_folder, pruned
from speckv.corpus import ROLE_ANSWER, ROLE_QUESTION, Corpus, CorpusSettings, write_shard
from speckv.distill import DistillSettings
from speckv.files import locked

END_OF_TURN = 3
ROWS, LENGTH = 16, 40
SETTINGS = DistillSettings(
    kind="lm", num_layers=1, head_tokens=50, epochs=3, batch_rows=4, warmup_steps=2, evaluate_every=6,
    corpus=CorpusSettings(tokens=2 * ROWS * LENGTH, rows=ROWS, length=LENGTH), checkpoint_seconds=0.05)


@pytest.fixture(scope="module", autouse=True)
def few_held_out_rows():
    patch = pytest.MonkeyPatch()
    patch.setattr(distill, "HELD_OUT_ROWS", 8)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def target():
    model = tiny_model("llama")
    model.generation_config.eos_token_id = END_OF_TURN
    return model


class Interrupted(Exception):
    pass


def run(target, folder, work, stop_after=None, settings=SETTINGS):
    """Distill, interrupted at the n-th report of progress where asked for."""
    calls = []

    def on_progress(progress):
        calls.append(progress)
        if len(calls) == stop_after:
            raise Interrupted
    return distill.distill(target, tiny_tokenizer(), folder, work, settings, "tiny", on_progress), calls


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


def assert_same_run(root, other):
    expected, got = (load_file(checkpoint(place / "work")) for place in (root, other))
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[key], got[key]) for key in expected)
    cards = [json.loads((place / "drafter/drafter.json").read_text()) for place in (root, other)]
    assert cards[0] == cards[1], "the best drafter is the same, weights included"
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


def test_the_drafter_loads_shares_the_targets_weights_and_is_lossless(target, finished):
    root, _, _ = finished
    drafter = speckv.load_drafter(str(root / "drafter"), target)
    assert all(parameter.requires_grad for parameter in target.parameters()), "the target is as it was"
    layer = getattr(drafter, "layer", drafter)
    assert layer.get_input_embeddings() is target.get_input_embeddings()
    assert layer.get_output_embeddings() is target.get_output_embeddings()
    assert len(layer.model.layers) == 1
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
