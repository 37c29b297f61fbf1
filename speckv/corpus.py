"""Training text written by the target itself, kept on disk in shards together with the target's hidden states.

A drafter is asked to continue the target's own answers, so those are what it should learn from: it is asked made-up
questions and answers them (greedily or sampled), in its own chat format; some rows also ask themselves. Every row of a
batch advances one token at a time in step with the others; what is not the target's to choose is forced rather than
sampled, so no row is ever padded. The hidden states that come for free are stored too: the last one stands for the
target's full distribution at every position.
"""

import copy
import hashlib
import json
import random
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from speckv.cache import cached, hidden_states, roomy_cache
from speckv.errors import ModelError
from speckv.files import atomic_file, claimed, locked, remove_leftovers, sha256, write_json
from speckv.kernels import draft_sample
from speckv.questions import question

ROLE_FORCED, ROLE_QUESTION, ROLE_ANSWER = 0, 1, 2
QUESTION_TEMPERATURE, ANSWER_TEMPERATURE = 0.9, 0.8
GREEDY_SHARE = 0.6
SELF_ASKING_SHARE = 0.3
MAX_QUESTION_TOKENS = 80
MAX_ARTICLE_TOKENS = 160  # of an answer that the next question quotes

# How a question that the target asks itself may begin. A small instruct model left to itself hardly ever asks for
# code or sums; half of them start freely all the same.
OPENERS = (
    "", "Write a Python function that", "", "Write a function to", "", "Solve this problem:", "", "How many",
    "", "Summarize the following text:\n", "", "Explain", "", "Give me a summary of this article:\n", "", "Compute",
    "", "Fix the bug in this code:\n```python\n", "", "What is", "", "Write a short story about", "", "If a",
    "", "Complete this function:\ndef ", "", "Based on the following passage, answer the question.\n",
    "", "Write an email", "", "A store sells",
)


@dataclass(frozen=True)
class CorpusSettings:
    """How much text, in what pieces. Shard i depends only on these and on i, so a shard can be made again alone (by the
    same version of Python, whose own sources are among the questions)."""
    tokens: int = 400_000
    rows: int = 128
    length: int = 512
    seed: int = 0

    @property
    def num_shards(self) -> int:
        return max(1, round(self.tokens / (self.rows * self.length)))


@dataclass(frozen=True)
class ChatFormat:
    """The token ids the chat template puts before a question, between question and answer, and after an answer."""
    before_question: list
    before_answer: list
    after_answer: list
    end_of_turn: frozenset


def chat_format(target, tokenizer) -> ChatFormat:
    """Read the format off the tokenizer's template; a base model without one writes plain text from its first token."""
    eos = target.generation_config.eos_token_id
    end_of_turn = frozenset([eos] if isinstance(eos, int) else eos or ())
    if not tokenizer.chat_template:
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if start is None:
            raise ModelError("the tokenizer has neither a chat template nor a first token to write from")
        return ChatFormat([start], [], [start], end_of_turn)
    question, answer, next_question = "@@question@@", "@@answer@@", "@@next@@"
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer},
         {"role": "user", "content": next_question}], tokenize=False)
    opened = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True)
    before_question, before_answer = opened.split(question)
    after_answer = text.split(answer)[1].split(next_question)[0]

    def encode(piece):
        return tokenizer(piece, add_special_tokens=False).input_ids
    return ChatFormat(encode(before_question), encode(before_answer), encode(after_answer), end_of_turn)


class _Turn(NamedTuple):
    """What comes next in a row: tokens it is given, then at most `limit` of its own, until it ends its turn."""

    forced: list
    role: int
    temperature: float
    limit: int | None = None


