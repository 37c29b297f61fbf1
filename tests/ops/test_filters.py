"""top_k, top_p and min_p in draft_sample, draft_step and verify_chain: what they keep, and that nothing is lost."""

import itertools

import pytest
import torch
from helpers_ops import (
    EXACT,
    GRID_BITS,
    INTERPRETED,
    LARGEST_UNIFORM,
    assert_refused,
    call,
    call_reference,
    each_dtype,
    measure_of_tokens,
    poisoned,
    random_chain,
    random_controller,
    random_filters,
    random_logits,
    random_signals,
    random_uniform,
    same_bits,
    share_of_uniforms,
    skip_in_the_interpreter,
    temperatures,
)
from oracle_ops import assert_close, assert_draft_sample_agrees, assert_verify_chain_agrees
from planted_verifiers import sampled_chain
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from speckv.kernels import reference

INF, NAN = float("inf"), float("nan")
VOCABULARIES = (7, 1023, 8193, 50257)
NAMES = [names for count in (1, 2, 3) for names in itertools.combinations(("top_k", "top_p", "min_p"), count)]
each_combination = pytest.mark.parametrize("names", NAMES, ids=["+".join(names) for names in NAMES])
SETTINGS = [{"top_k": 1}, {"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.45}, {"top_k": 3, "top_p": 0.7},
            {"top_p": 0.95, "min_p": 0.5}, {"top_k": 2, "top_p": 0.9, "min_p": 0.1}]
each_setting = pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: "+".join(
    f"{name}-{value}" for name, value in setting.items()))


def filters_of(rows, top_k=None, top_p=None, min_p=None):
    """The same filters for all rows, as tensors."""
    settings = {"top_k": top_k, "top_p": top_p, "min_p": min_p}
    return {name: torch.full((rows,), value) for name, value in settings.items() if value is not None}


def draft_values(rows, vocabulary, dtype=torch.float32, names=("top_k", "top_p", "min_p"), seed=0):
    return {"logits": random_logits(rows, vocabulary, dtype=dtype, seed=seed),
            "temperature": temperatures("mixed", rows), "uniform": random_uniform(rows, seed=seed),
            **random_filters(rows, seed, names)}


def warped(logits, temperature, top_k=0, top_p=1.0, min_p=0.0):
    """What transformers makes of logits [B, V]: its warpers in the order of its generate."""
    warpers = [TemperatureLogitsWarper(temperature)] if temperature != 1 else []
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    warpers += [MinPLogitsWarper(min_p)] if min_p else []
    for warper in warpers:
        logits = warper(None, logits)
    return logits


def kept_by_the_op(logits, temperature, filters):
    """Which tokens of one row [V] draft_sample can draw, asked at the middle of each token's share of the uniforms."""
    expected = reference.filter_logits(logits.unsqueeze(0), torch.tensor([temperature]), **filters_of(1, **filters))
    cdf = torch.softmax(expected[0].double() / temperature, -1).cumsum(0)
    middle = ((cdf + torch.nn.functional.pad(cdf, (1, -1))) / 2).float()[expected[0] > -INF]
    rows = len(middle)
    token, prob, *_ = call("draft_sample", {"logits": logits.expand(rows, -1), "temperature": torch.full(
        (rows,), temperature), "uniform": middle, **filters_of(rows, **filters)})
    return token, prob


@each_dtype
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_draft_sample_agrees_with_the_reference_on_poisoned_views(vocabulary, dtype):
    skip_in_the_interpreter(vocabulary > 1023 and (dtype != torch.bfloat16 or vocabulary > 8193), "a large vocabulary")
    rows = 6 if INTERPRETED else 30
    values = draft_values(rows, vocabulary, dtype, seed=vocabulary)
    assert_draft_sample_agrees({name: poisoned(tensor) for name, tensor in values.items()})


@each_combination
def test_draft_sample_agrees_with_the_reference_on_ties(names):
    # Logits of half a unit: most values several times, at the edge of a filter as elsewhere.
    values = draft_values(9 if INTERPRETED else 40, 1023, names=names, seed=3)
    values["logits"] = (values["logits"] * 2).round() / 2
    values["logits"][:, ::5] = -INF
    assert_draft_sample_agrees(values)


