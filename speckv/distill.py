"""Train a drafter for a given target on text the target wrote itself.

Both halves can be interrupted at any moment: text is kept in finished shards, training in checkpoints, and what a step
trains on depends only on its number. What a drafter learns from a batch is told in speckv/students.py.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from speckv import drafter_folder, head, pruned
from speckv.cache import context_limit, vocabulary_size
from speckv.corpus import ROLE_ANSWER, Corpus, CorpusSettings, target_identity, write_shard
from speckv.errors import InputError, ModelError
from speckv.files import atomic_file, check_writable, locked
from speckv.students import HeadStudent, PrunedStudent, evaluate, head_logits

HELD_OUT_ROWS = 32  # the first rows of shard 0; never trained on
HELD_OUT_BATCH = 8
KINDS = {"lm": pruned.KIND, "head": head.KIND}
OPTIMIZER_STATE = ("step", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class DistillSettings:
    """What to train and on how much. Everything but checkpoint_seconds is part of a run's identity."""

    kind: str = "head"
    num_layers: int = 2         # of a pruned drafter
    head_tokens: int = 16_384   # how many different tokens a head can draft
    depth: int = 3              # how many of its own tokens deep a head is trained
    corpus: CorpusSettings = field(default_factory=CorpusSettings)
    epochs: float = 10.0
    batch_rows: int = 4
    loss_positions: int = 512
    learning_rate: float = 1e-3
    warmup_steps: int = 50
    evaluate_every: int = 300
    start_from: str = ""        # sha256 of the weights that training starts from, see distill
    checkpoint_seconds: float = 120.0

    def __post_init__(self):
        if self.kind not in KINDS:
            raise InputError(f"unknown kind of drafter {self.kind!r}: choose one of {', '.join(KINDS)}")
        numbers = (self.num_layers, self.head_tokens, self.depth, self.epochs, self.corpus.tokens, self.batch_rows,
                   self.loss_positions, self.warmup_steps, self.evaluate_every)
        if not all(math.isfinite(number) and number > 0 for number in numbers):
            raise InputError(f"tokens, epochs and the other numbers of a distillation must be positive: {self}")

    @property
    def num_steps(self) -> int:
        trained_rows = self.corpus.num_shards * self.corpus.rows - HELD_OUT_ROWS
        return max(1, round(self.epochs * trained_rows / self.batch_rows))

    @property
    def identity(self) -> dict:
        return {key: value for key, value in asdict(self).items() if key != "checkpoint_seconds"}


@dataclass(frozen=True)
class Progress:
    """What is told to on_progress: stage is "text" or "training", done and total count tokens."""

    stage: str
    done: int
    total: int
    held_out: dict | None = None
    loss: float | None = None


def distill(target, tokenizer, folder, work_folder, settings: DistillSettings, target_name: str = "",
            on_progress: Callable[[Progress], None] = lambda progress: None, start_from=None) -> dict:
    """Write the text, train, and leave the best drafter so far in `folder`; returns its held-out figures.

    target is dense (bf16 or fp32; the latter is faster on many CPUs); work_folder keeps text and checkpoints, and a
    run started again on it goes on where it stopped. start_from is the folder of a drafter of the same kind to train
    further; else training starts from the target's first layers. Raises ModelError for a target that cannot be
    pruned, and where work_folder belongs to another run.
    """
    folder, work_folder = Path(folder), Path(work_folder)
    start = None
    if start_from is not None:
        card, start = drafter_folder.read(start_from, (KINDS[settings.kind],))
        settings = replace(settings, start_from=card["sha256"])
    limit = context_limit(target)
    if limit is not None and settings.corpus.length > limit:
        raise InputError(f"text of {settings.corpus.length} tokens is longer than the {limit} the target allows")
    _check_head(target)
    pruned.first_layers(target, settings.num_layers)  # refuses what cannot be pruned, before any work
    check_writable(folder)
    check_writable(work_folder)
    with locked(work_folder, "distilling", wait=False), _frozen(target):
        corpus = Corpus(work_folder, settings.corpus, target_identity(target), head.feature_layers(target))
        write_text(target, tokenizer, corpus, on_progress)
        return train(target, corpus, folder, settings, target_name, on_progress, start)


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


def write_text(target, tokenizer, corpus: Corpus, on_progress) -> None:
    """Make the shards that are missing."""
    settings = corpus.settings
    shard_tokens = settings.rows * settings.length
    missing = corpus.missing()
    written = (settings.num_shards - len(missing)) * shard_tokens
    for index in missing:
        def on_step(tokens):
            nonlocal written
            written += tokens
            on_progress(Progress("text", written, settings.num_shards * shard_tokens))
        finished = written + shard_tokens
        corpus.add(index, write_shard(target, tokenizer, settings, index, corpus.layers, on_step))
        written = finished


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
    """What is trained, and a name for its files."""
    if settings.kind == "lm":
        start = start or pruned.first_layers(target, settings.num_layers)
        return PrunedStudent(target, settings.num_layers, start), f"{settings.num_layers}-layers"
    if start is None:
        frequent = sampler.frequent_tokens(settings.head_tokens, vocabulary_size(target))
        start = head.initial_tensors(target, frequent, *sampler.feature_statistics())
    return HeadStudent(target, settings.depth, start), "head"


