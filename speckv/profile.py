"""Write texts at every compression and gamma, and keep what each step and each draft token was: records to learn from.

A run can be interrupted at any moment. The records of a text are two part files, and a text counts once the manifest
names both with their hashes; the same run started again writes the texts that do not count. What a text says depends
only on the settings and on its number, so nothing but its timings tells whether a run was interrupted.
"""

import hashlib
import json
import math
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from speckv import drafter_folder, head, pruned
from speckv.cache import context_limit, vocabulary_size
from speckv.corpus import target_identity
from speckv.decode import generate
from speckv.drafters import as_drafter
from speckv.errors import InputError
from speckv.files import check_writable, locked, remove_leftovers, sha256, write_json
from speckv.models import check_compression, shipped_drafter
from speckv.names import EMBEDDED, LOOKUP
from speckv.policy import Fixed
from speckv.record_files import Records, Text, check_installed, join, make_records, read_steps, read_tokens, write_table

MANIFEST_FILE = "profile.json"
PARTS_FOLDER = "parts"
WARM_UP_TOKENS = 8
AGAIN = "run the same 'speckv profile' again, which makes it anew"


@dataclass(frozen=True)
class ProfileSettings:
    """What is written; a folder holds the records of one such run. Raises InputError or ModelError for nonsense.

    target and draft are names for the records, as is draft_sha256: that of a drafter from a folder, where another may
    come to lie (see drafter_hash). Temperature 0 is greedy; with any other, `seed` decides what is drawn.
    """

    target: str
    draft: str
    draft_sha256: str | None = None
    gammas: tuple = (2, 4, 6, 8)
    compressions: tuple = ("bf16", "int8", "nf4")
    max_new_tokens: int = 128
    temperature: float = 0.0
    seed: int = 0
    fast: bool = False  # the target is read by the engine, see speckv.fast

    def __post_init__(self):
        for name, values in (("gammas", self.gammas), ("compressions", self.compressions)):
            if not values or len(set(values)) < len(values):
                raise InputError(f"{name} are {', '.join(map(str, values)) or 'none'}: give one or more, each once")
        for gamma in self.gammas:
            Fixed(gamma)
        for compression in self.compressions:
            check_compression(compression)
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {self.max_new_tokens}: a text must have 1 token or more")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise InputError(f"temperature is {self.temperature}: it must be 0 (greedy) or a positive number")


class Progress(NamedTuple):
    """How far a run has come: texts done, of all, and how many records that makes."""

    done: int
    total: int
    steps: int
    tokens: int


class _Cell(NamedTuple):
    """One text to write."""

    sequence: int
    compression: str
    prompt: int
    task: str
    gamma: int


def profile(load: Callable, prompts: dict, settings: ProfileSettings, folder,
            on_progress: Callable[[Progress], None] = lambda progress: None) -> Records:
    """Write the texts that are missing in `folder`, and return the records of all.

    load(compression) gives (target, drafter, encode), the last of which makes token ids [1, n] of a prompt; it is
    called for one compression after another. drafter may be None where every gamma is 0. prompts is {task: (prompt,
    ...)}. Raises InputError where the folder holds the records of other settings, weights or prompts, or where a prompt
    does not fit into the models.
    """
    folder = Path(folder)
    check_installed()
    cells = _cells(prompts, settings)
    check_writable(folder)
    with locked(folder, "profiling", wait=False):
        parts = _Parts(folder, _identity(prompts, settings))
        missing = parts.missing(cells)

        def report():
            on_progress(parts.progress(len(cells)))
        report()
        for compression in settings.compressions:
            unwritten = [cell for cell in missing if cell.compression == compression]
            if unwritten:
                _write_texts(load, unwritten, prompts, settings, parts, report)
    return read_records(folder)


