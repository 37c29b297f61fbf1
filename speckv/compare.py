"""Answer the same prompts under every policy at every compression, in one run, and say which is faster.

Policies take turns on each prompt, in an order that moves on from prompt to prompt, so that a drift of the machine
meets all alike. Each policy is one object a compression and keeps what it learns from prompt to prompt. Every text is
checked against plain decoding. A run that is interrupted goes on where it stopped; its policies learn anew from there.
"""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from speckv.compression import COMPRESSIONS
from speckv.decode import generate
from speckv.differences import NEAR_TIE, first_difference
from speckv.errors import InputError
from speckv.evaluate import PLAIN, RESAMPLES, Answer, best_fixed, compare, figures, oracle_rate, rate, ratios, select
from speckv.files import check_writable, locked, write_json
from speckv.policies import parse_policy

SETTINGS_FILE, RESULT_FILE, PARTS_FOLDER = "settings.json", "compare.json", "parts"
WARM_UP_TOKENS = 8
TABLE_WIDTH = 170
OURS = "adaptive"
REFERENCE = "fixed:4"  # the paper's baseline
BEST_OF_EACH, BEST_OF_ALL = "best fixed in hindsight", "best single fixed in hindsight"
EXACT = "fp32"  # where rounding may not change a text


@dataclass(frozen=True)
class CompareSettings:
    """What is compared, and on how much. Raises InputError for a policy or compression that is not known."""

    target: str
    draft: str
    policies: tuple
    compressions: tuple
    max_new_tokens: int = 128
    temperature: float = 0.0
    threads: int = 1
    fast: bool = False

    def __post_init__(self):
        for name in self.policies:
            parse_policy(name)
        for name in self.compressions:  # now, not when its turn comes after hours
            if name not in COMPRESSIONS:
                raise InputError(f"unknown compression {name!r}: choose of {', '.join(COMPRESSIONS)}")
        for kind, names in (("policies", self.policies), ("compressions", self.compressions)):
            if len(set(names)) < len(names):
                raise InputError(f"the {kind} are {', '.join(names)}: name each of them once")
        if PLAIN not in self.policies:
            raise InputError(f"the policies are {', '.join(self.policies)}: '{PLAIN}' must be among them, "
                             "everything is measured against it")


