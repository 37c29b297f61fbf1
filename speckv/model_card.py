"""The README of a drafter's folder: what it is for, how good it is, how to make it again. All of it from its card."""

import json
import shlex
from pathlib import Path

from speckv.corpus import ANSWER_TEMPERATURE, GREEDY_SHARE
from speckv.drafter_folder import CARD_FILE
from speckv.files import atomic_file

README_FILE = "README.md"
KINDS = {"head": "a feature head, which continues the target's own hidden states",
         "pruned": "the target's first layers, with its own embedding and output head"}


def write(folder: Path) -> None:
    """Write the README beside the card of a drafter's folder."""
    text = render(json.loads((Path(folder) / CARD_FILE).read_text()))
    with atomic_file(Path(folder) / README_FILE) as temporary:
        temporary.write_text(text, encoding="utf-8")


def render(card: dict) -> str:
    """The README of a card."""
    target, trained, held_out = card["target"], card["trained"], card["held_out"]
    name, seconds, settings = target["name"] or target["class"], trained["seconds"], trained["settings"]
    depths = range(1, len(held_out["match_by_depth"]) + 1)
    made = [
        ("target", f"{name}: {target['class']}, hidden size {target['hidden_size']}, vocabulary "
                   f"{target['vocabulary']:,}, identity `{target['identity']}`"),
        ("kind", KINDS[card["kind"]]),
        ("layers", _num_layers(card)),
        ("size", f"{card['bytes'] / 1e6:.1f} MB"),
        ("text", f"{trained['tokens_of_text']:,} tokens, written by the target in answer to made-up questions; "
                 f"{GREEDY_SHARE:.0%} of the conversations greedily, the others at temperature {ANSWER_TEMPERATURE}"),
        ("training", f"{trained['steps']:,} steps, {trained['epochs']:.2f} epochs"
                     + (f", from the drafter with sha256 `{settings['start_from'][:12]}`"
                        if settings["start_from"] else "")),
        ("wall time", f"{seconds['text'] / 3600:.2f} h for the text, {seconds['training'] / 3600:.2f} h of training"),
        ("machine", f"{trained['device']}, threads: {trained['threads']}, target held in {trained['dtype']}"),
    ]
    return "\n".join([
        f"# A drafter for {name}", "",
        "It proposes tokens that the target checks in one pass (speculative decoding with speckv); the text stays the "
        "target's own.", "",
        "```python", "import speckv", "",
        f"target, tokenizer = speckv.load_target({json.dumps(target['name'] or '…')})",
        'drafter = speckv.load_drafter("path/of/this/folder", target)', "```", "",
        "## How good it is", "",
        "On text of the target that was never trained on:", "",
        "| | " + " | ".join(str(depth) for depth in depths) + " |", "|---|" + "---|" * len(depths),
        "| token n of a draft is the target's first choice | "
        + " | ".join(f"{value:.1%}" for value in held_out["match_by_depth"]) + " |",
        "| tokens accepted of a draft of n, greedy target | "
        + " | ".join(f"{value:.2f}" for value in held_out["accepted_by_gamma"]) + " |", "",
        "`history.json` has these figures over the whole training, `training.png` draws them.", "",
        "## How it was made", "", "| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in made), "",
        "```", command(card), "```", "", *_repeatable(settings),
        "## Licence", "",
        "The weights derive from the target's: training started from a copy of its layers and followed its own "
        "probabilities. The target's licence applies to them.", ""])


def command(card: dict) -> str:
    """The command line that makes such a drafter."""
    settings = card["trained"]["settings"]
    words = ["speckv", "distill", "--target", card["target"]["name"] or "TARGET", "--output", "FOLDER",
             "--kind", settings["kind"]]
    words += ["--layers", _num_layers(card)]
    if settings["kind"] == "head":
        words += ["--depth", settings["depth"], "--head-tokens", settings["head_tokens"]]
    words += ["--tokens", settings["corpus"]["tokens"], "--seed", settings["corpus"]["seed"]]
    words += ["--learning-rate", settings["learning_rate"]]
    words += ["--hours", settings["hours"]] if settings["hours"] else ["--epochs", settings["epochs"]]
    words += ["--start-from", "DRAFTER"] if settings["start_from"] else []
    return shlex.join(str(word) for word in words)


def _num_layers(card):
    return card.get("num_layers", 1)  # a head's card of before does not say: there was only one


def _repeatable(settings):
    if settings["hours"]:
        lines = ["A run by time ends with other weights each time: how much it gets done depends on the machine."]
    else:
        lines = ["On the same machine, with as many threads and the same packages, this gives the same weights."]
    hidden = {key: settings[key] for key in ("batch_rows", "loss_positions", "warmup_steps", "evaluate_every")}
    hidden |= {f"corpus.{key}": settings["corpus"][key] for key in ("rows", "length")}
    return lines + ["Settings that the command has no option for: "
                    + ", ".join(f"{key} {value}" for key, value in hidden.items()) + ".", ""]