def read_records(folder) -> Records:
    """All token and step records in a folder, text by text in the order of their numbers, finished run or not.

    Raises InputError where the folder holds none, or naming the file that is damaged.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder)
    if manifest is None:
        raise InputError(f"{folder} holds no records ({MANIFEST_FILE} is missing): make some with 'speckv profile "
                         f"--output {folder}'")
    return join(_read_part(folder, sequence, part) for sequence, part in sorted(manifest.parts.items()))


def drafter_hash(name: str) -> str | None:
    """The hash of the drafter that load_drafter would take from a folder by this name; None for other drafters."""
    name = name.removeprefix(f"{LOOKUP}+")
    folder = shipped_drafter() if name == EMBEDDED else Path(name)
    if not drafter_folder.is_drafter(folder):
        return None
    card, _ = drafter_folder.read(folder, (pruned.KIND, head.KIND))
    return card["sha256"]


def _cells(prompts, settings):
    """Every text. A prompt's gammas follow each other, so that a drift of the machine meets all alike, and the tasks
    take turns, so that an interrupted run has something of each."""
    longest = max(map(len, prompts.values()), default=0)
    if longest == 0:
        raise InputError("there are no prompts: give one or more of a task")
    cells = [(compression, rank, task, gamma) for compression in settings.compressions for rank in range(longest)
             for task, texts in prompts.items() if rank < len(texts) for gamma in settings.gammas]
    return [_Cell(sequence, *cell) for sequence, cell in enumerate(cells)]


def _identity(prompts, settings):
    """All that decides what a run writes and how long it takes, but for the weights, which are not loaded yet."""
    identity = asdict(settings) | {"threads": torch.get_num_threads()}
    if not settings.fast:
        del identity["fast"]  # which manifests of before do not have
    for task, texts in prompts.items():
        digest = hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()
        identity[f"prompts of {task}"] = f"{len(texts)} with hash {digest[:12]}"
    return json.loads(json.dumps(identity))  # lists for tuples, as in the manifest


def _write_texts(load, cells, prompts, settings, parts, on_text):
    """Write texts at one compression."""
    compression = cells[0].compression
    target, drafter, encode = load(compression)
    parts.check_weights(compression, target)
    ids = {(task, rank): encode(prompts[task][rank]).to(target.device) for _, _, rank, task, _ in cells}
    _check_lengths(target, drafter, ids, settings)
    for gamma in settings.gammas:
        generate(target, drafter, next(iter(ids.values())), policy=Fixed(gamma), fast=settings.fast,
                 max_new_tokens=min(WARM_UP_TOKENS, settings.max_new_tokens))
    for cell in cells:
        seed = random.Random(f"{settings.seed}/{cell.sequence}").getrandbits(63)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # not generate's seed, with which less is accepted than in use
            output = generate(target, drafter, ids[cell.task, cell.prompt], max_new_tokens=settings.max_new_tokens,
                              policy=Fixed(cell.gamma), temperature=settings.temperature, fast=settings.fast)
        text = Text(cell.sequence, cell.prompt, cell.task, cell.compression, settings.draft, settings.temperature,
                    cell.gamma)
        parts.add(cell.sequence, make_records(text, output.steps))
        on_text()


def _check_lengths(target, drafter, ids, settings):
    """Refuse a prompt that does not fit, before hours are spent on those before it."""
    vocabulary = vocabulary_size(target)
    limits = [context_limit(target), as_drafter(drafter, vocabulary).context if drafter is not None else None]
    limit = min((limit for limit in limits if limit is not None), default=math.inf)
    for (task, rank), prompt in ids.items():
        needed = prompt.shape[1] + settings.max_new_tokens
        if needed > limit:
            raise InputError(f"prompt {rank + 1} of {task!r} has {prompt.shape[1]} tokens, which makes {needed} with "
                             f"{settings.max_new_tokens} new ones; the models have room for {limit}: leave it out, or "
                             "lower max_new_tokens")


class _Part(NamedTuple):
    """What the manifest tells of a text: the rows of its two files, and their hashes."""

    steps: int
    tokens: int
    steps_sha256: str
    tokens_sha256: str


class _Manifest(NamedTuple):
    settings: dict
    weights: dict  # {compression: identity of the target}
    parts: dict    # {sequence: _Part}


class _Parts:
    """The part files of one run in its folder; the folder's lock must be held."""

    def __init__(self, folder, identity):
        self._folder = folder
        remove_leftovers(folder, MANIFEST_FILE)
        remove_leftovers(folder / PARTS_FOLDER, "*.parquet")
        self._manifest = _read_manifest(folder) or _Manifest(identity, {}, {})
        _check_same(folder, self._manifest.settings, identity)

    def missing(self, cells):
        """The texts whose records are not there as they were written; they no longer count."""
        parts = {sequence: part for sequence, part in self._manifest.parts.items()
                 if _damaged(self._folder, sequence, part) is None}
        self._manifest = self._manifest._replace(parts=parts)
        return [cell for cell in cells if cell.sequence not in parts]

    def check_weights(self, compression, target):
        """Refuse a target that is not the one this compression's texts so far are of."""
        identity = target_identity(target)
        name = f"weights at {compression}"
        _check_same(self._folder, {name: self._manifest.weights.setdefault(compression, identity)}, {name: identity})

    def add(self, sequence, records):
        files = _files(self._folder, sequence)
        write_table(records.steps, files.steps)
        write_table(records.tokens, files.tokens)
        self._manifest.parts[sequence] = _Part(records.steps.num_rows, records.tokens.num_rows, sha256(files.steps),
                                               sha256(files.tokens))
        write_json(self._folder / MANIFEST_FILE, self._manifest._asdict() | {
            "parts": {number: part._asdict() for number, part in self._manifest.parts.items()}})

    def progress(self, total):
        parts = self._manifest.parts.values()
        return Progress(len(parts), total, sum(part.steps for part in parts), sum(part.tokens for part in parts))


def _files(folder, sequence):
    return Records(**{kind: folder / PARTS_FOLDER / f"{kind}-{sequence:06d}.parquet" for kind in Records._fields})


def _read_manifest(folder):
    """What a folder says of itself; None where it says nothing."""
    file = folder / MANIFEST_FILE
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return _Manifest(dict(content["settings"]), dict(content["weights"]),
                         {int(sequence): _Part(**part) for sequence, part in content["parts"].items()})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{file} is damaged ({error!r}): delete the folder to start anew") from error


def _check_same(folder, found, wanted):
    changes = [f"{name} was {found.get(name)}, is {wanted.get(name)}" for name in wanted | found
               if found.get(name) != wanted.get(name)]
    if changes:
        raise InputError(f"{folder} holds the records of a run with other settings ({'; '.join(changes)}): say the "
                         "same to go on with it, or choose another folder")


def _damaged(folder, sequence, part):
    """The first of a text's files that is not as it was written; None where both are."""
    files = _files(folder, sequence)
    for file, digest in ((files.steps, part.steps_sha256), (files.tokens, part.tokens_sha256)):
        if not file.is_file() or sha256(file) != digest:
            return file
    return None


def _read_part(folder, sequence, part):
    file = _damaged(folder, sequence, part)
    if file is not None:
        raise InputError(f"{file} is missing or damaged, its contents are not what was written: {AGAIN}")
    files = _files(folder, sequence)
    return Records(read_tokens(files.tokens), read_steps(files.steps))
