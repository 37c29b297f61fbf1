"""verify_chain where samplers have failed before: tails, padding, zero probabilities, bad rows."""

import pytest
import torch
from helpers_ops import (
    INT_SENTINEL,
    LARGEST_UNIFORM,
    assert_refused,
    call,
    each_dtype,
    random_chain,
    random_logits,
    random_uniform,
)
from oracle_ops import assert_chain_is_well_formed, assert_verify_chain_agrees
from planted_verifiers import assert_no_zero_probability_token, sampled_chain

NAN, INF = float("nan"), float("inf")


def test_a_uniform_of_zero_never_accepts_a_token_of_probability_zero():
    assert_no_zero_probability_token(lambda **values: call("verify_chain", values))


@pytest.mark.parametrize("vocabulary", [100, 8193, 10000, 151936])
@pytest.mark.parametrize("uniform", [0.0, LARGEST_UNIFORM], ids=["zero", "largest"])
def test_a_recovered_or_bonus_token_never_comes_from_a_tail_without_mass(vocabulary, uniform):
    # Row 0 rejects a token that the target has masked, row 1 has no draft; the target's mass lies in the middle.
    first, last = vocabulary // 10, vocabulary * 9 // 10
    for outside in (-INF, -1e4):
        target = torch.full((2, 2, vocabulary), outside)
        target[:, :, first:last] = random_logits(last - first, seed=vocabulary).clamp(-9, 9)
        draft = random_logits(2, 1, vocabulary, seed=vocabulary + 1)
        values = sampled_chain(target, draft, [[vocabulary - 1]] * 2, [[uniform] * 2] * 2, num_draft=[1, 0])
        tokens, accepted = call("verify_chain", values)
        assert_chain_is_well_formed(values, tokens, accepted)
        assert accepted.tolist() == [0, 0]
        assert ((tokens[:, 0] >= first) & (tokens[:, 0] < last)).all()


def test_the_largest_uniform_stays_inside_a_residual_that_ends_early():
    # Only token 1 has more of p than of q, and the cumulative sum is flat from there to the end.
    target = torch.tensor([0.2, 0.4, 0.2, 0.2]).log().expand(1, 2, 4)
    draft = torch.tensor([[[0.3, 0.1, 0.3, 0.3]]]).log()
    tokens, _ = call("verify_chain", sampled_chain(target, draft, [[3]], [[0.9, LARGEST_UNIFORM]]))
    assert tokens.tolist() == [[1, -1]]


@pytest.mark.parametrize("temperature", [0.0, 0.9], ids=["greedy", "sampled"])
def test_a_negative_draft_id_is_rejected_without_indexing(temperature):
    values = random_chain((4, 3, 1023), rows="sampled", seed=8)
    tokens = torch.tensor([[-1, 5, 5], [5, -1, 5], [5, 5, -1], [-INT_SENTINEL, -INT_SENTINEL, 5]])
    values = {**values, "draft_logits": random_logits(4, 3, 1023, seed=9), "draft_tokens": tokens,
              "num_draft": torch.tensor([3, 3, 3, 3]), "temperature": torch.full((4,), temperature)}
    _, accepted = assert_verify_chain_agrees(values)
    assert (accepted <= torch.tensor([0, 1, 2, 0])).all()


def test_a_row_without_a_draft_does_not_consume_the_uniforms_of_others_or_its_own_later_ones():
    values = random_chain((4, 3, 100), rows="sampled", seed=2)
    values["num_draft"] = torch.tensor([0, 3, 0, 2])
    values["draft_tokens"] = torch.randint(0, 100, (4, 3), generator=torch.Generator().manual_seed(1))
    values["draft_logits"] = random_logits(4, 3, 100, seed=4)
    before = call("verify_chain", values)
    changed = values["uniform"].clone()
    changed[[0, 2], 1:] = random_uniform(2, 3, seed=77)
    after = call("verify_chain", {**values, "uniform": changed})
    assert all(map(torch.equal, before, after))


def test_only_the_columns_up_to_num_draft_matter():
    values = random_chain((6, 5, 100), rows="mixed", seed=3)
    before = call("verify_chain", values)
    changed = values["uniform"].clone()
    behind = torch.arange(6) > values["num_draft"].unsqueeze(1)
    assert behind.any()
    changed[behind] = 0.123
    assert all(map(torch.equal, before, call("verify_chain", {**values, "uniform": changed})))


