"""The speckv command: thin; every command's work is done elsewhere."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch

try:
    import typer
except ImportError:
    sys.exit("speckv: the command line needs packages of its own: pip install 'speckv[cli]'")

from speckv.errors import SpecKVError
from speckv.models import COMPRESSIONS, EMBEDDED
from speckv.policy import POLICIES

app = typer.Typer(
    help="Speculative decoding for quantized language models. Start with 'speckv demo'.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")

Target = Annotated[str, typer.Option(
    help=f"Target model: '{EMBEDDED}' (embedded), a folder, or a Hugging Face name.")]
Draft = Annotated[str, typer.Option(
    help=f"Drafter: '{EMBEDDED}' (shipped, for the embedded target), a folder made by 'speckv distill', any causal "
         "language model with the target's tokenizer, 'lookup' (copies from the text so far, needs no model), or "
         "'lookup+' and one of these.")]
Compression = Annotated[str, typer.Option(help=f"How the target is held: {', '.join(COMPRESSIONS)}.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; PyTorch's choice if not given.")]


@app.command()
def generate(
    prompt: Annotated[str, typer.Option(help="What to ask. '-' reads standard input.")],
    target: Target = EMBEDDED,
    draft: Draft = EMBEDDED,
    compression: Compression = "bf16",
    policy: Annotated[str, typer.Option(help=f"How many tokens to draft: {POLICIES}.")] = "fixed:4",
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Makes a sampled text repeatable.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Stop after this many tokens.")] = 128,
    raw: Annotated[bool, typer.Option("--raw", help="Give the prompt as it is, without the chat template.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of streaming.")] = False,
    threads: Threads = None,
):
    """Write an answer to a prompt, streamed; accepted draft tokens are green.

    Example: speckv generate --prompt "Write a haiku about rain." --compression nf4 --policy fixed:2
    """
    from speckv import generate as decode
    from speckv import load_drafter, load_target
    from speckv.policy import parse_policy
    from speckv.terminal import TokenPrinter, encode_prompt

    _set_threads(threads)
    chosen = parse_policy(policy)
    model, tokenizer = load_target(target, compression)
    drafter = load_drafter(draft, model) if chosen.max_draft() > 0 else None
    prompt_ids = encode_prompt(tokenizer, sys.stdin.read() if prompt == "-" else prompt, raw).to(model.device)
    printer = None if as_json else TokenPrinter(tokenizer)
    output = decode(model, drafter, prompt_ids, max_new_tokens=max_new_tokens, policy=chosen, temperature=temperature,
                    seed=seed, on_step=printer)
    new_ids = output.sequences[0, output.prompt_length:]
    figures = {"tokens": output.new_tokens, "steps": len(output.steps),
               "tokens_per_second": round(output.tokens_per_second, 2),
               "tokens_per_step": round(output.tokens_per_step, 3),
               "acceptance_rate": round(output.acceptance_rate, 4), "compression": compression, "policy": chosen.name}
    if as_json:
        print(json.dumps({"text": tokenizer.decode(new_ids, skip_special_tokens=True)} | figures))
    else:
        printer.finish()
        print(f"{figures['tokens']} tokens in {figures['steps']} steps, {figures['tokens_per_second']} tokens/s, "
              f"{figures['acceptance_rate']:.0%} of draft tokens accepted", file=sys.stderr)


@app.command()
def demo(
    target: Target = EMBEDDED,
    draft: Draft = EMBEDDED,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens an answer.")] = 64,
    policy: Annotated[str, typer.Option(help=f"What to compare with plain decoding: {POLICIES}.")] = "fixed:4",
    compressions: Annotated[str, typer.Option(help="Which levels, comma-separated.")] = "bf16,int8,nf4",
    threads: Threads = None,
):
    """Four prompts at three compression levels, plain and with speculation, and a table of what it gained."""
    from speckv.demo import run

    _set_threads(threads)
    run(target, draft, [name.strip() for name in compressions.split(",")], policy, max_new_tokens)


@app.command()
def distill(
    output: Annotated[Path, typer.Option(help="Folder for the drafter; the best so far is always there.")],
    target: Target = EMBEDDED,
    kind: Annotated[str, typer.Option(
        help="'head': one layer that continues the target's hidden states, the cheapest drafter; 'lm': the target's "
             "first layers, a language model of its own.")] = "head",
    layers: Annotated[int, typer.Option(min=1, help="How many layers an 'lm' drafter keeps.")] = 2,
    tokens: Annotated[int, typer.Option(min=1, help="How much text the target writes to train on.")] = 400_000,
    epochs: Annotated[float, typer.Option(help="How often the text is trained on.")] = 10.0,
    work: Annotated[Path | None, typer.Option(
        help="Folder for text and checkpoints (about 1.2 kB a token for a small model); in the cache if not given.")
    ] = None,
    threads: Threads = None,
):
    """Make a drafter for a target: it writes its own training text, and the drafter learns to write it too.

    Interrupt it at any time; the same command goes on where it stopped. Example:

    speckv distill --target smollm2 --output my-drafter && speckv generate --draft my-drafter --prompt "Hello"
    """
    from speckv import load_target
    from speckv.cache import context_limit
    from speckv.corpus import CorpusSettings
    from speckv.distill import DistillSettings
    from speckv.distill import distill as train
    from speckv.files import cache_folder
    from speckv.terminal import DistillProgress

    _set_threads(threads)
    model, tokenizer = load_target(target, "bf16")
    corpus = CorpusSettings(tokens=tokens)
    corpus = replace(corpus, length=min(corpus.length, context_limit(model) or corpus.length))
    settings = DistillSettings(kind=kind, num_layers=layers, corpus=corpus, epochs=epochs)
    work = work or cache_folder() / "distill" / target.replace("/", "--")
    try:
        with DistillProgress() as progress:
            best = train(model, tokenizer, output, work, settings, target, progress)
    except KeyboardInterrupt:
        print(f"stopped; what is done lies in {work}, and the same command goes on from there", file=sys.stderr)
        raise typer.Exit(130) from None
    print(f"{output}: held-out greedy match {best['match']:.3f}, {best['accepted_at_4']:.2f} tokens accepted of 4")


@app.command()
def doctor():
    """Versions, devices, and which backend serves each op and why."""
    from speckv.doctor import report

    report()


def _set_threads(threads):
    if threads is not None:
        torch.set_num_threads(threads)


def main():
    """Entry point: errors that speckv raises on purpose end in one line and exit status 2."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # its bars for loading weights would run through the streamed text
    try:
        app()
    except (SpecKVError, OSError) as error:
        print(f"speckv: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
