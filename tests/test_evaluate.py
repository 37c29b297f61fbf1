"""The statistics of a comparison, on numbers made by hand."""

from dataclasses import replace

import pytest

from speckv import InputError
from speckv.evaluate import Answer, best_fixed, compare, figures, oracle_rate, rate, ratios, select

STEP = [2, 1, 2, 4.0, 40.0, 0.8]  # gamma, accepted, tokens, draft_ms, verify_ms, predicted


def answers(policy, seconds, compression="bf16", task="code", tokens=100):
    return [Answer(compression, task, prompt, policy, tokens, second, 0.1, [STEP] * 10)
            for prompt, second in enumerate(seconds)]


def test_a_rate_is_of_totals_so_that_long_texts_count_more():
    some = [replace(answers("off", [1.0])[0], tokens=10), replace(answers("off", [9.0])[0], tokens=190)]
    assert rate(some) == 20.0


def test_the_best_fixed_gamma_is_chosen_by_total_time():
    some = answers("fixed:2", [1.0, 5.0]) + answers("fixed:4", [2.0, 2.0]) + answers("adaptive", [0.1, 0.1])
    assert best_fixed(some) == "fixed:4"
    assert best_fixed(answers("off", [1.0])) is None


def test_the_best_fixed_gamma_of_all_compressions_counts_each_alike():
    # Over total seconds the slow compression would decide alone, and for fixed:4.
    some = (answers("fixed:2", [1.0]) + answers("fixed:4", [3.0])
            + answers("fixed:2", [120.0], "int8") + answers("fixed:4", [100.0], "int8"))
    assert best_fixed(some) == "fixed:2"
    assert best_fixed(select(some, compression="int8")) == "fixed:4"


def test_ratios_are_of_the_same_task():
    own = answers("fixed:2", [1.0]) + answers("fixed:2", [3.0], task="math")
    other = answers("off", [2.0]) + answers("off", [3.0], task="math")
    assert ratios(own, other) == {"code": 2.0, "math": 1.0, "all": 1.25}


def test_pairs_are_kept_together():
    # The prompts differ a hundredfold in length, the policies by 10 % on each: only pairing can tell.
    base = [0.1, 0.5, 1.0, 2.0, 5.0, 10.0]
    some = answers("adaptive", base) + answers("fixed:2", [1.1 * second for second in base])
    test = compare(some, "adaptive", {"bf16": "fixed:2"})
    assert test.ratio == pytest.approx(1.1) and test.lower == pytest.approx(1.1) and test.p_value == 0.0
    shuffled = answers("adaptive", base) + answers("fixed:2", [1.1 * second for second in reversed(base)])
    assert compare(shuffled, "adaptive", {"bf16": "fixed:2"}).p_value > 0.2


def test_no_difference_is_not_called_one():
    some = answers("adaptive", [1.0, 2.0, 3.0, 4.0]) + answers("fixed:2", [2.0, 1.0, 4.0, 3.0])
    test = compare(some, "adaptive", {"bf16": "fixed:2"})
    assert test.ratio == pytest.approx(1) and test.lower < 1 < test.upper and 0.3 < test.p_value < 0.7


def test_compressions_count_alike_however_slow_they_are():
    some = (answers("adaptive", [1.0] * 3) + answers("off", [2.0] * 3)
            + answers("adaptive", [100.0] * 3, "int8") + answers("off", [50.0] * 3, "int8"))
    assert compare(some, "adaptive", {"bf16": "off", "int8": "off"}).ratio == pytest.approx(1.0)


def test_a_prompt_is_one_prompt_at_however_many_compressions_it_is_answered():
    # The same gains at two compressions are no more evidence than at one; drawn apart they would look like more.
    gains = [0.7, 0.9, 1.0, 1.2, 1.5, 1.8]
    some = [answer for name in ("bf16", "int8")
            for answer in answers("adaptive", [1 / gain for gain in gains], name) + answers("off", [1.0] * 6, name)]
    once, twice = compare(some, "adaptive", {"bf16": "off"}), compare(some, "adaptive", {"bf16": "off", "int8": "off"})
    assert (once.lower, once.upper, once.p_value) == pytest.approx((twice.lower, twice.upper, twice.p_value))
    assert once.upper - once.lower > 0.3


def test_prompts_are_drawn_within_their_task():
    # Within a task all prompts are alike, so no draw can differ from the sample; across tasks it would.
    some = (answers("adaptive", [1.0] * 4) + answers("off", [4.0] * 4)
            + answers("adaptive", [1.0] * 4, task="math") + answers("off", [1.0] * 4, task="math"))
    test = compare(some, "adaptive", {"bf16": "off"})
    assert test.lower == pytest.approx(2.5) and test.upper == pytest.approx(2.5)


def test_a_single_prompt_a_task_has_no_interval():
    some = [answer for task in ("code", "math") for answer in answers("adaptive", [1.0], task=task)
            + answers("off", [2.0], task=task)]
    test = compare(some, "adaptive", {"bf16": "off"})
    assert (test.ratio, test.lower, test.upper, test.p_value) == (2.0, None, None, None)


def test_policies_that_did_not_answer_the_same_prompts_are_refused():
    with pytest.raises(InputError, match="did not answer the same prompts"):
        compare(answers("adaptive", [1.0]) + answers("off", [1.0, 2.0]), "adaptive", {"bf16": "off"})
    unequal = [answer for name, seconds in (("bf16", [1.0]), ("int8", [1.0, 2.0]))
               for policy in ("adaptive", "off") for answer in answers(policy, seconds, name)]
    with pytest.raises(InputError, match="did not answer the same prompts at int8"):
        compare(unequal, "adaptive", {"bf16": "off", "int8": "off"})


def test_figures_say_where_the_time_went():
    found = figures(answers("adaptive", [1.0]))
    assert found["tokens_per_step"] == 2 and found["mean_gamma"] == 2 and found["acceptance_rate"] == 0.5
    assert found["share_of_time"] == pytest.approx({"draft": 0.04, "verify": 0.4, "prompt": 0.1, "rest": 0.46})


def test_the_oracle_drafts_what_will_be_accepted_and_no_more():
    plain = [Answer("bf16", "code", 0, "off", 3, 0.12, 0.0, [[0, 0, 1, 0.0, 40.0, None]] * 3)]
    longest = [Answer("bf16", "code", 0, "fixed:8", 6, 0.2, 0.01, [[8, 4, 5, 16.0, 80.0, None],
                                                                   [8, 0, 1, 16.0, 80.0, None]])]
    # Four tokens: 4 * 2 ms, and a pass half-way between 40 ms and 80; none: 40 ms; and 10 ms for the prompt.
    assert oracle_rate(plain + longest) == pytest.approx(6 / (0.008 + 0.060 + 0.040 + 0.010))
    assert oracle_rate(plain) is None


def test_select_takes_all_that_is_asked():
    some = answers("off", [1.0]) + answers("off", [1.0], task="math") + answers("adaptive", [1.0])
    assert len(select(some, policy="off")) == 2 and len(select(some, policy="off", task="math")) == 1