def _conversation(chat, tokenizer, draw, answer_temperature):
    """The turns of one row, for ever; is sent the tokens that the target said in each."""

    def encode(text):
        return tokenizer(text, add_special_tokens=False).input_ids

    def answer(text, limit=None):
        return _Turn(encode(text) + chat.before_answer, ROLE_ANSWER, answer_temperature, limit)

    between = []  # the format's tokens since the last answer; the first question's are in place
    while True:
        if not chat.before_answer:  # no chat format: plain text
            opener = "" if draw.random() < SELF_ASKING_SHARE else question(draw)[0] + "\n"
            turn = _Turn(encode(opener), ROLE_ANSWER, answer_temperature)
            yield turn._replace(forced=between + turn.forced)
        elif draw.random() < SELF_ASKING_SHARE:
            yield _Turn(between + encode(draw.choice(OPENERS)), ROLE_QUESTION, QUESTION_TEMPERATURE,
                        MAX_QUESTION_TOKENS)
            yield answer("")
        else:
            request, follow_up = question(draw)
            turn = answer(request, None if follow_up is None else MAX_ARTICLE_TOKENS)
            article = yield turn._replace(forced=between + turn.forced)
            if follow_up is not None:
                turn = answer(follow_up.format(text=tokenizer.decode(article, skip_special_tokens=True)))
                yield turn._replace(forced=chat.after_answer + turn.forced)
        between = chat.after_answer


class _Row:
    """One row's place in its conversation: what is forced next, whose turn it is, what was said in it."""

    def __init__(self, chat, conversation):
        self._end_of_turn = chat.end_of_turn
        self._conversation = conversation
        self._begin(next(conversation))

    def _begin(self, turn):
        self._turn = turn
        self._forced = turn.forced[::-1]
        self._said = []

    @property
    def temperature(self):
        return self._turn.temperature

    def take(self, sampled):
        """The row's next token, given what the model would say, and the role it is stored under."""
        if self._forced:
            return self._forced.pop(), ROLE_FORCED
        role = self._turn.role
        has_ended = sampled in self._end_of_turn
        if not has_ended:
            self._said.append(sampled)
        if has_ended or len(self._said) == self._turn.limit:
            self._begin(self._conversation.send(self._said))
            if self._forced[-1:] == [sampled]:  # the format's end of turn was said already
                self._forced.pop()
        return sampled, role


def _rows(chat, tokenizer, settings, index):
    """The rows of a shard at their start: what they talk about, and whether their answers are greedy or sampled."""
    rows = []
    for number in range(settings.rows):
        draw = random.Random(f"{settings.seed}/{index}/{number}")
        temperature = 0.0 if draw.random() < GREEDY_SHARE else ANSWER_TEMPERATURE
        rows.append(_Row(chat, _conversation(chat, tokenizer, draw, temperature)))
    return rows


@torch.inference_mode()
def write_shard(target, tokenizer, settings: CorpusSettings, index: int, layers: tuple, on_step=None):
    """Have the target write one shard: tokens [rows, length] i32, roles [rows, length] u8, hidden [rows, length, n·H].

    hidden[:, i] joins the target's hidden states after `layers` (see speckv.cache.hidden_states) at token i; the last
    of them is what its output head turns into its prediction of token i + 1.
    """
    chat = chat_format(target, tokenizer)
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + index)
    rows = _rows(chat, tokenizer, settings, index)

    tokens = torch.empty(settings.rows, settings.length, dtype=torch.int64)
    roles = torch.zeros(settings.rows, settings.length, dtype=torch.uint8)
    start = len(chat.before_question)
    tokens[:, :start] = torch.tensor(chat.before_question)
    device = target.device
    cache = roomy_cache(target.config, settings.length)
    hidden, fed = None, 0
    for length in range(start, settings.length + 1):
        output = target(tokens[:, fed:length].to(device), **cached(target, cache), output_hidden_states=True,
                        logits_to_keep=1)
        states = hidden_states(output, layers)
        if hidden is None:
            hidden = torch.empty(settings.rows, settings.length, states.shape[-1], dtype=torch.bfloat16)
        hidden[:, fed:length] = states
        fed = length
        if length == settings.length:
            break
        temperature = torch.tensor([row.temperature for row in rows])
        uniform = torch.rand(settings.rows, generator=generator)
        sampled, *_ = draft_sample(output.logits[:, -1], temperature.to(device), uniform.to(device))
        for number, (row, token) in enumerate(zip(rows, sampled.tolist(), strict=True)):
            tokens[number, length], roles[number, length] = row.take(token)
        if on_step is not None:
            on_step(settings.rows)
    return {"tokens": tokens.int(), "roles": roles, "hidden": hidden}


