"""draft_step: draft_sample, the running signals and plan_gamma in one call."""

import pytest
import torch
from helpers_ops import (
    arguments,
    assert_refused,
    call,
    call_reference,
    each_dtype,
    each_shape,
    poisoned,
    random_controller,
    random_logits,
    random_signals,
    random_uniform,
    same_bits,
    skip_in_the_interpreter,
    skip_repeated_large_shapes,
    temperatures,
)
from oracle_ops import BOUNDARY, assert_close, assert_draft_sample_agrees

from speckv.kernels import draft_sample, draft_step

NAN = float("nan")


def step_values(rows, vocabulary, dtype=torch.float32, kind="mixed", features=5, seed=0):
    w1, b1, w2, b2 = random_controller(features, seed=seed)
    gammas = torch.tensor([0, 1, 2, 3, 4, 6, 8])
    return {
        "logits": random_logits(rows, vocabulary, dtype=dtype, seed=seed), "temperature": temperatures(kind, rows),
        "uniform": random_uniform(rows, seed=seed), "signals": random_signals(rows, features, seed),
        "drafted": torch.tensor([(0, 1, 2, 7)[row % 4] for row in range(rows)], dtype=torch.int64),
        "w1": w1, "b1": b1, "w2": w2, "b2": b2, "gammas": gammas, "seconds": 0.02 + 0.0037 * gammas,
    }


def forget_first_signals(values):
    """NaN in the first four signals of the rows that have drafted nothing: they must not be read."""
    signals = values["signals"].clone()
    signals[values["drafted"] == 0, :4] = NAN
    return {**values, "signals": signals}


def assert_agrees(values):
    outputs = call("draft_step", values)
    token, prob, entropy, confidence, signals, gamma = outputs
    assert_draft_sample_agrees(values, (token, prob, entropy, confidence))
    *_, expected_signals, expected_gamma = call_reference("draft_step", values)
    assert signals.shape == values["signals"].shape and signals.dtype == torch.float32
    assert gamma.shape == token.shape and gamma.dtype == torch.int64
    assert_close(signals, expected_signals, torch.float32)
    assert same_bits(signals[:, 4:], values["signals"][:, 4:])

    plan = {name: values[name] for name in ("w1", "b1", "w2", "b2", "gammas", "seconds")}
    _, acceptance = call_reference("plan_gamma", {**plan, "signals": expected_signals})
    score = (acceptance.double().clamp(0, 1) * plan["gammas"] + 1) / plan["seconds"]
    best = score.sort(dim=-1).values
    # Signals that differ in the last bit move the score by more than one: 10 boundaries apart is no tie.
    certain = best[:, -1] - best[:, -2] > 10 * BOUNDARY * best[:, -1]
    assert certain.all(), "choose another seed: two candidates are all but equal"
    assert torch.equal(gamma, expected_gamma)
    return outputs


@each_shape
@each_dtype
def test_agrees_with_the_reference_on_poisoned_views(shape, dtype):
    skip_repeated_large_shapes(shape, dtype)
    batch, _, vocabulary = shape
    # Two rows more than the batch, so that there are greedy and sampled ones, new drafts and old.
    values = forget_first_signals(step_values(batch + 2, vocabulary, dtype, "mixed", features=7, seed=vocabulary))
    assert_agrees({name: poisoned(tensor) for name, tensor in values.items()})


@pytest.mark.parametrize("batch", [99, 989])
def test_agrees_with_the_reference_in_batches_of(batch):
    skip_in_the_interpreter(True, f"{batch} rows")
    assert_agrees(forget_first_signals(step_values(batch, 100, seed=batch)))


def test_its_draw_is_that_of_draft_sample():
    values = step_values(5, 8193, seed=1)
    step = call("draft_step", values)
    alone = draft_sample(*arguments("draft_sample", **{n: values[n] for n in ("logits", "temperature", "uniform")}))
    assert torch.equal(step[0], alone[0])
    for together, apart in zip(step[1:4], alone[1:], strict=True):
        assert_close(together, apart, torch.float32)


def test_hand_written_signals_over_three_tokens():
    # Entropies 1, 2 and 0 bits, confidences 1/2, 1/4 and 1.
    rows = [[0.0, 0.0, -200.0, -200.0], [0.0] * 4, [0.0, -200.0, -200.0, -200.0]]
    expected = [[1.0, 0.5, 1.0, 0.5, 0.25], [1.5, 0.375, 2.0, 0.25, 0.25], [1.0, 1.75 / 3, 2.0, 0.25, 0.25]]
    controller = *random_controller(5), torch.tensor([2, 4]), torch.ones(2)
    signals = torch.tensor([[NAN, NAN, NAN, NAN, 0.25]])
    for drafted, (row, after) in enumerate(zip(rows, expected, strict=True)):
        *_, signals, _ = draft_step(torch.tensor([row]), torch.ones(1), torch.tensor([0.3]), signals,
                                    torch.tensor([drafted]), *controller)
        assert signals[0].tolist() == pytest.approx(after, rel=1e-6)


