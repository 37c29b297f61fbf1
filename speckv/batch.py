"""Several texts at a time: each as it would be alone, with several to a pass of the target."""

import math
import re
import time
from collections.abc import Iterable, Mapping

import torch

from speckv.cost import ALONE, Others
from speckv.decode import is_out_of_memory, open_run
from speckv.errors import InputError, NumericalError
from speckv.fast import FastModel
from speckv.head_engine import draft_chains
from speckv.policies import parse_policy
from speckv.records import SpecOutput

# What concerns one text, by its default.
_OF_A_TEXT = {"attention_mask": None, "max_new_tokens": 128, "temperature": 0.0, "seed": None, "eos_token_id": None,
              "top_k": 0, "top_p": 1.0, "min_p": 0.0, "logits_processor": None, "stopping_criteria": None}

WIDTH = 1 / 8  # of the tokens left; how far apart the ends of texts are, or how much later than expected


def generate_batch(target, drafter, requests, policy="adaptive", fast=False, on_step=None,
                   **shared) -> list[SpecOutput]:
    """Decode several texts; returns their outputs in the order of the requests.

    requests is a list of mappings, each with the input_ids [1, n] of a text and any of attention_mask, max_new_tokens,
    temperature, seed, eos_token_id, top_k, top_p, min_p, logits_processor and stopping_criteria, which mean what they
    mean to speckv.generate; `shared` are those of all texts that do not say otherwise. Or it is a tensor [B, n] i64,
    padded where an attention_mask [B, n] given beside it is 0. Prompts and texts may be of any length: each text has
    its own draft length at every step, its own acceptance and its own end, after which it costs nothing. One policy
    serves all: 'adaptive' learns from each what drafts are worth beside the others. on_step(index, tokens, record) is
    called after every step of every text.

    What a text says does not depend on the others. With fast the target reads all of them in one pass, sooner than in
    a pass for each (see docs/fast.md), and every token has the same bits as alone; a target that the engine cannot read
    is run for one text after the other, which saves no time. A step's verify_ms is its share, by tokens, of the pass it
    was verified in.

    Raises what speckv.generate raises, an InputError and a NumericalError with the number of the request; InputError
    and ModelError before any work.
    """
    runs, policy = [], parse_policy(policy)
    for index, request in enumerate(_requests(requests, shared)):
        try:
            runs.append(open_run(target, drafter, policy=policy, fast=fast, **request))
        except InputError as error:
            raise InputError(f"request {index}: {error}") from error
    _prefill(runs)
    active = {index: run for index, run in enumerate(runs) if not run.finished}
    rows = dict.fromkeys(active, 1)  # of each text in the last pass
    while active:
        made, rows = _step(active, rows)
        for index, (tokens, record) in made.items():
            if on_step is not None:
                on_step(index, tokens, record)
        active = {index: run for index, run in active.items() if not run.finished}
    return [run.output() for run in runs]


@torch.inference_mode()
def _prefill(runs):
    """Read all prompts, several to a pass where the target can."""
    unread = [run for run in runs if run.prompt() is not None]
    hidden = {}
    if unread and _share_a_pass(unread):
        read = _read_together(unread, [(run.target, run.prompt(), 0) for run in unread])
        hidden = {} if read is None else {run: states for run, (_, states) in zip(unread, read, strict=True)}
    for run in runs:
        if run in hidden:
            run.end_prefill(hidden.pop(run))
        else:
            run.prefill()


@torch.inference_mode()
def _step(runs, last_rows):
    """A step of each run, by its index: all drafts, one pass of the target, all verdicts; and how many rows of the pass
    each took, where in the last pass it took so many."""
    shares = len(runs) > 1 and _share_a_pass(runs.values())
    drafts = _drafts(runs, last_rows, shares)
    started = time.perf_counter()
    read, has_shared = _read(runs, drafts)
    read_ms = (time.perf_counter() - started) * 1e3
    rows = {index: draft.tokens.shape[1] + 1 for index, (draft, *_) in read.items()}
    of_all = sum(rows.values())
    of_a_row = read_ms / of_all
    for index, run in runs.items():
        value = run.policy.others.value
        run.policy.others = Others(len(runs) - 1, of_all - rows[index], value) if has_shared else ALONE
    made = {index: _named(index, run.commit, *read[index], rows[index] * of_a_row) for index, run in runs.items()}
    return made, rows


