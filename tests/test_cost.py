"""What drafts and passes cost is learned from the steps of a run, stalls and all."""

import pytest
from test_adaptive import step

from speckv.cost import StepCosts
from speckv.records import StepRecord
from speckv.signals import Signal


def test_costs_are_usual_before_and_measured_after():
    costs = StepCosts()
    assert costs.is_empty and costs.verify_ms(1) == 1.0 and costs.draft_ms(False) == pytest.approx(0.1)
    for _ in range(30):
        costs.record(step(0, 0, 0.0, 40.0))
        costs.record(step(4, 2, 12.0, 48.0))
    assert costs.verify_ms(1) == pytest.approx(40, rel=0.02) and costs.verify_ms(5) == pytest.approx(48, rel=0.02)
    assert costs.verify_ms(3) == pytest.approx(44, rel=0.02)  # between them, though never measured
    assert costs.draft_ms(False) == pytest.approx(3) and costs.draft_ms(True) == 0
    assert costs.step_ms(4) == pytest.approx(60, rel=0.02)


def test_a_draft_of_both_kinds_is_split_between_them():
    costs = StepCosts()
    costs.record(step(4, 4, 0.8, 40.0, is_estimate=True))
    mixed = StepRecord(3, 0, 1, 5.2, 40.0, (Signal(1, 0.9, True), Signal(1, 0.5), Signal(1, 0.5)))
    costs.record(mixed)
    assert costs.draft_ms(True) == pytest.approx(0.2) and costs.draft_ms(False) == pytest.approx(2.5)


def test_one_stall_moves_an_estimate_little_and_a_lasting_change_is_learned():
    costs = StepCosts()
    for _ in range(50):
        costs.record(step(0, 0, 0.0, 40.0))
    costs.record(step(0, 0, 0.0, 4000.0))
    assert costs.verify_ms(1) < 43
    for _ in range(100):
        costs.record(step(0, 0, 0.0, 80.0))
    assert costs.verify_ms(1) == pytest.approx(80, rel=0.05)


def test_a_pass_that_jumps_at_a_length_is_seen_there():
    costs = StepCosts()
    for _ in range(40):
        for gamma, ms in ((1, 30), (3, 32), (4, 50), (5, 51)):
            costs.record(step(gamma, 0, gamma, ms))
    assert costs.verify_ms(5) - costs.verify_ms(4) > 12


def test_a_longer_context_raises_the_price_of_lengths_that_it_was_not_measured_at():
    costs = StepCosts()
    for _ in range(40):
        for gamma, ms in ((0, 30), (1, 32), (4, 38)):
            costs.record(step(gamma, 0, gamma, ms))
    for _ in range(60):
        costs.record(step(1, 0, 1, 40))  # a quarter more
    assert costs.verify_ms(2) == pytest.approx(40, rel=0.01)
    assert costs.verify_ms(1) == pytest.approx(37.5, rel=0.04) and costs.verify_ms(5) == pytest.approx(47.5, rel=0.04)


def test_a_stall_at_a_length_not_yet_measured_counts_for_little():
    costs = StepCosts()
    for _ in range(10):
        costs.record(step(1, 1, 1.0, 30.0))
    costs.record(step(4, 1, 1.0, 300.0))
    assert costs.verify_ms(5) < 1.5 * 30
