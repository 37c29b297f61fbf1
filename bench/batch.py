"""Tokens a second of batches: python bench/batch.py

The same prompts, of mixed lengths, cut into batches of several sizes; greedy, prompts included. transformers' generate
pads them on the left. Keeps everything in bench/results/batch.json.
"""

import argparse
import time
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

import speckv
from speckv.files import write_json
from speckv.prompts import PROMPTS
from speckv.terminal import encode_prompt

RESULTS = Path(__file__).parent / "results" / "batch.json"
WARM_UP_TOKENS = 8


def padded(prompts):
    """input_ids [B, n] and attention_mask [B, n], padded on the left."""
    length = max(ids.shape[1] for ids in prompts)
    rows = [torch.nn.functional.pad(torch.stack([ids[0], torch.ones_like(ids[0])]), (length - ids.shape[1], 0))
            for ids in prompts]
    return torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows])


def ways(target, drafter):
    """{name: a function that decodes so many tokens behind each of a list of prompts}."""
    def transformers(prompts, tokens):
        ids, mask = padded(prompts)
        target.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=tokens, eos_token_id=-1,
                        pad_token_id=0)

    def ours(policy, with_drafter):
        def run(prompts, tokens):
            speckv.generate_batch(target, with_drafter, [{"input_ids": ids} for ids in prompts], policy=policy,
                                  fast=True, max_new_tokens=tokens, eos_token_id=[])
        return run
    return {"transformers generate": transformers, "speckv --fast, plain": ours("off", None),
            "speckv --fast, fixed:1": ours("fixed:1", drafter), "speckv --fast, adaptive": ours("adaptive", drafter)}


def measure(compression, sizes, tokens, repeats, only):
    """{way: {batch size: its tokens a second, of the median run}} of the ways whose names contain one of `only`."""
    target, tokenizer = speckv.load_target("smollm2", compression)
    # One of each task in turn, so that every batch is mixed.
    texts = [text for texts in zip(*PROMPTS.values(), strict=False) for text in texts][:max(sizes)]
    prompts = [encode_prompt(tokenizer, text) for text in texts]
    runs = {name: run for name, run in ways(target, speckv.load_drafter("lookup+smollm2", target)).items()
            if any(part in name for part in only)}
    seconds = {name: {size: [] for size in sizes} for name in runs}
    for run in runs.values():
        run(prompts, WARM_UP_TOKENS)
    for _ in range(repeats):
        for size in sizes:
            for name, run in runs.items():
                started = time.perf_counter()
                for first in range(0, len(prompts), size):
                    run(prompts[first:first + size], tokens)
                seconds[name][size].append(time.perf_counter() - started)
    return {name: {size: len(prompts) * tokens / median(some) for size, some in each.items()}
            for name, each in seconds.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compressions", default="bf16,nf4")
    parser.add_argument("--sizes", default="1,4,8,16")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--only", default="", help="ways whose names contain one of these, such as plain,adaptive")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.set_verbosity_error()  # it says at every call that -1 ends no text, which is what is wanted
    sizes = [int(size) for size in arguments.sizes.split(",")]
    console, result = Console(highlight=False), {"threads": arguments.threads, "tokens": arguments.tokens}
    for compression in arguments.compressions.split(","):
        result[compression] = measure(compression, sizes, arguments.tokens, arguments.repeats,
                                      arguments.only.split(","))
        table = Table("tokens/s in batches of", *map(str, sizes),
                      title=f"{compression}: {arguments.tokens} tokens each, {arguments.threads} threads")
        for name, row in result[compression].items():
            table.add_row(name, *(f"{row[size]:.0f}" for size in sizes))
        console.print(table)
        write_json(RESULTS, result)


if __name__ == "__main__":
    main()