def test_draft_step_draws_as_draft_sample_does_and_its_signals_are_without_the_filters():
    rows = 9
    w1, b1, w2, b2 = random_controller(5)
    plan = {"signals": random_signals(rows), "drafted": torch.arange(rows) % 3, "w1": w1, "b1": b1, "w2": w2, "b2": b2,
            "gammas": torch.tensor([2, 4]), "seconds": torch.ones(2)}
    values = draft_values(rows, 1023, seed=5)
    step, alone = call("draft_step", {**values, **plan}), call("draft_sample", values)
    assert all(map(same_bits, step[:4], alone))
    plain = {name: values[name] for name in ("logits", "temperature", "uniform")}
    without = call("draft_step", {**plain, **plan})
    for filtered, unfiltered in zip(step[2:], without[2:], strict=True):
        assert_close(filtered, unfiltered, torch.float32)
    assert (step[1] != without[1]).any()


@pytest.mark.parametrize("shape", [(6, 3, 7), (9, 3, 1023), (6, 2, 32001)], ids=str)
@each_dtype
def test_verify_chain_agrees_with_the_reference_on_poisoned_views(shape, dtype):
    skip_in_the_interpreter(shape[2] > 1023 or (shape[2] == 1023 and dtype != torch.float16), "a large vocabulary")
    values = random_chain(shape, dtype, rows="mixed", seed=shape[2])
    filters = {name: poisoned(tensor) for name, tensor in random_filters(shape[0], seed=1).items()}
    assert_verify_chain_agrees({**values, **filters})


@each_setting
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_what_is_kept_is_what_transformers_keeps(setting, temperature):
    skip_in_the_interpreter(temperature != 1, "every temperature")
    for vocabulary, seed in ((7, 0), (100, 1), (1023, 2)):
        logits = random_logits(20, vocabulary, seed=seed)
        logits[:, 2::7] = -INF
        expected = warped(logits, temperature, **setting)
        kept = reference.filter_logits(logits, torch.full((20,), temperature), **filters_of(20, **setting))
        assert torch.equal(kept > -INF, expected > -INF)
        row = 1
        token, prob = kept_by_the_op(logits[row], temperature, setting)
        q = torch.softmax(expected[row], -1)
        assert torch.equal(token, (q > 0).nonzero().flatten())
        assert_close(prob, q[token], torch.float32)


@each_setting
def test_ties_at_the_edge_are_kept_together(setting):
    # transformers keeps all of them too, but for top_p, where it keeps those that its sort puts last.
    logits = (random_logits(50, 100, seed=4) / 2).round()
    expected = warped(logits, 1.0, **setting) > -INF
    kept = reference.filter_logits(logits, torch.ones(50), **filters_of(50, **setting)) > -INF
    assert (kept | ~expected).all()
    least = logits.where(kept, INF).amin(-1, keepdim=True)
    assert torch.equal(kept, logits >= least), "not all of equal logits"
    if "top_p" not in setting:
        assert torch.equal(kept, expected)
    else:
        assert (logits.where(expected, INF).amin(-1, keepdim=True) == least).any()
    token, _ = kept_by_the_op(logits[0], 1.0, setting)
    assert torch.equal(token, kept[0].nonzero().flatten())


