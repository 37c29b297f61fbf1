"""Train a drafter for a given target on text the target wrote itself.

Both halves can be interrupted at any moment: text is kept in finished shards, training in checkpoints, and what a step
trains on depends only on its number. What a drafter learns from a batch is told in speckv/students.py.

What repeats: a run of so many epochs has so many steps, and ends with the same weights, interrupted or not (on one
machine, with as many threads). A run of so many hours is led by the clock: the share of its time that is spent sets
learning rate and depth, so they run their whole course on any machine, however often it is interrupted, but how many
shards and steps that makes, and so the weights, differ from run to run. Its n-th step still trains on the same rows of
the text it has. Time is counted while it runs; what a killed process did since its last checkpoint is done again and
not counted, at most checkpoint_seconds.
"""

import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from speckv import checkpoint, distill_text, drafter_folder, head, model_card, pruned, training_plot
from speckv.cache import context_limit
from speckv.corpus import Corpus, target_identity
from speckv.distill_settings import HISTORY_FILE, KINDS, DistillSettings, Progress, places
from speckv.errors import InputError, ModelError
from speckv.files import check_writable, locked, remove_leftovers
from speckv.models import shipped_drafter
from speckv.names import EMBEDDED
from speckv.students import head_logits
from speckv.training import train


def distill(target, tokenizer, folder, work_folder, settings: DistillSettings, target_name: str = "",
            on_progress: Callable[[Progress], None] = lambda progress: None, start_from=None, resume=True) -> dict:
    """Write the text, train, and leave the best drafter so far in `folder`; returns its held-out figures.

    target is dense (bf16 or fp32; the latter is faster on many CPUs); work_folder keeps text and checkpoints, and a
    run started again on it goes on where it stopped, or with resume=False trains anew on the same text. start_from is
    the folder of a drafter of the same kind to train further, or "smollm2" for the shipped one; else training starts
    from the target's first layers. A head may have fewer layers than asked for: it is given more, see head.grow; and
    more tokens that it can draft: they become those most frequent in the text. Beside the drafter lie a README,
    history.json with the figures of every evaluation, and at the end, with matplotlib, training.png. Raises ModelError
    for a target that cannot be pruned, and where work_folder belongs to another run; InputError where the disk has no
    room for the text.
    """
    folder, work_folder = Path(folder), Path(work_folder)
    start = None
    if start_from is not None:
        digest, start = _read_start(target, start_from, settings, folder, work_folder)
        settings = replace(settings, start_from=digest)
    _check_target(target, settings)
    check_writable(folder)
    check_writable(work_folder)
    with locked(work_folder, "distilling", wait=False), _frozen(target):
        training_file, best_folder, clock_file = places(work_folder, settings)
        _tidy(folder, work_folder, best_folder, training_file)
        corpus = Corpus(work_folder, settings.corpus, target_identity(target), head.feature_layers(target))
        if not resume:
            training_file.unlink(missing_ok=True)
            clock_file.unlink(missing_ok=True)
        if training_file.exists():
            checkpoint.read_metadata(training_file, settings)  # refuses another run's, before any work
        corpus, text_seconds = distill_text.write(target, tokenizer, corpus, settings, clock_file, on_progress)
        return train(target, corpus, folder, settings, target_name, on_progress, start, text_seconds)


def write_only(target, tokenizer, work_folder, settings: DistillSettings,
               on_progress: Callable[[Progress], None] = lambda progress: None) -> int:
    """Write shards that nobody else is writing until none is left; returns how many are still being written elsewhere.

    Any number of processes may do so in one work folder, beside one that distills. With settings.hours it ends after
    the text's share of them, counted from its own start.
    """
    work_folder = Path(work_folder)
    _check_target(target, settings)
    check_writable(work_folder)
    with _frozen(target):
        corpus = Corpus(work_folder, settings.corpus, target_identity(target), head.feature_layers(target))
        begun = time.monotonic()
        is_over = distill_text.limit(target, corpus, settings, lambda: time.monotonic() - begun)
        return len(distill_text.write_text(target, tokenizer, corpus, on_progress, is_over, wait=False))


def _tidy(folder, work_folder, best_folder, training_file):
    """Remove what a killed process left half-written."""
    for place in (folder, best_folder):
        drafter_folder.remove_leftovers(place)
    for name in (HISTORY_FILE, model_card.README_FILE, training_plot.PLOT_FILE):
        remove_leftovers(folder, name)
    remove_leftovers(work_folder, training_file.name)


def _check_target(target, settings):
    """Refuse what cannot be distilled from, before any work."""
    limit = context_limit(target)
    if limit is not None and settings.corpus.length > limit:
        raise InputError(f"text of {settings.corpus.length} tokens is longer than the {limit} the target allows")
    _check_head(target)
    pruned.first_layers(target, settings.num_layers)


@torch.no_grad()
def _check_head(target):
    """Refuse a model that does something else between its hidden states and its logits."""
    ids = torch.arange(4, device=target.device).unsqueeze(0)
    output = target(ids, output_hidden_states=True)
    if not torch.allclose(head_logits(target, output.hidden_states[-1]), output.logits, rtol=1e-2, atol=1e-2):
        raise ModelError(f"{type(target).__name__} computes its logits in a way that 'speckv distill' does not know")


def _read_start(target, start_from, settings, folder, work_folder):
    """The hash and tensors of the drafter to start from, checked before any work."""
    source = (shipped_drafter() if start_from == EMBEDDED else Path(start_from)).resolve()
    if source == folder.resolve() or work_folder.resolve() in (source, *source.parents):
        raise InputError(f"training would replace {start_from}, which it starts from: choose another output folder")
    card, tensors = drafter_folder.read(source, tuple(KINDS.values()))
    if card["kind"] != KINDS[settings.kind]:
        (found,) = (name for name, kind in KINDS.items() if kind == card["kind"])
        raise InputError(f"{start_from} holds a drafter of kind {found!r}, asked for is {settings.kind!r}: to train it "
                         f"further say --kind {found}")
    is_head, wanted = settings.kind == "head", settings.num_layers
    found = head.build(target, tensors).num_layers if is_head else card.get("num_layers")
    if found != wanted and not (is_head and found < wanted):
        raise InputError(f"{start_from} was made with --layers {found}, asked for is {wanted}: to train it further say "
                         f"--layers {found}")
    if is_head:
        tensors = head.grow(target, tensors, wanted)
    else:
        pruned.load(target, tensors, wanted)
    return card["sha256"], tensors


@contextmanager
def _frozen(target):
    """No gradients for the target's own parameters, some of which the drafter shares."""
    trainable = [parameter for parameter in target.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
