"""Profiles of tiny models, in this process or in one of its own that reports on a pipe and may be killed."""

import torch
from tiny_models import VOCABULARY, noisy_copy, tiny_model

from speckv.profile import ProfileSettings, profile

# Before processes are forked from the one that has imported this, rather than in each of them.
__import__("transformers.models.llama.modeling_llama")
__import__("pyarrow.parquet")

PROMPTS = {"code": ("one", "a second prompt"), "chat": ("the third",)}
SETTINGS = ProfileSettings("tiny", "noisy", gammas=(2, 3), compressions=("bf16", "nf4"), max_new_tokens=10,
                           temperature=0.7, seed=5)
TEXTS = 12  # 3 prompts at 2 gammas and 2 compressions


def encode(prompt):
    return torch.tensor([[2 + ord(letter) % (VOCABULARY - 2) for letter in prompt]])


def load(compression):
    """Another model a compression, as quantization makes of one."""
    target = tiny_model(seed={"bf16": 0, "nf4": 1}[compression])
    return target, noisy_copy(target), encode


def run_reported(reports, threads, folder):
    """Profile; reports each progress."""
    torch.set_num_threads(threads)
    profile(load, PROMPTS, SETTINGS, folder, lambda progress: reports.send(progress.done))
