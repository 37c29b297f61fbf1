"""Distillations of a tiny model in processes of their own, which report on a pipe and may be killed."""

import time

import torch
from tiny_chat import tiny_tokenizer
from tiny_models import tiny_model

from speckv import distill, distill_settings, distill_text, questions

# Before processes are forked from the one that has imported this, rather than in each of them.
__import__("transformers.models.llama.modeling_llama")
questions.python_functions()

END_OF_TURN = 3
HELD_OUT_ROWS = 8


def _prepared(threads):
    torch.set_num_threads(threads)
    distill_settings.HELD_OUT_ROWS = HELD_OUT_ROWS
    model = tiny_model("llama")
    model.generation_config.eos_token_id = END_OF_TURN
    return model, tiny_tokenizer()


def distill_tiny(reports, threads, folder, settings, pause=0.0):
    """Distill; reports each progress, and at the end the held-out figures. It pauses for so many seconds after each
    report: a run of a few milliseconds would be over before anyone could stop it."""

    def on_progress(progress):
        reports.send(progress.done)
        time.sleep(pause)
    best = distill.distill(*_prepared(threads), folder / "drafter", folder / "work", settings, "tiny", on_progress)
    reports.send(best)


def write_tiny(reports, threads, folder, settings):
    """Only write text; reports the number of each shard that is begun."""
    write_shard = distill_text.write_shard

    def reported(target, tokenizer, corpus, index, *rest):
        reports.send(index)
        return write_shard(target, tokenizer, corpus, index, *rest)
    distill_text.write_shard = reported
    distill.write_only(*_prepared(threads), folder / "work", settings)