@pytest.mark.parametrize("setting, tokens", [
    ({"top_k": 1}, [1]),
    ({"top_k": 2}, [1, 2, 4]),  # a tie for the second place
    ({"top_k": 3}, [1, 2, 4]),
    ({"top_k": 4}, [0, 1, 2, 4]),
    ({"top_k": 5}, [0, 1, 2, 4]),  # the fifth is masked
    ({"top_k": 99}, [0, 1, 2, 4]),
    ({"top_p": 0.0}, [1]),
    ({"top_p": 1e-30}, [1]),
    ({"top_p": 0.49}, [1]),
    ({"top_p": 0.51}, [1, 2, 4]),
    ({"top_p": 0.87}, [1, 2, 4]),
    ({"top_p": 0.88}, [0, 1, 2, 4]),
    ({"min_p": 1.0}, [1]),
    ({"min_p": 0.38}, [1]),
    ({"min_p": 0.37}, [1, 2, 4]),
    ({"min_p": 0.24}, [0, 1, 2, 4]),
    ({"top_k": 2, "top_p": 0.6}, [1, 2, 4]),  # 1/2 of 7/8 is 0.57
    ({"top_k": 2, "top_p": 0.55}, [1]),
    ({"top_p": 0.88, "min_p": 0.3}, [1, 2, 4]),
    ({"top_k": 4, "top_p": 0.6, "min_p": 0.5}, [1]),
], ids=str)
def test_hand_written_sets(setting, tokens):
    # 1/8, 1/2, 3/16, nothing, 3/16
    logits = torch.tensor([0.125, 0.5, 0.1875, 0.0, 0.1875]).log()
    assert kept_by_the_op(logits, 1.0, setting)[0].tolist() == tokens
    if not INTERPRETED:
        assert kept_by_the_op(logits * 0.5, 0.5, setting)[0].tolist() == tokens


def test_filters_that_are_off_change_nothing():
    values = draft_values(6, 1023, names=(), seed=2)
    off = filters_of(6, 0, 1.0, 0.0)
    for one, other in zip(call("draft_sample", values), call("draft_sample", {**values, **off}), strict=True):
        assert_close(one, other, torch.float32)
    chain = random_chain((4, 2, 100), seed=2)
    unfiltered = call("verify_chain", {**chain, **filters_of(4, 0, 1.0, 0.0)})
    assert all(map(torch.equal, call("verify_chain", chain), unfiltered))


