"""The loop at its edges, interrupted, out of memory, in threads and after a fork: the text is what it always is.

`make hostile` sets SPECKV_HOSTILE=1, for the long counts.
"""

import gc
import os
import subprocess
import sys
import threading
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import test_sampling
import torch
from test_head import tiny_head
from test_sampling import VOCABULARY as FEW
from test_sampling import p_value
from tiny_models import VOCABULARY, noisy_copy, prompt_ids, tiny_model
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

import speckv
from speckv import InputError
from speckv.cache import CachedModel
from speckv.fast import FastTarget
from speckv.kernels import serving
from speckv.lookup import LookupDrafter, LookupFirst

TEXTS = 1000 if os.environ.get("SPECKV_HOSTILE") == "1" else 100
CONTEXT = 128  # of the tiny models
needs_engine = pytest.mark.skipif(serving()["cpu"][0] != "cpu", reason="needs the C++ kernels")
ways = pytest.mark.parametrize("fast", [False, pytest.param(True, marks=needs_engine)], ids=["PyTorch", "fast"])


def small_head(target):
    head = tiny_head(target)
    head.hold_in_int8()  # read by the engine
    return head


DRAFTS = {"model": noisy_copy, "head": small_head, "lookup": lambda target: LookupDrafter(VOCABULARY, shortest=1),
          "lookup first": lambda target: LookupFirst(noisy_copy(target), shortest=1)}
each_draft = pytest.mark.parametrize("draft", DRAFTS)


def plain(target, ids, count, fast=False):
    return speckv.generate(target, None, ids, policy="off", max_new_tokens=count, fast=fast).sequences


@ways
@each_draft
@pytest.mark.parametrize("length", [1, CONTEXT - 20, CONTEXT - 1])
def test_from_one_token_to_the_end_of_the_context_in_drafts_as_long_as_they_may_be(draft, length, fast):
    target, ids, count = tiny_model(), prompt_ids(length), min(CONTEXT - length, 30)
    output = speckv.generate(target, DRAFTS[draft](target), ids, max_new_tokens=count, policy="fixed:1000",
                             fast=fast)
    assert torch.equal(output.sequences, plain(target, ids, count, fast))
    if not fast:
        assert torch.equal(output.sequences, target.generate(ids, do_sample=False, max_new_tokens=count,
                                                             pad_token_id=0))
    assert max(step.gamma for step in output.steps) < count, "what does not fit is not drafted"


def test_one_token_more_than_the_context_is_refused():
    target = tiny_model()
    for length in (CONTEXT, CONTEXT - 3):
        count = CONTEXT + 1 - length
        with pytest.raises(InputError, match=f"need {CONTEXT + 1} positions"):
            speckv.generate(target, target, prompt_ids(length), max_new_tokens=count, policy="fixed:1000")


class Stop:
    """Ctrl-C at the n-th call: of itself, or of a module in a model."""

    def __init__(self, at):
        self._left = at

    def __call__(self, *args):
        self._left -= 1
        if self._left == 0:
            raise KeyboardInterrupt


@contextmanager
def stopped(stop, model, fast):
    """A forward of the model is interrupted: halfway through it or, where the engine runs the layers, before it."""
    if not fast:
        with model.model.layers[1].mlp.register_forward_pre_hook(stop):
            yield
        return
    reader = FastTarget.of(model)

    def read(*args):
        stop()
        return FastTarget._read(reader, *args)
    reader._read = read
    try:
        yield
    finally:
        del reader._read


def interrupted(place, at, target, drafter, **settings):
    """A generation that is interrupted: after a step, or in a forward of the target or the drafter."""
    stop, model = Stop(at), {"target": target, "drafter": drafter}.get(place)
    with nullcontext() if model is None else stopped(stop, model, settings["fast"]):
        with pytest.raises(KeyboardInterrupt):
            speckv.generate(target, drafter, prompt_ids(), max_new_tokens=40,
                            on_step=stop if model is None else None, **settings)


PLACES = [("step", False), ("target", False), ("drafter", False), pytest.param("step", True, marks=needs_engine),
          pytest.param("target", True, marks=needs_engine), pytest.param("drafter", True, marks=needs_engine)]


@pytest.mark.parametrize("place, fast", PLACES)
def test_after_an_interrupt_the_same_models_write_the_same_text(place, fast):
    target = tiny_model()
    drafter, policy = noisy_copy(target), speckv.policy.Fixed(3)
    expected = plain(target, prompt_ids(), 40, fast)
    for at in (1, 2, 7):
        interrupted(place, at, target, drafter, policy=policy, fast=fast)
        output = speckv.generate(target, drafter, prompt_ids(), max_new_tokens=40, policy=policy, fast=fast)
        assert torch.equal(output.sequences, expected) and output.accepted > 0