def test_greedy_and_sampled_rows_mix_in_a_batch():
    values = random_chain((9, 4, 1023), rows="mixed", seed=4)
    tokens, accepted = assert_verify_chain_agrees(values)
    for row, temperature in enumerate(values["temperature"].tolist()):
        alone = {name: tensor[row:row + 1] for name, tensor in values.items()}
        assert torch.equal(call("verify_chain", alone)[0], tokens[row:row + 1])
        if temperature == 0:
            best = values["target_logits"][row].argmax(dim=-1)
            count = int(accepted[row]) + 1
            assert torch.equal(tokens[row, :count], best[:count])


@pytest.mark.parametrize("uniform, token", [(0.1, 0), (0.6, 2), (LARGEST_UNIFORM, 2)])
def test_a_residual_of_zero_everywhere_draws_from_p(uniform, token):
    # Target and draft agree to the last bit and the drafted token is masked in both.
    logits = torch.tensor([0.5, 0.0, 0.5]).log()
    values = sampled_chain(logits.expand(1, 2, 3), logits.expand(1, 1, 3), [[1]], [[0.0, uniform]])
    tokens, accepted = call("verify_chain", values)
    assert (tokens.tolist(), accepted.tolist()) == ([[token, -1]], [0])


@each_dtype
def test_a_residual_of_zero_in_a_large_vocabulary_is_zero_to_the_last_bit(dtype):
    # The least rounding that p and q do not share would leave a residual of noise to draw from.
    logits = random_logits(1, 1, 8193, dtype=dtype, seed=6)
    logits[..., 17] = -INF
    uniform = random_uniform(1, 2, seed=6)
    values = sampled_chain(logits.expand(1, 2, -1), logits, [[17]], uniform)
    assert_verify_chain_agrees(values)
    plain, _ = call("verify_chain", {**values, "num_draft": torch.tensor([0]), "uniform": uniform.flip(1)})
    assert torch.equal(call("verify_chain", values)[0][:, 0], plain[:, 0])


def test_a_drafted_token_that_the_draft_gives_no_probability_is_accepted_if_the_target_has_it():
    # q = 0: p/q is infinite, and 0/0 where the target has masked it too.
    target = torch.tensor([[0.25, 0.75, 0.0], [0.25, 0.75, 0.0]]).log().expand(2, 2, 3)
    draft = torch.tensor([0.0, 0.5, 0.5]).log().expand(2, 1, 3)
    draft = torch.where(torch.tensor([[[False]], [[True]]]), torch.tensor([0.5, 0.5, 0.0]).log(), draft)
    values = sampled_chain(target, draft, [[0], [2]], [[LARGEST_UNIFORM, 0.5], [0.0, 0.5]])
    tokens, accepted = call("verify_chain", values)
    assert accepted.tolist() == [1, 0]
    assert tokens.tolist() == [[0, 1], [1, -1]]


BAD_ROWS = {"nan": (NAN, "a logit is NaN"), "inf": (INF, "a logit is +inf"),
            "all-masked": (-INF, "every logit is -inf")}


@pytest.mark.parametrize("bad", BAD_ROWS)
@pytest.mark.parametrize("vocabulary", [7, 8193])
@pytest.mark.parametrize("name, temperature", [("target", 0.0), ("target", 0.9), ("draft", 0.9)])
def test_bad_logits_in_one_row_are_refused_by_name(bad, vocabulary, name, temperature):
    value, reason = BAD_ROWS[bad]
    # Where target and draft are the same every draft token is accepted, so position 1 is reached.
    target = random_logits(3, 3, vocabulary, seed=1)
    best = target.argmax(dim=-1)[:, :2]
    good = sampled_chain(target, target[:, :2], best, torch.full((3, 3), 0.5), temperature=temperature)
    broken = good[f"{name}_logits"].clone()
    broken[1, 1, :] = value if bad == "all-masked" else 0.25
    broken[1, 1, -1] = value
    assert_refused("verify_chain", good, {f"{name}_logits": broken}, 1,
                   f"verify_chain: row 1, position 1: {name} logits: {reason}")


def test_a_bad_bonus_position_is_refused():
    target = random_logits(2, 3, 100, seed=1)
    good = sampled_chain(target, target[:, :2], target.argmax(-1)[:, :2], torch.full((2, 3), 0.5))
    broken = target.clone()
    broken[0, 2, 50] = NAN
    assert_refused("verify_chain", good, {"target_logits": broken}, 0,
                   "verify_chain: row 0, position 2: target logits: a logit is NaN")


