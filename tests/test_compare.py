"""A comparison with tiny models: everything is answered once, texts are checked, and an interrupted run goes on."""

import gc
import json
import weakref
from dataclasses import replace

import pytest
import torch
from test_cli import run_main
from tiny_chat import tiny_tokenizer
from tiny_models import noisy_copy, prompt_ids, tiny_model

import speckv
from speckv import InputError, compare, compare_plots
from speckv.compare import CompareSettings, has_changed_text, report, run, summarize
from speckv.differences import first_difference
from speckv.names import DEFAULT_POLICIES, NAMED_POLICIES
from speckv.policies import NAMED, parse_policy

PROMPTS = {"code": ["ab", "cde"], "math": ["fgh"]}
POLICIES = ("off", "fixed:2", "fixed:4", "adaptive")


def settings(**changes):
    values = {"target": "tiny", "draft": "tiny", "policies": POLICIES, "compressions": ("fp32",), "max_new_tokens": 12}
    return CompareSettings(**values | changes)


def load(compression):
    target = tiny_model(max_position_embeddings=64)
    return target, noisy_copy(target), lambda text: torch.tensor([[2 + ord(letter) % 90 for letter in text]])


def test_every_prompt_is_answered_by_every_policy_with_the_same_text(tmp_path):
    seen = []
    answers = run(load, PROMPTS, settings(), tmp_path, lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert {(a.task, a.prompt, a.policy) for a in answers} == {
        (task, prompt, policy) for task, prompt in (("code", 0), ("code", 1), ("math", 0)) for policy in POLICIES}
    assert all(answer.tokens == 12 and answer.difference is None for answer in answers)
    result = summarize(answers, settings())
    assert not has_changed_text(result)
    assert result["compressions"]["fp32"]["policies"]["off"]["ratio"] == {"code": 1.0, "math": 1.0, "all": 1.0}
    against = {"best fixed in hindsight", "best single fixed in hindsight", "off", "fixed:2", "fixed:4"}
    assert set(result["tests"]) == against == set(result["compressions"]["fp32"]["tests"])
    fixed = result["compressions"]["fp32"]["policies"]["fixed:4"]
    assert fixed["ratio_to"]["fixed:4"] == {"code": 1.0, "math": 1.0, "all": 1.0}
    assert fixed["tasks"]["math"]["mean_gamma"] == fixed["gamma_by_task"]["math"]
    stored = json.loads(json.dumps(result))["answers"]
    assert len(stored) == 3 * len(POLICIES)
    for answer in stored:
        assert answer["tokens"] == 12 and answer["seconds"] > answer["draft_ms"] / 1e3
        assert sum(answer["steps_by_gamma"].values()) == answer["steps"]
        assert sum(int(gamma) * steps for gamma, steps in answer["steps_by_gamma"].items()) == answer["drafted"]


def test_policies_take_turns_and_stay_the_same_objects(tmp_path, monkeypatch):
    calls, whole = [], compare.generate

    def watched(target, drafter, ids, policy, **options):
        calls.append((policy, drafter))
        return whole(target, drafter, ids, policy=policy, **options)
    monkeypatch.setattr(compare, "generate", watched)
    run(load, PROMPTS, settings(), tmp_path)
    orders = [[policy.name for policy, _ in calls[start:start + 4]] for start in range(0, len(calls), 4)]
    # The first four warm up; then every prompt begins with the next policy.
    assert orders[1:] == [list(POLICIES[start:] + POLICIES[:start]) for start in range(3)]
    assert len({id(policy) for policy, _ in calls}) == len(POLICIES)
    # A drafter that listens to the target would slow plain decoding down.
    assert all((drafter is None) == (policy.name == "off") for policy, drafter in calls)


def test_only_one_target_is_in_memory_at_a_time(tmp_path):
    loaded = []

    def watched(compression):
        gc.collect()
        assert all(target() is None for target in loaded)
        target, drafter, encode = load(compression)
        loaded.append(weakref.ref(target))
        return target, drafter, encode
    run(watched, {"code": ["ab"]}, settings(policies=("off", "fixed:2"), compressions=("fp32", "bf16")), tmp_path)
    assert len(loaded) == 2


def test_a_text_that_stops_early_is_not_the_same():
    target, ids = tiny_model(), prompt_ids()
    whole = speckv.generate(target, None, ids, max_new_tokens=8, policy="off")
    short = replace(whole, sequences=whole.sequences[:, :-3])
    for pair in ((whole, short), (short, whole)):
        position, gap = first_difference(target, *pair)
        assert position == 5 and gap >= 0
    assert first_difference(target, whole, replace(whole)) is None


def test_a_policy_that_changed_a_text_is_found_out(tmp_path, monkeypatch):
    whole = compare.generate

    def wrong(target, drafter, ids, policy, **options):
        output = whole(target, drafter, ids, policy=policy, **options)
        if policy.name == "fixed:4":
            output.sequences[0, -1] += 1
        return output
    monkeypatch.setattr(compare, "generate", wrong)
    result = summarize(run(load, PROMPTS, settings(), tmp_path), settings())
    assert has_changed_text(result)
    parts = result["compressions"]["fp32"]["policies"]["fixed:4"]["texts_that_part"]
    assert parts["at_near_ties"] + parts["elsewhere"] == 3


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path):
    class Stop(Exception):
        pass

    def stop(done, total):
        if done == 2:
            raise Stop
    with pytest.raises(Stop):
        run(load, PROMPTS, settings(), tmp_path, stop)
    before = {file.name: file.read_text() for file in (tmp_path / "parts").iterdir()}
    assert len(before) == 2
    answers = run(load, PROMPTS, settings(), tmp_path)
    assert len(answers) == 3 * len(POLICIES)
    assert all((tmp_path / "parts" / name).read_text() == text for name, text in before.items())
    with pytest.raises(InputError, match="with other max_new_tokens"):
        run(load, PROMPTS, settings(max_new_tokens=13), tmp_path)