def train(target, corpus: Corpus, folder: Path, settings: DistillSettings, target_name: str, on_progress,
          start: dict | None = None) -> dict:
    """Train on the corpus; checkpoints in its folder, the best drafter so far in `folder`."""
    sampler = _Sampler(corpus, settings)
    student, name = _student(target, settings, sampler, start)
    own = student.own
    for parameter in own.values():
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(own.values(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    checkpoint = corpus.folder / f"checkpoint-{name}.safetensors"
    best_folder = corpus.folder / f"best-{name}"
    step, best = _restore(checkpoint, own, optimizer, settings)
    if best:
        # The output folder may be a new one, or may have been lost since the interruption.
        drafter_folder.publish(best_folder, folder, student.kind)
    step_tokens = settings.batch_rows * corpus.settings.length
    saved, is_whole = time.monotonic(), True
    try:
        while step < settings.num_steps:
            is_whole = False
            for group in optimizer.param_groups:
                group["lr"] = _learning_rate(step, settings)
            loss = _update(student, optimizer, sampler.batch(step), step, settings)
            step += 1
            if step % settings.evaluate_every == 0 or step == settings.num_steps:
                held_out = evaluate(student, sampler.held_out())
                if held_out["accepted_at_4"] > best.get("accepted_at_4", -1.0):
                    best = held_out
                    student.save(best_folder, _card(target, target_name, step, settings, held_out))
                    drafter_folder.publish(best_folder, folder, student.kind)
            is_whole = True
            on_progress(Progress("training", step * step_tokens, settings.num_steps * step_tokens, best, loss))
            if time.monotonic() - saved > settings.checkpoint_seconds:
                _save(checkpoint, own, optimizer, step, best, settings)
                saved = time.monotonic()
    finally:
        # Also on Ctrl-C; but in the middle of a step parameters and optimizer do not fit together, and the last
        # checkpoint stands.
        if is_whole:
            _save(checkpoint, own, optimizer, step, best, settings)
    return best


def _update(student, optimizer, batch, step, settings):
    """One update; returns the loss, or None where the rows hold nothing to learn from."""
    generator = torch.Generator().manual_seed(settings.corpus.seed * 7_919 + step)
    loss = student.loss(batch, settings.loss_positions, generator, step / settings.num_steps)
    if loss is None:
        return None
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()
    return loss.item()


def _learning_rate(step, settings):
    """Linear warm-up, then linear decay to a twentieth."""
    warm = min(1.0, (step + 1) / settings.warmup_steps)
    return settings.learning_rate * warm * (1 - 0.95 * step / settings.num_steps)


def _card(target, target_name, step, settings, held_out):
    """What the drafter's card tells: for which target, from what, how good."""
    return {"target": {"name": target_name, "identity": target_identity(target), "class": type(target).__name__,
                       "hidden_size": target.config.get_text_config().hidden_size,
                       "vocabulary": target.config.get_text_config().vocab_size},
            "trained": {"steps": step, "tokens_of_text": settings.corpus.num_shards * settings.corpus.rows
                        * settings.corpus.length, "settings": settings.identity},
            "held_out": held_out}


def _save(file, own, optimizer, step, best, settings):
    tensors = {}
    for key, parameter in own.items():
        tensors[key] = parameter.detach()
        state = optimizer.state.get(parameter, {})
        for name in OPTIMIZER_STATE:
            if name in state:
                tensors[f"{name}/{key}"] = state[name]
    with atomic_file(file) as temporary:
        save_file(tensors, temporary, metadata={
            "step": str(step), "best": json.dumps(best), "settings": json.dumps(settings.identity),
            "digest": _digest(tensors)})


def _digest(tensors):
    """A hash of named tensors, to tell a damaged checkpoint."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        digest.update(key.encode())
        digest.update(tensors[key].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _restore(file, own, optimizer, settings):
    """Put parameters and optimizer back as they were; returns the step reached and the best figures so far."""
    if not file.exists():
        return 0, {}
    try:
        with safe_open(file, "pt") as stored:
            metadata = stored.metadata()
            tensors = {key: stored.get_tensor(key) for key in stored.keys()}
        if metadata["digest"] != _digest(tensors):
            raise ValueError("its contents are not what was written")
        step, best, identity = int(metadata["step"]), json.loads(metadata["best"]), json.loads(metadata["settings"])
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise ModelError(f"{file} is damaged ({error!r}): delete it to train anew on the same text") from error
    if identity != settings.identity:
        raise ModelError(f"{file} belongs to a run with other settings: delete it to start anew, "
                         "or choose another work folder")
    with torch.no_grad():
        for key, parameter in own.items():
            parameter.copy_(tensors[key])
            if f"exp_avg/{key}" in tensors:
                optimizer.state[parameter] = {
                    name: tensors[f"{name}/{key}"].to("cpu" if name == "step" else parameter.device)
                    for name in OPTIMIZER_STATE}
    return step, best
