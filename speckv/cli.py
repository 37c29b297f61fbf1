"""The speckv command: thin; every command's work is done elsewhere."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

try:
    import typer
    from rich.console import Console
except ImportError:
    sys.exit("speckv: the command line needs packages of its own: pip install 'speckv[cli]'")

from speckv.compression import COMPRESSIONS
from speckv.errors import InputError, SpecKVError
from speckv.names import DEFAULT_DRAFT, DEFAULT_POLICIES, EMBEDDED, POLICIES

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
TOKENS, MOST_TOKENS, EPOCHS = 400_000, 4_000_000, 10.0  # of a distillation; the second with --hours
Fast = Annotated[bool, typer.Option(
    "--fast", help="Read the target with speckv's own CPU kernels, several times as fast: Llama, Mistral, Qwen 2 and 3 "
                   "in fp32, bf16, int8 or nf4. Others are read by PyTorch, with a warning.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; PyTorch's choice if not given.")]


@app.command()
def generate(
    prompt: Annotated[str, typer.Option(help="What to ask. '-' reads standard input.")],
    target: Target = EMBEDDED,
    draft: Draft = DEFAULT_DRAFT,
    compression: Compression = "bf16",
    policy: Annotated[str, typer.Option(help=f"How many tokens to draft: {POLICIES}.")] = "adaptive",
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Sample from the k most probable tokens only; 0 is off.")] = 0,
    top_p: Annotated[float, typer.Option(
        help="Sample from the fewest tokens that hold this share of the probability; 1 is off.")] = 1.0,
    min_p: Annotated[float, typer.Option(
        help="Sample from tokens with at least this share of the highest probability; 0 is off.")] = 0.0,
    seed: Annotated[int | None, typer.Option(
        help="Makes a sampled text repeatable, whatever drafts; without it, more of a draft is accepted.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Stop after this many tokens.")] = 128,
    raw: Annotated[bool, typer.Option("--raw", help="Give the prompt as it is, without the chat template.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of streaming.")] = False,
    fast: Fast = False,
    threads: Threads = None,
):
    """Write an answer to a prompt, streamed; accepted draft tokens are green.

    Example: speckv generate --prompt "Write a haiku about rain." --compression nf4
    """
    from speckv import generate as decode
    from speckv import load_drafter, load_target
    from speckv.policies import parse_policy
    from speckv.terminal import TokenPrinter, encode_prompt

    _begin(threads)
    chosen = parse_policy(policy)
    model, tokenizer = load_target(target, compression)
    drafter = load_drafter(draft, model) if chosen.name != "off" else None
    prompt_ids = encode_prompt(tokenizer, sys.stdin.read() if prompt == "-" else prompt, raw).to(model.device)
    printer = None if as_json else TokenPrinter(tokenizer)
    output = decode(model, drafter, prompt_ids, max_new_tokens=max_new_tokens, policy=chosen, temperature=temperature,
                    seed=seed, on_step=printer, top_k=top_k, top_p=top_p, min_p=min_p, fast=fast)
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


def _names(text):
    return [name.strip() for name in text.split(",")]


def _numbers(option, text):
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise InputError(f"--{option} is {text!r}: give whole numbers with commas between, such as 2,4") from None


@app.command()
def demo(
    target: Target = EMBEDDED,
    draft: Draft = DEFAULT_DRAFT,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens an answer.")] = 48,
    policy: Annotated[str, typer.Option(
        help=f"What to compare with plain decoding, one or more with commas between: {POLICIES}.")
    ] = "adaptive,fixed:1,fixed:2,fixed:4",
    compressions: Annotated[str, typer.Option(help="Which levels, comma-separated.")] = "bf16,int8,nf4",
    fast: Fast = False,
    threads: Threads = None,
):
    """Four prompts at three compression levels, plain and with speculation, and a table of what it gained."""
    from speckv.demo import run

    _begin(threads)
    run(target, draft, _names(compressions), _names(policy), max_new_tokens, fast)


@app.command()
def distill(
    output: Annotated[Path | None, typer.Option(
        help="Folder for the drafter; the best so far is always there, with a README of what it is and how good. "
             "Needed unless --write-only.")] = None,
    target: Target = EMBEDDED,
    kind: Annotated[str, typer.Option(
        help="'head': one layer or a few that continue the target's hidden states, the cheapest drafter; 'lm': the "
             "target's first layers, a language model of its own.")] = "head",
    layers: Annotated[int | None, typer.Option(
        min=1, show_default=False, help="How many layers the drafter has: if not given, 1 for a head, 2 for an 'lm'. "
                                        "A draft token takes longer with more.")] = None,
    depth: Annotated[int, typer.Option(
        min=1, help="How many of its own tokens deep a head is trained: in the second half of the training, or with "
                    "--start-from from its beginning. Deeper makes long drafts better; a step then takes that many "
                    "times as long.")] = 3,
    head_tokens: Annotated[int, typer.Option(
        min=1, help="How many different tokens a head can draft: those that the target writes most. A draft token "
                    "takes longer with more. A head with more that training starts from is cut.")] = 8_192,
    tokens: Annotated[int | None, typer.Option(
        min=1, show_default=False, help="How much text the target writes to train on: 400,000 if not given; with "
                                        "--hours, the most it may write, 4,000,000 if not given.")] = None,
    epochs: Annotated[float | None, typer.Option(
        show_default=False, help="How often the text is trained on; 10 if not given. More text teaches more than more "
                                 "epochs.")] = None,
    learning_rate: Annotated[float, typer.Option(
        help="Of AdamW, at its highest, after a short warm-up; it falls to a twentieth. Less suits a drafter that is "
             "trained further.")] = 1e-3,
    hours: Annotated[float | None, typer.Option(
        help="Finish in about so many hours, all sittings together, whatever this machine can do in them: 40 % of the "
             "time writes text, at least one shard of it (65,536 tokens), the rest trains. In place of --epochs.")
    ] = None,
    start_from: Annotated[str | None, typer.Option(
        help=f"Train this drafter further, of the same kind: a folder made by 'speckv distill', or '{EMBEDDED}' for "
             "the shipped one. The outcome is never worse on held-out text than what it starts from. A head with fewer "
             "--layers than asked for is given more.")] = None,
    resume: Annotated[bool, typer.Option(
        help="Go on where the last run in the work folder stopped; --no-resume trains anew on the text that is there.")
    ] = True,
    write_only: Annotated[bool, typer.Option(
        "--write-only", help="Only write text that is missing, then stop. Several processes may do this at once in one "
                             "work folder, also beside one that distills.")] = False,
    work: Annotated[Path | None, typer.Option(
        help=f"Folder for text and checkpoints; in the cache if not given. A token of text takes 2 bytes times the "
             f"target's hidden size times 4: 4.6 kB for '{EMBEDDED}', 1.9 GB for 400,000.")] = None,
    seed: Annotated[int, typer.Option(
        help="Which text is written: to train a drafter further on text that it has not seen, choose another seed and "
             "another --work.")] = 0,
    threads: Threads = None,
):
    """Make a drafter for a target: it writes its own training text, and the drafter learns to write it too.

    Interrupt it at any time; the same command goes on where it stopped. On a CPU the target is held in fp32 where
    that is faster than bf16; the drafter serves every compression. Examples:

    speckv distill --target smollm2 --output my-drafter && speckv generate --draft my-drafter --prompt "Hello"

    speckv distill --target smollm2 --output my-drafter --hours 8 --start-from smollm2
    """
    from speckv import load_target
    from speckv.cache import context_limit
    from speckv.corpus import CorpusSettings
    from speckv.distill import DistillSettings
    from speckv.distill import distill as train
    from speckv.distill import write_only as write
    from speckv.files import cache_folder
    from speckv.memory import keep_freed_memory
    from speckv.models import default_device, faster_dtype
    from speckv.terminal import DistillProgress, held_out_table
    from speckv.training_plot import INSTALL, can_draw

    if output is None and not write_only:
        raise InputError("no folder for the drafter: say --output FOLDER")
    if hours is not None and epochs is not None:
        raise InputError("--hours and --epochs both say when training ends: give one of them")
    keep_freed_memory()
    _begin(threads)
    corpus = CorpusSettings(tokens=tokens or (TOKENS if hours is None else MOST_TOKENS), seed=seed)
    settings = DistillSettings(kind=kind, num_layers=layers, depth=depth, head_tokens=head_tokens,
                               epochs=EPOCHS if epochs is None else epochs, hours=hours, corpus=corpus,
                               learning_rate=learning_rate)
    model, tokenizer = load_target(target, faster_dtype(default_device()))
    corpus = replace(corpus, length=min(corpus.length, context_limit(model) or corpus.length))
    settings = replace(settings, corpus=corpus)
    work = work or cache_folder() / "distill" / target.replace("/", "--")
    try:
        with DistillProgress() as progress:
            if write_only:
                missing = write(model, tokenizer, work, settings, progress)
            else:
                best = train(model, tokenizer, output, work, settings, target, progress, start_from, resume)
    except KeyboardInterrupt:
        print(f"stopped; what is done lies in {work}, and the same command goes on from there", file=sys.stderr)
        raise typer.Exit(130) from None
    if write_only:
        print(f"{work}: " + (f"shards of text left, or being written by other processes: {missing}" if missing
                             else "all text is written"))
        return
    Console(highlight=False).print(held_out_table(best))
    print(f"{output}: held-out greedy match {best['match']:.3f}, {best['accepted_at_4']:.2f} tokens accepted of 4")
    if not can_draw():
        print(f"no plot of the training without matplotlib: {INSTALL}, and the same command draws it", file=sys.stderr)


@app.command()
def profile(
    output: Annotated[Path, typer.Option(help="Folder for the records, in Parquet files.")],
    target: Target = EMBEDDED,
    draft: Draft = DEFAULT_DRAFT,
    prompts: Annotated[Path | None, typer.Option(
        help="Prompts, a JSON object a line as in Spec-Bench: {\"category\": \"coding\", \"turns\": [\"...\"]}. If not "
             "given, prompts that come with speckv.")] = None,
    per_task: Annotated[int, typer.Option(
        min=1, help="How many prompts of each task at most: code, math, chat and summarization.")] = 10,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens a text.")] = 128,
    gammas: Annotated[str, typer.Option(help="How many tokens to draft a step, comma-separated; 0 is plain decoding.")
                      ] = "2,4,6,8",
    compressions: Annotated[str, typer.Option(help="Which levels, comma-separated.")] = "bf16,int8,nf4",
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Which texts are drawn, with a temperature.")] = 0,
    csv: Annotated[Path | None, typer.Option(
        help="Also write the step records to this file, in the columns of the paper's own (arXiv 2605.02888).")] = None,
    fast: Fast = False,
    threads: Threads = None,
):
    """Write texts at every compression and gamma, and record each step and draft token: signals, outcome, time.

    The records say what drafting gains and costs on this machine, and are what a predictor of acceptance learns from.
    Interrupt it at any time; the same command goes on where it stopped. Needs pyarrow: pip install
    'speckv\\[records]'. Example:

    speckv profile --output records --per-task 5 --csv steps.csv
    """
    from speckv import load_drafter, load_target
    from speckv.files import check_writable
    from speckv.profile import ProfileSettings, drafter_hash
    from speckv.profile import profile as record
    from speckv.prompts import PROMPTS, read_prompts
    from speckv.record_files import write_csv
    from speckv.terminal import PROFILE_WIDTH, ProfileProgress, encode_prompt, profile_table

    def load(compression):
        model, tokenizer = load_target(target, compression)
        return model, load_drafter(draft, model), lambda prompt: encode_prompt(tokenizer, prompt)

    _begin(threads)
    chosen = {task: texts[:per_task] for task, texts in (read_prompts(prompts) if prompts else PROMPTS).items()}
    settings = ProfileSettings(target, draft, drafter_hash(draft), _numbers("gammas", gammas),
                               tuple(_names(compressions)), max_new_tokens, temperature, seed, fast)
    if csv is not None:
        check_writable(csv.parent)  # now, rather than when all texts are written
    try:
        with ProfileProgress() as progress:
            records = record(load, chosen, settings, output, progress)
    except KeyboardInterrupt:
        print(f"stopped; the records so far lie in {output}, and the same command goes on from there", file=sys.stderr)
        raise typer.Exit(130) from None
    if csv is not None:
        write_csv(records.steps, csv)
    console = Console(highlight=False)
    console.width = max(console.width, PROFILE_WIDTH)  # folded to 80 columns, as in a log, it cannot be read
    console.print(profile_table(records.steps))
    print(f"{output}: {records.steps.num_rows:,} steps, {records.tokens.num_rows:,} draft tokens")


@app.command()
def train(
    records: Annotated[Path, typer.Option(help="Folder of records that 'speckv profile' wrote.")],
    output: Annotated[Path, typer.Option(help="FILE.safetensors, or FILE.npz in the layout the paper releases.")],
    kind: Annotated[str, typer.Option(
        help="'adaptive': for the policy of that name; 'paper': the paper's MLP on the step before, which needs "
             "scikit-learn.")] = "adaptive",
):
    """Make a controller of records, judged on texts it was not fitted on.

    Use it in Python: speckv.adaptive.Adaptive(speckv.controller.load_controller(FILE)). Example:

    speckv profile --output records && speckv train --records records --output controller.safetensors
    """
    from speckv.controller import check_name, save_controller
    from speckv.profile import read_records
    from speckv.train import train as fit

    check_name(output)
    trained = fit(read_records(records), kind)
    save_controller(trained.controller, output)
    print(f"{output}: " + ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in trained.figures.items()))


@app.command()
def compare(
    output: Annotated[Path, typer.Option(help="Folder for answers, tables and plots; a run there is gone on with.")],
    target: Target = EMBEDDED,
    draft: Draft = DEFAULT_DRAFT,
    policies: Annotated[str, typer.Option(help=f"With commas between: {POLICIES}; 'off' must be among them."
                                          )] = DEFAULT_POLICIES,
    compressions: Annotated[str, typer.Option(help="Which levels, comma-separated.")] = "bf16,int8,nf4",
    prompts: Annotated[Path | None, typer.Option(
        help="Prompts, a JSON object a line as in Spec-Bench: {\"category\": \"coding\", \"turns\": [\"...\"]}. If not "
             "given, prompts that come with speckv.")] = None,
    per_task: Annotated[int, typer.Option(min=1, help="How many prompts of each task at most.")] = 3,
    skip: Annotated[int, typer.Option(min=0, help="Leave out the first so many of each task, such as those a "
                                                  "controller was trained on.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens an answer.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy; else texts are not compared.")] = 0.0,
    fast: Fast = False,
    threads: Threads = None,
):
    """Which policy is fastest here: every policy on the same prompts in one run, with intervals, tables and plots.

    Interrupt it at any time; the same command goes on where it stopped. Ends with status 1 where an fp32 text differs
    from plain decoding. Example:

    speckv compare --output comparison --policies off,fixed:2,fixed:4,adaptive --compressions bf16,nf4
    """
    from speckv import compare_plots, load_drafter, load_target
    from speckv.compare import CompareSettings, has_changed_text, report, run, summarize
    from speckv.files import write_json
    from speckv.prompts import PROMPTS, read_prompts
    from speckv.terminal import CompareProgress, encode_prompt

    settings = CompareSettings(target, draft, tuple(_names(policies)), tuple(_names(compressions)), max_new_tokens,
                               temperature, _begin(threads), fast)
    chosen = {task: list(texts)[skip:skip + per_task]
              for task, texts in (read_prompts(prompts) if prompts else PROMPTS).items()}

    def load(compression):
        model, tokenizer = load_target(target, compression)
        return model, load_drafter(draft, model), lambda text: encode_prompt(tokenizer, text)
    try:
        with CompareProgress() as progress:
            answers = run(load, chosen, settings, output, progress)
    except KeyboardInterrupt:
        print(f"stopped; the answers so far lie in {output}, and the same command goes on from there", file=sys.stderr)
        raise typer.Exit(130) from None
    result = summarize(answers, settings)
    write_json(output / "compare.json", result)
    report(result)
    plots = compare_plots.draw(result, answers, output)
    print(f"{output}: compare.json" + "".join(f", {name}" for name in plots))
    if left_out := compare_plots.left_out(plots):
        print(left_out, file=sys.stderr)
    if has_changed_text(result):
        Console(stderr=True).print("speckv: a text in fp32 differs from plain decoding: that is a defect", style="red")
        raise typer.Exit(1)


@app.command()
def paper(
    data: Annotated[Path, typer.Option(
        help="Folder with the results released with the paper: phase2_step_results.csv (a row a step), "
             "phase2_experiment_results.csv (a row a text), and its published tables, paper_*.csv and "
             "paper_numbers.json.")],
    as_json: Annotated[bool, typer.Option(
        "--json", help="Print one JSON object: 'recomputed', 'published' and 'honest'.")] = False,
    save: Annotated[Path | None, typer.Option(
        help="Keep the retrained controller: FILE.safetensors, or FILE.npz in the layout the paper releases.")] = None,
):
    """Recompute the SpecKV paper (arXiv 2605.02888) from its own step records, then score its policies honestly.

    Its controller is trained again on its own split, and its tables are printed with the published figures beside them:
    tokens per step as the predictor promises them. Then the same policies by what was really logged: tokens per step,
    milliseconds per step at each compression, and so tokens per second. Needs scikit-learn: pip install
    'speckv\\[paper]'. Example:

    speckv paper --data speckv_paper --save controller.safetensors
    """
    from speckv.paper import run

    run(data, as_json, save)


@app.command()
def doctor(
    profile: Annotated[bool, typer.Option(
        "--profile", help="Decode once with the embedded model and tell where the time went; the options below are for "
                          "this.")] = False,
    draft: Draft = DEFAULT_DRAFT,
    compression: Compression = "bf16",
    policy: Annotated[str, typer.Option(help=f"How many tokens to draft: {POLICIES}.")] = "adaptive",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="How many tokens to decode.")] = 128,
    fast: Fast = False,
    threads: Threads = None,
):
    """Versions, devices, and which backend serves each op and why; or, with --profile, where a decode's time goes.

    Example: speckv doctor --profile --compression nf4 --fast
    """
    from speckv.doctor import profile_decode, report

    _begin(threads)
    if profile:
        profile_decode(compression, draft, policy, max_new_tokens, fast)
    else:
        report()


def _begin(threads):
    """Before a command's work; returns how many threads PyTorch has."""
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()  # its bars for loading weights would run through the streamed text
    if threads is not None:
        torch.set_num_threads(threads)
    return torch.get_num_threads()


def main():
    """Entry point: errors that speckv raises on purpose end in one line and exit status 2."""
    try:
        app()
    except (SpecKVError, OSError) as error:
        print(f"speckv: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
