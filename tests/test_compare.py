"""A comparison with tiny models: everything is answered once, texts are checked, and an interrupted run goes on."""

import json

import pytest
import torch
from tiny_models import noisy_copy, tiny_model

from speckv import InputError, compare, compare_plots
from speckv.compare import CompareSettings, has_changed_text, report, run, summarize

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
    assert set(result["tests"]) == {"best fixed in hindsight", "off", "fixed:2", "fixed:4"}
    json.dumps(result)


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
    with pytest.raises(InputError, match="no prompts"):
        run(load, {}, settings(), tmp_path)


def test_tables_and_plots_are_made(tmp_path, capsys):
    answers = run(load, PROMPTS, settings(), tmp_path)
    result = summarize(answers, settings())
    report(result)
    printed = capsys.readouterr().out
    for word in ("adaptive", "best fixed in hindsight", "of the oracle", "math"):
        assert word in printed
    for name in compare_plots.draw(result, answers, tmp_path):
        assert (tmp_path / name).stat().st_size > 5000
