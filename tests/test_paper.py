"""The paper recomputed: its own figures from its own records, and the honest score by hand on small ones."""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from test_cli import run_main

from speckv import InputError, paper, paper_fit, paper_honest, paper_records
from speckv.controller import load_controller
from speckv.paper_records import FILES, NUMBERS_FILE, POLICIES, RUNS_FILE, STEPS_FILE

RELEASED = Path(__file__).resolve().parents[2] / "shared" / "data" / "speckv_paper"
needs_records = pytest.mark.skipif(not RELEASED.is_dir(), reason=f"the paper's records are not in {RELEASED}")
pytest.importorskip("sklearn", reason="the paper's fits are scikit-learn's: pip install 'speckv[paper]'")
DRAFT_MS, VERIFY_MS = {"fp16": 10, "nf4": 12}, {"fp16": 20, "nf4": 40}


@pytest.fixture(scope="module")
def released():
    return paper.report(RELEASED)


@needs_records
def test_every_figure_comes_within_a_hundredth_of_the_published(released):
    printed = paper.as_dict(released)
    recomputed, published = printed["recomputed"], printed["published"]
    assert recomputed["tokens_per_step"] == pytest.approx(published["tokens_per_step"], abs=0.01)
    assert recomputed.keys() == published.keys()
    for name in ("improvement_pct", "correlation", "mse", "p_value"):
        assert recomputed[name] == pytest.approx(published[name], abs=0.01), name
    # The paper's headline, so that the files cannot move both sides at once.
    assert recomputed["tokens_per_step"] == pytest.approx({
        "fixed-4": 3.73, "fixed-best": 5.81, "task-oracle": 4.07, "speckv-fast": 5.82,
        "speckv-accurate": 6.39}, abs=0.01)
    assert recomputed["improvement_pct"] == pytest.approx(56.0, abs=0.01)
    assert recomputed["correlation"] == pytest.approx(0.685, abs=0.01)
    assert recomputed["mse"] == pytest.approx(0.0896, abs=0.01)


@needs_records
def test_both_tables_and_the_intervals_are_the_published_ones(released):
    recomputed, published, steps = released.recomputed, released.published, released.steps
    compression, task = steps.compression[recomputed.test], steps.task[recomputed.test]
    for name, row in published.table1.items():
        assert {policy: expected[compression == name].mean() for policy, expected in recomputed.expected.items()} == (
            pytest.approx(row, abs=0.01))
    for cell, (fixed, speckv, gain) in published.table2.items():
        here = (compression == cell[0]) & (task == cell[1])
        means = [recomputed.expected[policy][here].mean() for policy in ("fixed-4", "speckv-fast")]
        assert means == pytest.approx([fixed, speckv], abs=0.01)
        assert paper_fit.improvement(*means) == pytest.approx(gain, abs=0.1)
    for policy, interval in published.intervals.items():
        assert recomputed.intervals[policy] == pytest.approx(interval, abs=0.01)
    assert recomputed.forest_correlation == pytest.approx(published.forest_correlation, abs=0.01)


@needs_records
def test_the_honest_score_is_what_the_records_hold(released):
    honest = released.honest
    assert honest.logged == pytest.approx({2: 2.61, 4: 3.76, 6: 4.63, 8: 5.24}, abs=0.006)
    assert honest.measured["fp16"] == pytest.approx({2: 64.4, 4: 62.0, 6: 57.8, 8: 53.6}, abs=0.06)
    assert honest.measured["int8"] == pytest.approx({2: 23.7, 4: 28.5, 6: 31.2, 8: 31.5}, abs=0.06)
    for name, verify_ms in {"fp16": 20, "int8": 90, "nf4": 37}.items():
        assert honest.costs[name] == pytest.approx((10.5, verify_ms), abs=1)
    for gamma, tokens in honest.logged.items():
        assert honest.scores[f"fixed-{gamma}"]["all"].tokens_per_step == pytest.approx(tokens, abs=0.01)
    speed = {policy: scores["all"].tokens_per_second for policy, scores in honest.scores.items()}
    assert honest.gains["speckv-fast"] == pytest.approx((-6.7, 0.3), abs=0.5)
    assert speed["speckv-fast"] < speed["fixed-4"] < speed["fixed-fastest"]
    assert honest.correlation["step_before"] < 0.5 < honest.correlation["same_step"]