def _drafts(runs, last_rows, shares):
    """The draft of each run, made together as far as the drafter can. The others of a text are expected to take as many
    rows of the pass as they took last time."""
    values = _values(runs)
    expected = sum(last_rows[index] for index in runs)
    begun = {}
    for index, run in runs.items():
        run.policy.others = Others(len(runs) - 1, expected - last_rows[index], values[index]) if shares else ALONE
        begun[index] = _named(index, run.begin_draft)
    wanted = {index: draft.wanted for index, draft in begun.items() if draft.wanted is not None}
    started = time.perf_counter()
    chains = _chains(runs, wanted)
    ms = (time.perf_counter() - started) * 1e3
    # A text's share of that time is that of its tokens.
    of_a_token = ms / max(1, sum(len(chain.signals) for chain in chains.values()))
    drafts = {}
    for index, run in runs.items():
        chain = chains.get(index)
        share = 0.0 if chain is None else len(chain.signals) * of_a_token
        drafts[index] = _named(index, run.end_draft, begun[index], chain, share)
    return drafts


def _values(runs):
    """What one more token of each run is worth, by index, in that of the average run.

    The batch is over when its last text is, so a token of a text that is behind is worth more: by a softmax of what is
    left, as wide as it is uncertain how much of that there will be.
    """
    most = max(run.left for run in runs.values())
    weights = {index: math.exp((run.left - most) / (WIDTH * most)) for index, run in runs.items()}
    average = sum(weights.values()) / len(weights)
    return {index: weight / average for index, weight in weights.items()}


def _chains(runs, wanted):
    """The chains that are wanted, by index."""
    if not wanted:
        return {}
    try:
        return dict(zip(wanted, draft_chains([*wanted.values()]), strict=True))
    except RuntimeError as error:
        if row := re.match(r"draft_chains: row (\d+)", str(error)):
            index = [*wanted][int(row[1])]
            raise NumericalError(f"request {index}: {runs[index].named(error)}") from error
        raise


def _read(runs, drafts):
    """Each run's draft, or what memory leaves of it, and what its target makes of that; and whether in one pass."""
    if _share_a_pass(runs.values()):
        requests = [(run.target, *run.request(drafts[index])) for index, run in runs.items()]
        read = _read_together([*runs.values()], requests, all(run.takes_best for run in runs.values()))
        if read is not None:
            return {index: (drafts[index], *some) for index, some in zip(runs, read, strict=True)}, len(runs) > 1
    return {index: run.read(drafts[index]) for index, run in runs.items()}, False


def _read_together(runs, requests, best=False):
    """What FastModel.read_together makes of a request of each run; None, and nothing read, where memory is short."""
    lengths = [run.target.length for run in runs]
    try:
        return FastModel.read_together(requests, runs[0].wants_hidden, best)  # of the one drafter that all share
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    for run, length in zip(runs, lengths, strict=True):  # some may have been read
        run.target.rollback(length)
    return None


def _share_a_pass(runs):
    return all(isinstance(run.target, FastModel) for run in runs)


def _named(index, call, *arguments):
    try:
        return call(*arguments)
    except NumericalError as error:
        raise NumericalError(f"request {index}: {error}") from error


def _requests(requests, shared):
    """All arguments of each text, those of a padded tensor as one request a row."""
    _check_names(shared, "generate_batch")
    if isinstance(requests, torch.Tensor):
        mask = shared.pop("attention_mask", None)
        if requests.dim() != 2:
            raise InputError(f"input_ids has shape {list(requests.shape)}: it must be [B, n]")
        if mask is not None and getattr(mask, "shape", None) != requests.shape:
            raise InputError(f"attention_mask has shape {list(getattr(mask, 'shape', []))}, input_ids "
                             f"{list(requests.shape)}: they must be the same")
        masks = [None] * len(requests) if mask is None else mask.split(1)
        requests = [{"input_ids": ids, "attention_mask": mask}
                    for ids, mask in zip(requests.split(1), masks, strict=True)]
    if not isinstance(requests, Iterable) or isinstance(requests, Mapping | str):
        raise InputError(f"requests is a {type(requests).__name__}: it must be a list of mappings, or a tensor [B, n] "
                         "of token ids")
    for index, request in enumerate(requests):
        if not isinstance(request, Mapping) or "input_ids" not in request:
            raise InputError(f"request {index} must be a mapping with at least 'input_ids'")
        _check_names(request.keys() - {"input_ids"}, f"request {index}")
        yield _OF_A_TEXT | shared | dict(request)


def _check_names(names, whose):
    unknown = sorted(set(names) - _OF_A_TEXT.keys())
    if unknown:
        raise InputError(f"{whose} has {', '.join(map(repr, unknown))}: what a text may be given is input_ids, "
                         f"{', '.join(_OF_A_TEXT)}")
