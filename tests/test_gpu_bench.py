"""bench/gpu.py where there is no GPU, and its check of correctness against the reference's own answers."""

import os
import subprocess
import sys
from pathlib import Path

import gpu
import pytest
import torch

from speckv.kernels import reference

SCRIPT = Path(gpu.__file__)
SMALL = [("draft_sample", 2, 300, None), ("draft_step", 2, 300, None), ("plan_gamma", 2, None, None),
         ("verify_chain", 2, 300, 0), ("verify_chain", 2, 300, gpu.GAMMA)]


def run(*arguments):
    environment = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET",
                                                                                    "SPECKV_BACKEND")}
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, timeout=120,
                          env=environment)


def test_compile_only_prints_what_a_kernel_takes():
    pytest.importorskip("triton", reason="needs Triton: pip install 'speckv[triton]'")
    result = run("--compile-only", "--targets", "sm_90,gfx942", "--ops", "plan_gamma")
    assert result.returncode == 0, result.stderr
    row = next(line for line in result.stdout.splitlines() if "plan_gamma" in line)
    assert row.count("/ none") == 2


def test_expected_has_a_row_for_every_shape():
    pytest.importorskip("triton", reason="needs Triton: pip install 'speckv[triton]'")
    result = run("--expected")
    assert result.returncode == 0, result.stderr
    for shape, is_split in gpu.variants():
        assert gpu.label(*shape, is_split) in result.stdout
    for card in gpu.GPUS:
        assert card.name in result.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_what_it_can_do():
    result = run()
    assert result.returncode == 2
    assert "no GPU here" in result.stderr and "--compile-only" in result.stderr and "--expected" in result.stderr


@pytest.mark.parametrize("card", gpu.GPUS, ids=lambda card: card.name)
def test_more_work_takes_longer_and_nothing_less_than_memory_and_launch(card):
    times = [card.expected_us(gpu.work_of("draft_sample", rows, 151936, None)) for rows in (1, 64, 1024)]
    assert gpu.LAUNCH_US < times[0] <= times[1] < times[2]
    for shape in gpu.SHAPES:
        work = gpu.work_of(*shape)
        assert card.expected_us(work) >= card.memory_us(work)


@pytest.mark.parametrize("card", gpu.GPUS, ids=lambda card: card.name)
def test_rows_are_split_where_that_is_expected_to_be_faster(card):
    pytest.importorskip("triton", reason="needs Triton: pip install 'speckv[triton]'")
    for rows in (1, 2, 8, 40, 64, 100, 1024):
        for vocabulary in (1023, 20000, 32001, *gpu.VOCABULARIES):
            shape = "draft_sample", rows, vocabulary, None
            share = gpu.share_of_a_row(*shape[:3], card.units)
            split, whole = (card.expected_us(gpu.work_of(*shape, share)) for share in (share, None))
            assert split < whole or share is None
    assert gpu.share_of_a_row("draft_step", 1, 151936, card.units) == pytest.approx(4096 / 151936)
    assert gpu.share_of_a_row("draft_step", card.units, 151936, card.units) is None
    for shape in gpu.SHAPES:
        if shape[0] == "verify_chain":
            assert card.expected_us(gpu.work_on(card, shape, True)) <= card.expected_us(gpu.work_on(card, shape, False))
    assert gpu.share_of_a_row("verify_chain", 1, 128256, card.units) < 1 / 4
    assert gpu.share_of_a_row("verify_chain", 64, 128256, card.units) is None


@pytest.mark.parametrize("shape", SMALL, ids=lambda shape: gpu.label(*shape))
def test_the_check_passes_the_right_outputs_and_finds_a_wrong_one(shape):
    outputs = getattr(reference, shape[0])(*gpu.inputs_of(*shape))
    assert gpu.wrong_outputs(outputs, outputs) == []
    if shape[0] == "verify_chain":
        assert (outputs[1] == shape[3]).all()
    spoiled = [outputs[0] + 1, *outputs[1:]]
    assert gpu.wrong_outputs(spoiled, outputs) == [0]
