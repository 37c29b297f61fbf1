"""What drafters gain over plain decoding, by kind of task: python bench/drafters.py --prompts FILE

FILE holds a question a line, as Spec-Bench does: {"category": "coding", "turns": ["…"]}. Every question is answered
greedily by the target alone and with every drafter at every gamma, one after another so that a drift of the machine
meets all alike. Prints a table a compression and drafter, and keeps everything in bench/results/drafters.json.
"""

import argparse
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import speckv
from speckv.differences import first_difference
from speckv.files import write_json
from speckv.prompts import read_prompts
from speckv.terminal import encode_prompt

RESULTS = Path(__file__).parent / "results" / "drafters.json"
PEAK = """
import resource, sys, torch, speckv
from speckv.terminal import encode_prompt
torch.set_num_threads(int(sys.argv[4]))
target, tokenizer = speckv.load_target(sys.argv[1], sys.argv[2])
drafter = speckv.load_drafter(sys.argv[3], target) if sys.argv[3] else None
speckv.generate(target, drafter, encode_prompt(tokenizer, "Hello"), max_new_tokens=16,
                policy="fixed:2" if drafter else "off", eos_token_id=[])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@dataclass(frozen=True)
class Answer:
    """One question answered plainly and at each gamma."""

    group: str
    plain: speckv.SpecOutput
    drafted: dict      # {gamma: SpecOutput}
    differences: dict  # {gamma: (new token, gap) or None}


def answer(target, drafter, prompt, gammas, tokens, group):
    plain = speckv.generate(target, None, prompt, max_new_tokens=tokens, policy="off")
    drafted = {gamma: speckv.generate(target, drafter, prompt, max_new_tokens=tokens, policy=f"fixed:{gamma}")
               for gamma in gammas}
    return Answer(group, plain, drafted,
                  {gamma: first_difference(target, plain, output) for gamma, output in drafted.items()})


def ratio(answers, gamma):
    """Tokens a second over all answers against plain decoding, prompts included."""
    def rate(outputs):
        return sum(o.new_tokens for o in outputs) / sum(o.seconds for o in outputs)
    return rate([a.drafted[gamma] for a in answers]) / rate([a.plain for a in answers])


def figures(answers, gammas):
    """What a drafter did in some answers."""
    widest = [step for a in answers for step in a.drafted[max(gammas)].steps if step.gamma]
    plain_ms = median(step.verify_ms for a in answers for step in a.plain.steps)
    return {
        "ratio": {gamma: ratio(answers, gamma) for gamma in gammas},
        "first_match": sum(step.accepted > 0 for step in widest) / max(1, len(widest)),
        "accepted_a_draft": sum(step.accepted for step in widest) / max(1, len(widest)),
        "drafted_steps": len(widest) / max(1, sum(len(a.drafted[max(gammas)].steps) for a in answers)),
        "draft_token_ms": median([step.draft_ms / step.gamma for step in widest] or [0.0]),
        "plain_step_ms": plain_ms,
        "tokens_a_step": {gamma: sum(a.drafted[gamma].new_tokens for a in answers)
                          / sum(len(a.drafted[gamma].steps) for a in answers) for gamma in gammas},
    }


def table(title, answers, gammas):
    drawn = Table(title=title)
    for heading in ("task", "plain tok/s", *(f"γ={gamma}" for gamma in gammas), "best", "first token matches",
                    f"accepted of {max(gammas)}", "ms a draft token", "ms a plain step"):
        drawn.add_column(heading, justify="left" if heading == "task" else "right")
    for group in (*dict.fromkeys(a.group for a in answers), "all"):
        some = [a for a in answers if group in (a.group, "all")]
        f = figures(some, gammas)
        plain = sum(a.plain.new_tokens for a in some) / sum(a.plain.seconds for a in some)
        best = max(f["ratio"], key=f["ratio"].get)
        drawn.add_row(group, f"{plain:.1f}", *(f"{f['ratio'][gamma]:.2f}×" for gamma in gammas), f"γ={best}",
                      f"{f['first_match']:.2f}", f"{f['accepted_a_draft']:.2f}", f"{f['draft_token_ms']:.2f}",
                      f"{f['plain_step_ms']:.1f}", style="bold" if group == "all" else None)
    return drawn


def peak_memory(target, compression, drafter, threads):
    """Peak resident megabytes of a process that decodes a little; an empty drafter is plain decoding."""
    done = subprocess.run([sys.executable, "-c", PEAK, target, compression, drafter, str(threads)],
                          capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1]) / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--prompts", type=Path, required=True, help="questions, a JSON object a line, as Spec-Bench's")
    parser.add_argument("--per-group", type=int, default=4, help="questions of each kind")
    parser.add_argument("--target", default="smollm2")
    parser.add_argument("--drafters", default="smollm2,lookup,lookup+smollm2")
    parser.add_argument("--compressions", default="bf16,nf4")
    parser.add_argument("--gammas", default="1,2,3,4")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens an answer")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    gammas = [int(gamma) for gamma in options.gammas.split(",")]
    chosen = {task: texts[:options.per_group] for task, texts in read_prompts(options.prompts).items()}
    console = Console()
    console.width = max(console.width, 140)  # folded to 80 columns, as in a log, it cannot be read
    results = []
    for compression in options.compressions.split(","):
        target, tokenizer = speckv.load_target(options.target, compression)
        for name in options.drafters.split(","):
            drafter = speckv.load_drafter(name, target)
            for policy in ("off", *(f"fixed:{gamma}" for gamma in gammas)):  # warm up
                speckv.generate(target, drafter, encode_prompt(tokenizer, "Hello"), max_new_tokens=8, policy=policy)
            work = [(group, text) for group, texts in chosen.items() for text in texts]
            answers = [
                answer(target, drafter, encode_prompt(tokenizer, text), gammas, options.tokens, group)
                for group, text in track(work, f"{compression}, {name}", console=Console(stderr=True))]
            console.print(table(f"{compression}, {name}: {options.tokens} tokens, greedy, {options.threads} threads",
                                answers, gammas))
            gaps = [difference[1] for a in answers for difference in a.differences.values() if difference]
            console.print(f"{len(gaps)} of {len(answers) * len(gammas)} texts part from plain decoding"
                          + (f", where the target's top two logits are at most {max(gaps):.2f} apart" if gaps else ""))
            memory = [peak_memory(options.target, compression, which, options.threads) for which in ("", name)]
            console.print(f"peak memory {memory[0]:.0f} MB alone, {memory[1]:.0f} MB with the drafter "
                          f"({memory[1] / memory[0]:.3f} times)\n")
            results.append({
                "compression": compression, "drafter": name, "tokens": options.tokens, "threads": options.threads,
                "peak_mb": memory, "gaps": gaps, "all": figures(answers, gammas),
                **{group: figures([a for a in answers if a.group == group], gammas) for group in chosen}})
    RESULTS.parent.mkdir(exist_ok=True)
    write_json(RESULTS, results)


if __name__ == "__main__":
    main()
