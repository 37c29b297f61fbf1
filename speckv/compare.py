"""Answer the same prompts under every policy at every compression, in one run, and say which is faster.

Policies take turns on each prompt, in an order that moves on from prompt to prompt, so that a drift of the machine
meets all alike. Each policy is one object a compression and keeps what it learns from prompt to prompt. Every text is
checked against plain decoding. A run that is interrupted goes on where it stopped.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from speckv.decode import generate
from speckv.differences import NEAR_TIE, first_difference
from speckv.errors import InputError
from speckv.evaluate import PLAIN, Answer, best_fixed, compare, figures, oracle_rate, rate, select
from speckv.files import check_writable, locked, write_json
from speckv.policies import parse_policy

DEFAULT_POLICIES = ("off,fixed:1,fixed:2,fixed:3,fixed:4,fixed:6,fixed:8,paper,adaptive,hf-confidence,hf-heuristic,"
                    "adaedl,svip,specdec++")
SETTINGS_FILE, RESULT_FILE, PARTS_FOLDER = "settings.json", "compare.json", "parts"
WARM_UP_TOKENS = 8
TABLE_WIDTH = 130


@dataclass(frozen=True)
class CompareSettings:
    """What is compared, and on how much. Raises InputError for a policy that is not known."""

    target: str
    draft: str
    policies: tuple
    compressions: tuple
    max_new_tokens: int = 128
    temperature: float = 0.0
    threads: int = 1

    def __post_init__(self):
        for name in self.policies:
            parse_policy(name)
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
        raise InputError("there are no prompts to answer")
    with locked(folder, "comparing", wait=False):
        _check_settings(folder / SETTINGS_FILE, identity)
        answers, total = [], len(work) * len(settings.compressions)
        for compression in settings.compressions:
            files = {cell: folder / PARTS_FOLDER / f"{compression}-{cell[1]}-{cell[0]}.json" for cell in work}
            missing = [cell for cell in work if not files[cell].exists()]
            bench = _Bench(load, compression, settings) if missing else None
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
        return generate(self._target, self._drafter, ids, max_new_tokens=tokens, policy=policy,
                        temperature=self._settings.temperature, seed=0)

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
    """Everything that is told of the answers, as plain numbers."""
    result = {"settings": asdict(settings), "compressions": {}, "tests": {}, "lowest_cell": {}}
    rivals = {}
    for compression in settings.compressions:
        here = select(answers, compression=compression)
        rivals[compression] = best_fixed(here)
        plain, oracle = rate(select(here, policy=PLAIN)), oracle_rate(here)
        rows = {}
        for name in settings.policies:
            own = select(here, policy=name)
            row = figures(own)
            row["ratio"] = {task: rate(select(own, task=task)) / rate(select(here, policy=PLAIN, task=task))
                            for task in dict.fromkeys(a.task for a in own)} | {"all": rate(own) / plain}
            row["gamma_by_task"] = {task: figures(select(own, task=task))["mean_gamma"]
                                    for task in dict.fromkeys(a.task for a in own)}
            row["share_of_oracle"] = (rate(own) - plain) / (oracle - plain) if oracle else None
            gaps = [a.difference[1] for a in own if a.difference]
            row["texts_that_part"] = {"at_near_ties": sum(gap <= NEAR_TIE for gap in gaps),
                                      "elsewhere": sum(gap > NEAR_TIE for gap in gaps),
                                      "largest_gap": max(gaps, default=0)}
            rows[name] = row
        result["compressions"][compression] = {
            "plain_tokens_per_second": plain, "oracle_ratio": oracle / plain if oracle else None,
            "best_fixed": rivals[compression], "policies": rows}
    if "adaptive" in settings.policies:
        against = {"best fixed in hindsight": rivals} if all(rivals.values()) else {}
        against |= {name: dict.fromkeys(settings.compressions, name)
                    for name in settings.policies if name != "adaptive"}
        result["tests"] = {name: asdict(compare(answers, "adaptive", rival)) for name, rival in against.items()}
    for name in settings.policies:
        cells = {f"{compression} {task}": ratio for compression, one in result["compressions"].items()
                 for task, ratio in one["policies"][name]["ratio"].items() if task != "all"}
        worst = min(cells, key=cells.get)
        result["lowest_cell"][name] = [worst, cells[worst]]
    return result


def report(result: dict, console: Console | None = None) -> None:
    """Print the tables."""
    console = console or Console(highlight=False)
    console.width = max(console.width, TABLE_WIDTH)
    for compression, one in result["compressions"].items():
        table = Table(title=f"{compression}: plain decoding {one['plain_tokens_per_second']:.1f} tokens/s, the rest in "
                            "multiples of it")
        tasks = list(next(iter(one["policies"].values()))["ratio"])
        for column in ("policy", *tasks, "tokens/step", "mean γ", "accepted", "of the oracle", "texts that part"):
            table.add_column(column, justify="left" if column == "policy" else "right")
        for name, row in one["policies"].items():
            parts = row["texts_that_part"]
            table.add_row(
                name, *(f"{row['ratio'][task]:.2f}" for task in tasks), f"{row['tokens_per_step']:.2f}",
                f"{row['mean_gamma']:.2f}", f"{row['acceptance_rate']:.0%}",
                "–" if row["share_of_oracle"] is None else f"{row['share_of_oracle']:.0%}",
                f"{parts['at_near_ties']}" + (f" + {parts['elsewhere']} (gap to {parts['largest_gap']:.2f})"
                                              if parts["elsewhere"] else ""),
                style="bold" if name in ("adaptive", one["best_fixed"]) else None)
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
            table.add_row(name, f"{test['ratio']:.3f}", f"{test['lower']:.3f}–{test['upper']:.3f}",
                          f"{test['p_value']:.4f}", "" if cell is None else f"{cell[1]:.2f} ({cell[0]})")
        console.print(table)
        cell = result["lowest_cell"]["adaptive"]
        console.print(f"The lowest cell of adaptive: {cell[1]:.2f} of plain decoding ({cell[0]}).")
    console.print(f"Greedy texts 'part' where rounding of a pass over several tokens chose between the target's top "
                  f"two logits: at near-ties at most {NEAR_TIE} apart, + elsewhere. {result['settings']['threads']} "
                  f"CPU threads, {result['settings']['max_new_tokens']} tokens an answer, prompts included.")


def has_changed_text(result: dict) -> bool:
    """Whether an fp32 text differs from plain decoding, which no policy may cause."""
    return any(sum(row["texts_that_part"][kind] for kind in ("at_near_ties", "elsewhere"))
               for row in result["compressions"].get("fp32", {"policies": {}})["policies"].values())

