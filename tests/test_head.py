"""The feature head drafts in the loop what it was trained to draft, and is lossless like any drafter."""

import pytest
import torch
from tiny_models import VOCABULARY, prompt_ids, tiny_model

import speckv
from speckv import ModelError, drafter_folder, head, pruned
from speckv.cache import hidden_states
from speckv.int8 import MANY_ROWS, Int8Linear
from speckv.kernels import serving
from speckv.lookup import LookupFirst
from speckv.students import MATCH_GAMMA, HeadStudent

ARCHITECTURES = ["llama", "qwen2", "gemma", "gpt2", "mistral-sliding"]


def tiny_head(target, seed=0, drafts=60, num_layers=1):
    """A head with random joining weights that can draft `drafts` of the tokens."""
    generator = torch.Generator().manual_seed(seed)
    token_ids = torch.randperm(VOCABULARY, generator=generator)[:drafts].sort().values
    return head.build(target, random_tensors(target, token_ids, generator, num_layers))


def random_tensors(target, token_ids, generator=None, num_layers=1):
    """Weights of a head that mixes features and embeddings at random."""
    size = 32 * len(head.feature_layers(target))
    center, scale = (torch.rand(size, generator=generator) for _ in range(2))
    tensors = head.initial_tensors(target, token_ids, center, scale, num_layers)
    for key in (head.COMBINE, head.FUSE):
        tensors[key] = tensors[key] + 0.2 * torch.randn(tensors[key].shape, generator=generator)
    return tensors


def features_of(target, ids):
    """What the loop shows the head of ids."""
    return hidden_states(target(ids, output_hidden_states=True), head.feature_layers(target))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("policy", ["off", "fixed:1", "fixed:3", "fixed:6"])
@pytest.mark.parametrize("length", [1, 12])
def test_greedy_output_is_that_of_plain_decoding(architecture, policy, length):
    target = tiny_model(architecture)
    ids = prompt_ids(length)
    output = speckv.generate(target, tiny_head(target), ids, max_new_tokens=30, policy=policy)
    assert torch.equal(output.sequences, target.generate(ids, do_sample=False, max_new_tokens=30, pad_token_id=0))


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "gemma2"])
def test_greedy_output_with_two_layers_is_that_of_plain_decoding(architecture):
    target = tiny_model(architecture)
    ids = prompt_ids(12)
    output = speckv.generate(target, tiny_head(target, num_layers=2), ids, max_new_tokens=30, policy="fixed:3")
    assert torch.equal(output.sequences, target.generate(ids, do_sample=False, max_new_tokens=30, pad_token_id=0))