@ways
def test_after_an_interrupted_batch_too(fast):
    target = tiny_model()
    drafter, requests = noisy_copy(target), [{"input_ids": prompt_ids(length)} for length in (3, 9)]

    def texts(**settings):
        return speckv.generate_batch(target, drafter, requests, policy="fixed:3", max_new_tokens=20, fast=fast,
                                     **settings)
    expected = texts()
    with pytest.raises(KeyboardInterrupt):
        texts(on_step=Stop(3))
    for output, before in zip(texts(), expected, strict=True):
        assert torch.equal(output.sequences, before.sequences)


def live_bytes():
    """Of the storages of all tensors that Python holds, but for the fake ones of torch.compile, which have none."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@pytest.mark.parametrize("place, fast", PLACES)
def test_interrupted_texts_leave_nothing_behind(place, fast):
    target = tiny_model()
    drafter = noisy_copy(target)

    def interrupt(count):
        for i in range(count):
            interrupted(place, 1 + i % 5, target, drafter, policy="fixed:3", fast=fast)
    interrupt(5)
    before = live_bytes()
    interrupt(TEXTS // 5)
    assert live_bytes() == before


def test_the_test_above_sees_a_tensor_that_stays():
    before = live_bytes()
    kept = [torch.zeros(3)]
    assert live_bytes() == before + 12, kept


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="asks Linux for the resident memory")
@ways
def test_many_texts_take_no_more_memory_than_a_few(fast):
    target = tiny_model()
    drafter = LookupFirst(noisy_copy(target), shortest=1)

    def write(count):
        for i in range(count):
            speckv.generate(target, drafter, prompt_ids(1 + i % 9, seed=i % 50), max_new_tokens=8, temperature=i % 2,
                            policy=("adaptive", "fixed:3")[i // 2 % 2], fast=fast)
    write(30)
    held, before = live_bytes(), resident_bytes()
    write(TEXTS)
    assert live_bytes() <= held + 1024
    assert resident_bytes() < 1.01 * before


def run_out_of_memory(monkeypatch, rows, where, error):
    """From now on a pass over more tokens than this, if not a prompt, fails halfway through the second layer."""
    def fails(tokens):
        return rows < tokens < 20
    if where == "keys":  # when they are taken in, and the values not yet
        for kind in (DynamicLayer, DynamicSlidingWindowLayer):
            def update(self, key_states, value_states, *args, update=kind.update, **kwargs):
                if fails(key_states.shape[2]):
                    if not self.is_initialized:
                        self.lazy_initialization(key_states, value_states)
                    self.keys = torch.cat([self.keys, key_states], dim=-2)
                    if self.is_sliding:
                        self.cumulative_length += key_states.shape[2]
                    raise error
                return update(self, key_states, value_states, *args, **kwargs)
            monkeypatch.setattr(kind, "update", update)
        return None

    def hook(module, args):
        if fails(args[0].shape[1]):
            raise error
    return hook


OUT_OF_MEMORY = {
    "GPU": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "CPU": RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you "
                        "tried to allocate 4000 bytes."), "Python": MemoryError()}


@pytest.mark.parametrize("architecture, error", [
    ("llama", "GPU"), ("llama", "Python"), ("mistral-sliding", "CPU"), ("gemma2", "CPU")])
@pytest.mark.parametrize("where", ["layer", "keys"])
@pytest.mark.parametrize("length", [1, 3, 30])
def test_where_memory_does_not_suffice_for_a_draft_less_of_it_is_verified(architecture, error, where, length,
                                                                          monkeypatch):
    target = tiny_model(architecture)
    drafter, ids = noisy_copy(target), prompt_ids(length, seed=1)
    expected = plain(target, ids, 40)
    hook = run_out_of_memory(monkeypatch, 3, where, OUT_OF_MEMORY[error])
    if hook is not None:
        target.model.layers[1].mlp.register_forward_pre_hook(hook)
    # The drafter reads a token at a time, but for what it has missed.
    output = speckv.generate(target, drafter, ids, max_new_tokens=40, policy="fixed:10")
    assert torch.equal(output.sequences, expected)
    assert max(step.gamma for step in output.steps) == 2 and output.accepted > 0  # 10 tokens, 5, 2


def test_sampled_texts_stay_plain_decodings_and_so_does_their_distribution(monkeypatch):
    target = tiny_model(seed=2, vocab_size=FEW, num_hidden_layers=2)
    drafter = tiny_model(seed=11, vocab_size=FEW, num_hidden_layers=1)
    settings = {"max_new_tokens": 40, "temperature": 1.0, "seed": 3}
    prompt = prompt_ids(30) % FEW
    expected = speckv.generate(target, None, prompt, policy="off", **settings)
    target.model.layers[1].mlp.register_forward_pre_hook(
        run_out_of_memory(monkeypatch, 2, "layer", OUT_OF_MEMORY["GPU"]))
    output = speckv.generate(target, drafter, prompt, policy="fixed:7", **settings)
    assert torch.equal(output.sequences, expected.sequences) and output.accepted > 0
    # A draft of two is cut to one; the exact probabilities are of passes as long as a prompt, which do not fail.
    monkeypatch.setattr(test_sampling, "SAMPLES", 300)
    assert p_value(target, drafter, "fixed:2", prompt, fast=False) > 1e-3


def test_without_memory_for_one_token_the_error_is_raised_and_so_is_any_other(monkeypatch):
    target = tiny_model()
    for rows, error in ((0, OUT_OF_MEMORY["GPU"]), (3, RuntimeError("mat1 and mat2 cannot be multiplied"))):
        hook = target.model.layers[1].mlp.register_forward_pre_hook(
            run_out_of_memory(monkeypatch, rows, "layer", error))
        with pytest.raises(type(error), match=str(error)[:8]):
            speckv.generate(target, noisy_copy(tiny_model()), prompt_ids(30), max_new_tokens=40, policy="fixed:10")
        hook.remove()


def test_the_test_above_fails_where_the_cache_is_left_as_it_is(monkeypatch):
    monkeypatch.setattr(CachedModel, "restore", lambda self: True)
    with pytest.raises((AssertionError, RuntimeError, ValueError)):
        test_where_memory_does_not_suffice_for_a_draft_less_of_it_is_verified("llama", "GPU", "layer", 3, monkeypatch)


@needs_engine
def test_a_batch_that_does_not_fit_is_read_text_by_text_and_less_at_a_time(monkeypatch):
    target = tiny_model()
    drafter, requests = noisy_copy(target), [{"input_ids": prompt_ids(length)} for length in (3, 9, 5)]
    expected = [plain(target, request["input_ids"], 30, fast=True) for request in requests]
    read = FastTarget._read

    def tight(self, op, parts, layers):
        if sum(len(ids) for _, ids, _ in parts) > 4 and all(session.length for session, _, _ in parts):
            raise OUT_OF_MEMORY["CPU"]
        return read(self, op, parts, layers)
    monkeypatch.setattr(FastTarget, "_read", tight)
    outputs = speckv.generate_batch(target, drafter, requests, policy="fixed:6", max_new_tokens=30, fast=True)
    for output, text in zip(outputs, expected, strict=True):
        assert torch.equal(output.sequences, text)
        assert max(step.gamma for step in output.steps) == 3 and output.accepted > 0


@ways
@each_draft
def test_threads_that_share_models_write_the_texts_they_write_alone(draft, fast):
    target = tiny_model()
    drafter = DRAFTS[draft](target)
    settings = [{"input_ids": prompt_ids(3 + i, seed=i), "seed": i, "temperature": i % 2, "policy": policy}
                for i, policy in enumerate(["fixed:3", "adaptive", "fixed:5", "hf-confidence"])]

    def write(one):
        return speckv.generate(target, drafter, max_new_tokens=40, fast=fast, **one).sequences
    alone = [write(one) for one in settings]
    together, start = [None] * len(settings), threading.Barrier(2)

    def work(first):
        start.wait()
        for i in (first, first + 2):
            together[i] = [write(settings[i]) for _ in range(2)]
    threads = [threading.Thread(target=work, args=(first,)) for first in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for texts, expected in zip(together, alone, strict=True):
        assert all(torch.equal(text, expected) for text in texts)


FORK = """
import os, torch, speckv
from tiny_models import prompt_ids, tiny_model
torch.set_num_threads(2)
# Large enough that the engine calls in PyTorch's threads.
target = tiny_model(hidden_size=256, intermediate_size=1024, num_hidden_layers=2)
def text():
    return speckv.generate(target, None, prompt_ids(), max_new_tokens=8, policy="off", fast=True).sequences
def child_writes(expected=None):
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    if expected is not None:
        torch.set_num_threads(1)  # the others have not come along, and PyTorch would wait for them
    written = text()
    os._exit(written.shape[1] != 14 or expected is not None and not torch.equal(written, expected))
assert child_writes(), "after the import"
assert child_writes(text()), "after a text"
"""


@needs_engine
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_decodes():
    # After PyTorch has used its threads, a child hangs in its first product, with speckv or without, unless it says
    # set_num_threads(1) as PyTorch's own DataLoader does.
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", FORK], timeout=120, capture_output=True, text=True,
                            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "2"})
    assert result.returncode == 0, result.stderr