def run(load: Callable, prompts: dict, settings: CompareSettings, folder: Path, on_progress=lambda done, total: None):
    """Answer what is not yet answered in `folder`, and return all Answers.

    load(compression) gives (target, drafter, encode), the last of which makes token ids [1, n] of a prompt; prompts is
    {task: [text]}. Raises InputError where the folder holds a run with other settings.
    """
    folder = Path(folder)
    check_writable(folder)
    identity = json.loads(json.dumps(asdict(settings) | {"prompts": {t: list(p) for t, p in prompts.items()}}))
    work = [(rank, task) for rank in range(max(map(len, prompts.values()), default=0))
            for task in prompts if rank < len(prompts[task])]
    if not work:
        raise InputError("there are no prompts to answer: skip fewer, or give a file with more")
    with locked(folder, "comparing", wait=False):
        _check_settings(folder / SETTINGS_FILE, identity)
        answers, total, bench = [], len(work) * len(settings.compressions), None
        for compression in settings.compressions:
            files = {cell: folder / PARTS_FOLDER / f"{compression}-{cell[1]}-{cell[0]}.json" for cell in work}
            missing = [cell for cell in work if not files[cell].exists()]
            bench = None  # or two targets would be in memory at once
            if missing:
                bench = _Bench(load, compression, settings)
            for number, (rank, task) in enumerate(work):
                file = files[rank, task]
                if not file.exists():
                    write_json(file, bench.answer(prompts[task][rank], number, rank, task))
                answers += [Answer(**stored) for stored in json.loads(file.read_text())]
                on_progress(len(answers) // len(settings.policies), total)
        return answers


def _check_settings(file, identity):
    if file.exists():
        stored = json.loads(file.read_text())
        changed = [name for name in identity if stored.get(name) != identity[name]]
        if changed:
            raise InputError(f"{file.parent} holds a comparison with other {', '.join(changed)}: choose another folder")
    write_json(file, identity)


class _Bench:
    """The models of one compression, and the policies with what they have learned of it."""

    def __init__(self, load, compression, settings):
        self._compression, self._settings = compression, settings
        self._target, self._drafter, self._encode = load(compression)
        self._policies = {name: parse_policy(name) for name in settings.policies}
        for policy in self._policies.values():
            self._generate(policy, self._encode("Hello"), WARM_UP_TOKENS)

    def _generate(self, policy, ids, tokens):
        # With a head that reads the target's hidden states, plain decoding would be slower than it is.
        drafter = None if policy.name == PLAIN else self._drafter
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return generate(self._target, drafter, ids, max_new_tokens=tokens, policy=policy,
                            temperature=self._settings.temperature, fast=self._settings.fast)

    def answer(self, prompt, number, rank, task):
        """The answers of all policies, as JSON."""
        ids = self._encode(prompt).to(self._target.device)
        names = list(self._settings.policies)
        start = number % len(names)
        outputs = {name: self._generate(self._policies[name], ids, self._settings.max_new_tokens)
                   for name in names[start:] + names[:start]}
        differences = dict.fromkeys(names)
        if self._settings.temperature == 0:
            differences |= {name: first_difference(self._target, outputs[PLAIN], output)
                            for name, output in outputs.items()}
        return [asdict(Answer(
            self._compression, task, rank, name, outputs[name].new_tokens, outputs[name].seconds,
            outputs[name].prefill_seconds,
            [[s.gamma, s.accepted, s.tokens, s.draft_ms, s.verify_ms, s.predicted] for s in outputs[name].steps],
            differences[name])) for name in names]


def summarize(answers, settings: CompareSettings) -> dict:
    """Everything that is told of the answers, as plain numbers, and the answers but for the times of their steps."""
    result = {"settings": asdict(settings), "compressions": {}, "tests": {}, "lowest_cell": {},
              "best_single_fixed": best_fixed(answers)}
    rivals = {}
    for compression in settings.compressions:
        here = select(answers, compression=compression)
        rivals[compression] = best_fixed(here)
        plain, oracle = rate(select(here, policy=PLAIN)), oracle_rate(here)
        rows = {}
        for name in settings.policies:
            own = select(here, policy=name)
            row = figures(own)
            row["ratio"] = ratios(own, select(here, policy=PLAIN))
            row["tasks"] = {task: figures(select(own, task=task)) for task in dict.fromkeys(a.task for a in own)}
            row["gamma_by_task"] = {task: one["mean_gamma"] for task, one in row["tasks"].items()}
            row["ratio_to"] = {rival: ratios(own, select(here, policy=rival))
                               for rival in (rivals[compression], REFERENCE) if rival in settings.policies}
            # Where knowing the outcome gains nothing there is no distance to cover.
            row["share_of_oracle"] = (rate(own) - plain) / (oracle - plain) if oracle and oracle > plain else None
            gaps = [a.difference[1] for a in own if a.difference]
            row["texts_that_part"] = {"at_near_ties": sum(gap <= NEAR_TIE for gap in gaps),
                                      "elsewhere": sum(gap > NEAR_TIE for gap in gaps),
                                      "largest_gap": max(gaps, default=0)}
            rows[name] = row
        result["compressions"][compression] = {
            "plain_tokens_per_second": plain, "oracle_ratio": oracle / plain if oracle else None,
            "best_fixed": rivals[compression], "policies": rows, "tests": {}}
    if OURS in settings.policies:
        against = {name: dict.fromkeys(settings.compressions, name) for name in settings.policies if name != OURS}
        if all(rivals.values()):
            against = {BEST_OF_EACH: rivals,
                       BEST_OF_ALL: dict.fromkeys(settings.compressions, result["best_single_fixed"])} | against
        for name, rival in against.items():
            result["tests"][name] = asdict(compare(answers, OURS, rival))
            for compression, one in result["compressions"].items():
                one["tests"][name] = asdict(compare(answers, OURS, {compression: rival[compression]}))
    for name in settings.policies:
        cells = {f"{compression} {task}": ratio for compression, one in result["compressions"].items()
                 for task, ratio in one["policies"][name]["ratio"].items() if task != "all"}
        worst = min(cells, key=cells.get)
        result["lowest_cell"][name] = [worst, cells[worst]]
    result["answers"] = [_in_short(answer) for answer in answers]
    return result


def _in_short(answer):
    """An answer as it is kept beside the figures; the times of its steps are in the parts."""
    short = asdict(answer)
    steps = short.pop("steps")
    return short | {"steps": len(steps), "drafted": sum(step[0] for step in steps),
                    "accepted": sum(step[1] for step in steps), "draft_ms": sum(step[3] for step in steps),
                    "verify_ms": sum(step[4] for step in steps),
                    "steps_by_gamma": dict(sorted(Counter(step[0] for step in steps).items()))}


def report(result: dict, console: Console | None = None) -> None:
    """Print the tables."""
    console = console or Console(highlight=False)
    console.width = max(console.width, TABLE_WIDTH)
    for compression, one in result["compressions"].items():
        table = Table(title=f"{compression}: plain decoding {one['plain_tokens_per_second']:.1f} tokens/s, the rest in "
                            "multiples of it")
        tasks = list(next(iter(one["policies"].values()))["ratio"])
        for column in ("policy", "tok/s", *tasks, "tokens/step", "mean γ", "accepted", "of the oracle",
                       f"{OURS} over it", "texts that part"):
            table.add_column(column, justify="left" if column == "policy" else "right", no_wrap=True)
        for name, row in one["policies"].items():
            test = one["tests"].get(name)
            table.add_row(
                name, f"{row['tokens_per_second']:.1f}", *(f"{row['ratio'][task]:.2f}" for task in tasks),
                f"{row['tokens_per_step']:.2f}", f"{row['mean_gamma']:.2f}", f"{row['acceptance_rate']:.0%}",
                "–" if row["share_of_oracle"] is None else f"{row['share_of_oracle']:.0%}",
                "–" if test is None else f"{test['ratio']:.2f}" + _interval(test, " ({:.2f}–{:.2f})"),
                _parting(compression, row["texts_that_part"]),
                style="bold" if name in (OURS, one["best_fixed"]) else None)
        console.print(table)
        if one["oracle_ratio"]:
            console.print(f"An oracle that knows the outcome: {one['oracle_ratio']:.2f}. Best fixed gamma in "
                          f"hindsight: {one['best_fixed']}.\n")
    if result["tests"]:
        table = Table(title="adaptive against the others, all compressions: paired bootstrap over prompts")
        for column in ("against", "ratio", "95 %", "p", "lowest cell of that policy"):
            table.add_column(column, justify="left" if column == "against" else "right")
        for name, test in result["tests"].items():
            cell = result["lowest_cell"].get(name)
            table.add_row(name, f"{test['ratio']:.3f}", _interval(test, "{:.3f}–{:.3f}"), _p_value(test["p_value"]),
                          "" if cell is None else f"{cell[1]:.2f} ({cell[0]})")
        console.print(table)
        cell = result["lowest_cell"][OURS]
        if result["best_single_fixed"]:
            console.print(f"The best single fixed gamma is {result['best_single_fixed']}.")
        console.print(f"The lowest cell of {OURS}: {cell[1]:.2f} of plain decoding ({cell[0]}).")
    console.print(f"Greedy texts 'part' where rounding of a pass over several tokens chose between the target's top "
                  f"two logits: at near-ties at most {NEAR_TIE} apart, + elsewhere. {result['settings']['threads']} "
                  f"CPU threads, {result['settings']['max_new_tokens']} tokens an answer, prompts included.")


def _interval(test, form):
    return "" if test["lower"] is None else form.format(test["lower"], test["upper"])


def _p_value(value):
    if value is None:
        return ""
    return f"{value:.4f}" if value else f"< 1/{RESAMPLES:,}"


def _parting(compression, parts):
    """How many texts part from the plain ones: at near-ties, and elsewhere with the largest gap; red where none may."""
    text = str(parts["at_near_ties"])
    if parts["elsewhere"]:
        text += f" + {parts['elsewhere']} (gap to {parts['largest_gap']:.2f})"
    return f"[bold red]{text}[/]" if compression == EXACT and text != "0" else text


def has_changed_text(result: dict) -> bool:
    """Whether an fp32 text differs from plain decoding, which no policy may cause."""
    return any(sum(row["texts_that_part"][kind] for kind in ("at_near_ties", "elsewhere"))
               for row in result["compressions"].get(EXACT, {"policies": {}})["policies"].values())