def test_settings_that_cannot_be_compared_are_refused(tmp_path):
    with pytest.raises(InputError, match="'off' must be among them"):
        settings(policies=("adaptive",))
    with pytest.raises(InputError, match="unknown policy"):
        settings(policies=("off", "best"))
    with pytest.raises(InputError, match="name each of them once"):
        settings(policies=("off", "fixed:2", "fixed:2"))
    with pytest.raises(InputError, match="unknown compression 'int3'"):
        settings(compressions=("fp32", "int3"))
    with pytest.raises(InputError, match="no prompts"):
        run(load, {}, settings(), tmp_path)


def test_tables_and_plots_are_made(tmp_path, capsys):
    answers = run(load, PROMPTS, settings(), tmp_path)
    result = summarize(answers, settings())
    report(result)
    printed = capsys.readouterr().out
    for word in ("adaptive", "best fixed in hindsight", "of the oracle", "math"):
        assert word in printed
    drawn = compare_plots.draw(result, answers, tmp_path)
    for name in drawn:
        assert (tmp_path / name).stat().st_size > 5000
    assert ("calibration.png" in drawn) != ("calibration.png" in compare_plots.left_out(drawn))


def test_every_default_policy_has_a_name():
    assert tuple(NAMED) == NAMED_POLICIES
    assert [parse_policy(name).name for name in DEFAULT_POLICIES.split(",")] == DEFAULT_POLICIES.split(",")


@pytest.fixture
def command(tmp_path):
    """The arguments of a comparison of tiny models on the command line."""
    model = tiny_model()
    for name, one in (("target", model), ("draft", noisy_copy(model))):
        one.save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    lines = [{"category": category, "turns": [f"w{number}"]} for category in ("coding", "math") for number in (5, 6, 7)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return ["compare", "--target", str(tmp_path / "target"), "--draft", str(tmp_path / "draft"), "--prompts",
            str(tmp_path / "prompts.jsonl"), "--compressions", "fp32", "--policies", "off,fixed:2", "--skip", "1",
            "--per-task", "1", "--max-new-tokens", "6", "--output", str(tmp_path / "out")]


def test_the_command_writes_what_it_compared(command, tmp_path, monkeypatch, capsys):
    status, printed = run_main(monkeypatch, capsys, *command)
    assert status == 0, printed.err
    result = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert {(answer["task"], answer["policy"]) for answer in result["answers"]} == {
        (task, policy) for task in ("code", "math") for policy in ("off", "fixed:2")}
    stored = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert stored["prompts"] == {"code": ["w6"], "math": ["w6"]}
    assert "fixed:2" in printed.out and "no gamma.png: 'adaptive' was not among the policies" in printed.err


def test_the_command_fails_where_an_fp32_text_differs(command, monkeypatch, capsys):
    whole = compare.generate

    def wrong(target, drafter, ids, policy, **options):
        output = whole(target, drafter, ids, policy=policy, **options)
        return replace(output, sequences=output.sequences[:, :-1]) if policy.name == "fixed:2" else output
    monkeypatch.setattr(compare, "generate", wrong)
    status, printed = run_main(monkeypatch, capsys, *command)
    assert status == 1 and "differs from plain decoding" in printed.err
