"""The first half of a distillation: the target writes text, by amount or by the clock, in any number of processes."""

import json
import shutil
import time
from dataclasses import replace

from speckv.corpus import Corpus, write_shard
from speckv.distill_settings import Progress
from speckv.errors import InputError, ModelError
from speckv.files import write_json

TEXT_SHARE = 0.4  # of the hours of a run by time
ROOM_FOR_TRAINING = 512 << 20  # bytes of disk left free for checkpoints and drafters
PROJECTION_SHARE = 0.1  # of a shard, after which it is clear whether there is time for all of it
POLL_SECONDS = 1.0
CLOCK_SECONDS = 30.0  # how often the time spent on text is stored


def write(target, tokenizer, corpus, settings, clock_file, on_progress):
    """Complete the text: the corpus to train on, and the seconds it took."""
    clock = _TextClock(clock_file, settings.identity)

    def on_text(progress):
        clock.tick()
        on_progress(progress)
    try:
        if settings.hours is not None and clock.shards is None:
            is_over = limit(target, corpus, settings, lambda: clock.seconds)
            by_time = _by_time(on_text, lambda: clock.seconds / (TEXT_SHARE * settings.hours * 3600))
            missing = write_text(target, tokenizer, corpus, by_time, is_over, wait=False)
            # What lies before the last finished shard is about to be finished by other processes.
            finished = set(range(corpus.settings.num_shards)) - set(missing)
            corpus = corpus.first(1 + max(finished, default=0))
        elif settings.hours is not None:
            corpus = corpus.first(clock.shards)
        _check_room(corpus, len(corpus.missing()) * _shard_bytes(target, corpus))
        write_text(target, tokenizer, corpus, on_text)
        clock.finish(corpus.settings.num_shards)
    finally:
        if clock.shards is None:
            clock.save()
    return corpus, clock.seconds


class _TextClock:
    """How long the text took, all sittings together, and how many shards it has; kept in a file of the work folder."""

    def __init__(self, file, identity):
        self._file, self._identity = file, identity
        stored = _read_clock(file)
        if stored.get("settings") != identity:
            stored = {}
        self._earlier, self.shards = stored.get("seconds", 0.0), stored.get("shards")
        self._begun = self._saved = time.monotonic()

    @property
    def seconds(self) -> float:
        """Time spent until the text was complete."""
        return self._earlier + (time.monotonic() - self._begun if self.shards is None else 0.0)

    def tick(self):
        """Store the time spent, now and then."""
        if time.monotonic() - self._saved > CLOCK_SECONDS:
            self.save()

    def finish(self, shards):
        """The text is complete; from now on the clock stands."""
        if self.shards is None:
            self._earlier, self.shards = self.seconds, shards
            self.save()

    def save(self):
        write_json(self._file, {"seconds": self.seconds, "shards": self.shards, "settings": self._identity})
        self._saved = time.monotonic()


def _read_clock(file):
    try:
        return dict(json.loads(file.read_text())) if file.exists() else {}
    except (ValueError, TypeError) as error:
        raise ModelError(f"{file} is damaged ({error!r}): delete it, and its time will be counted anew") from error


def _by_time(on_progress, share):
    """on_progress with the total that the tokens so far and the share of the time spent on them suggest."""
    before = None

    def report(progress):
        nonlocal before
        before = progress.done if before is None else before
        total = before + (progress.done - before) / min(1.0, max(share(), 1e-3))
        on_progress(replace(progress, total=min(progress.total, max(progress.done, round(total)))))
    return report


def limit(target, corpus, settings, seconds):
    """A function that says whether a shard that would take so many seconds more is one too many."""
    if settings.hours is None:
        return None
    return lambda shard_seconds: (
        seconds() + shard_seconds > TEXT_SHARE * settings.hours * 3600
        or _room(corpus.folder) < _shard_bytes(target, corpus))


def write_text(target, tokenizer, corpus: Corpus, on_progress, is_over=None, wait=True) -> list:
    """Make the shards that are missing; returns those that are missing still.

    Each is claimed first, so that no two processes write the same. With wait, those that others are writing are waited
    for. Once there is a shard, is_over is asked before another, and again when a part of it is written and shows how
    long it takes, whether to leave it.
    """
    settings = corpus.settings
    shard_tokens = settings.rows * settings.length
    missing, shard_seconds = corpus.missing(), 0.0

    def report(tokens, note=""):
        written = (settings.num_shards - len(missing)) * shard_tokens
        on_progress(Progress("text", written + tokens, settings.num_shards * shard_tokens, note=note))

    while missing:
        has_progressed = False
        for index in list(missing):
            may_stop = is_over is not None and len(missing) < settings.num_shards
            if may_stop and is_over(shard_seconds):
                return missing
            with corpus.claim(index) as is_ours:
                if not is_ours:
                    continue
                if not corpus.has(index):
                    shard_seconds = _write(target, tokenizer, corpus, index, report, is_over if may_stop else None)
                    if shard_seconds is None:
                        return missing
            missing.remove(index)
            has_progressed = True
        if not has_progressed:
            if not wait:
                return missing
            report(0, f"waiting for shards of other processes: {len(missing)}")
            time.sleep(POLL_SECONDS)
    return missing


class _NoTimeLeft(Exception):
    """There is none to write the rest of a shard."""


def _write(target, tokenizer, corpus, index, report, is_over):
    """Make one shard; returns the seconds it took, or None where is_over said that it would take too many."""
    begun, tokens, is_checked = time.monotonic(), 0, is_over is None
    shard_tokens = corpus.settings.rows * corpus.settings.length

    def on_step(count):
        nonlocal tokens, is_checked
        tokens += count
        report(tokens)
        if not is_checked and tokens >= PROJECTION_SHARE * shard_tokens:
            is_checked = True
            if is_over((time.monotonic() - begun) * (shard_tokens / tokens - 1)):
                raise _NoTimeLeft
    _check_room(corpus, _shard_bytes(target, corpus))
    try:
        corpus.add(index, write_shard(target, tokenizer, corpus.settings, index, corpus.layers, on_step))
    except _NoTimeLeft:
        return None
    return time.monotonic() - begun


def _shard_bytes(target, corpus):
    """What a shard takes on disk: token ids in 32 bits, roles in 8, hidden states in 16."""
    states = len(corpus.layers) * target.config.get_text_config(decoder=True).hidden_size
    return corpus.settings.rows * corpus.settings.length * (4 + 1 + 2 * states)


def _room(folder):
    return shutil.disk_usage(folder).free - ROOM_FOR_TRAINING


def _check_room(corpus, wanted):
    """Raise InputError where the disk has no room for so many more bytes of text."""
    room = _room(corpus.folder)
    if wanted > max(room, 0):
        tokens = corpus.settings.rows * corpus.settings.length
        raise InputError(
            f"the text still to be written takes {wanted / 1e9:.1f} GB, and the disk of {corpus.folder} has room for "
            f"{max(room, 0) / 1e9:.1f}: choose another work folder, or fewer tokens (a shard is {tokens:,} of them)")
