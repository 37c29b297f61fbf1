"""Train a drafter for a given target on text the target wrote itself.

The drafter is the target's first layers (speckv/pruned.py) trained on the target's full distribution at every position
of its answers. Both halves can be interrupted at any moment: text is kept in finished shards, training in checkpoints,
and what a step trains on depends only on its number.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn import functional as F

from speckv import drafter_folder, pruned
from speckv.corpus import ROLE_ANSWER, Corpus, CorpusSettings, target_identity, write_shard
from speckv.errors import InputError, ModelError
from speckv.files import atomic_file, check_writable, locked

HELD_OUT_ROWS = 32  # the first rows of shard 0; never trained on
MATCH_GAMMA = 4
OPTIMIZER_STATE = ("step", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class DistillSettings:
    """What to train and on how much. Everything but checkpoint_seconds is part of a run's identity."""

    num_layers: int = 2
    corpus: CorpusSettings = field(default_factory=CorpusSettings)
    epochs: float = 10.0
    batch_rows: int = 4
    loss_positions: int = 512
    learning_rate: float = 1e-3
    warmup_steps: int = 50
    evaluate_every: int = 100
    checkpoint_seconds: float = 120.0

    def __post_init__(self):
        numbers = (self.epochs, self.corpus.tokens, self.batch_rows, self.loss_positions, self.warmup_steps,
                   self.evaluate_every)
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
            on_progress: Callable[[Progress], None] = lambda progress: None) -> dict:
    """Write the text, train, and leave the best drafter so far in `folder`; returns its held-out figures.

    target is dense (bf16 or fp32); work_folder keeps text and checkpoints, and a run started again on it goes on where
    it stopped. Raises ModelError for a target that cannot be pruned, and where work_folder belongs to another run.
    """
    folder, work_folder = Path(folder), Path(work_folder)
    first = pruned.first_layers(target, settings.num_layers)
    _check_head(target)
    check_writable(folder)
    check_writable(work_folder)
    with locked(work_folder, "distilling", wait=False), _frozen(target):
        corpus = Corpus(work_folder, settings.corpus, target_identity(target))
        write_text(target, tokenizer, corpus, on_progress)
        return train(target, corpus, first, folder, settings, target_name, on_progress)


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
        corpus.add(index, write_shard(target, tokenizer, settings, index, on_step))
        written = finished


def head_logits(model, hidden):
    """The model's logits from its last hidden states, soft cap included (Gemma 2)."""
    head = model.get_output_embeddings()
    logits = head(hidden.to(head.weight.dtype))
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return torch.tanh(logits / cap) * cap if cap else logits


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

    def batch(self, step):
        """tokens [rows, length], roles [rows, length], hidden [rows, length, H] of a step."""
        first = step * self._batch
        return self.gather([self._row(first + i) for i in range(self._batch)])

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


