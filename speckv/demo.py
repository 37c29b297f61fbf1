"""One prompt of each task at each compression level, plain and with speculation, and a table of what it gained."""

from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from speckv import generate, load_drafter, load_target
from speckv.models import check_compression
from speckv.policy import parse_policy
from speckv.records import SpecOutput
from speckv.terminal import ACCEPTED_STYLE, TokenPrinter, encode_prompt

TABLE_WIDTH = 118
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
    """One prompt at one compression: the same text decoded plainly and with speculation."""

    compression: str
    task: str
    plain: SpecOutput
    speculative: SpecOutput
    difference: tuple | None

    @property
    def ratio(self) -> float:
        return self.speculative.tokens_per_second / self.plain.tokens_per_second


@torch.inference_mode()
def first_difference(target, plain: SpecOutput, speculative: SpecOutput):
    """Where two greedy outputs part: (number of the new token, gap between the target's top two logits there), or None.

    The gap is measured in a pass over the shared text; a small one means that rounding chose.
    """
    length = min(plain.sequences.shape[1], speculative.sequences.shape[1])
    different = (plain.sequences[0, :length] != speculative.sequences[0, :length]).nonzero()
    if len(different) == 0:
        return None
    position = different[0].item()
    best = target(plain.sequences[:, :position], logits_to_keep=1).logits[0, -1].float().topk(2).values
    return position - plain.prompt_length, (best[0] - best[1]).item()


def run(target_name: str, drafter_name: str, compressions: list, policy: str, max_new_tokens: int) -> list:
    """Decode, print as it goes, print the table; returns the cells."""
    chosen = parse_policy(policy)
    for compression in compressions:
        check_compression(compression)
    console = Console(highlight=False, soft_wrap=True)
    cells = []
    for compression in compressions:
        with console.status(f"loading {target_name} at {compression}"):
            target, tokenizer = load_target(target_name, compression)
            drafter = load_drafter(drafter_name, target)
            warm_up = encode_prompt(tokenizer, "Hello").to(target.device)
            for warm_policy in ("off", chosen):
                generate(target, drafter, warm_up, max_new_tokens=8, policy=warm_policy)
        for task, prompt in PROMPTS.items():
            console.rule(f"{compression} · {task}", align="left")
            console.print(prompt, style="dim")
            ids = encode_prompt(tokenizer, prompt).to(target.device)
            printer = TokenPrinter(tokenizer, console)
            speculative = generate(target, drafter, ids, max_new_tokens=max_new_tokens, policy=chosen, on_step=printer)
            printer.finish()
            plain = generate(target, drafter, ids, max_new_tokens=max_new_tokens, policy="off")
            cells.append(Cell(compression, task, plain, speculative, first_difference(target, plain, speculative)))
        del target, drafter
    console.print()
    tabular = Console()
    tabular.width = max(tabular.width, TABLE_WIDTH)  # folded to 80 columns, as in a log, it cannot be read
    tabular.print(table(cells, chosen.name))
    console.print(f"[{ACCEPTED_STYLE}]Green[/] tokens were drafted and accepted. {torch.get_num_threads()} CPU "
                  f"threads, {max_new_tokens} tokens an answer, greedy, prompt included in the time.")
    if any(cell.difference is not None for cell in cells):
        console.print("'to 12 (gap 0.1)': the texts are the same up to new token 12, where the target's top two logits "
                      "are 0.1 apart. A pass over several tokens rounds differently from a pass over one, and int8 "
                      "picks its outlier columns over the whole pass; in fp32 the texts are the same throughout.")
    return cells


def table(cells: list, policy: str) -> Table:
    """A row a cell and a row of means a compression."""
    result = Table(title=f"plain decoding against {policy}")
    for column in ("compression", "task", "plain tok/s", f"{policy} tok/s", "ratio", "tokens/step", "accepted",
                   "same text"):
        result.add_column(column, justify="left" if column in ("compression", "task") else "right",
                          no_wrap=True)
    for compression in dict.fromkeys(cell.compression for cell in cells):
        group = [cell for cell in cells if cell.compression == compression]
        for cell in group:
            different = cell.difference
            result.add_row(
                compression, cell.task, f"{cell.plain.tokens_per_second:.1f}",
                f"{cell.speculative.tokens_per_second:.1f}", f"{cell.ratio:.2f}×",
                f"{cell.speculative.tokens_per_step:.2f}", f"{cell.speculative.acceptance_rate:.0%}",
                "yes" if different is None else f"to {different[0]} (gap {different[1]:.2f})")
        plain, speculative = ([getattr(cell, kind) for cell in group] for kind in ("plain", "speculative"))
        rates = [sum(o.new_tokens for o in kind) / sum(o.seconds for o in kind) for kind in (plain, speculative)]
        steps = sum(len(o.steps) for o in speculative)
        drafted = sum(o.drafted for o in speculative)
        result.add_row(
            compression, "all", f"{rates[0]:.1f}", f"{rates[1]:.1f}", f"{rates[1] / rates[0]:.2f}×",
            f"{sum(o.new_tokens for o in speculative) / steps:.2f}",
            f"{sum(o.accepted for o in speculative) / drafted:.0%}" if drafted else "–", "", style="bold",
            end_section=True)
    return result