def test_bad_logits_behind_the_stop_are_not_looked_at():
    # Row 0 stops at position 0, since its token is masked; row 1 has only one draft token.
    target = random_logits(2, 4, 100, seed=2)
    target[0, 0, 7] = -INF
    draft = random_logits(2, 3, 100, seed=3)
    tokens = torch.stack([torch.full((3,), 7), target[1, :3].argmax(-1)])
    draft[1, 0] = target[1, 0]
    values = sampled_chain(target, draft, tokens, random_uniform(2, 4), num_draft=[3, 1])
    before = call("verify_chain", values)
    assert before[1].tolist() == [0, 1]
    target, draft = target.clone(), draft.clone()
    target[0, 1:], target[1, 2:], draft[:, 1:] = NAN, INF, -INF
    after = call("verify_chain", {**values, "target_logits": target, "draft_logits": draft})
    assert all(map(torch.equal, before, after))


def test_full_acceptance_reads_the_target_behind_the_draft_and_never_the_draft_there():
    # Two of three drafted: the bonus comes from target row 2, whose only token is 42; draft row 2 is NaN.
    target = random_logits(1, 4, 100, seed=5)
    draft = target[:, :3].clone()
    target[0, 2], target[0, 3], draft[0, 2] = -INF, NAN, NAN
    target[0, 2, 42] = 0.0
    best = target.argmax(dim=-1)[:, :3]
    for temperature in (0.0, 0.9):
        values = sampled_chain(target, draft, best, torch.full((1, 4), 0.5), [2], temperature)
        tokens, accepted = call("verify_chain", values)
        assert tokens.tolist() == [[*best[0, :2].tolist(), 42, -1]] and accepted.tolist() == [2]


@pytest.mark.parametrize("top_k", [1, 5, 99])
def test_tokens_stay_inside_a_top_k_mask(top_k):
    target, draft = random_logits(6, 4, 1023, seed=top_k), random_logits(6, 3, 1023, seed=top_k + 1)
    assert_stays_in_support(target.where(target >= target.topk(top_k).values[..., -1:], -INF), draft)


@pytest.mark.parametrize("top_p", [0.5, 0.9, 0.99])
def test_tokens_stay_inside_a_top_p_mask(top_p):
    target, draft = random_logits(6, 4, 1023, seed=1), random_logits(6, 3, 1023, seed=2)
    ordered, order = target.sort(dim=-1, descending=True)
    beyond = torch.softmax(ordered, -1).cumsum(-1) - torch.softmax(ordered, -1) > top_p
    assert_stays_in_support(target.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), -INF), draft)


