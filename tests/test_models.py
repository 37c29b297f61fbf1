"""The embedded model: converted once, checked, quantized, and decoded without loss with the shipped drafter."""

import importlib.metadata

import pytest
import torch

import speckv
from speckv import ModelError, models
from speckv.terminal import encode_prompt


def installed(package):
    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


needs_embedded = pytest.mark.skipif(
    not installed(models.EMBEDDED_PACKAGE), reason=f"needs the embedded model: {models.EMBEDDED_INSTALL}")
PROMPTS = {
    "code": "Write a Python function that reverses a string.",
    "chat": "What should I pack for a day at the sea?",
}


@pytest.fixture(scope="module")
def smollm2():
    return speckv.load_target("smollm2", "fp32")


@needs_embedded
@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS.keys())
def test_the_embedded_pair_decodes_what_generate_decodes_in_fp32(smollm2, prompt):
    target, tokenizer = smollm2
    drafter = speckv.load_drafter("smollm2", target)
    ids = encode_prompt(tokenizer, prompt)
    expected = target.generate(ids, do_sample=False, max_new_tokens=32)
    for policy in ("off", "fixed:1", "fixed:7"):
        output = speckv.generate(target, drafter, ids, max_new_tokens=32, policy=policy)
        assert torch.equal(output.sequences, expected), policy
        if policy != "off":
            assert output.accepted > 0, f"the shipped drafter is never right with {policy}"


@needs_embedded
@pytest.mark.parametrize("compression, dtype", [
    ("bf16", torch.bfloat16), ("fp16", torch.float16), ("int8", torch.int8), ("nf4", torch.uint8)])
def test_every_compression_loads_and_decodes(compression, dtype, caplog):
    if compression in ("int8", "nf4"):
        pytest.importorskip("bitsandbytes")
    target, tokenizer = speckv.load_target("smollm2", compression)
    assert target.model.layers[0].mlp.up_proj.weight.dtype == dtype
    drafter = speckv.load_drafter("smollm2", target)
    ids = encode_prompt(tokenizer, PROMPTS["code"])
    # Room for a sentence before the code: how int8 begins depends on how many tokens are verified together.
    output = speckv.generate(target, drafter, ids, max_new_tokens=24, policy="fixed:2")
    assert "def" in tokenizer.decode(output.sequences[0, ids.shape[1]:])
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == len(set(messages)), "nothing is said at every product of every token"


@needs_embedded
def test_the_drafter_adds_only_its_own_layers_to_memory(smollm2):
    target, _ = smollm2
    drafter = speckv.load_drafter("smollm2", target)
    shared = {parameter.data_ptr() for parameter in target.parameters()}
    own = sum(parameter.numel() for parameter in drafter.parameters() if parameter.data_ptr() not in shared)
    assert own < 0.1 * sum(parameter.numel() for parameter in target.parameters())


@pytest.mark.parametrize("compression", ["int3", "", "BF16"])
def test_an_unknown_compression_is_refused(compression):
    with pytest.raises(ModelError, match=r"unknown compression .* choose one of bf16, fp16, fp32, int8, nf4"):
        speckv.load_target("smollm2", compression)


def test_a_model_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ModelError, match="does not load as a causal language model"):
        speckv.load_target(str(tmp_path))


def test_a_missing_package_is_named_with_its_installation(monkeypatch):
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"needs bitsandbytes: pip install 'speckv\[quant\]'"):
        speckv.load_target("smollm2", "nf4")


class Counter:
    """Stands in for the conversion, which takes half a minute."""

    def __init__(self):
        self.calls = 0

    def __call__(self, gguf_file, folder):
        self.calls += 1
        (folder / "model.safetensors").write_bytes(b"weights")


@pytest.fixture
def conversion(tmp_path, monkeypatch):
    counter = Counter()
    monkeypatch.setenv("SPECKV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(models, "_convert", counter)
    monkeypatch.setattr(models, "embedded_gguf", lambda: tmp_path / "model.gguf")
    return counter


def test_the_embedded_model_is_converted_once(conversion):
    assert models.embedded_model() == models.embedded_model()
    assert conversion.calls == 1 and models.is_converted()


def test_a_damaged_conversion_is_made_again(conversion):
    file = models.embedded_model() / "model.safetensors"
    file.write_bytes(b"wrong")
    assert not models.is_converted()
    assert (models.embedded_model() / "model.safetensors").read_bytes() == b"weights"
    assert conversion.calls == 2


def test_an_interrupted_conversion_leaves_nothing_behind(conversion, monkeypatch, tmp_path):
    def interrupted(gguf_file, folder):
        (folder / "half").write_bytes(b"written")
        raise KeyboardInterrupt
    monkeypatch.setattr(models, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        models.embedded_model()
    assert [file.name for file in (tmp_path / "cache").iterdir() if file.name != ".lock"] == []


@needs_embedded
def test_a_model_file_that_is_not_the_release_is_refused(monkeypatch):
    monkeypatch.setattr(models, "sha256", lambda file: "0" * 64)
    with pytest.raises(ModelError, match="its hash differs"):
        models.embedded_gguf()


@needs_embedded
def test_a_drafter_that_is_nothing_is_refused(tmp_path, smollm2):
    target, _ = smollm2
    with pytest.raises(ModelError, match="neither a drafter folder nor a causal language model"):
        speckv.load_drafter(str(tmp_path), target)