@torch.inference_mode()
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("architecture", ["llama", "gemma", "gemma2", "mistral-sliding"])
def test_training_sees_what_the_loop_drafts(architecture, num_layers, monkeypatch):
    """Pass d at position j is what a session makes of it that has the target's features up to j - d."""
    monkeypatch.setattr(head, "WINDOW", 20)
    target = tiny_model(architecture)
    drafter = tiny_head(target, drafts=VOCABULARY, num_layers=num_layers)
    student = HeadStudent(target, 3, drafter.own_tensors())
    ids = prompt_ids(20)
    features = features_of(target, ids)
    passes = student._passes(ids, features, MATCH_GAMMA)
    for start in (3, 9, 16):
        session = drafter.open()
        session.observe(features[:, :start], 0)
        for depth in range(MATCH_GAMMA):
            logits = session.next_logits(ids[:, :start + 1 + depth]).logits
            expected = drafter.logits(passes[depth][:, start + depth])
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("window", [2, 20])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_a_rollback_leaves_nothing_of_the_rejected_draft(num_layers, window, monkeypatch):
    monkeypatch.setattr(head, "WINDOW", window)
    target = tiny_model()
    drafter = tiny_head(target, num_layers=num_layers)
    ids = prompt_ids(20)
    features = features_of(target, ids)

    def drafted(session):
        session.observe(features[:, 9:15], 9)
        session.rollback(15)
        return [session.next_logits(ids[:, :16 + i]).logits for i in range(3)]
    fresh, used = drafter.open(), drafter.open()
    for session in (fresh, used):
        session.observe(features[:, :9], 0)
        session.next_logits(ids[:, :9])
    for i in range(4):  # a draft of other tokens, guessed features and all, of which none stands
        used.next_logits(torch.cat([ids[:, :9], prompt_ids(i + 1, seed=5)], dim=1))
    used.rollback(9)
    for a, b in zip(drafted(fresh), drafted(used), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("make", [lambda target: tiny_head(target), lambda target: int8_head(target)],
                         ids=["as trained", "int8"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mistral-sliding"])
def test_of_a_long_text_a_head_reads_the_last_tokens(architecture, make, monkeypatch):
    monkeypatch.setattr(head, "WINDOW", 6)
    target = tiny_model(architecture)
    drafter = make(target)
    ids = prompt_ids(20)
    features, other_ids, sessions = features_of(target, ids), ids.clone(), [drafter.open(), drafter.open()]
    other_ids[:, :13] = prompt_ids(13, seed=5)  # the first position read is number 14; what 13 brings is the target's
    other = torch.cat([torch.randn(1, 13, features.shape[2]), features[:, 13:]], dim=1)
    sessions[0].observe(features[:, :19], 0)
    sessions[1].observe(other[:, :19], 0)
    first = [session.next_logits(text).logits for session, text in zip(sessions, (ids, other_ids), strict=True)]
    assert torch.equal(*first)
    for session, text in zip(sessions, (ids, other_ids), strict=True):
        first.append(session.next_logits(torch.cat([text, prompt_ids(1, seed=3)], dim=1)).logits)
    assert torch.equal(*first[2:])
    other[:, 13] = 0  # but that it does read
    fresh = drafter.open()
    fresh.observe(other[:, :19], 0)
    assert not torch.equal(fresh.next_logits(ids).logits, first[0])


@pytest.mark.parametrize("policy", ["fixed:3", "adaptive"])
@pytest.mark.parametrize("draft", [lambda target: tiny_head(target), lambda target: LookupFirst(tiny_head(target))],
                         ids=["head", "behind lookup"])
def test_greedy_output_with_a_head_that_falls_behind_is_that_of_plain_decoding(draft, policy, monkeypatch):
    monkeypatch.setattr(head, "WINDOW", 2)
    target = tiny_model()
    ids = prompt_ids(12)
    output = speckv.generate(target, draft(target), ids, max_new_tokens=60, policy=policy)
    assert torch.equal(output.sequences, target.generate(ids, do_sample=False, max_new_tokens=60, pad_token_id=0))


def test_a_head_never_drafts_outside_its_tokens():
    target = tiny_model()
    drafter = tiny_head(target, drafts=7)
    session = drafter.open()
    session.observe(torch.randn(1, 4, 96), 0)
    logits, token_ids = session.next_logits(prompt_ids(5))
    assert logits.shape == (1, 7) and torch.equal(token_ids, drafter.token_ids)


@pytest.mark.parametrize("num_layers", [1, 2])
def test_a_head_survives_its_folder(tmp_path, num_layers):
    target = tiny_model()
    drafter = tiny_head(target, num_layers=num_layers)
    head.save(tmp_path, drafter, {})
    again = speckv.load_drafter(str(tmp_path), target)
    assert again.num_layers == num_layers
    session, other = drafter.open(), again.open()
    for each in (session, other):
        each.observe(torch.ones(1, 4, 96), 0)
    torch.testing.assert_close(session.next_logits(prompt_ids(5)), other.next_logits(prompt_ids(5)),
                               rtol=0.05, atol=0.05)  # stored in bf16


@pytest.mark.parametrize("change, words", [
    (lambda tensors: tensors.pop(head.COMBINE), "lack"),
    (lambda tensors: tensors.pop(head.FUSE), "lack"),
    (lambda tensors: tensors.pop("layers.0.self_attn.o_proj.weight"), "do not fit this target"),
    (lambda tensors: [tensors.pop(key) for key in list(tensors) if "layers.0" in key], "do not fit this target"),
    (lambda tensors: tensors.update({f"layers.{i}.mlp.down_proj.weight": torch.zeros(2) for i in (1, 2)}), "1 to 2"),
    (lambda tensors: tensors.update({head.COMBINE: torch.zeros(2, 2)}), "do not fit this target"),
    (lambda tensors: tensors.update({head.FUSE: torch.zeros(32, 2)}), "do not fit this target"),
    (lambda tensors: tensors.update({head.LAYERS: torch.tensor([1, 9, -1])}), "it has 3 layers"),
    (lambda tensors: tensors.update({head.TOKEN_IDS: torch.tensor([1, 1])}), "must be ascending"),
    (lambda tensors: tensors.update({head.TOKEN_IDS: torch.tensor([5, VOCABULARY])}), "must be ascending"),
    (lambda tensors: tensors.update({head.TOKEN_IDS: torch.zeros(0)}), "must be ascending"),
], ids=["missing", "of before", "part of a layer", "no layer", "too many layers",
        "shape", "fewer layers", "no such layer", "twice", "too large", "none"])
def test_a_head_that_does_not_fit_is_refused(tmp_path, change, words):
    target = tiny_model()
    tensors = tiny_head(target).own_tensors()
    change(tensors)
    drafter_folder.write(tmp_path, head.KIND, tensors, {})
    with pytest.raises(ModelError, match=words):
        speckv.load_drafter(str(tmp_path), target)


def further_trained(drafter, seed=2):
    """The tensors of a head whose layers are no longer the target's."""
    generator = torch.Generator().manual_seed(seed)
    return {key: tensor + 0.05 * torch.randn(tensor.shape, generator=generator) if tensor.dim() == 2 else tensor
            for key, tensor in drafter.own_tensors().items()}


@torch.inference_mode()
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma", "gemma2", "mistral-sliding"])
def test_a_head_that_is_given_a_layer_drafts_exactly_as_before(architecture):
    target = tiny_model(architecture)
    tensors = further_trained(tiny_head(target))
    grown = head.grow(target, tensors, 2)
    heads = [head.build(target, each) for each in (tensors, grown)]
    assert [each.num_layers for each in heads] == [1, 2]
    ids = prompt_ids(20)
    features = features_of(target, ids)
    sessions = [each.open() for each in heads]
    for session in sessions:
        session.observe(features[:, :12], 0)
    for length in (12, 13, 14, 15):
        assert torch.equal(*(session.next_logits(ids[:, :length]).logits for session in sessions))
    passes = [HeadStudent(target, 3, each)._passes(ids, features, MATCH_GAMMA) for each in (tensors, grown)]
    assert all(torch.equal(before, after) for before, after in zip(*passes, strict=True))
    assert head.grow(target, grown, 2).keys() == grown.keys()


def test_a_layer_that_a_head_is_given_learns():
    target = tiny_model()
    student = HeadStudent(target, 1, head.grow(target, tiny_head(target).own_tensors(), 2))
    silent = [parameter for key, parameter in student.own.items()
              if key in ("layers.1.self_attn.o_proj.weight", "layers.1.mlp.down_proj.weight")]
    assert len(silent) == 2 and all((parameter == 0).all() for parameter in silent)
    for parameter in student.own.values():
        parameter.requires_grad_(True)
    ids = prompt_ids(20)
    (output,) = student._passes(ids, features_of(target, ids).detach(), 1)
    output.square().mean().backward()
    assert all((parameter.grad != 0).any() for parameter in silent)


def test_a_target_whose_layers_cannot_be_added_unnoticed_is_named():
    target = tiny_model("gpt2")  # its linear maps are of a class of their own
    with pytest.raises(ModelError, match="a head for GPT2LMHeadModel cannot be given more layers"):
        head.grow(target, tiny_head(target).own_tensors(), 2)


def int8_head(target, **settings):
    drafter = tiny_head(target, **settings)
    drafter.hold_in_int8()
    return drafter


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("rows", [1, 3, MANY_ROWS - 1, MANY_ROWS], ids=["one", "few", "most of the op", "many"])
def test_a_linear_map_in_int8_is_off_by_half_a_step_a_weight(dtype, rows):
    torch.manual_seed(0)
    dense = torch.nn.Linear(70, 50).to(dtype)
    dense.weight.data[7] = 0
    held = Int8Linear(dense.weight, dense.bias)
    assert held.weight.dtype == torch.int8 and held.dtype == dtype
    x = torch.randn(1, rows, 70).to(dtype)
    off = (held(x).float() - dense(x).float()).abs()
    assert held(x).dtype == dtype
    step = held.scale / 2 * x.float().abs().sum(-1, keepdim=True)
    rounding = {torch.float32: 1e-6, torch.float16: 2**-9, torch.bfloat16: 2**-6}[dtype]
    assert (off <= step + rounding * (1 + dense(x).float().abs())).all()
    torch.testing.assert_close(held(x)[..., 7], dense.bias[7].expand(1, rows))
    assert held(x[:, :0]).shape == (1, 0, 50)


@torch.inference_mode()
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("num_layers", [1, 2])
def test_a_head_in_int8_drafts_nearly_what_it_drafted_before(architecture, num_layers):
    target = tiny_model(architecture)
    ids, sessions = prompt_ids(20), [make(target, num_layers=num_layers).open() for make in (tiny_head, int8_head)]
    for session in sessions:
        session.observe(features_of(target, ids)[:, :12], 0)
    for length in (12, 13, 14, 20):
        plain, held = (session.next_logits(ids[:, :length]).logits.softmax(-1) for session in sessions)
        assert (plain - held).abs().sum() < 0.1 * num_layers


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("policy", ["fixed:1", "fixed:4"])
def test_greedy_output_with_a_head_in_int8_is_that_of_plain_decoding(architecture, policy):
    target = tiny_model(architecture)
    ids = prompt_ids(12)
    output = speckv.generate(target, int8_head(target), ids, max_new_tokens=30, policy=policy)
    assert torch.equal(output.sequences, target.generate(ids, do_sample=False, max_new_tokens=30, pad_token_id=0))


def own_bytes(drafter, target):
    """Bytes of the head's own matrices, its rows of the output head included."""
    shared = {tensor.data_ptr() for tensor in (*target.parameters(), *target.buffers())}
    tensors = [*drafter.parameters(), *drafter.buffers()]
    if isinstance(drafter.rows, torch.Tensor):
        tensors.append(drafter.rows)
    return sum(tensor.nbytes for tensor in tensors if tensor.dim() == 2 and tensor.data_ptr() not in shared)


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma"])
def test_holding_a_head_in_int8_halves_its_memory_and_leaves_the_target_alone(architecture, num_layers):
    target = tiny_model(architecture).bfloat16()
    before = {name: (tensor, tensor.clone()) for name, tensor in target.state_dict(keep_vars=True).items()}
    modules = dict(target.named_modules())
    drafter = tiny_head(target, num_layers=num_layers)
    plain = own_bytes(drafter, target)
    drafter.hold_in_int8()
    assert own_bytes(drafter, target) == plain // 2
    assert not any(type(module) is torch.nn.Linear for module in pruned.decoder_layers(drafter.decoder)[1].modules())
    assert dict(target.named_modules()) == modules
    after = target.state_dict(keep_vars=True)
    assert after.keys() == before.keys()
    for name, (tensor, values) in before.items():
        assert after[name] is tensor and torch.equal(tensor, values)
    assert drafter.decoder.get_input_embeddings() is target.get_input_embeddings()
    assert drafter.decoder.get_output_embeddings() is target.get_output_embeddings()


def test_a_head_in_int8_cannot_be_stored(tmp_path):
    with pytest.raises(ModelError, match="cannot be stored"):
        head.save(tmp_path, int8_head(tiny_model()), {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def test_a_head_is_loaded_in_int8_beside_a_16_bit_target_on_the_cpu(tmp_path, dtype):
    target = tiny_model().to(dtype)
    head.save(tmp_path, tiny_head(target), {})
    drafter = speckv.load_drafter(str(tmp_path), target)
    held = any(isinstance(module, Int8Linear) for module in drafter.modules())
    assert held == (dtype != torch.float32 and serving()["cpu"][0] == "cpu")
    output = speckv.generate(target, drafter, prompt_ids(), max_new_tokens=20, policy="fixed:3")
    assert output.sequences.shape == (1, 26)


def test_a_trained_head_goes_deep_from_the_start():
    target = tiny_model()
    tensors = tiny_head(target).own_tensors()
    depths = [[HeadStudent(target, 3, tensors, is_trained)._depth_at(done) for done in (0.0, 0.49, 0.6, 0.99)]
              for is_trained in (False, True)]
    assert depths == [[1, 1, 2, 3], [3, 3, 3, 3]]
