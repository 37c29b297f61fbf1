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

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from speckv import drafter_folder, head, model_card, pruned, training_plot
from speckv.cache import context_limit, vocabulary_size
from speckv.corpus import ROLE_ANSWER, Corpus, CorpusSettings, target_identity, write_shard
from speckv.errors import InputError, ModelError
from speckv.files import atomic_file, check_writable, locked, remove_leftovers, write_json
from speckv.models import EMBEDDED, shipped_drafter
from speckv.students import HeadStudent, PrunedStudent, evaluate, head_logits

HELD_OUT_ROWS = 32  # the first rows of shard 0; never trained on
HELD_OUT_BATCH = 8
KINDS = {"lm": pruned.KIND, "head": head.KIND}
OPTIMIZER_STATE = ("step", "exp_avg", "exp_avg_sq")
HISTORY_FILE = "history.json"
TEXT_SHARE = 0.4  # of the hours of a run by time
LEAST_TRAINING_SHARE = 0.1  # where one shard takes longer than that
ROOM_FOR_TRAINING = 512 << 20  # bytes of disk left free for checkpoints and drafters
PROJECTION_SHARE = 0.1  # of a shard, after which it is clear whether there is time for all of it
POLL_SECONDS = 1.0
CLOCK_SECONDS = 30.0  # how often the time spent on text is stored


@dataclass(frozen=True)
class DistillSettings:
    """What to train and on how much. Everything but checkpoint_seconds is part of a run's identity.

    With hours, text and training end by the clock: corpus.tokens is the most text there will be, epochs is not used.
    """

    kind: str = "head"
    num_layers: int = 2         # of a pruned drafter
    head_tokens: int = 16_384   # how many different tokens a head can draft
    depth: int = 3              # how many of its own tokens deep a head is trained
    corpus: CorpusSettings = field(default_factory=CorpusSettings)
    epochs: float = 10.0
    hours: float | None = None  # of wall time, text and training, all sittings together
    batch_rows: int = 4
    loss_positions: int = 480   # times 16,384 tokens in fp32: just below 32 MB, see speckv/memory.py
    learning_rate: float = 1e-3
    warmup_steps: int = 50
    evaluate_every: int = 300
    start_from: str = ""        # sha256 of the weights that training starts from, see distill
    checkpoint_seconds: float = 120.0

    def __post_init__(self):
        if self.kind not in KINDS:
            raise InputError(f"unknown kind of drafter {self.kind!r}: choose one of {', '.join(KINDS)}")
        numbers = (self.num_layers, self.head_tokens, self.depth, self.epochs, self.corpus.tokens, self.batch_rows,
                   self.loss_positions, self.warmup_steps, self.evaluate_every, 1 if self.hours is None else self.hours)
        if not all(math.isfinite(number) and number > 0 for number in numbers):
            raise InputError(f"tokens, epochs, hours and the other numbers of a distillation must be positive: {self}")

    @property
    def num_steps(self) -> int:
        trained_rows = self.corpus.num_shards * self.corpus.rows - HELD_OUT_ROWS
        return max(1, round(self.epochs * trained_rows / self.batch_rows))

    @property
    def identity(self) -> dict:
        return {key: value for key, value in asdict(self).items() if key != "checkpoint_seconds"}


@dataclass(frozen=True)
class Progress:
    """What is told to on_progress: stage is "text" or "training", done and total count tokens.

    In a run by time total is an estimate that follows the clock. note says what is waited for.
    """

    stage: str
    done: int
    total: int
    held_out: dict | None = None
    loss: float | None = None
    note: str = ""