def train(target, corpus: Corpus, first: dict, folder: Path, settings: DistillSettings, target_name: str,
          on_progress) -> dict:
    """Train from `first` (name -> tensor); checkpoints in the corpus folder, the best drafter so far in `folder`."""
    device = target.device
    drafter = pruned.prune(target, settings.num_layers)
    pruned.fill(drafter, first, torch.float32, device)
    own = {key: parameter for key, parameter in drafter.base_model.named_parameters()
           if key in pruned.own_state(drafter)}
    for parameter in own.values():
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(own.values(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    checkpoint = corpus.folder / f"checkpoint-{settings.num_layers}-layers.safetensors"
    best_folder = corpus.folder / f"best-{settings.num_layers}-layers"
    step, best = _restore(checkpoint, own, optimizer, settings)
    if best:
        # The output folder may be a new one, or may have been lost since the interruption.
        drafter_folder.publish(best_folder, folder, pruned.KIND)
    sampler = _Sampler(corpus, settings)
    step_tokens = settings.batch_rows * corpus.settings.length
    saved, is_whole = time.monotonic(), True
    try:
        while step < settings.num_steps:
            is_whole = False
            for group in optimizer.param_groups:
                group["lr"] = _learning_rate(step, settings)
            loss = _train_step(target, drafter, optimizer, sampler.batch(step), step, settings)
            step += 1
            if step % settings.evaluate_every == 0 or step == settings.num_steps:
                held_out = evaluate(target, drafter, sampler)
                if held_out["match"] > best.get("match", -1.0):
                    best = held_out
                    card = _card(target, target_name, step, settings, held_out)
                    drafter_folder.write(best_folder, pruned.KIND, own, card)
                    drafter_folder.publish(best_folder, folder, pruned.KIND)
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


def _train_step(target, drafter, optimizer, batch, step, settings):
    """One update: cross-entropy against the target's full distribution at some positions of its answers."""
    tokens, roles, hidden = batch
    device = target.device
    # Position i predicts token i + 1, so what counts is whether that one was the target's own.
    answers = (roles[:, 1:] == ROLE_ANSWER).flatten().nonzero().flatten()
    generator = torch.Generator().manual_seed(settings.corpus.seed * 7_919 + step)
    chosen = answers[torch.randperm(len(answers), generator=generator)[:settings.loss_positions]]
    if len(chosen) == 0:  # short rows may hold questions only
        return None
    with torch.autocast(device.type, torch.bfloat16):
        output = drafter.base_model(tokens[:, :-1].to(device), use_cache=False).last_hidden_state
        logits = head_logits(drafter, output.flatten(0, 1)[chosen.to(device)])
        with torch.no_grad():
            teacher = head_logits(target, hidden[:, :-1].flatten(0, 1)[chosen].to(device)).float().softmax(-1)
    loss = F.cross_entropy(logits.float(), teacher)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()
    return loss.item()


def _learning_rate(step, settings):
    """Linear warm-up, then linear decay to a twentieth."""
    warm = min(1.0, (step + 1) / settings.warmup_steps)
    return settings.learning_rate * warm * (1 - 0.95 * step / settings.num_steps)


@torch.no_grad()
def evaluate(target, drafter, sampler) -> dict:
    """Held-out figures, in the target's own answers.

    match: share of positions where the drafter's first choice is the target's. accepted: mean number of draft tokens
    a greedy target would accept at gamma 4, counted where its text is its own first choice four tokens on.
    """
    matches, chains = [], []
    for first in range(0, HELD_OUT_ROWS, 8):
        tokens, roles, hidden = sampler.gather(range(first, first + 8))
        with torch.autocast(target.device.type, torch.bfloat16):
            output = drafter.base_model(tokens.to(target.device), use_cache=False).last_hidden_state
        for row in range(len(tokens)):
            positions = (roles[row, 1:] == ROLE_ANSWER).nonzero().flatten()
            choice = head_logits(target, hidden[row, positions].to(target.device)).argmax(-1).cpu()
            drafted = head_logits(drafter, output[row, positions.to(output.device)]).argmax(-1).cpu()
            match = drafted == choice
            greedy = choice == tokens[row, positions + 1]
            matches.append(match)
            if len(match) >= MATCH_GAMMA:
                follows = greedy.unfold(0, MATCH_GAMMA, 1).all(-1)
                chains.append(match.unfold(0, MATCH_GAMMA, 1)[follows].long().cumprod(-1).sum(-1))
    match, accepted = (torch.cat(pieces).float() if pieces else torch.zeros(0) for pieces in (matches, chains))
    return {"match": match.mean().item() if len(match) else 0.0,
            "accepted_at_4": accepted.mean().item() if len(accepted) else 0.0}


def _card(target, target_name, step, settings, held_out):
    """What the drafter's card tells: for which target, from what, how good."""
    return {"num_layers": settings.num_layers,
            "target": {"name": target_name, "identity": target_identity(target), "class": type(target).__name__,
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
