"""What a distillation is asked to do, and what it tells of itself while it runs."""

import math
from dataclasses import asdict, dataclass, field

from speckv import head, pruned
from speckv.corpus import CorpusSettings
from speckv.errors import InputError

KINDS = {"lm": pruned.KIND, "head": head.KIND}
DEFAULT_LAYERS = {"lm": 2, "head": 1}
HELD_OUT_ROWS = 32  # the first rows of shard 0; never trained on
HISTORY_FILE = "history.json"


@dataclass(frozen=True)
class DistillSettings:
    """What to train and on how much. Everything but checkpoint_seconds is part of a run's identity.

    With hours, text and training end by the clock: corpus.tokens is the most text there will be, epochs is not used.
    """

    kind: str = "head"
    num_layers: int | None = None  # where not given, that of DEFAULT_LAYERS
    head_tokens: int = 8_192    # how many different tokens a head can draft
    depth: int = 3              # how many of its own tokens deep a head is trained
    corpus: CorpusSettings = field(default_factory=CorpusSettings)
    epochs: float = 10.0
    hours: float | None = None  # of wall time, text and training, all sittings together
    batch_rows: int = 4
    loss_positions: int = 960   # of a batch; a head reads all of its rows whatever this is
    learning_rate: float = 1e-3
    warmup_steps: int = 50
    evaluate_every: int = 300
    start_from: str = ""        # sha256 of the weights that training starts from, see distill
    checkpoint_seconds: float = 120.0

    def __post_init__(self):
        if self.kind not in KINDS:
            raise InputError(f"unknown kind of drafter {self.kind!r}: choose one of {', '.join(KINDS)}")
        if self.num_layers is None:
            object.__setattr__(self, "num_layers", DEFAULT_LAYERS[self.kind])
        numbers = (self.num_layers, self.head_tokens, self.depth, self.epochs, self.corpus.tokens, self.batch_rows,
                   self.loss_positions, self.warmup_steps, self.evaluate_every, self.learning_rate,
                   1 if self.hours is None else self.hours)
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


def places(work_folder, settings):
    """Where drafters of a kind and depth keep checkpoint, the best drafter so far, and the time their text took."""
    layers = settings.num_layers
    if settings.kind == "lm":
        name = f"{layers}-layers"
    else:
        name = "head" if layers == 1 else f"{layers}-layer-head"  # work folders of before have heads of one layer
    checkpoint, best_folder, clock = f"checkpoint-{name}.safetensors", f"best-{name}", f"text-{name}.json"
    return work_folder / checkpoint, work_folder / best_folder, work_folder / clock
