"""What a step costs as the text grows: python bench/context.py

Decodes 32 tokens behind texts of several lengths and says what a step spends in the target, in the drafter and outside
of both. The target's attention grows with the text; nothing else should.
"""

import argparse

import torch
from rich.console import Console
from rich.table import Table

import speckv
from speckv.profile_decode import DRAFT, FORWARDS, TARGET, profile

TOKENS = 32


def text_of(target, length):
    """A text [1, length] of the target's own, so that drafters find in it what they would."""
    ids = torch.randint(1_000, 20_000, (1, 8), generator=torch.Generator().manual_seed(0))
    return speckv.generate(target, None, ids, policy="off", max_new_tokens=length - 8, temperature=1.0, seed=0,
                           eos_token_id=[], fast=True).sequences


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compression", default="bf16")
    parser.add_argument("--policy", default="fixed:2")
    parser.add_argument("--lengths", default="64,256,512,1024,1536")
    parser.add_argument("--pytorch", action="store_true", help="read the target by PyTorch instead of --fast")
    arguments = parser.parse_args()
    target, _ = speckv.load_target("smollm2", arguments.compression)
    drafter = speckv.load_drafter("lookup+smollm2", target)
    lengths = [int(length) for length in arguments.lengths.split(",")]
    text = text_of(target, max(lengths))
    table = Table("tokens of text", "target", "drafter", "outside both",
                  title=f"{arguments.compression}, {arguments.policy}: milliseconds a step")
    for length in lengths:
        runs = [profile(target, drafter, text[:, :length], arguments.policy, max_new_tokens=TOKENS, eos_token_id=[],
                        fast=not arguments.pytorch) for _ in range(4)][1:]  # the first warms up
        best = min(runs, key=lambda run: run.wall_seconds)
        of_a_step = 1e3 / len(best.output.steps)
        outside = best.wall_seconds - sum(best.seconds[part] for part in FORWARDS)
        table.add_row(f"{length:,}", *(f"{of_a_step * seconds:.2f}"
                                       for seconds in (best.seconds[TARGET], best.seconds[DRAFT], outside)))
    Console(highlight=False).print(table)


if __name__ == "__main__":
    main()
