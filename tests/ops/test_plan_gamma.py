"""plan_gamma: the speculation length with the most predicted tokens per second."""

import pytest
import torch
from helpers_ops import (
    BACKEND,
    assert_refused,
    call,
    call_reference,
    poisoned,
    random_controller,
    random_signals,
    skip_in_the_interpreter,
)
from oracle_ops import BOUNDARY, RARELY, assert_close

from speckv.kernels import plan_gamma

GAMMAS = torch.tensor([2, 4, 6, 8])


def plan_values(rows, features=5, hidden=16, gammas=GAMMAS, seconds=None, seed=0):
    w1, b1, w2, b2 = random_controller(features, hidden, seed)
    seconds = torch.ones(gammas.shape[0]) if seconds is None else seconds
    return {"signals": random_signals(rows, features, seed), "w1": w1, "b1": b1, "w2": w2, "b2": b2,
            "gammas": gammas, "seconds": seconds}


def assert_agrees(values):
    """The serving backend against the reference, and gamma against fp64 wherever the best two are not a tie."""
    gamma, acceptance = call("plan_gamma", values)
    expected_gamma, expected_acceptance = call_reference("plan_gamma", values)
    rows, gammas, seconds = values["signals"].shape[0], values["gammas"], values["seconds"]
    assert gamma.dtype == torch.int64 and acceptance.dtype == torch.float32
    assert gamma.shape == (rows,) and acceptance.shape == (rows, gammas.shape[0])
    assert_close(acceptance, expected_acceptance, torch.float32)

    features = torch.cat([values["signals"].unsqueeze(1).expand(-1, len(gammas), -1),
                          gammas.reshape(1, -1, 1).expand(rows, -1, 1)], dim=-1).double()
    acceptance64 = (torch.relu(features @ values["w1"].double() + values["b1"].double())
                    @ values["w2"].double() + values["b2"].double()).squeeze(-1)
    assert_close(acceptance, acceptance64.float(), torch.float32)
    tokens, rate = acceptance64.clamp(0, 1) * gammas + 1, values.get("rate", 0.0)
    score = tokens - rate * seconds.double() if rate else tokens / seconds.double()
    ordered = torch.nn.functional.pad(score, (1, 0), value=-torch.inf).sort(dim=-1).values  # one has no rival
    rounded = (tokens + rate * seconds.double()).amax(dim=-1) if rate else ordered[:, -1]
    certain = ordered[:, -1] - ordered[:, -2] > BOUNDARY * rounded
    assert (~certain).float().mean() <= RARELY
    assert torch.equal(gamma[certain], expected_gamma[certain])
    assert torch.equal(gamma[certain], gammas[score.argmax(dim=-1)][certain])


def hand_controller(per_signal, per_gamma=0.0, bias=0.0):
    """An MLP with one hidden unit: acceptance = relu(signals @ per_signal + per_gamma * gamma) + bias."""
    w1 = torch.tensor([*per_signal, per_gamma]).unsqueeze(1)
    return w1, torch.zeros(1), torch.ones(1, 1), torch.tensor([bias])


@pytest.mark.parametrize("rows, features, hidden, candidates", [
    (1, 5, 1, 1), (3, 5, 16, 4), (2, 7, 33, 17), (99, 5, 16, 9), (989, 12, 64, 5),
], ids=lambda size: str(size))
def test_agrees_with_the_reference_on_poisoned_views(rows, features, hidden, candidates):
    skip_in_the_interpreter(rows > 99, "989 rows")
    gammas = torch.arange(candidates)
    values = plan_values(rows, features, hidden, gammas, seconds=0.02 + 0.0037 * gammas, seed=rows)
    values = {name: poisoned(tensor) for name, tensor in values.items()}
    assert_agrees(values)
    assert_agrees({**values, "rate": 55.0})


def test_reads_transposed_and_strided_inputs_as_they_look():
    values = plan_values(6, features=5, hidden=7)
    assert_agrees({**values,
                   "signals": random_signals(6, 10)[:, ::2], "w1": values["w1"].t().contiguous().t(),
                   "b1": torch.tensor(0.1).expand(7), "w2": values["w2"].expand(7, 2)[:, 1:],
                   "gammas": torch.arange(12)[::3], "seconds": torch.tensor(0.5).expand(4)})


def test_hand_written_numbers():
    # acceptance = mean confidence - 0.05 gamma: 0.7, 0.6, 0.5, 0.4, so 2.4, 3.4, 4.0, 4.2 tokens.
    signals = torch.tensor([[1.0, 0.8, 2.0, 0.5, 0.0]])
    controller = hand_controller([0.0, 1.0, 0.0, 0.0, 0.0], per_gamma=-0.05)
    gamma, acceptance = plan_gamma(signals, *controller, GAMMAS, torch.ones(4))
    assert gamma.tolist() == [8]
    torch.testing.assert_close(acceptance, torch.tensor([[0.7, 0.6, 0.5, 0.4]]))
    # Where drafting costs as much as half of a pass, fewer tokens are more tokens per second: 1.2, 1.13, 1.0, 0.84.
    gamma, _ = plan_gamma(signals, *controller, GAMMAS, torch.tensor([2.0, 3.0, 4.0, 5.0]))
    assert gamma.tolist() == [2]


