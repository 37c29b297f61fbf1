"""Tokens a second of the whole loop against what else there is: python bench/loop.py

Every way of decoding answers the same prompts (those of 'speckv demo') in turns, so that a drift of the machine meets
all alike; greedy, prompts included. transformers' prompt lookup is its assisted generation with the drafter that both
have; with --assistant FOLDER, a drafter made by 'speckv distill --kind lm', it is also run with that one, and so is
speckv. With --llama PYTHON, an interpreter that has llama-cpp-python, llama.cpp answers them too, from the same GGUF
file that the embedded model comes from (Q4_1). Keeps everything in bench/results/loop.json.
"""

import argparse
import json
import subprocess
import time
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

import speckv
from speckv.demo import PROMPTS
from speckv.differences import first_difference
from speckv.files import write_json
from speckv.models import embedded_gguf
from speckv.policies import parse_policy
from speckv.records import SpecOutput
from speckv.terminal import encode_prompt

RESULTS = Path(__file__).parent / "results" / "loop.json"
LLAMA = """
import json, sys, time
from llama_cpp import Llama
model = Llama(sys.argv[1], n_threads=int(sys.argv[2]), n_threads_batch=int(sys.argv[2]), n_ctx=2048, verbose=False)
tokens = int(sys.argv[3])
for line in sys.stdin:
    ids = json.loads(line)
    model.reset()
    started, count = time.perf_counter(), 0
    for _ in model.generate(ids, temp=0.0, repeat_penalty=1.0, reset=True):
        count += 1
        if count == tokens:
            break
    print(json.dumps([count, time.perf_counter() - started]), flush=True)
"""


class Llama:
    """llama.cpp in a process of its own, asked one prompt at a time."""

    def __init__(self, python, tokens):
        if subprocess.run([python, "-c", "import llama_cpp"], stderr=subprocess.DEVNULL).returncode:
            raise SystemExit(f"{python} cannot import llama_cpp: install llama-cpp-python there, or leave --llama out")
        command = [python, "-c", LLAMA, str(embedded_gguf()), str(torch.get_num_threads()), str(tokens)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                         stderr=subprocess.DEVNULL, text=True)
        self(torch.ones(1, 1, dtype=torch.long))  # else what fails would fail after minutes of others

    def __call__(self, ids):
        self._process.stdin.write(json.dumps(ids[0].tolist()) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"llama.cpp ended with status {self._process.wait()} (-4 is an instruction that this "
                             "machine refuses: build it with CMAKE_ARGS=-DGGML_NATIVE=OFF and the units it may use)")
        return tuple(json.loads(answer))

    def close(self):
        self._process.stdin.close()
        self._process.wait()


def ways(target, drafter, tokens, assistant=None):
    """{name: a function of prompt ids that gives what was decoded and the seconds it took}."""
    lookup = speckv.load_drafter("lookup", target)

    def transformers(**settings):
        def run(ids):
            started = time.perf_counter()
            out = target.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens,
                                  eos_token_id=-1, pad_token_id=0, **settings)
            return SpecOutput(out, ids.shape[1], time.perf_counter() - started, 0.0, [])
        return run

    def ours(policy, with_drafter, fast):
        chosen = parse_policy(policy)  # one object a way, which keeps what it learns

        def run(ids):
            return speckv.generate(target, with_drafter, ids, max_new_tokens=tokens, policy=chosen, eos_token_id=[],
                                   fast=fast)
        return run
    with_assistant = {} if assistant is None else {
        "transformers, assistant model": transformers(assistant_model=assistant),
        "speckv, the same model, adaptive": ours("adaptive", assistant, False),
        "speckv --fast, the same model, fixed:2": ours("fixed:2", assistant, True),
        "speckv --fast, the same model, adaptive": ours("adaptive", assistant, True),
    }
    return {
        "transformers generate": transformers(),
        "transformers, prompt lookup": transformers(prompt_lookup_num_tokens=4),
        "speckv, plain": ours("off", None, False),
        "speckv, adaptive": ours("adaptive", drafter, False),
        "speckv --fast, plain": ours("off", None, True),
        "speckv --fast, lookup, adaptive": ours("adaptive", lookup, True),
        "speckv --fast, fixed:1": ours("fixed:1", drafter, True),
        "speckv --fast, fixed:2": ours("fixed:2", drafter, True),
        "speckv --fast, adaptive": ours("adaptive", drafter, True),
    } | with_assistant


def measure(compression, tokens, repeats, llama, assistant):
    """{way: its tokens a second, of the median of each prompt, and where each text parts from transformers'}."""
    target, tokenizer = speckv.load_target("smollm2", compression)
    assistant = speckv.load_drafter(assistant, target) if assistant else None
    runs = ways(target, speckv.load_drafter("lookup+smollm2", target), tokens, assistant)
    seconds = {name: [[] for _ in PROMPTS] for name in [*runs, *(["llama.cpp, Q4_1"] if llama else [])]}
    texts = {name: {} for name in runs}
    for repeat in range(repeats + 1):  # the first warms up
        for number, prompt in enumerate(PROMPTS.values()):
            ids = encode_prompt(tokenizer, prompt)
            for name, run in runs.items():
                output = run(ids)
                texts[name][number] = output
                if repeat:
                    seconds[name][number].append(output.seconds)
            if llama and repeat:
                count, taken = llama(ids)
                seconds["llama.cpp, Q4_1"][number].append(taken * tokens / count)
    first = next(iter(runs))
    parts = {name: {number: first_difference(target, texts[first][number], output)
                    for number, output in texts[name].items()} for name in runs}
    return {name: {"tokens_per_second": len(PROMPTS) * tokens / sum(median(some) for some in each),
                   "parts_from_transformers": parts.get(name)} for name, each in seconds.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compressions", default="bf16,nf4,int8")
    parser.add_argument("--tokens", type=int, default=128, help="of an answer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--llama", metavar="PYTHON", help="an interpreter with llama-cpp-python")
    parser.add_argument("--assistant", metavar="FOLDER", help="a drafter made by 'speckv distill --kind lm'")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.set_verbosity_error()  # it says at every call that -1 ends no text, which is what is wanted
    llama = Llama(arguments.llama, arguments.tokens) if arguments.llama else None
    console, result = Console(highlight=False), {"threads": arguments.threads, "tokens": arguments.tokens}
    for compression in arguments.compressions.split(","):
        figures = result[compression] = measure(compression, arguments.tokens, arguments.repeats, llama,
                                                arguments.assistant)
        base = next(iter(figures.values()))["tokens_per_second"]
        table = Table(title=f"{compression}: {len(PROMPTS)} prompts, {arguments.tokens} tokens each, "
                            f"{arguments.threads} threads")
        for column in ("", "tokens/s", "against generate", "texts that part, largest gap"):
            table.add_column(column, justify="left" if not column else "right")
        for name, row in figures.items():
            gaps = [part[1] for part in (row["parts_from_transformers"] or {}).values() if part]
            table.add_row(name, f"{row['tokens_per_second']:.1f}", f"{row['tokens_per_second'] / base:.2f}×",
                          "–" if row["parts_from_transformers"] is None
                          else f"{len(gaps)} ({max(gaps):.2f})" if gaps else "none")
        console.print(table)
        write_json(RESULTS, result)
    if llama:
        llama.close()


if __name__ == "__main__":
    main()