def target_identity(target) -> str:
    """A name for the target's weights: a hash of its configuration, final norm and some rows of its embedding.

    Taken in bf16, so that a model is the same whatever 16 or 32 bits it is held in.
    """
    digest = hashlib.sha256(repr(sorted(
        (key, value) for key, value in target.config.get_text_config().to_dict().items()
        if isinstance(value, int | float) and not isinstance(value, bool))).encode())
    embedding = target.get_input_embeddings().weight
    vectors = [tensor for tensor in target.base_model.state_dict().values() if tensor.dim() == 1]
    for tensor in (embedding[:: max(1, len(embedding) // 64)], *vectors):
        digest.update(tensor.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


class Corpus:
    """The shards in a folder. A manifest names each finished shard with its hash; anything else is made again."""

    def __init__(self, folder: Path, settings: CorpusSettings, target_identity: str, layers: tuple):
        self.folder = Path(folder)
        self.settings = settings
        self.layers = layers
        self._manifest_file = self.folder / "corpus.json"
        self._identity = {"target": target_identity, "rows": settings.rows, "length": settings.length,
                          "seed": settings.seed, "layers": list(layers)}
        self._hashes = self._read_manifest()
        self._verified = {}  # shards read and found whole, with their hashes: reading them takes a second each

    def first(self, count: int) -> "Corpus":
        """The same text, of which only the first shards count."""
        shorter = copy.copy(self)
        shorter.settings = replace(self.settings, tokens=count * self.settings.rows * self.settings.length)
        return shorter

    def _read_manifest(self):
        if not self._manifest_file.exists():
            return {}
        try:
            manifest = json.loads(self._manifest_file.read_text())
            identity, shards = manifest["identity"], dict(manifest["shards"])
        except (ValueError, KeyError, TypeError) as error:
            raise ModelError(
                f"{self._manifest_file} is damaged ({error!r}): delete the folder to start anew") from error
        if identity != self._identity:
            raise ModelError(f"{self.folder} holds text for {identity}, not {self._identity}: choose another folder, "
                             "or delete it")
        return shards

    def file(self, index: int) -> Path:
        return self.folder / f"shard-{index:05d}.safetensors"

    def missing(self) -> list:
        """Numbers of the shards that are not there, or not as they were written."""
        return [index for index in range(self.settings.num_shards) if not self._is_intact(index)]

    def _is_intact(self, index):
        file = self.file(index)
        digest = self._hashes.get(file.name)
        if digest is None or not file.exists():
            return False
        if self._verified.get(file.name) != digest and sha256(file) == digest:
            self._verified[file.name] = digest
        return self._verified.get(file.name) == digest

    @contextmanager
    def claim(self, index: int):
        """Ask to be the one process that makes a shard now; yields whether this one is. Dying lets go of it."""
        with claimed(self.folder / "claims" / f"{index:05d}.lock") as is_ours:
            if is_ours:
                remove_leftovers(self.folder, self.file(index).name)
            yield is_ours

    def has(self, index: int) -> bool:
        """Whether the shard is there as it was written, perhaps by another process a moment ago."""
        self._hashes = self._read_manifest()
        return self._is_intact(index)

    def add(self, index: int, tensors: dict) -> None:
        with atomic_file(self.file(index)) as temporary:
            save_file(tensors, temporary)
            digest = sha256(temporary)
        with locked(self.folder / "manifest", "adding text", wait=True):  # several processes may be writing shards
            remove_leftovers(self.folder, self._manifest_file.name)
            self._hashes = self._read_manifest()
            self._hashes[self.file(index).name] = self._verified[self.file(index).name] = digest
            write_json(self._manifest_file, {"identity": self._identity, "shards": dict(sorted(self._hashes.items()))})

    def read(self, index: int, *names) -> list:
        """The named tensors of a shard, memory-mapped."""
        with safe_open(self.file(index), "pt") as shard:
            return [shard.get_tensor(name) for name in names]