def distill(target, tokenizer, folder, work_folder, settings: DistillSettings, target_name: str = "",
            on_progress: Callable[[Progress], None] = lambda progress: None, start_from=None, resume=True) -> dict:
    """Write the text, train, and leave the best drafter so far in `folder`; returns its held-out figures.

    target is dense (bf16 or fp32; the latter is faster on many CPUs); work_folder keeps text and checkpoints, and a
    run started again on it goes on where it stopped, or with resume=False trains anew on the same text. start_from is
    the folder of a drafter of the same kind to train further, or "smollm2" for the shipped one; else training starts
    from the target's first layers. Beside the drafter lie a README, history.json with the figures of every
    evaluation, and at the end, with matplotlib, training.png. Raises ModelError for a target that cannot be pruned,
    and where work_folder belongs to another run; InputError where the disk has no room for the text.
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
        checkpoint, best_folder, clock_file = _places(work_folder, settings)
        _tidy(folder, work_folder, best_folder, checkpoint)
        corpus = Corpus(work_folder, settings.corpus, target_identity(target), head.feature_layers(target))
        if not resume:
            checkpoint.unlink(missing_ok=True)
            clock_file.unlink(missing_ok=True)
        if checkpoint.exists():
            _read_metadata(checkpoint, settings)  # refuses another run's, before any work
        corpus, text_seconds = _text(target, tokenizer, corpus, settings, clock_file, on_progress)
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
        is_over = _text_limit(target, corpus, settings, lambda: time.monotonic() - begun)
        return len(write_text(target, tokenizer, corpus, on_progress, is_over, wait=False))


def _places(work_folder, settings):
    """Where a kind of drafter keeps its checkpoint, the best drafter so far, and the time its text took."""
    name = f"{settings.num_layers}-layers" if settings.kind == "lm" else "head"
    checkpoint, best_folder, clock = f"checkpoint-{name}.safetensors", f"best-{name}", f"text-{name}.json"
    return work_folder / checkpoint, work_folder / best_folder, work_folder / clock


def _tidy(folder, work_folder, best_folder, checkpoint):
    """Remove what a killed process left half-written."""
    for place in (folder, best_folder):
        drafter_folder.remove_leftovers(place)
    for name in (HISTORY_FILE, model_card.README_FILE, training_plot.PLOT_FILE):
        remove_leftovers(folder, name)
    remove_leftovers(work_folder, checkpoint.name)


def _check_target(target, settings):
    """Refuse what cannot be distilled from, before any work."""
    limit = context_limit(target)
    if limit is not None and settings.corpus.length > limit:
        raise InputError(f"text of {settings.corpus.length} tokens is longer than the {limit} the target allows")
    _check_head(target)
    pruned.first_layers(target, settings.num_layers)


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
    if settings.kind == "head":
        head.build(target, tensors)
    elif card.get("num_layers") != settings.num_layers:
        raise InputError(f"{start_from} has {card.get('num_layers')} layers, asked for are {settings.num_layers}: to "
                         f"train it further say --layers {card.get('num_layers')}")
    else:
        pruned.load(target, tensors, settings.num_layers)
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


def _text(target, tokenizer, corpus, settings, clock_file, on_progress):
    """Complete the text: the corpus to train on, and the seconds it took."""
    clock = _TextClock(clock_file, settings.identity)

    def on_text(progress):
        clock.tick()
        on_progress(progress)
    try:
        if settings.hours is not None and clock.shards is None:
            is_over = _text_limit(target, corpus, settings, lambda: clock.seconds)
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


def _by_time(on_progress, share):
    """on_progress with the total that the tokens so far and the share of the time spent on them suggest."""
    before = None

    def report(progress):
        nonlocal before
        before = progress.done if before is None else before
        total = before + (progress.done - before) / min(1.0, max(share(), 1e-3))
        on_progress(replace(progress, total=min(progress.total, max(progress.done, round(total)))))
    return report


def _text_limit(target, corpus, settings, seconds):
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


@torch.no_grad()
def _check_head(target):
    """Refuse a model that does something else between its hidden states and its logits."""
    ids = torch.arange(4, device=target.device).unsqueeze(0)
    output = target(ids, output_hidden_states=True)
    if not torch.allclose(head_logits(target, output.hidden_states[-1]), output.logits, rtol=1e-2, atol=1e-2):
        raise ModelError(f"{type(target).__name__} computes its logits in a way that 'speckv distill' does not know")


class _Sampler:
    """Which rows step n trains on: each epoch is a shuffle of all rows but the held-out ones."""

    def __init__(self, corpus, settings):
        self._corpus = corpus
        rows = corpus.settings.num_shards * corpus.settings.rows
        self._rows = range(HELD_OUT_ROWS, rows)
        self._batch = settings.batch_rows
        self._seed = corpus.settings.seed
        self._small = [corpus.read(index, "tokens", "roles") for index in range(corpus.settings.num_shards)]
        self._hidden = [safe_open(corpus.file(index), "pt").get_slice("hidden")
                        for index in range(corpus.settings.num_shards)]

    def feature_statistics(self):
        """Mean of the hidden states [n·H] and one over their standard deviation, f32, over the first rows."""
        hidden = torch.cat([self._hidden[0][row] for row in range(HELD_OUT_ROWS)]).float()
        return hidden.mean(0), 1 / hidden.std(0).clamp(min=1e-6)

    def batch(self, step):
        """tokens [rows, length], roles [rows, length], hidden [rows, length, H] of a step."""
        first = step * self._batch
        return self.gather([self._row(first + i) for i in range(self._batch)])

    def held_out(self):
        """The held-out rows, a few at a time."""
        for first in range(0, HELD_OUT_ROWS, HELD_OUT_BATCH):
            yield self.gather(range(first, min(first + HELD_OUT_BATCH, HELD_OUT_ROWS)))

    def frequent_tokens(self, count, vocabulary):
        """The ids [count] of the tokens that the target writes most, ascending; lower ids first among equals."""
        written = torch.zeros(vocabulary, dtype=torch.int64)
        for tokens, roles in self._small:
            written += torch.bincount(tokens[roles == ROLE_ANSWER].long(), minlength=vocabulary)
        return written.argsort(descending=True, stable=True)[:count].sort().values

    def _row(self, position):
        epoch, place = divmod(position, len(self._rows))
        order = torch.randperm(len(self._rows), generator=torch.Generator().manual_seed(self._seed + epoch))
        return self._rows[order[place]]

    def gather(self, rows):
        places = [divmod(row, self._corpus.settings.rows) for row in rows]
        tokens = torch.stack([self._small[shard][0][row] for shard, row in places]).long()
        roles = torch.stack([self._small[shard][1][row] for shard, row in places])
        hidden = torch.stack([self._hidden[shard][row] for shard, row in places])
        return tokens, roles, hidden


def _student(target, settings, sampler, start):
    """What is trained."""
    if settings.kind == "lm":
        start = start or pruned.first_layers(target, settings.num_layers)
        return PrunedStudent(target, settings.num_layers, start)
    if start is None:
        frequent = sampler.frequent_tokens(settings.head_tokens, vocabulary_size(target))
        start = head.initial_tensors(target, frequent, *sampler.feature_statistics())
    return HeadStudent(target, settings.depth, start)


@dataclass
class _State:
    """Where a training stands; with parameters and optimizer, all of a checkpoint."""

    step: int = 0
    seconds: float = 0.0  # of all sittings
    losses: list = field(default_factory=list)   # of the steps since the last evaluation
    history: list = field(default_factory=list)  # of evaluations


def train(target, corpus: Corpus, folder: Path, settings: DistillSettings, target_name: str, on_progress,
          start: dict | None = None, text_seconds: float = 0.0) -> dict:
    """Train on the corpus; checkpoints in its folder, the best drafter so far in `folder`.

    text_seconds is what of settings.hours, if given, has been spent on the text.
    """
    begun = saved = time.monotonic()
    checkpoint, best_folder, _ = _places(corpus.folder, settings)
    sampler = _Sampler(corpus, settings)
    student = _student(target, settings, sampler, start)
    own = student.own
    for parameter in own.values():
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(own.values(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    state = _restore(checkpoint, own, optimizer, settings)
    step_tokens = settings.batch_rows * corpus.settings.length
    best = {}
    if state.history:
        if not drafter_folder.is_drafter(best_folder):
            raise ModelError(f"{best_folder} has lost the best drafter of the run: say --no-resume to train anew")
        # The drafter, not the checkpoint, knows the best figures: a killed process may have saved only the former.
        # And the output folder may be a new one, or may have been lost since the interruption.
        best = _publish(best_folder, folder, student.kind, state.history)
    else:
        shutil.rmtree(best_folder, ignore_errors=True)  # another run's

    def look():
        nonlocal best
        held_out = evaluate(student, sampler.held_out())
        state.history.append({
            "step": state.step, "tokens": state.step * step_tokens, "seconds": round(state.seconds, 1),
            "loss": sum(state.losses) / len(state.losses) if state.losses else None} | held_out)
        state.losses.clear()
        if held_out["accepted_at_4"] > best.get("accepted_at_4", -1.0):
            student.save(best_folder, _card(target, target_name, state, corpus, settings, held_out, text_seconds))
            best = _publish(best_folder, folder, student.kind, state.history)
        write_json(folder / HISTORY_FILE, state.history)

    earlier, is_whole = state.seconds, True
    done = _share_done(state, settings, text_seconds)
    try:
        if start is not None and not state.history:
            look()  # so that the outcome is never worse than the start
        while done < 1:
            is_whole = False
            for group in optimizer.param_groups:
                group["lr"] = _learning_rate(state.step, done, settings)
            loss = _update(student, optimizer, sampler.batch(state.step), state.step, done, settings)
            state.step += 1
            state.losses += [] if loss is None else [loss]
            state.seconds = earlier + time.monotonic() - begun
            done = _share_done(state, settings, text_seconds)
            if state.step % settings.evaluate_every == 0 or done >= 1:
                look()
            is_whole = True
            on_progress(Progress("training", state.step * step_tokens,
                                 round(state.step * step_tokens / min(done, 1)), best, loss))
            if time.monotonic() - saved > settings.checkpoint_seconds:
                _save(checkpoint, own, optimizer, state, settings)
                saved = time.monotonic()
    finally:
        # Also on Ctrl-C; but in the middle of a step parameters and optimizer do not fit together, and the last
        # checkpoint stands.
        if is_whole:
            _save(checkpoint, own, optimizer, state, settings)
    training_plot.draw(state.history, folder / training_plot.PLOT_FILE,
                       f"{settings.kind} drafter for {target_name or type(target).__name__}")
    return best


def _share_done(state, settings, text_seconds):
    """How much of the training lies behind, 0 to 1 (or a step's time more): of its steps, or by time of its time."""
    if settings.hours is None:
        return state.step / settings.num_steps
    whole = settings.hours * 3600
    return state.seconds / max(whole - text_seconds, LEAST_TRAINING_SHARE * whole)


def _publish(best_folder, folder, kind, history):
    """Make `folder` hold the best drafter so far, and what there is to tell of it; returns its held-out figures."""
    drafter_folder.publish(best_folder, folder, kind)
    model_card.write(folder)
    write_json(folder / HISTORY_FILE, history)
    card, _ = drafter_folder.read(folder, (kind,))
    return card["held_out"]


def _update(student, optimizer, batch, step, done, settings):
    """One update; returns the loss, or None where the rows hold nothing to learn from."""
    generator = torch.Generator().manual_seed(settings.corpus.seed * 7_919 + step)
    loss = student.loss(batch, settings.loss_positions, generator, done)
    if loss is None:
        return None
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()
    return loss.item()


def _learning_rate(step, done, settings):
    """Linear warm-up, and linear decay to a twentieth."""
    warm = min(1.0, (step + 1) / settings.warmup_steps)
    return settings.learning_rate * warm * (1 - 0.95 * done)


def _card(target, target_name, state, corpus, settings, held_out, text_seconds):
    """What the drafter's card tells: for which target, from what, how good."""
    text = corpus.settings
    trained_rows = text.num_shards * text.rows - HELD_OUT_ROWS
    config = target.config.get_text_config()
    return {"target": {"name": target_name, "identity": target_identity(target), "class": type(target).__name__,
                       "hidden_size": config.hidden_size, "vocabulary": config.vocab_size},
            "trained": {"steps": state.step, "epochs": state.step * settings.batch_rows / trained_rows,
                        "tokens_of_text": text.num_shards * text.rows * text.length,
                        "seconds": {"text": round(text_seconds, 1), "training": round(state.seconds, 1)},
                        "threads": torch.get_num_threads(), "device": target.device.type,
                        "dtype": str(target.dtype).removeprefix("torch."), "settings": settings.identity},
            "held_out": held_out}


def _save(file, own, optimizer, state, settings):
    tensors = {}
    for key, parameter in own.items():
        tensors[key] = parameter.detach()
        optimizer_state = optimizer.state.get(parameter, {})
        for name in OPTIMIZER_STATE:
            if name in optimizer_state:
                tensors[f"{name}/{key}"] = optimizer_state[name]
    with atomic_file(file) as temporary:
        save_file(tensors, temporary, metadata={
            "state": json.dumps(asdict(state)), "settings": json.dumps(settings.identity), "digest": _digest(tensors)})


def _digest(tensors):
    """A hash of named tensors, to tell a damaged checkpoint."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        digest.update(key.encode())
        digest.update(tensors[key].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _restore(file, own, optimizer, settings):
    """Put parameters and optimizer back as they were; returns where training stood."""
    if not file.exists():
        return _State()
    metadata = _read_metadata(file, settings)
    try:
        with safe_open(file, "pt") as stored:
            tensors = {key: stored.get_tensor(key) for key in stored.keys()}
        if metadata["digest"] != _digest(tensors):
            raise ValueError("its contents are not what was written")
        state = _State(**json.loads(metadata["state"]))
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise _damaged(file, error) from error
    with torch.no_grad():
        for key, parameter in own.items():
            parameter.copy_(tensors[key])
            if f"exp_avg/{key}" in tensors:
                optimizer.state[parameter] = {
                    name: tensors[f"{name}/{key}"].to("cpu" if name == "step" else parameter.device)
                    for name in OPTIMIZER_STATE}
    return state


def _read_metadata(file, settings):
    """What a checkpoint tells of itself; raises ModelError where it is damaged or another run's."""
    try:
        with safe_open(file, "pt") as stored:
            metadata = stored.metadata()
        identity = _flat(json.loads(metadata["settings"]))
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise _damaged(file, error) from error
    wanted = _flat(settings.identity)
    changes = [f"{key} was {identity.get(key)}, is {wanted.get(key)}"
               for key in sorted(wanted.keys() | identity.keys()) if identity.get(key) != wanted.get(key)]
    if changes:
        raise ModelError(
            f"{file} belongs to a run with other settings ({'; '.join(changes)}): say --no-resume to train anew on the "
            "same text and what is added to it, --no-resume --start-from OLD-DRAFTER to go on from a drafter made so "
            "far, or choose another work folder")
    return metadata


def _flat(settings):
    """Settings with those of the corpus among them."""
    settings = dict(settings)
    corpus = settings.pop("corpus", {})
    return settings | {f"corpus.{key}": value for key, value in corpus.items()}


def _damaged(file, error):
    return ModelError(f"{file} is damaged ({error!r}): delete it to train anew on the same text")