def assert_stays_in_support(target, draft):
    """Drafts with and without the same mask, at ordinary and at extreme uniforms, emit only unmasked tokens."""
    masked_draft = target[:, :3] * 0.5
    uniform = random_uniform(6, 4, seed=3)
    uniform[2:4], uniform[4:] = 0.0, LARGEST_UNIFORM
    for draft_logits in (draft, masked_draft):
        draft_tokens = torch.multinomial(torch.softmax(draft_logits, -1).flatten(0, 1), 1,
                                         generator=torch.Generator().manual_seed(5)).reshape(6, 3)
        values = sampled_chain(target, draft_logits, draft_tokens, uniform)
        tokens, accepted = call("verify_chain", values)
        assert_chain_is_well_formed(values, tokens, accepted)
        emitted = target.gather(-1, tokens.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        assert (emitted[tokens >= 0] > -INF).all()


@pytest.mark.parametrize("target, draft", [
    ([0.0] * 4, [0.0] * 4), ([1e-40] * 4, [-1e-40] * 4), ([1e-45, 0.0, -0.0, -1e-45], [0.0] * 4),
], ids=["zeros", "subnormal", "mixed-subnormal"])
def test_logits_that_are_all_but_zero_accept_everything(target, draft):
    values = sampled_chain(torch.tensor(target).expand(4, 2, 4), torch.tensor(draft).expand(4, 1, 4),
                           [[0], [1], [2], [3]], [[0.999, (i + 0.5) / 4] for i in range(4)])
    tokens, _ = call("verify_chain", values)
    assert tokens.tolist() == [[i, i] for i in range(4)]


def test_mixed_magnitudes_up_to_the_whole_range_of_fp32():
    target = torch.tensor([-3e38, 1e-40, 3e38, 5.0, 3e38]).expand(2, 2, 5)
    draft = torch.tensor([3e38, 3e38, -3e38, 0.0, 3e38]).expand(2, 1, 5)
    # p is half each for 2 and 4, q a third each for 0, 1, 4. Token 4 is kept, token 0 replaced: the residual is
    # 1/2 of 2 and 1/6 of 4, so 2 up to a uniform of 3/4.
    values = sampled_chain(target, draft, [[4], [0]], [[0.99, 0.2], [0.0, 0.74]])
    tokens, accepted = call("verify_chain", values)
    assert (tokens.tolist(), accepted.tolist()) == ([[4, 2], [2, -1]], [1, 0])


def test_cancellation_of_a_large_constant_changes_nothing():
    # Multiples of 1/64 below 64 leave room for 4096 in fp32, so softmax is the same to the last bit, and with it
    # the residual, which is zero: a recovered token comes from p.
    logits = (random_logits(8, 2, 1023, seed=5) * 64).round() / 64
    logits[..., 9] = -INF
    values = sampled_chain(logits, logits[:, :1] + 4096, [[9]] * 8, random_uniform(8, 2, seed=5))
    _, accepted = assert_verify_chain_agrees(values)
    assert accepted.tolist() == [0] * 8


@pytest.mark.parametrize("temperature", [1e-40, 1e-30])
def test_a_tiny_temperature_leaves_only_the_highest_logits(temperature):
    # p: tokens 1 and 3 half each; q: token 1. At u = 0.49 token 1 is kept, at 0.51 replaced by token 3.
    target = torch.tensor([1.0, 5.0, 4.999, 5.0]).expand(2, 2, 4)
    draft = torch.tensor([0.0, 2.0, 1.999, 1.0]).expand(2, 1, 4)
    values = sampled_chain(target, draft, [[1], [1]], [[0.49, 0.3], [0.51, 0.0]], temperature=temperature)
    assert call("verify_chain", values)[0].tolist() == [[1, 1], [3, -1]]


@pytest.mark.parametrize("temperature", [1e30, 3e38])
def test_a_huge_temperature_makes_both_uniform_over_what_is_not_masked(temperature):
    # p: 0, 1 and 2, a third each; q: 2 and 3, half each. Token 2 has p/q = 2/3; the residual is 0 and 1.
    target = torch.tensor([9.0, -9.0, 60.0, -INF]).expand(3, 2, 4)
    draft = torch.tensor([-INF, -INF, -50.0, 50.0]).expand(3, 1, 4)
    values = sampled_chain(target, draft, [[2], [2], [3]], [[0.66, 0.9], [0.67, 0.4], [0.0, 0.6]],
                           temperature=temperature)
    assert call("verify_chain", values)[0].tolist() == [[2, 2], [0, -1], [1, -1]]


@pytest.mark.parametrize("changes, words", [
    ({"temperature": torch.tensor([1.0, -1.0, 1.0])}, "temperature must be finite and >= 0"),
    ({"temperature": torch.tensor([1.0, NAN, 1.0])}, "temperature must be finite and >= 0"),
    ({"uniform": torch.tensor([[0.5, 0.5], [1.0, 0.5], [0.5, 0.5]])}, "uniform must be in [0, 1)"),
    ({"uniform": torch.tensor([[0.5, 0.5], [0.5, NAN], [0.5, 0.5]])}, "uniform must be in [0, 1)"),
    ({"num_draft": torch.tensor([1, 2, 1])}, "num_draft must be in [0, 1]"),
    ({"num_draft": torch.tensor([1, -1, 1])}, "num_draft must be in [0, 1]"),
    ({"num_draft": torch.tensor([1, INT_SENTINEL, 1])}, "num_draft must be in [0, 1]"),
    ({"draft_tokens": torch.tensor([[5], [100], [7]])}, "a draft token is outside the vocabulary of 100"),
    ({"draft_tokens": torch.tensor([[5], [INT_SENTINEL], [7]])}, "a draft token is outside the vocabulary of 100"),
], ids=["temperature", "temperature-nan", "uniform-one", "uniform-nan", "num-draft-large", "num-draft-negative",
        "num-draft-huge", "token-just-outside", "token-huge"])
def test_bad_values_are_refused_by_name(changes, words):
    good = sampled_chain(random_logits(3, 2, 100), random_logits(3, 1, 100, seed=1), [[5], [6], [7]],
                         torch.full((3, 2), 0.5))
    assert_refused("verify_chain", good, changes, 1, f"verify_chain: row 1: {words}")