def test_greedy_rows_are_not_filtered():
    values = {**draft_values(3, 1023, names=()), "temperature": torch.zeros(3)}
    for setting in ({"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}):
        filtered = call("draft_sample", {**values, **filters_of(3, **setting)})
        assert all(map(same_bits, filtered, call("draft_sample", values)))


@pytest.mark.parametrize("logits", [[0.0] * 130, [-3e38, 3e38, 3e38, 0.0, 1e-40], [-INF] * 100 + [-5.0] + [-INF] * 100,
                                    [-0.0, 0.0, -1e-45, 1e-45, 0.0]], ids=["flat", "extreme", "one", "zeros"])
def test_odd_rows(logits):
    rows = 12
    values = {"logits": torch.tensor([logits]).expand(rows, -1), "temperature": torch.full((rows,), 0.9),
              "uniform": (torch.arange(rows) + 0.51) / rows, **random_filters(rows, seed=9)}
    for one, other in zip(call("draft_sample", values), call_reference("draft_sample", values), strict=True):
        assert_close(one, other, torch.float32)


@pytest.mark.parametrize("temperature", [1e-40, 1e-3, 1e3, 3e38])
def test_extreme_temperatures(temperature):
    rows = 8
    values = {**draft_values(rows, 100, seed=6), "temperature": torch.full((rows,), temperature)}
    for one, other in zip(call("draft_sample", values), call_reference("draft_sample", values), strict=True):
        assert_close(one, other, torch.float32)


@pytest.mark.parametrize("uniform", [0.0, LARGEST_UNIFORM])
def test_tokens_stay_in_the_support_at_the_ends_of_the_uniforms(uniform):
    rows = 8
    values = draft_values(rows, 8193, seed=8)
    values |= {"uniform": torch.full((rows,), uniform), "temperature": torch.full((rows,), 0.8)}
    filters = {name: values[name] for name in ("top_k", "top_p", "min_p")}
    token, prob, *_ = call("draft_sample", values)
    kept = reference.filter_logits(values["logits"], values["temperature"], **filters)
    assert (kept.gather(1, token.unsqueeze(1)) > -INF).all() and (prob > 0).all()


@each_setting
def test_q_of_verify_chain_is_what_draft_sample_drew_from(setting):
    """Of each token that can be drafted, the share of uniforms that accept it, p/q, gives q back: it is the reported
    prob, and where the target is the draft, nothing that was drafted is ever rejected."""
    skip_in_the_interpreter(len(setting) < 3, "every filter of its own")
    vocabulary, rows = 30, 4 if INTERPRETED else 16
    draft = random_logits(vocabulary, seed=7) / 3
    temperature, filters = torch.full((rows,), 0.8), filters_of(rows, **setting)
    token, prob, *_ = call("draft_sample", {"logits": draft.expand(rows, -1), "temperature": temperature,
                                            "uniform": (torch.arange(rows) + 0.5) / rows, **filters})

    def accepted(target, uniform):
        chain = sampled_chain(target.expand(rows, 2, -1), draft.expand(rows, 1, -1), token,
                              torch.stack([uniform, torch.full((rows,), 0.5)], 1), temperature=0.8)
        return call("verify_chain", {**chain, **filters})[1]
    assert (accepted(draft, torch.full((rows,), LARGEST_UNIFORM)) == 1).all()

    # A flat target: every filter but min_p and the ties of top_k keeps all of it, so p is 1/vocabulary.
    share = share_of_uniforms(lambda uniform: accepted(torch.zeros(vocabulary), uniform) == 0, rows)
    expected = torch.clamp(1 / vocabulary / prob.double(), max=1)
    torch.testing.assert_close(share, expected, rtol=1e-5, atol=EXACT)


# Five tokens; the draft likes what the target has masked, or what the filters take away.
TARGET = torch.tensor([[0.45, 0.27, 0.2, 0.08, 0.0], [0.12, 0.09, 0.3, 0.08, 0.41]]).log()
DRAFT = torch.tensor([0.05, 0.22, 0.23, 0.2, 0.3]).log()


def emitted(verify, setting):
    """The measure of all draft tokens and uniforms that emit each token first, and of the bonus tokens."""
    def run(draft_token, accept, uniform):
        rows = len(draft_token)
        return verify(**sampled_chain(TARGET.expand(rows, 2, 5), DRAFT.expand(rows, 1, 5), draft_token,
                                      torch.stack([accept, uniform], dim=1)), **filters_of(rows, **setting))

    def drawn(uniform):
        rows = len(uniform)
        return call("draft_sample", {"logits": DRAFT.expand(rows, 5), "temperature": torch.ones(rows),
                                     "uniform": uniform, **filters_of(rows, **setting)})[0]
    q = measure_of_tokens(lambda row, u: drawn(u), rows=1, vocabulary=5)[0]
    every = (q > 2 * EXACT).nonzero().flatten()
    accepted = share_of_uniforms(lambda u: run(every, u, torch.full_like(u, 0.5))[1] == 0, len(every))
    rejected = (accepted < 1).nonzero().flatten()
    nearly_one = 1 - 2**-GRID_BITS
    recovered = torch.zeros(len(every), 5, dtype=torch.float64)
    recovered[rejected] = measure_of_tokens(
        lambda row, u: run(every[rejected[row]], torch.full_like(u, nearly_one), u)[0][:, 0], len(rejected), 5)
    first = (q[every] * (1 - accepted)) @ recovered
    first[every] += q[every] * accepted
    kept = every[accepted > 0][:1]
    if len(kept) == 0:  # no draft token that the filters leave to the target
        return first, None
    bonus = measure_of_tokens(lambda row, u: run(kept.expand(len(u)), torch.zeros_like(u), u)[0][:, 1], 1, 5)[0]
    return first, bonus


def assert_lossless(verify, setting):
    p = torch.softmax(warped(TARGET, 1.0, **setting).double(), -1)
    first, bonus = emitted(verify, setting)
    torch.testing.assert_close(first, p[0], rtol=0, atol=2 * EXACT)
    if bonus is not None:
        torch.testing.assert_close(bonus, p[1], rtol=0, atol=2 * EXACT)


@pytest.mark.parametrize("setting", [{"top_k": 2}, {"top_k": 3}, {"top_p": 0.6}, {"top_p": 0.9}, {"min_p": 0.5},
                                     {"top_k": 4, "top_p": 0.8, "min_p": 0.2}], ids=str)
def test_emission_integrates_to_the_filtered_target(setting):
    skip_in_the_interpreter(True, "thousands of filtered rows")  # a few are compared with the reference there
    assert_lossless(lambda **values: call("verify_chain", values), setting)


def draft_unfiltered(target_logits, draft_logits, temperature, top_k, **values):
    """Wrong: filters the target alone, so that q is not what was drawn from."""
    target_logits = warped(target_logits.flatten(0, 1), 1.0, int(top_k[0])).reshape(target_logits.shape)
    return call("verify_chain", {"target_logits": target_logits, "draft_logits": draft_logits,
                                 "temperature": temperature, **values})


def target_unfiltered(target_logits, draft_logits, temperature, top_k, **values):
    """Wrong: filters the draft alone."""
    draft_logits = warped(draft_logits.flatten(0, 1), 1.0, int(top_k[0])).reshape(draft_logits.shape)
    return call("verify_chain", {"target_logits": target_logits, "draft_logits": draft_logits,
                                 "temperature": temperature, **values})


@pytest.mark.parametrize("wrong", [draft_unfiltered, target_unfiltered])
def test_the_integration_rejects_a_wrong_verifier(wrong):
    skip_in_the_interpreter(True, "a check of the check")
    with pytest.raises(AssertionError, match="not close"):
        assert_lossless(wrong, {"top_k": 3})


def test_a_residual_of_zero_draws_from_the_filtered_target():
    # Target and draft are the same to the last bit; the draft token is one that the filters remove.
    logits = random_logits(1, 1, 1023, seed=6)
    filters = filters_of(1, top_k=5, top_p=0.9)
    values = {**sampled_chain(logits.expand(1, 2, -1), logits, [[int(logits.argmin())]], [[0.0, 0.6]]), **filters}
    tokens, accepted = call("verify_chain", values)
    plain, _ = call("verify_chain", {**values, "num_draft": torch.tensor([0]), "uniform": torch.tensor([[0.6, 0.0]])})
    assert accepted.tolist() == [0] and torch.equal(tokens[:, 0], plain[:, 0])
    assert_verify_chain_agrees(values)


@pytest.mark.parametrize("op", ["draft_sample", "verify_chain"])
def test_a_row_does_not_depend_on_its_neighbours_nor_on_the_threads(op):
    def values(seed, rows=6):
        filters = random_filters(rows, seed)
        if op == "verify_chain":
            return {**random_chain((rows, 2, 1023), seed=seed), **filters}
        return {**draft_values(rows, 1023, seed=seed), **filters}
    together, others = values(0), values(1)
    before = call(op, together)
    mixed = {name: torch.cat([tensor[:1], together[name][1:2], tensor[2:]]) for name, tensor in others.items()}
    assert all(same_bits(one[1], other[1]) for one, other in zip(before, call(op, mixed), strict=True))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert all(map(same_bits, before, call(op, together)))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("op", ["draft_sample", "draft_step", "verify_chain"])
@pytest.mark.parametrize("name, value, words", [
    ("top_k", -1, "top_k must be >= 0"), ("top_p", -0.1, "top_p must be in [0, 1]"),
    ("top_p", 1.1, "top_p must be in [0, 1]"), ("top_p", NAN, "top_p must be in [0, 1]"),
    ("min_p", -0.1, "min_p must be in [0, 1]"), ("min_p", 1.1, "min_p must be in [0, 1]"),
    ("min_p", NAN, "min_p must be in [0, 1]"),
])
def test_a_bad_setting_in_one_row_is_refused_by_name(op, name, value, words):
    skip_in_the_interpreter(op == "verify_chain" and not value < 0, "more than one value of a filter")
    good = filters_of(3, 5, 0.9, 0.1)
    if op == "verify_chain":
        good |= random_chain((3, 2, 100), rows="sampled")
    else:
        good |= draft_values(3, 100, names=())
    if op == "draft_step":
        w1, b1, w2, b2 = random_controller(5)
        good |= {"signals": random_signals(3), "drafted": torch.zeros(3, dtype=torch.int64), "w1": w1, "b1": b1,
                 "w2": w2, "b2": b2, "gammas": torch.tensor([2, 4]), "seconds": torch.ones(2)}
    changed = good[name].clone()
    changed[1] = value
    assert_refused(op, good, {name: changed}, 1, f"{op}: row 1: {words}")
