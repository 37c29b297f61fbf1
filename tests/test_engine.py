"""The engine reads a model's weights as the model means them, and a token's logits do not depend on what is read with
it."""

import gc
import math

import pytest
import torch
from tiny_models import VOCABULARY, noisy_copy, prompt_ids, tiny_model
from torch import nn

import speckv
from speckv import ModelError, NumericalError
from speckv.cache import CachedModel
from speckv.engine import MOST_ROWS, ROOM, HeldMatrix, embedding_weight, why_not
from speckv.fast import FastModel, FastTarget
from speckv.int8 import Int8Linear
from speckv.kernels import serving

pytestmark = pytest.mark.skipif(serving()["cpu"][0] != "cpu", reason="needs the C++ kernels")
FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]
SHAPES = [(1, 1), (32, 64), (33, 65), (97, 96), (160, 576), (64, 1000)]


def long_prompt(length):
    return torch.randint(2, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(length))


def close(ours, theirs, tolerance):
    return (ours - theirs).norm() <= tolerance * theirs.norm()


@torch.inference_mode()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("length", [1, 12, MOST_ROWS + 20])
@pytest.mark.parametrize("most", [0, 3])
def test_logits_and_hidden_states_are_the_models(family, length, most):
    model, layers = tiny_model(family), (0, 2, -1)
    ids = long_prompt(length + 9)
    fast, plain = FastTarget.of(model).open(), CachedModel(model)
    for end in (length, length + 1, length + 5, length + 9):
        keep = min(most, end - plain.length)
        ours, theirs = (one.read(ids[:, :end], keep, layers) for one in (fast, plain))
        assert ours[0].shape[1] == keep
        assert fast.length == plain.length == end
        for mine, other in zip(ours, theirs, strict=True):
            assert mine.shape == other.shape
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
        for one in (fast, plain):
            one.rollback(end - 1)


@torch.inference_mode()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_has_the_same_logits_alone_and_among_others(family, dtype):
    model = tiny_model(family).to(dtype)
    ids, session = long_prompt(40), FastTarget.of(model).open()
    session.read(ids[:, :20], 1)
    alone = torch.cat([session.read(ids[:, :end], 1)[0] for end in range(21, 41)], dim=1)
    for width in (2, 3, 5, 9, 20):
        session.rollback(20)
        together = torch.cat([session.read(ids[:, :end], min(width, end - session.length))[0]
                              for end in range(20 + width, 41, width)], dim=1)
        assert torch.equal(together, alone[:, :together.shape[1]])


