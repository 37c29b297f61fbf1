"""What a seed costs: python bench/seeds.py

With a seed a sampled text is that of plain decoding whatever drafts, but less of a draft is accepted than by rejection
(see speckv.randomness). Prints both rates of acceptance, of drafts of one token, at several temperatures.
"""

import argparse

import torch
from rich.console import Console
from rich.table import Table

import speckv
from speckv.prompts import PROMPTS
from speckv.terminal import encode_prompt


def acceptance(target, drafter, prompts, temperature, tokens, has_seed):
    """Accepted over drafted tokens of all prompts."""
    accepted = drafted = 0
    torch.manual_seed(0)
    for number, ids in enumerate(prompts):
        output = speckv.generate(target, drafter, ids, max_new_tokens=tokens, policy="fixed:1", temperature=temperature,
                                 seed=number if has_seed else None, eos_token_id=[], fast=True)
        accepted, drafted = accepted + output.accepted, drafted + output.drafted
    return accepted / drafted


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compression", default="nf4")
    parser.add_argument("--drafters", default="smollm2,lookup+smollm2")
    parser.add_argument("--temperatures", default="0.5,0.8,1.0")
    parser.add_argument("--per-task", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=96, help="of an answer")
    arguments = parser.parse_args()
    target, tokenizer = speckv.load_target("smollm2", arguments.compression)
    prompts = [encode_prompt(tokenizer, text) for texts in PROMPTS.values() for text in texts[:arguments.per_task]]
    table = Table("drafter", "temperature", "by rejection", "with a seed", "ratio")
    for name in arguments.drafters.split(","):
        drafter = speckv.load_drafter(name, target)
        for temperature in map(float, arguments.temperatures.split(",")):
            rates = [acceptance(target, drafter, prompts, temperature, arguments.tokens, has_seed)
                     for has_seed in (False, True)]
            table.add_row(name, f"{temperature}", *(f"{rate:.3f}" for rate in rates), f"{rates[1] / rates[0]:.2f}")
    Console(highlight=False).print(table)


if __name__ == "__main__":
    main()