def test_the_plan_sees_the_signals_after_this_token():
    # acceptance is the mean entropy: 0 before this token, 2 bits (clipped to 1) after, so the long draft wins.
    w1 = torch.tensor([[1.0], [0.0], [0.0], [0.0], [0.0], [0.0]])
    *_, gamma = draft_step(torch.zeros(1, 4), torch.ones(1), torch.tensor([0.3]), torch.zeros(1, 5),
                           torch.zeros(1, dtype=torch.int64), w1, torch.zeros(1), torch.ones(1, 1), torch.zeros(1),
                           torch.tensor([2, 8]), torch.ones(2))
    assert gamma.tolist() == [8]


def test_signals_do_not_depend_on_temperature_or_on_the_token_drawn():
    values = step_values(1, 1023)
    results = []
    for temperature, uniform in ((0.0, 0.5), (0.7, 0.1), (1.3, 0.9)):
        *_, signals, gamma = call("draft_step", {**values, "temperature": torch.tensor([temperature]),
                                                 "uniform": torch.tensor([uniform])})
        results.append((signals, gamma))
    for signals, gamma in results[1:]:
        assert same_bits(signals, results[0][0]) and torch.equal(gamma, results[0][1])


def test_expanded_and_strided_inputs_are_read_as_they_look():
    values = step_values(1, 1023)
    assert_agrees({**values, "logits": values["logits"].expand(4, 1023), "temperature": torch.tensor(0.9).expand(4),
                   "uniform": random_uniform(4, 3)[:, 1], "signals": random_signals(4, 10)[:, ::2],
                   "drafted": torch.tensor([0, 9, 1, 9, 2, 9, 3])[::2]})


def test_an_empty_batch_gives_empty_outputs():
    token, prob, entropy, confidence, signals, gamma = call("draft_step", step_values(0, 100))
    assert all(output.shape == (0,) for output in (token, prob, entropy, confidence, gamma))
    assert signals.shape == (0, 5) and gamma.dtype == torch.int64


def test_a_vocabulary_of_one():
    outputs = call("draft_step", {**step_values(1, 1), "signals": torch.full((1, 5), 0.5)})
    assert [output.item() for output in outputs[:4]] == [0, 1.0, 0.0, 1.0]
    assert outputs[4].tolist() == [[0.0, 1.0, 0.0, 1.0, 0.5]]


@pytest.mark.parametrize("value, reason", [
    (NAN, "a logit is NaN"), (float("inf"), "a logit is +inf"), (-float("inf"), "every logit is -inf"),
], ids=["nan", "inf", "all-masked"])
def test_bad_logits_in_one_row_are_refused_by_name(value, reason):
    good = step_values(3, 1023)
    logits = good["logits"].clone()
    logits[1, 500] = value
    if value < 0:
        logits[1] = value
    assert_refused("draft_step", good, {"logits": logits}, 1, f"draft_step: row 1: {reason}")


@pytest.mark.parametrize("name, row, value, words", [
    ("temperature", 1, -1.0, "temperature must be finite and >= 0"),
    ("uniform", 2, 1.0, "uniform must be in [0, 1)"),
    ("drafted", 1, -1, "drafted must be >= 0"),
], ids=["temperature", "uniform", "drafted"])
def test_bad_values_in_one_row_are_refused_by_name(name, row, value, words):
    good = step_values(3, 100)
    changed = good[name].clone()
    changed[row] = value
    assert_refused("draft_step", good, {name: changed}, row, f"draft_step: row {row}: {words}")


def test_seconds_that_are_not_positive_are_refused():
    assert_refused("draft_step", step_values(3, 100), {"seconds": torch.tensor([1.0] * 6 + [0.0])}, None,
                   "draft_step: seconds must be finite and > 0")


@pytest.mark.parametrize("column", [0, 1, 2, 3, 4])
def test_a_signal_that_is_nan_is_refused_once_something_was_drafted(column):
    # Also for the maximum and the minimum, which in C and on a GPU prefer the operand that is a number.
    good = step_values(3, 100)
    signals = good["signals"].clone()
    signals[2, column] = NAN
    assert good["drafted"][2] > 0
    assert_refused("draft_step", good, {"signals": signals}, 2,
                   "draft_step: row 2: predicted acceptance is not finite")
