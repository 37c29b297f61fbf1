"""The second half of a distillation: a drafter learns from the text; the best so far is kept."""

import shutil
import time
from pathlib import Path

import torch
from safetensors import safe_open

from speckv import checkpoint, distill_settings, drafter_folder, head, model_card, pruned, training_plot
from speckv.cache import vocabulary_size
from speckv.corpus import ROLE_ANSWER, Corpus, target_identity
from speckv.distill_settings import HISTORY_FILE, DistillSettings, Progress, places
from speckv.errors import ModelError
from speckv.files import write_json
from speckv.students import HeadStudent, PrunedStudent, evaluate

HELD_OUT_BATCH = 8
LEAST_TRAINING_SHARE = 0.1  # of the hours of a run by time, where one shard of text takes longer than its share


def train(target, corpus: Corpus, folder: Path, settings: DistillSettings, target_name: str, on_progress,
          start: dict | None = None, text_seconds: float = 0.0) -> dict:
    """Train on the corpus; checkpoints in its folder, the best drafter so far in `folder`.

    text_seconds is what of settings.hours, if given, has been spent on the text.
    """
    begun = saved = time.monotonic()
    file, best_folder, _ = places(corpus.folder, settings)
    sampler = Sampler(corpus, settings)
    student = _student(target, settings, sampler, start)
    own = student.own
    for parameter in own.values():
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(own.values(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    state = checkpoint.restore(file, own, optimizer, settings)
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
                checkpoint.save(file, own, optimizer, state, settings)
                saved = time.monotonic()
    finally:
        # Also on Ctrl-C; but in the middle of a step parameters and optimizer do not fit together, and the last
        # checkpoint stands.
        if is_whole:
            checkpoint.save(file, own, optimizer, state, settings)
    training_plot.draw(state.history, folder / training_plot.PLOT_FILE,
                       f"{settings.kind} drafter for {target_name or type(target).__name__}")
    return best


class Sampler:
    """Which rows step n trains on: each epoch is a shuffle of all rows but the held-out ones."""

    def __init__(self, corpus, settings):
        self._corpus = corpus
        rows = corpus.settings.num_shards * corpus.settings.rows
        self._rows = range(distill_settings.HELD_OUT_ROWS, rows)
        self._batch = settings.batch_rows
        self._seed = corpus.settings.seed
        self._small = [corpus.read(index, "tokens", "roles") for index in range(corpus.settings.num_shards)]
        self._hidden = [safe_open(corpus.file(index), "pt").get_slice("hidden")
                        for index in range(corpus.settings.num_shards)]

    def feature_statistics(self):
        """Mean of the hidden states [n·H] and one over their standard deviation, f32, over the first rows."""
        hidden = torch.cat([self._hidden[0][row] for row in range(distill_settings.HELD_OUT_ROWS)]).float()
        return hidden.mean(0), 1 / hidden.std(0).clamp(min=1e-6)

    def batch(self, step):
        """tokens [rows, length], roles [rows, length], hidden [rows, length, H] of a step."""
        first = step * self._batch
        return self.gather([self._row(first + i) for i in range(self._batch)])

    def held_out(self):
        """The held-out rows, a few at a time."""
        for first in range(0, distill_settings.HELD_OUT_ROWS, HELD_OUT_BATCH):
            yield self.gather(range(first, min(first + HELD_OUT_BATCH, distill_settings.HELD_OUT_ROWS)))

    def frequent_tokens(self, count, vocabulary):
        """The ids [count] of the tokens that the target writes most, ascending; lower ids first among equals."""
        written = torch.zeros(vocabulary, dtype=torch.int64)
        for shard, (tokens, roles) in enumerate(self._small):
            is_counted = roles == ROLE_ANSWER
            if shard == 0:
                is_counted[:distill_settings.HELD_OUT_ROWS] = False
            written += torch.bincount(tokens[is_counted].long(), minlength=vocabulary)
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
    is_trained = start is not None
    if start is None or len(start[head.TOKEN_IDS]) > settings.head_tokens:
        frequent = sampler.frequent_tokens(settings.head_tokens, vocabulary_size(target))
        if start is None:
            start = head.initial_tensors(target, frequent, *sampler.feature_statistics(), settings.num_layers)
        start = start | {head.TOKEN_IDS: frequent.int()}  # a head's own weights are the same for any tokens
    return HeadStudent(target, settings.depth, start, is_trained)


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
    trained_rows = text.num_shards * text.rows - distill_settings.HELD_OUT_ROWS
    config = target.config.get_text_config()
    return {"target": {"name": target_name, "identity": target_identity(target), "class": type(target).__name__,
                       "hidden_size": config.hidden_size, "vocabulary": config.vocab_size},
            "trained": {"steps": state.step, "epochs": state.step * settings.batch_rows / trained_rows,
                        "tokens_of_text": text.num_shards * text.rows * text.length,
                        "seconds": {"text": round(text_seconds, 1), "training": round(state.seconds, 1)},
                        "threads": torch.get_num_threads(), "device": target.device.type,
                        "dtype": str(target.dtype).removeprefix("torch."), "settings": settings.identity},
            "held_out": held_out}