def test_with_a_rate_a_step_is_weighed_against_what_its_time_is_worth_elsewhere():
    # 1.4, 2.4, 3.0, 3.2 more tokens than none, for 1, 2, 3, 4 more seconds than the 2 that none takes.
    signals = torch.tensor([[1.0, 0.8, 2.0, 0.5, 0.0]])
    controller = hand_controller([0.0, 1.0, 0.0, 0.0, 0.0], per_gamma=-0.05)
    arguments = (signals, *controller, torch.tensor([0, 2, 4, 6, 8]), torch.tensor([2.0, 3.0, 4.0, 5.0, 6.0]))
    # By its own rate the step would draft 4: 0.5, 0.8, 0.85, 0.8, 0.7. A slow run should draft longer, a fast one less.
    chosen = [plan_gamma(*arguments, rate)[0].item() for rate in (0.0, 0.1, 0.5, 0.8, 1.1, 1.5)]
    assert chosen == [4, 8, 6, 4, 2, 0]


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), 1e39])
def test_a_rate_that_is_negative_or_not_finite_is_refused(value):
    values = {**plan_values(3), "rate": value}
    for function in (call, call_reference):
        with pytest.raises(RuntimeError, match="plan_gamma: rate must be finite and >= 0"):
            function("plan_gamma", values)


def test_acceptance_is_given_raw_and_clipped_only_to_compare():
    signals = torch.tensor([[0.0, 5.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    gamma, acceptance = plan_gamma(signals, *hand_controller([0.0, 1.0, 0.0, 0.0, 0.0], bias=-2.0),
                                   GAMMAS, torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert acceptance.tolist() == [[3.0] * 4, [-2.0] * 4]
    # Clipped to 1: 3/1, 5/2, 7/3, 9/4. Unclipped it would be 7, 6.5, 6.3, 6.25: the same; so a costlier case follows.
    assert gamma.tolist() == [2, 2]
    gamma, _ = plan_gamma(signals, *hand_controller([0.0, 1.0, 0.0, 0.0, 0.0], bias=-2.0),
                          GAMMAS, torch.tensor([1.0, 1.8, 2.6, 3.4]))
    # Clipped 3, 2.78, 2.69, 2.65; unclipped 7, 7.2, 7.3, 7.35 would take 8.
    assert gamma.tolist() == [2, 2]


def test_gamma_zero_is_a_candidate_and_wins_where_nothing_is_accepted():
    signals = torch.zeros(1, 5)
    controller = hand_controller([0.0] * 5)
    gamma, _ = plan_gamma(signals, *controller, torch.tensor([4, 0, 2]), torch.tensor([1.4, 1.0, 1.2]))
    assert gamma.tolist() == [0]


def test_the_first_candidate_wins_a_tie():
    # Acceptance 0 everywhere and equal costs: every candidate predicts one token.
    for gammas in ([8, 2, 6, 4], [3] * 5, list(range(16, -1, -1))):
        gamma, _ = plan_gamma(torch.zeros(2, 5), *hand_controller([0.0] * 5), torch.tensor(gammas),
                              torch.ones(len(gammas)))
        assert gamma.tolist() == gammas[:1] * 2


def test_extra_signals_stand_before_gamma():
    # The sixth of six signals has weight 1, and gamma, the last input, weight 0.
    signals = torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.0, 0.75]])
    _, acceptance = plan_gamma(signals, *hand_controller([0.0] * 5 + [1.0]), GAMMAS, torch.ones(4))
    assert acceptance.tolist() == [[0.75] * 4]


def test_an_empty_batch_gives_empty_outputs():
    gamma, acceptance = call("plan_gamma", plan_values(0))
    assert gamma.shape == (0,) and acceptance.shape == (0, 4)
    assert gamma.dtype == torch.int64 and acceptance.dtype == torch.float32


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("column", [0, 3, 4, 5])
def test_a_signal_that_is_not_finite_is_refused_even_behind_the_relu(value, column):
    # Of the hidden units some see the signal with a positive weight and some with a negative one, and a relu that
    # turns NaN into 0 would hide it.
    good = plan_values(3, features=6)
    signals = good["signals"].clone()
    signals[1, column] = value
    assert_refused("plan_gamma", good, {"signals": signals}, 1,
                   "plan_gamma: row 1: predicted acceptance is not finite")


@pytest.mark.parametrize("name", ["w1", "b1", "w2", "b2"])
def test_weights_that_are_not_finite_are_refused(name):
    good = plan_values(2)
    broken = good[name].clone()
    broken[0] = float("nan")
    bad = {**good, name: broken}
    if BACKEND == "triton":
        assert call("plan_gamma", bad)[0].tolist() == [-1, -1]
    else:
        assert_refused("plan_gamma", good, {name: broken}, 0, "plan_gamma: row 0: predicted acceptance is not finite")


def test_an_acceptance_that_overflows_is_refused():
    good = plan_values(3)
    signals = good["signals"].clone()
    signals[2] = 3e38
    assert_refused("plan_gamma", good, {"signals": signals}, 2,
                   "plan_gamma: row 2: predicted acceptance is not finite")


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_seconds_that_are_not_positive_and_finite_are_refused(value):
    assert_refused("plan_gamma", plan_values(3), {"seconds": torch.tensor([1.0, 1.0, value, 1.0])}, None,
                   "plan_gamma: seconds must be finite and > 0")