@torch.inference_mode()
@pytest.mark.parametrize("layers", [(), (2, 0, -1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_sequences_read_together_have_the_bits_of_each_alone(family, dtype, layers):
    model = tiny_model(family).to(dtype)
    lengths, steps = [1, 5, 70, 12, 33], [(1, 3, 2, 1, 1), (2, 1, 1, 40, 30), (1, 1, 1, 1, 1)]
    texts = [long_prompt(length + sum(step[i] for step in steps)) for i, length in enumerate(lengths)]
    alone, together = ([FastTarget.of(model).open() for _ in texts] for _ in range(2))
    ends = [0] * len(texts)
    for step in (lengths, *steps):
        ends = [end + more for end, more in zip(ends, step, strict=True)]
        requests = [(each, ids[:, :end], min(i % 3, end - each.length))
                    for i, (each, ids, end) in enumerate(zip(together, texts, ends, strict=True))]
        results = type(together[0]).read_together(requests, layers)
        for each, (_, ids, keep), (logits, hidden) in zip(alone, requests, results, strict=True):
            expected, states = each.read(ids, keep, layers)
            assert torch.equal(logits, expected)
            assert hidden is states is None or torch.equal(hidden, states)
        for each in (*alone, *together):
            each.rollback(each.length - 1)
        assert [each.length for each in together] == [each.length for each in alone] == [end - 1 for end in ends]
        ends = [end - 1 for end in ends]


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_best_tokens_are_those_of_the_logits_the_first_of_equals(dtype):
    half = 10_000
    model = tiny_model("llama", vocab_size=2 * half, tie_word_embeddings=False).to(dtype)
    model.lm_head.weight[half:] = model.lm_head.weight[:half]  # every token has an equal
    ids = [long_prompt(length + 9) for length in (20, 3, 33)]
    fast = [FastTarget.of(model).open() for _ in ids]
    lengths = [each.shape[1] - 9 for each in ids]

    def requests():
        for each, length in zip(fast, lengths, strict=True):
            each.rollback(length)
        return [(each, some[:, :length + keep], keep)
                for each, some, length, keep in zip(fast, ids, lengths, (4, 1, 9), strict=True)]
    for each, some, length in zip(fast, ids, lengths, strict=True):
        each.read(some[:, :length], 1)
    expected = FastModel.read_together(requests(), (2, -1))
    together = FastModel.read_together(requests(), (2, -1), best=True)
    alone = [each.read_best(some, keep, (2, -1)) for each, some, keep in requests()]
    for (logits, states), *both in zip(expected, together, alone, strict=True):
        for best, hidden in both:
            assert best == logits[0].argmax(dim=-1).tolist() and max(best) < half
            assert torch.equal(hidden, states)


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_target_without_a_distribution_is_named_with_its_step(value):
    target = tiny_model("llama", tie_word_embeddings=False)
    with torch.no_grad():
        target.lm_head.weight[50] = float(value)
    for policy in ("off", "fixed:2"):
        with pytest.raises(NumericalError, match="step 0: verify_chain: row 0: the logits are not"):
            speckv.generate(target, noisy_copy(tiny_model("llama")), prompt_ids(), policy=policy, max_new_tokens=9,
                            fast=True)


@torch.inference_mode()
def test_threads_do_not_change_a_bit():
    model = tiny_model("llama", hidden_size=512, intermediate_size=1024).bfloat16()
    ids, threads = long_prompt(30), torch.get_num_threads()
    logits = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            logits.append(FastTarget.of(model).open().read(ids, 30)[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])


@torch.inference_mode()
def test_a_draft_across_chunks_of_keys_has_the_bits_of_its_tokens_alone_on_any_number_of_threads():
    model = tiny_model("llama", hidden_size=512, intermediate_size=1024).bfloat16()
    ids, threads = long_prompt(270), torch.get_num_threads()
    alone = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for start in (124, 252):  # chunks are of 128 keys
                session = FastTarget.of(model).open()
                session.read(ids[:, :start], 1)
                one_by_one = [session.read(ids[:, :end], 1)[0] for end in range(start + 1, start + 9)]
                session.rollback(start)
                together = session.read(ids[:, :start + 8], 8)[0]
                assert torch.equal(together, torch.cat(one_by_one, dim=1))
                alone.append(together)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(alone[i], alone[i % 2]) for i in range(len(alone)))


@torch.inference_mode()
@pytest.mark.parametrize("rows,columns", SHAPES)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("has_bias", [False, True])
def test_dense_matrices(rows, columns, count, has_bias):
    torch.manual_seed(rows + count)
    module, x = nn.Linear(columns, rows, bias=has_bias), torch.randn(count, columns)
    torch.testing.assert_close(HeldMatrix(module)(x), module(x), rtol=1e-4, atol=1e-4)
    module.bfloat16()
    rounded = nn.functional.linear(x.bfloat16().double(), module.weight.double(),
                                   module.bias.double() if has_bias else None).float()
    torch.testing.assert_close(HeldMatrix(module)(x), rounded, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("columns", [64, 96, 130, 576])
@pytest.mark.parametrize("offset", [1, 2, 8, 60])
def test_weights_that_lie_across_cache_lines_give_the_same_bits_for_any_number_of_rows(dtype, columns, offset):
    torch.manual_seed(columns)
    rows, most = 37, 19
    aligned, x = torch.randn(rows, columns).to(dtype), torch.randn(most, columns)
    memory = torch.zeros(rows * columns + 64, dtype=dtype)
    moved = memory[offset:offset + rows * columns].view(rows, columns).copy_(aligned)  # as a mapped file may have them
    expected = torch.cat([HeldMatrix(aligned)(row.unsqueeze(0)) for row in x])
    for count in range(1, most + 1):
        assert torch.equal(HeldMatrix(moved)(x[:count]), expected[:count])
        assert torch.equal(HeldMatrix(aligned)(x[:count]), expected[:count])


@torch.inference_mode()
@pytest.mark.parametrize("rows,columns", SHAPES)
def test_int8_matrices_of_drafters(rows, columns):
    torch.manual_seed(rows)
    module, x = Int8Linear(torch.randn(rows, columns), torch.randn(rows)), torch.randn(3, columns)
    torch.testing.assert_close(HeldMatrix(module)(x), module(x), rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_int8_rows_of_odd_values_are_theirs_alone():
    torch.manual_seed(0)
    module, x = Int8Linear(torch.randn(50, 70), None), torch.randn(6, 70)
    x[0, 3], x[2, 5], x[3], x[4] = math.nan, math.inf, 0.0, 1e30 * x[4].sign()
    out, expected = HeldMatrix(module)(x), module(x)
    assert not out[[0, 2]].isfinite().any() and not out[3].any()
    torch.testing.assert_close(out[[1, 5]], expected[[1, 5]], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out[4] / 1e30, module(x / 1e30)[4], rtol=1e-4, atol=1e-4)


def quantized(module):
    """A linear map of bitsandbytes as it is once it is loaded on the CPU."""
    torch.manual_seed(0)
    module.weight.data.normal_()
    module.weight = module.weight._quantize("cpu")
    return module.eval()


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("was_used", [False, True])
def test_four_bit_matrices(kind, nested, was_used):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    module = quantized(bitsandbytes.nn.Linear4bit(128, 96, quant_type=kind, compress_statistics=nested,
                                                  compute_dtype=torch.bfloat16))
    dense = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state).float()
    x = torch.randn(5, 128)
    if was_used:
        module(x[:1].bfloat16())
    expected = x.bfloat16().float() @ dense.T + module.bias.float()
    assert close(HeldMatrix(module)(x), expected, 6e-3)  # bitsandbytes' layout for CPUs rounds the scales to bf16


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantized_matrices_give_the_same_bits_for_any_number_of_rows(kind):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    if kind == "nf4":
        module = bitsandbytes.nn.Linear4bit(576, 96, quant_type=kind, compute_dtype=torch.bfloat16)
    else:
        module = bitsandbytes.nn.Linear8bitLt(576, 97, has_fp16_weights=False, threshold=2.5)
    matrix, x = HeldMatrix(quantized(module)), torch.randn(19, 576)
    expected = torch.cat([matrix(row.unsqueeze(0)) for row in x])
    for count in range(1, len(x) + 1):
        assert torch.equal(matrix(x[:count]), expected[:count])


def test_inputs_of_eight_bits_are_rounded_as_by_pytorch():
    # Weights of 127 are ones, so the products are what the inputs were rounded to.
    x = torch.arange(-254.0, 255.0)[None] / 254 * 5
    x[0, 0], x[0, 60] = 5.0, 2.5  # half the largest value: 63.5, a tie
    for largest in (5.0, 3.0, 1.5, 7.0, 11.0):
        rows = (x / 5 * largest).bfloat16().float()
        matrix = torch.ops.speckv.open_matrix(torch.eye(509, dtype=torch.int8) * 127, torch.ones(509),
                                              torch.empty(0), torch.tensor([0.0]))
        rounded = torch.ops.speckv.multiply_matrix(matrix, rows) * 127 / rows.abs().max()
        torch.ops.speckv.close_matrix(matrix)
        expected = torch.round(rows * (127.0 / rows.abs().max()))
        assert (rounded - expected).abs().max() < 1e-3


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf])
@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_bad_inputs_of_eight_bits_stay_bad_in_their_own_row(bad, threshold):
    matrix = torch.ops.speckv.open_matrix(torch.ones(5, 70, dtype=torch.int8), torch.ones(5), torch.empty(0),
                                          torch.tensor([threshold]))
    x = torch.ones(3, 70)
    expected = torch.ops.speckv.multiply_matrix(matrix, x)
    x[1, 68] = bad
    x[2] = 1e-39  # so small that 127 over it is no number
    out = torch.ops.speckv.multiply_matrix(matrix, x)
    torch.ops.speckv.close_matrix(matrix)
    assert torch.equal(out[0], expected[0]) and not out[1].isfinite().any() and (out[2].abs() < 1e-36).all()


@torch.inference_mode()
@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_eight_bit_matrices(threshold):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    module = quantized(bitsandbytes.nn.Linear8bitLt(130, 97, has_fp16_weights=False, threshold=threshold))
    x = torch.randn(4, 130).bfloat16()
    x[0, 5], x[1, 7], x[1, 100] = 9.0, -30.0, 6.0  # outliers, and one on the threshold
    ours = HeldMatrix(module)(x.float())
    alone = torch.cat([module(row.unsqueeze(0).clone()).float() for row in x])
    assert close(ours, alone, 6e-3)
    assert close(HeldMatrix(module)(x.float()), ours, 1e-4)  # a first product moves the weights, and rounds the bias


@pytest.mark.parametrize("policy", ["off", "fixed:1", "fixed:4", "adaptive", "svip"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_output_is_that_of_transformers(family, policy):
    target, ids = tiny_model(family), prompt_ids(8)
    output = speckv.generate(target, noisy_copy(target), ids, max_new_tokens=40, policy=policy, fast=True)
    assert torch.equal(output.sequences, target.generate(ids, do_sample=False, max_new_tokens=40, pad_token_id=0))


@pytest.mark.parametrize("policy", ["fixed:1", "fixed:4", "adaptive"])
def test_bf16_text_is_that_of_plain_decoding_to_the_last_token(policy):
    target = tiny_model("llama", seed=2).bfloat16()
    for seed in range(4):
        ids = prompt_ids(8, seed)
        plain = speckv.generate(target, None, ids, max_new_tokens=100, policy="off", fast=True)
        output = speckv.generate(target, noisy_copy(target), ids, max_new_tokens=100, policy=policy, fast=True)
        assert torch.equal(output.sequences, plain.sequences)


def test_a_drafter_that_is_a_model_is_run_by_the_engine_too(monkeypatch):
    target = tiny_model("llama")
    drafter, readings = noisy_copy(target), []
    read = FastModel.read

    def spy(self, *args, **settings):
        readings.append(self._target)
        return read(self, *args, **settings)
    monkeypatch.setattr(FastModel, "read", spy)
    both = [speckv.generate(target, drafter, prompt_ids(), max_new_tokens=40, policy="fixed:3", fast=fast)
            for fast in (False, True)]
    assert readings.count(FastTarget.of(drafter)) == both[1].drafted + 1  # and once for the prompt
    assert both[0].accepted == both[1].accepted > 0
    assert torch.equal(both[0].sequences, both[1].sequences)


def test_a_long_text_outgrows_the_cache():
    target = tiny_model("llama", max_position_embeddings=2048)
    ids = prompt_ids(8)
    output = speckv.generate(target, None, ids, max_new_tokens=ROOM + 60, policy="off", fast=True)
    assert torch.equal(output.sequences,
                       target.generate(ids, do_sample=False, max_new_tokens=ROOM + 60, pad_token_id=0))


@pytest.mark.parametrize("family,reason", [("gpt2", "not one of llama"), ("gemma2", "not one of llama"),
                                           ("mistral-sliding", "sliding window")])
def test_other_models_are_refused_by_name_and_decoded_all_the_same(family, reason):
    target, ids = tiny_model(family), prompt_ids(8)
    assert reason in why_not(target)
    with pytest.raises(ModelError, match=reason):
        FastTarget.of(target)
    with pytest.warns(UserWarning, match=reason):
        output = speckv.generate(target, None, ids, max_new_tokens=10, policy="off", fast=True)
    assert torch.equal(output.sequences, target.generate(ids, do_sample=False, max_new_tokens=10, pad_token_id=0))


def test_parts_that_are_not_known_are_refused():
    target = tiny_model("llama").half()
    assert "float16" in why_not(target)
    with pytest.raises(ModelError, match="Bilinear"):
        HeldMatrix(nn.Bilinear(2, 2, 2))


def test_ops_refuse_what_does_not_fit():
    target = tiny_model("llama")
    fast = FastTarget.of(target)
    decoder, head, weight = fast.stack.number, fast.head.number, embedding_weight(target)
    keys, values = torch.zeros(3, 2, 4, 8), torch.zeros(3, 2, 4, 8)

    def read(ids, keys, values, starts, counts, kept=None, layers=(), embedding=weight):
        return torch.ops.speckv.read_model(decoder, head, embedding, ids, keys, values, starts, counts,
                                           [1] * len(counts) if kept is None else kept, list(layers))
    one, huge = torch.zeros(1, dtype=torch.int64), 2**63 - 1
    for ids, starts, counts, given, words in (
            (one, [0], [1], {"embedding": weight[:, :31]}, "size 32"),
            (one.repeat(5), [0], [5], {}, "room for 4 tokens"),
            (one, [-1], [1], {}, "room for 4 tokens"), (one, [huge], [1], {}, "room for 4 tokens"),
            (one, [0], [huge], {}, "room for 4 tokens"), (one, [0], [0], {}, "room for 4 tokens"),
            (one, [0], [1], {"layers": [4]}, "layers must be in"),
            (one, [0], [1], {"layers": [-2]}, "layers must be in"),
            (one.int(), [0], [1], {}, "int64"), (one - 1, [0], [1], {}, "ids must be in"),
            (one + len(weight), [0], [1], {}, "ids must be in"), (one, [0], [1], {"kept": [2]}, "kept must be in"),
            (one, [0], [1], {"kept": [-1]}, "kept must be in"), (one, [0], [1], {"kept": []}, "as many as"),
            (one, [0, 0], [1, 1], {}, "as many as"), (one, [], [], {}, "as many as"), (one, [0], [2], {}, "add up"),
            (one.repeat(3), [0], [2], {}, "add up")):
        with pytest.raises(RuntimeError, match=words):
            read(ids, [keys], [values], starts, counts, **given)
    with pytest.raises(RuntimeError, match="as many as"):
        read(one, [], [], [], [])
    with pytest.raises(RuntimeError, match="add up"):
        read(one, [keys, keys], [values, values], [0, 0], [1, 1])
    with pytest.raises(RuntimeError, match="contiguous"):
        read(one, [keys.transpose(2, 3).contiguous().transpose(2, 3)], [values], [0], [1])
    with pytest.raises(RuntimeError, match="head must take hidden states of 32"):
        other = HeldMatrix(torch.zeros(5, 16))
        torch.ops.speckv.read_model(decoder, other.number, weight, one, [keys], [values], [0], [1], [1], [])
    with pytest.raises(RuntimeError, match="none of number"):
        torch.ops.speckv.multiply_matrix(10**9, torch.zeros(1, 1))


@pytest.mark.parametrize("layers", [(0, 2, -1), (-1, 1), (3, 0), (2, 2)])
def test_hidden_states_are_those_of_the_model_in_the_order_asked_for(layers):
    target, ids = tiny_model("llama"), prompt_ids(7)
    reader = FastTarget.of(target).open()
    _, states = reader.read(ids, 1, layers)
    expected = target(ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(states[0], torch.cat([expected[layer][0] for layer in layers], dim=-1), rtol=1e-4,
                               atol=1e-5)


def test_an_embedding_that_is_more_than_a_table_is_refused_by_name():
    target = tiny_model("llama")

    class Scaled(nn.Embedding):
        pass
    target.set_input_embeddings(Scaled(50, 32))
    with pytest.raises(ModelError, match="embedding of type Scaled"):
        FastTarget.of(target)


def test_weights_are_let_go_with_the_model():
    target = tiny_model("llama")
    fast = FastTarget.of(target)
    decoder, head = fast.stack.number, fast.head.number
    speckv.generate(target, None, prompt_ids(4), max_new_tokens=4, policy="off", fast=True)
    del target, fast
    gc.collect()
    with pytest.raises(RuntimeError, match="none of number"):
        torch.ops.speckv.read_model(decoder, head, torch.zeros(1, 32), torch.zeros(1, dtype=torch.int64),
                                    [torch.zeros(3, 2, 4, 8)], [torch.zeros(3, 2, 4, 8)], [0], [1], [1], [])
    with pytest.raises(RuntimeError, match="none of number"):
        torch.ops.speckv.multiply_matrix(head, torch.zeros(1, 32))
