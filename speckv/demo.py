"""One prompt of each task at each compression level, plain and with speculation, and a table of what it gained."""

from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from speckv import generate, load_drafter, load_target
from speckv.differences import first_difference
from speckv.models import check_compression
from speckv.policies import parse_policy
from speckv.records import SpecOutput
from speckv.terminal import ACCEPTED_STYLE, TokenPrinter, encode_prompt

TABLE_WIDTH = 140
PROMPTS = {
    "code": "Write a Python function that returns the n-th Fibonacci number, with a docstring.",
    "math": "A train travels 60 km in the first hour and 45 km in each of the next three hours. How far does it "
            "travel in total? Explain step by step.",
    "chat": "I have a free weekend and it is going to rain. What could I do at home?",
    "summarization": "Summarize in two sentences: The city council voted on Tuesday to turn the old railway line into "
                     "a park. Supporters say the path will link three neighbourhoods that have long been cut off from "
                     "each other, and bring visitors to small shops. Opponents fear that rents will rise and that the "
                     "maintenance will cost more than planned. Work is to begin in spring and to take two years.",
}


@dataclass(frozen=True)
class Cell:
    """One prompt at one compression: the same text decoded plainly and with speculation under each policy."""

    compression: str
    task: str
    plain: SpecOutput
    speculative: dict  # {policy: SpecOutput}
    differences: dict  # {policy: (new token, gap) or None}


def rate(outputs) -> float:
    """Tokens a second over several outputs, prompts included."""
    return sum(output.new_tokens for output in outputs) / sum(output.seconds for output in outputs)


def run(target_name: str, drafter_name: str, compressions: list, policies: list, max_new_tokens: int,
        fast: bool = False) -> list:
    """Decode, print as it goes, print the table; returns the cells."""
    chosen = [parse_policy(policy) for policy in policies]
    for compression in compressions:
        check_compression(compression)
    console = Console(highlight=False, soft_wrap=True)
    cells = []
    for compression in compressions:
        with console.status(f"loading {target_name} at {compression}"):
            target, tokenizer = load_target(target_name, compression)
            drafter = load_drafter(drafter_name, target)
            warm_up = encode_prompt(tokenizer, "Hello").to(target.device)
            for policy in ("off", *chosen):
                generate(target, drafter, warm_up, max_new_tokens=8, policy=policy, fast=fast)
        for task, prompt in PROMPTS.items():
            console.rule(f"{compression} · {task}", align="left")
            console.print(prompt, style="dim")
            ids = encode_prompt(tokenizer, prompt).to(target.device)
            printer = TokenPrinter(tokenizer, console)
            outputs = {}
            for policy in chosen:  # the first is shown as it is written
                outputs[policy.name] = generate(target, drafter, ids, max_new_tokens=max_new_tokens, policy=policy,
                                                on_step=None if outputs else printer, fast=fast)
            printer.finish()
            # With a drafter that reads the target's hidden states, plain decoding would be slower than it is.
            plain = generate(target, None, ids, max_new_tokens=max_new_tokens, policy="off", fast=fast)
            cells.append(Cell(compression, task, plain, outputs, {
                name: first_difference(target, plain, output) for name, output in outputs.items()}))
        del target, drafter
    console.print()
    tabular = Console()
    tabular.width = max(tabular.width, TABLE_WIDTH)  # folded to 80 columns, as in a log, it cannot be read
    tabular.print(table(cells))
    console.print(f"[{ACCEPTED_STYLE}]Green[/] tokens were drafted and accepted. Speeds are times plain decoding, "
                  f"greedy, {max_new_tokens} tokens an answer, prompt included in the time; "
                  f"{torch.get_num_threads()} CPU threads. 'best' is known in hindsight only.")
    if any(difference is not None for cell in cells for difference in cell.differences.values()):
        console.print("'to 12 (gap 0.1)': a text is the same up to new token 12, where the target's top two logits "
                      "are 0.1 apart. A pass over several tokens rounds differently from a pass over one, and int8 "
                      "picks its outlier columns over the whole pass; in fp32 the texts are the same throughout.")
    return cells


def table(cells: list) -> Table:
    """A row a cell, and a row a compression for all its cells together."""
    policies = list(cells[0].speculative)
    result = Table(title="speculation against plain decoding")
    for column in ("compression", "task", "plain tok/s", *policies, "best", "tokens/step", "accepted", "same text"):
        result.add_column(column, justify="left" if column in ("compression", "task") else "right",
                          no_wrap=True)
    for compression in dict.fromkeys(cell.compression for cell in cells):
        group = [cell for cell in cells if cell.compression == compression]
        for some in (*([cell] for cell in group), group):
            plain = rate([cell.plain for cell in some])
            ratios = {name: rate([cell.speculative[name] for cell in some]) / plain for name in policies}
            best = max(ratios, key=ratios.get)
            outputs = [cell.speculative[best] for cell in some]
            drafted = sum(output.drafted for output in outputs)
            is_total = some is group
            result.add_row(
                compression, "all" if is_total else some[0].task, f"{plain:.1f}",
                *(f"{ratios[name]:.2f}×" for name in policies), best,
                f"{sum(o.new_tokens for o in outputs) / sum(len(o.steps) for o in outputs):.2f}",
                f"{sum(o.accepted for o in outputs) / drafted:.0%}" if drafted else "–",
                "" if is_total else _same(some[0].differences.values()), style="bold" if is_total else None,
                end_section=is_total)
    return result


def _same(differences):
    """Whether all texts are the plain one, else where the first of them parts from it."""
    parted = [difference for difference in differences if difference is not None]
    return "to {} (gap {:.2f})".format(*min(parted)) if parted else "yes"
