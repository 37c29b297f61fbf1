"""What a pass of the engine over several tokens costs beside one over one: python bench/passes.py

Milliseconds of the embedded target, 100 tokens of context, medians of passes in turns of four: of each turn the first
is left out, which finds the caches as another length left them. Then prompts, read by the engine and by the model in
PyTorch. Keeps everything in bench/results/passes.json.
"""

import argparse
import time
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

import speckv
from speckv.fast import FastTarget, open_target
from speckv.files import write_json

RESULTS = Path(__file__).parent / "results" / "passes.json"
CONTEXT = 100
TURN = 4


def milliseconds(call):
    started = time.perf_counter()
    call()
    return (time.perf_counter() - started) * 1e3


@torch.inference_mode()
def of_lengths(target, ids, lengths, turns):
    """{tokens: ms}."""
    model, times = FastTarget.of(target).open(), {length: [] for length in lengths}
    model.read(ids[:, :CONTEXT], 1)
    for _ in range(turns):
        for length in lengths:
            for number in range(TURN):
                model.rollback(CONTEXT)
                taken = milliseconds(lambda length=length: model.read(ids[:, :CONTEXT + length], length))
                if number > 0:
                    times[length].append(taken)
    return {length: median(each) for length, each in times.items()}


@torch.inference_mode()
def of_prompts(target, ids, lengths, repeats):
    """{tokens: (ms of the engine, ms of PyTorch)}."""
    fast, times = FastTarget.of(target), {length: ([], []) for length in lengths}
    longest, fast.longest_prompt = fast.longest_prompt, max(lengths)
    for _ in range(repeats + 1):  # the first warms up
        for length in lengths:
            for each, is_fast in zip(times[length], (True, False), strict=True):
                model = open_target(target, is_fast)
                each.append(milliseconds(lambda model=model, length=length: model.read(ids[:, :length], 1)))
    fast.longest_prompt = longest
    return {length: tuple(median(each[1:]) for each in both) for length, both in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compressions", default="nf4,bf16,int8")
    parser.add_argument("--lengths", default="1,2,3,4,5,8,16")
    parser.add_argument("--prompts", default="50,100,200,400")
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    lengths, prompts = ([int(n) for n in text.split(",")] for text in (arguments.lengths, arguments.prompts))
    result = {"threads": arguments.threads}
    passes = Table("ms of a pass over", *map(str, lengths), title=f"{arguments.threads} threads")
    read = Table("ms of a prompt of", *map(str, prompts))
    for compression in arguments.compressions.split(","):
        target, _ = speckv.load_target("smollm2", compression)
        ids = torch.randint(target.config.vocab_size, (1, max(CONTEXT + max(lengths), *prompts)),
                            generator=torch.Generator().manual_seed(0))
        figures = of_lengths(target, ids, lengths, arguments.turns)
        passes.add_row(compression, *(f"{figures[length]:.2f}" for length in lengths))
        both = of_prompts(target, ids, prompts, 3)
        for name, number in (("engine", 0), ("PyTorch", 1)):
            read.add_row(f"{compression}, {name}", *(f"{both[length][number]:.0f}" for length in prompts))
        result[compression] = {"passes": figures, "prompts": both}
    console = Console(highlight=False)
    console.print(passes, read)
    write_json(RESULTS, result)


if __name__ == "__main__":
    main()