@needs_records
def test_the_controller_chooses_as_the_fit_it_came_from(released):
    from sklearn.neural_network import MLPRegressor

    steps, recomputed, gammas = released.steps, released.recomputed, np.array([2, 4, 6, 8])
    fitted = MLPRegressor(hidden_layer_sizes=(16,), max_iter=500, random_state=42).fit(
        steps.inputs(), steps.acceptance)
    signals = steps.inputs()[recomputed.test, :-1]
    acceptance = np.stack([fitted.predict(np.column_stack([signals, np.full(len(signals), gamma)]))
                           for gamma in gammas], axis=1)
    assert np.array_equal(recomputed.chosen, gammas[(acceptance.clip(0, 1) * gammas + 1).argmax(axis=1)])


# Small records, in which everything is known.

def write_csv(file, rows):
    with open(file, "w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def small_release(folder, compressions=("fp16", "nf4"), gammas=(2, 4), prompts=6, steps=8):
    """Two tasks; a step accepts as much as its confidence says, and takes exactly DRAFT_MS and VERIFY_MS."""
    random = np.random.default_rng(0)
    step_rows, run_rows = [], []
    for compression in compressions:
        for gamma in gammas:
            for number in range(prompts):
                task, made = ("code", "chat")[number % 2], 0
                for step in range(steps):
                    confidence = random.uniform(0.2, 1)
                    accepted = int(confidence * gamma)
                    made += accepted + 1
                    step_rows.append({
                        "compression": compression, "gamma": gamma, "task": task, "step": step, "accepted": accepted,
                        "acceptance_rate": accepted / gamma, "tokens_produced": accepted + 1,
                        "mean_draft_entropy": 1 - confidence, "mean_draft_confidence": confidence,
                        "max_draft_entropy": 2 - confidence, "min_draft_confidence": confidence / 2})
                seconds = steps * (gamma * DRAFT_MS[compression] + VERIFY_MS[compression]) / 1000
                run_rows.append({"compression": compression, "gamma": gamma, "task": task, "prompt": f"prompt {number}",
                                 "num_tokens": made, "elapsed_sec": seconds, "num_steps": steps})
    write_csv(folder / STEPS_FILE, step_rows)
    write_csv(folder / RUNS_FILE, run_rows)
    names = POLICIES.values()
    write_csv(folder / paper_records.TABLE1_FILE, [
        {"compression": name, **dict.fromkeys(names, 2.5)} for name in (*compressions, "Overall")])
    write_csv(folder / paper_records.TABLE2_FILE, [
        {"compression": compressions[0], "task": "code", "Fixed-4": 2.5, "SpecKV": 3, "improvement_pct": 20}])
    write_csv(folder / paper_records.INTERVALS_FILE, [
        {"policy": name, "mean": 2.5, "ci_lower": 2, "ci_upper": 3} for name in names])
    (folder / NUMBERS_FILE).write_text(json.dumps({
        "predictor": {"fast_test_corr": 0.5, "fast_test_mse": 0.1, "reference_corr": 0.6},
        "results": {"overall_improvement_pct": 20.0}, "statistical_test": {"p_value": 0.25}}))
    return folder


def test_the_command_prints_what_it_promises_and_keeps_the_controller(tmp_path, monkeypatch, capsys):
    (tmp_path / "release").mkdir()
    data = ["--data", str(small_release(tmp_path / "release"))]
    kept = tmp_path / "kept" / "controller.safetensors"
    status, printed = run_main(monkeypatch, capsys, "paper", *data, "--json", "--save", str(kept))
    assert status == 0, printed.err
    figures = json.loads(printed.out)
    assert list(figures) == ["recomputed", "published", "honest"]
    for part in ("recomputed", "published"):
        assert list(figures[part]) == ["tokens_per_step", "improvement_pct", "correlation", "mse", "p_value"]
        assert list(figures[part]["tokens_per_step"]) == list(POLICIES)
    assert figures["published"]["improvement_pct"] == 20.0 and figures["published"]["p_value"] == 0.25
    assert figures["honest"]["ms_per_step"]["nf4"] == pytest.approx({"draft_ms_a_token": 12, "verify_ms": 40})
    assert figures["honest"]["improvement_pct"]["fixed-4"] == 0
    controller = load_controller(kept)
    assert list(controller.w1.shape) == [6, 16] and controller.about["fitted_on"] == "192 steps"

    status, printed = run_main(monkeypatch, capsys, "paper", *data)
    assert status == 0 and "Table 1" in printed.out and "Table 2" in printed.out
    assert f"{figures['recomputed']['tokens_per_step']['speckv-fast']:.2f} (2.50)" in printed.out


def test_the_help_tells_what_the_folder_must_hold(monkeypatch, capsys):
    status, printed = run_main(monkeypatch, capsys, "paper", "--help")
    assert status == 0 and STEPS_FILE in printed.out and RUNS_FILE in printed.out and "speckv[paper]" in printed.out


def test_equal_records_give_equal_figures(tmp_path):
    one, other = (paper.as_dict(paper.report(small_release(tmp_path))) for _ in range(2))
    assert one == other


def some_steps(gamma, tokens, compression="fp16", task="code"):
    """Steps of one text with these gammas and tokens."""
    count, gamma, tokens = len(gamma), np.array(gamma), np.array(tokens)
    return paper_records.Steps(np.array([compression] * count), np.array([task] * count), gamma, tokens,
                               (tokens - 1) / gamma, np.zeros((count, 4)), np.zeros(count, int), np.arange(count))


def test_a_replay_counts_the_steps_logged_at_the_chosen_gamma_by_hand():
    steps, costs = some_steps([2, 2, 2, 4, 4], [1, 2, 3, 3, 5]), {"fp16": (10.0, 20.0)}
    fixed = paper_honest.replay("fixed-4", steps, np.full(5, 4), costs)["all"]
    assert (fixed.tokens_per_step, fixed.ms_per_step) == pytest.approx((4, 60))
    assert fixed.tokens_per_second == pytest.approx(1000 * 4 / 60)
    # It would have chosen as logged in two of three steps at 2, in one of two at 4: those weigh 1/3, 1/3 and 1/2.
    mixed = paper_honest.replay("mixed", steps, np.array([2, 4, 2, 2, 4]), costs)["fp16"]
    assert mixed.tokens_per_step == pytest.approx((1 / 3 * 1 + 1 / 3 * 3 + 1 / 2 * 5) / (7 / 6))
    assert mixed.ms_per_step == pytest.approx((2 / 3 * 40 + 1 / 2 * 60) / (7 / 6))


def test_every_cell_writes_the_same_text():
    scores = [paper_honest.Score(2, 40), paper_honest.Score(4, 100)]
    together = paper_honest._same_text(scores)  # 4 tokens each take 2 steps of 40 ms and 1 of 100 ms
    assert together.tokens_per_step == pytest.approx(8 / 3)
    assert together.tokens_per_second == pytest.approx(1000 * 8 / 180)


def test_drawing_every_prompt_once_is_the_replay_itself(tmp_path):
    steps, runs, _ = paper_records.read(small_release(tmp_path))
    costs, chosen = paper_honest.fit_costs(runs), np.where(steps.signals[:, 1] > 0.5, 4, 2)
    replayed = paper_honest.replay("by confidence", steps, chosen, costs)["all"].tokens_per_second
    once = np.ones((1, 6))
    assert paper_honest.speeds_of(steps, runs, chosen, costs, once) == pytest.approx([replayed])
    assert paper_honest.speeds_of(steps, runs, chosen, costs, 3 * once) == pytest.approx([replayed])
    intervals = paper_honest.gain_intervals(
        steps, runs, {"fixed-4": np.full_like(chosen, 4), "by confidence": chosen}, costs)
    gain = paper_fit.improvement(
        paper_honest.replay("fixed-4", steps, np.full_like(chosen, 4), costs)["all"].tokens_per_second, replayed)
    assert intervals["fixed-4"] == pytest.approx((0, 0))
    assert intervals["by confidence"][0] < gain < intervals["by confidence"][1]


def test_a_gamma_that_was_never_logged_cannot_be_scored():
    with pytest.raises(InputError, match="no step of fp16 code was logged at the gamma that fixed-8 chooses"):
        paper_honest.replay("fixed-8", some_steps([2, 4], [1, 3]), np.full(2, 8), {"fp16": (10.0, 20.0)})


def test_the_inputs_of_a_loop_are_those_of_the_step_before(tmp_path):
    steps, _, _ = paper_records.read(small_release(tmp_path))
    before, same = paper_honest.inputs_before(steps), steps.inputs()
    later = np.flatnonzero(steps.position > 0)
    assert np.array_equal(before[later, :4], same[later - 1, :4])
    assert np.array_equal(before[later, 5], steps.acceptance[later - 1])
    assert np.array_equal(before[:, 4], same[:, 4]) and np.array_equal(before[:, 6], same[:, 5])


def test_a_choice_is_made_by_models_that_never_saw_the_prompt(tmp_path):
    steps, runs, _ = paper_records.read(small_release(tmp_path))
    inputs = np.column_stack([np.arange(len(steps.gamma)), steps.gamma])  # the first column tells the step
    prompts, seen = runs.prompt[steps.run], []

    class Remembering:
        def __init__(self, inputs, acceptance):
            self.trained = {prompts[int(step)] for step in inputs[:, 0]}

        def predict(self, inputs):
            asked = {prompts[int(step)] for step in inputs[:, 0]}
            assert asked.isdisjoint(self.trained)
            seen.extend(asked)
            return inputs[:, 0] / len(steps.gamma)

    paper_honest.left_out(Remembering, steps, runs, inputs, np.array([2, 4]))
    assert set(seen) == set(prompts)


def test_the_p_value_is_the_share_of_resamples_that_do_not_gain():
    random = np.random.default_rng(0)
    noise = random.normal(0, 1, 400)
    _, p_value = paper_fit.bootstrap({"fixed-4": np.zeros(400), "speckv-fast": noise - noise.mean()})
    assert 0.45 < p_value < 0.55
    intervals, p_value = paper_fit.bootstrap({"fixed-4": noise - noise.mean(), "speckv-fast": noise - noise.mean() + 1})
    assert p_value == 0
    assert intervals["fixed-4"] == pytest.approx((-1.96 / 20, 1.96 / 20), abs=0.02)


def edit(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize("spoil, words", [
    (lambda folder: (folder / RUNS_FILE).unlink(), f"has no {RUNS_FILE}"),
    (lambda folder: edit(folder / STEPS_FILE, "acceptance_rate", "rate"), "no column or value 'acceptance_rate'"),
    (lambda folder: edit(folder / STEPS_FILE, "fp16", "int3"), "line 2: compression is 'int3'"),
    (lambda folder: edit(folder / STEPS_FILE, "fp16,2,code,0,", "fp16,2,code,zero,"), "line 2: invalid literal"),
    (lambda folder: edit(folder / STEPS_FILE, "fp16,2,code,0,0,", "fp16,2,code,0,3,"), "3 accepted of 2 drafted"),
    (lambda folder: edit(folder / STEPS_FILE, "fp16,2,code,0,", "fp16,2,code,1,"), "text by text"),
    (lambda folder: edit(folder / STEPS_FILE, "fp16,2,code,7,", "fp16,2,code,0,"), "text by text"),
    (lambda folder: edit(folder / RUNS_FILE, "0.32", "nan"), "elapsed_sec is nan"),
    (lambda folder: (folder / STEPS_FILE).write_text("compression,gamma\n"), "holds no records"),
    (lambda folder: (folder / STEPS_FILE).write_bytes(b"\xff\xfe\x00"), STEPS_FILE),
    (lambda folder: (folder / NUMBERS_FILE).write_text("[" * 100_000), "published figures"),
    (lambda folder: (folder / NUMBERS_FILE).write_text('{"predictor": 1}'), "published figures"),
    (lambda folder: edit(folder / paper_records.TABLE1_FILE, "Overall", "Total"), "published figures"),
    (lambda folder: edit(folder / paper_records.INTERVALS_FILE, "SpecKV-fast", "other"), "published figures"),
], ids=["missing", "no column", "compression", "no number", "accepted", "no first step", "two texts", "nan", "empty",
        "not text", "deep json", "other json", "no overall row", "no interval"])
def test_records_that_do_not_fit_are_refused_in_one_line(spoil, words, tmp_path, monkeypatch, capsys):
    spoil(small_release(tmp_path))
    status, printed = run_main(monkeypatch, capsys, "paper", "--data", str(tmp_path), "--json")
    assert status == 2 and words in printed.err, printed.err
    assert len(printed.err.strip().splitlines()) == 1 and not printed.out


@pytest.mark.parametrize("settings, words", [
    ({"gammas": (2, 8)}, "the baseline, 4, must be among them"),
    ({"prompts": 2, "steps": 1}, "too few to be split"),
    ({"prompts": 4}, "4 prompts: at least 5"),
    ({"gammas": (4,)}, "records of at least two gammas"),
], ids=["no baseline", "too few", "few prompts", "one gamma"])
def test_too_few_records_are_refused(settings, words, tmp_path):
    small_release(tmp_path, **settings)
    with pytest.raises(InputError, match=words):
        paper.report(tmp_path)


def test_without_scikit_learn_the_error_tells_how_to_get_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    status, printed = run_main(monkeypatch, capsys, "paper", "--data", str(tmp_path))
    assert status == 2 and "pip install 'speckv[paper]'" in printed.err


def test_a_name_that_tells_no_layout_is_refused_before_the_work(tmp_path, monkeypatch, capsys):
    status, printed = run_main(monkeypatch, capsys, "paper", "--data", str(tmp_path), "--save", "controller.pkl")
    assert status == 2 and "end it in .safetensors" in printed.err


def test_a_folder_that_is_not_there_names_the_files_it_should_hold(tmp_path):
    with pytest.raises(InputError) as refused:
        paper.report(tmp_path / "nowhere")
    assert all(name in str(refused.value) for name in FILES)
