"""What the command line prints while something runs: streamed tokens in colour, progress of a distillation."""

import re

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.style import Style
from rich.table import Table

ACCEPTED_STYLE = Style(color="green")
HALF_A_CHARACTER = "\ufffd"  # what a tokenizer makes of bytes that are not a whole character
CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
PROFILE_WIDTH = 110  # columns of profile_table
SPEED_PERIOD = 600  # seconds; over how many of the last the time that remains is reckoned: a text may take many
STAGES = {"text": "the target writes", "training": "the drafter learns"}


def encode_prompt(tokenizer, prompt: str, raw: bool = False):
    """Token ids [1, n] of a prompt, in the tokenizer's chat format where it has one and raw is not asked for."""
    if raw or not tokenizer.chat_template:
        return tokenizer(prompt, return_tensors="pt").input_ids
    return tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True,
                                         return_tensors="pt", return_dict=True).input_ids


class TokenPrinter:
    """Prints tokens as they come, accepted draft tokens in colour; pass it as on_step to speckv.generate.

    The text is the model's to the letter, but for control characters, with which it could command the terminal.
    """

    def __init__(self, tokenizer, console: Console | None = None):
        self._tokenizer = tokenizer
        self._console = console or Console()
        self._ids = []
        self._printed = 0  # characters

    def __call__(self, tokens, record):
        for position, token in enumerate(tokens):
            self._ids.append(token)
            text = self._tokenizer.decode(self._ids, skip_special_tokens=True)
            if not text.endswith(HALF_A_CHARACTER):  # else the next token brings the rest
                self._print(text, position < record.accepted)

    def _print(self, text, is_accepted):
        new = CONTROL_CHARACTERS.sub(HALF_A_CHARACTER, text[self._printed:])
        self._printed = len(text)
        coloured = is_accepted and new and self._console.color_system is not None
        # Not through Rich, which would turn tabs into spaces and break lines.
        self._console.file.write(ACCEPTED_STYLE.render(new) if coloured else new)
        self._console.file.flush()

    def finish(self):
        """Print what was held back, and end the line."""
        self._print(self._tokenizer.decode(self._ids, skip_special_tokens=True) + "\n", False)


class DistillProgress:
    """A progress bar a stage with tokens per second, loss and held-out figures; pass it as on_progress to distill."""

    def __enter__(self):
        self._bars = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("{task.fields[speed]}"), TimeElapsedColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"), console=Console(stderr=True))
        self._tasks = {}
        self._bars.start()
        return self

    def __exit__(self, *exception):
        self._bars.stop()

    def __call__(self, progress):
        if progress.stage not in self._tasks:
            self._tasks[progress.stage] = self._bars.add_task(
                STAGES[progress.stage], total=progress.total, completed=progress.done, speed="", figures="")
        figures = [progress.note] if progress.note else []
        if progress.loss is not None:
            figures.append(f"loss {progress.loss:.3f}")
        if progress.held_out:
            by_depth = "/".join(f"{100 * match:.0f}" for match in progress.held_out["match_by_depth"])
            figures.append(f"held-out match {by_depth} %")
            figures.append(f"accepted of 4 {progress.held_out['accepted_at_4']:.2f}")
        task = self._tasks[progress.stage]
        speed = self._bars.tasks[task].speed
        self._bars.update(task, completed=progress.done, total=progress.total,
                          figures=", ".join(figures), speed=f"{speed:,.0f} tokens/s" if speed else "")


def held_out_table(held_out: dict) -> Table:
    """How good a drafter is on text it was not trained on, by how many tokens it drafts."""
    result = Table(title="on held-out text")
    result.add_column("tokens drafted")
    for gamma in range(1, len(held_out["match_by_depth"]) + 1):
        result.add_column(str(gamma), justify="right")
    result.add_row("the last is the target's first choice", *(f"{match:.1%}" for match in held_out["match_by_depth"]))
    result.add_row("accepted (greedy target)", *(f"{accepted:.2f}" for accepted in held_out["accepted_by_gamma"]))
    return result


class ProfileProgress:
    """A progress bar of texts, with what remains and the records so far; pass it as on_progress to profile."""

    def __enter__(self):
        self._bars = Progress(
            TextColumn("profiling"), BarColumn(), TextColumn("{task.completed:.0f} of {task.total:.0f} texts"),
            TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[records]}"),
            console=Console(stderr=True), speed_estimate_period=SPEED_PERIOD)
        self._task = None
        self._bars.start()
        return self

    def __exit__(self, *exception):
        self._bars.stop()

    def __call__(self, progress):
        records = f"{progress.steps:,} steps, {progress.tokens:,} draft tokens"
        if self._task is None:  # what an earlier run did says nothing of the speed of this one
            self._task = self._bars.add_task("", total=progress.total, completed=progress.done, records=records)
        self._bars.update(self._task, completed=progress.done, records=records)


def profile_table(steps) -> Table:
    """What step records say of each compression and gamma, prompts not included."""
    sums = ("drafted", "accepted", "tokens_produced", "draft_ms", "verify_ms")
    cells = steps.group_by(["compression", "gamma"], use_threads=False).aggregate(
        [*((name, "sum") for name in sums), ("step", "count")])
    result = Table(title="what was recorded")
    for column in ("compression", "gamma", "steps", "accepted", "tokens/step", "ms a draft token", "ms a verify pass",
                   "tokens/s"):
        result.add_column(column, justify="left" if column == "compression" else "right", no_wrap=True)
    for cell in cells.to_pylist():
        drafted, accepted, tokens, draft_ms, verify_ms = (cell[f"{name}_sum"] for name in sums)
        count = cell["step_count"]
        result.add_row(cell["compression"], str(cell["gamma"]), f"{count:,}",
                       f"{accepted / drafted:.0%}" if drafted else "–", f"{tokens / count:.2f}",
                       f"{draft_ms / drafted:.2f}" if drafted else "–", f"{verify_ms / count:.2f}",
                       f"{1e3 * tokens / (draft_ms + verify_ms):.1f}")
    return result


class CompareProgress:
    """A progress bar of answered prompts; pass it as on_progress to compare.run."""

    def __enter__(self):
        self._bars = Progress(TextColumn("comparing"), BarColumn(),
                              TextColumn("{task.completed:.0f} of {task.total:.0f} prompts"),
                              TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True),
                              speed_estimate_period=SPEED_PERIOD)
        self._task = None
        self._bars.start()
        return self

    def __exit__(self, *exception):
        self._bars.stop()

    def __call__(self, done, total):
        if self._task is None:
            self._task = self._bars.add_task("", total=total, completed=done)
        self._bars.update(self._task, completed=done)
