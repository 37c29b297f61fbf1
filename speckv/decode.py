"""The loop: draft until the policy says stop, verify in one pass of the target, roll both caches back, go on."""

import re
import time
from functools import lru_cache
from typing import NamedTuple

import torch

from speckv.arguments import checked_gamma, checked_settings
from speckv.cache import check_rollback, vocabulary_size
from speckv.drafters import OfSome, as_drafter, open_drafter
from speckv.errors import NumericalError
from speckv.fast import open_target
from speckv.head_engine import WantedChain
from speckv.kernels import verify_chain
from speckv.policies import parse_policy
from speckv.policy import open_policy
from speckv.processors import ends_text, process_draft, process_rows
from speckv.randomness import random_numbers, verify_coupled
from speckv.records import SpecOutput, StepRecord
from speckv.signals import read_signals
from speckv.stopping import StopRule

NO_DISTRIBUTION = "verify_chain: row 0: the logits are not a distribution (NaN, +inf, or all -inf)"


def generate(target, drafter, input_ids, attention_mask=None, max_new_tokens=128, policy="adaptive", temperature=0.0,
             seed=None, eos_token_id=None, on_step=None, top_k=0, top_p=1.0, min_p=0.0, fast=False,
             logits_processor=None, stopping_criteria=None) -> SpecOutput:
    """Decode with speculation: the target's own output, sooner.

    target is a causal language model of transformers, drafter a model that shares its tokenizer or a Drafter (None
    will do where the policy never drafts). policy is one of speckv.names.POLICIES, or a Policy of your own, which
    may be given to many calls and keep what it learns. input_ids [1, n] i64; attention_mask [1, n] hides padding. At
    temperature 0 the output is that of greedy decoding, else a sample of softmax(logits / temperature). With a seed the
    sample is that of plain decoding with this seed, whatever drafts and however much; without, numbers come from
    torch's own generator, and more of a draft is accepted (see speckv.randomness). What is sampled from may be
    filtered: top_k keeps the k most probable tokens (0: all), top_p the fewest that hold this share of the probability
    (1: all), min_p those with this share of the highest probability (0: all), in this order, as in transformers (see
    speckv.kernels.reference.filter_logits).
    eos_token_id is an id, a list of ids, or None for what the target's generation_config says, of which nothing else
    is used. on_step(tokens, record) is called after every step with the new token ids. fast has the target, and a
    drafter that is a model, run by the C++ engine of speckv.engine, several times as fast on a CPU; a model that it
    cannot read is run without it, with a warning that says why.

    logits_processor is a list of callables (ids [1, n], scores [1, V] f32) -> scores, transformers' own among them,
    that change the target's logits of every token, in turn and before temperature and filters; see speckv.processors
    for what is asked of them. stopping_criteria is a list of callables (ids [1, n], None) -> bool: the text ends with
    the first token behind which one says so, and each is asked once for every new token, in order. model.generate
    makes both of a generation_config and hands them to speckv.custom_generate.

    Raises InputError or ModelError before any work where an argument cannot be used, and NumericalError, with the
    step, where a model's logits are not a distribution.
    """
    run = open_run(target, drafter, input_ids, attention_mask, max_new_tokens, policy, temperature, seed, eos_token_id,
                   top_k, top_p, min_p, fast, logits_processor, stopping_criteria)
    run.prefill()
    if on_step is None:
        run.finish()
    while not run.finished:
        on_step(*run.step())
    return run.output()


def open_run(target, drafter, input_ids, attention_mask, max_new_tokens, policy, temperature, seed, eos_token_id, top_k,
             top_p, min_p, fast, logits_processor, stopping_criteria) -> "Run":
    """A decode that is about to begin, of arguments that are those of generate and checked as there."""
    policy = parse_policy(policy)
    check_rollback(target, "target")
    drafter = as_drafter(drafter, vocabulary_size(target)) if drafter is not None else None
    session = open_policy(policy, getattr(target, "speckv_compression", None))
    settings = checked_settings(target, drafter, session, input_ids, attention_mask, max_new_tokens, temperature, seed,
                                eos_token_id, top_k, top_p, min_p, logits_processor, stopping_criteria)
    return Run(target, drafter, session, settings, input_ids, fast)


class Draft(NamedTuple):
    """What a step proposes: tokens [1, n] i64 and the logits [1, n, V] they were drawn from, None where n is 0 or the
    text is greedy, of which verification asks for no more than the tokens."""

    tokens: torch.Tensor
    logits: torch.Tensor | None
    signals: tuple
    promise: float | None
    uniform: torch.Tensor  # [1, n + 1] f32, what verification draws with
    ms: float


class BegunDraft(NamedTuple):
    """A draft before its first token: at most gamma tokens, the numbers to draw and verify them with, the rule by which
    it ends where it is made in one call, and what the drafter wants for that where it drafts together with others."""

    started: float
    gamma: int
    to_draft: torch.Tensor
    to_verify: torch.Tensor
    rule: StopRule | None
    wanted: WantedChain | None = None
    ms: float = 0.0


class Run:
    """One sequence being decoded; `ids[:, :length]` is what stands."""

    def __init__(self, target, drafter, policy, settings, input_ids, fast):
        self._started = time.perf_counter()
        self._given = input_ids
        self._steps = []
        device = target.device
        self.length = self._prompt_length = settings.prompt.shape[1]
        self.end = self.length + settings.max_new_tokens
        self.ids = torch.empty(1, self.end, dtype=torch.int64, device=device)
        self.ids[:, :self.length] = settings.prompt
        self._host_ids = self.ids.numpy()[0] if device.type == "cpu" else None  # the same memory, written to sooner
        self.finished = settings.max_new_tokens == 0
        self._eos_ids = settings.eos_ids
        self._processors = settings.processors
        self._criteria = settings.criteria
        self.target = open_target(target, fast)
        self._draft = open_drafter(drafter, fast) if drafter is not None else None
        self.policy = policy
        self._own_signals = getattr(self._draft, "signals", None)
        self._vocabulary = drafter.vocabulary if drafter is not None else None
        policy.is_asked = hasattr(self._draft, "ask")
        if policy.is_asked:
            self._draft.ask(policy.may_draft)
        # Processors change a draft's logits between its tokens.
        self._may_chain = hasattr(self._draft, "chains") and not self._processors and self._host_ids is not None
        self.wants_hidden = drafter.wants_hidden if drafter is not None else ()
        self._is_greedy = settings.temperature == 0
        self._temperature = torch.full((1,), settings.temperature, device=device)
        self._filters = {name: torch.tensor([value], device=device) for name, value in settings.filters.items()}
        self._numbers = random_numbers(settings)
        self._longest_draft = settings.max_new_tokens
        self.takes_best = self._is_greedy and not self._processors and hasattr(self.target, "read_best")
        self._read = self.target.read_best if self.takes_best else self.target.read

    @property
    def left(self) -> int:
        """How many tokens more the text may have."""
        return self.end - self.length

    @torch.inference_mode()
    def prefill(self):
        """Read the prompt but for its last token, which the first step feeds."""
        prompt = self.prompt()
        self.end_prefill(None if prompt is None else self.target.read(prompt, 0, self.wants_hidden)[1])

    def prompt(self):
        """What prefill reads [1, n]; None where there is nothing to read."""
        return self.ids[:, :self.length - 1] if self.length > 1 and not self.finished else None

    @torch.inference_mode()
    def end_prefill(self, hidden):
        """After the target has read what there is of prompt(), with the hidden states that the drafter wants."""
        prompt = self.prompt()
        if prompt is not None:
            self._observe(hidden, 0)
            self.target.rollback(self.length - 1)
            if self._draft is not None and _will_draft(self.policy):
                getattr(self._draft, "prefill", self._draft.next_logits)(prompt)
        self._prefilled = time.perf_counter()

    def _observe(self, hidden, start):
        """Show the drafter the target's hidden states of the positions from `start` on."""
        if self.wants_hidden:
            self._draft.observe(hidden, start)

    @torch.inference_mode()
    def step(self):
        """Draft, verify, commit; returns the new token ids and the step's record."""
        return self._step()

    @torch.inference_mode()
    def finish(self):
        """All steps that are left, in one inference mode: after a pass entering it takes some 50 µs."""
        while not self.finished:
            self._step()

    def _step(self):
        draft = self.draft()
        started = time.perf_counter()
        draft, read, hidden = self.read(draft)
        return self.commit(draft, read, hidden, (time.perf_counter() - started) * 1e3)

    def read(self, draft):
        """The draft, the target's logits [1, n + 1, V] after the last token that stands and after each of the draft, or
        where takes_best a list of the n + 1 most probable tokens, and the hidden states that the drafter wants.

        Where memory does not suffice, the draft is cut in half, and none of this text is longer from then on. That
        depends on how many tokens there are and not on what they are, so the output stays the target's.
        """
        while True:
            try:
                return draft, *self._read(*self.request(draft), self.wants_hidden)
            except (RuntimeError, MemoryError) as error:
                if draft.tokens.shape[1] == 0 or not is_out_of_memory(error) or not self.target.restore():
                    raise
            # Out here nothing of the pass that failed is held any more.
            self._longest_draft = draft.tokens.shape[1] // 2
            draft = self._cut(draft, self._longest_draft)

    def _cut(self, draft, gamma):
        """The first tokens of a draft."""
        logits = None if draft.logits is None or gamma == 0 else draft.logits[:, :gamma]
        return Draft(draft.tokens[:, :gamma], logits, draft.signals[:gamma],
                     self.policy.promise(gamma) if gamma else None, draft.uniform[:, :gamma + 1], draft.ms)

    def request(self, draft):
        """What the target is to read to verify a draft: the text with it, and after how many tokens logits are needed.
        """
        gamma = draft.tokens.shape[1]
        return self.ids[:, :self.length + gamma], gamma + 1

    def draft(self) -> Draft:
        """Propose tokens."""
        try:
            return self._drafted(self._begun())
        except RuntimeError as error:
            raise self.named(error) from error

    def begin_draft(self) -> BegunDraft:
        """As `draft`, up to where other runs may draft together with this one; then comes end_draft."""
        begun = self._begun()
        if begun.rule is not None and hasattr(self._draft, "open_chain"):
            wanted = self._draft.open_chain(*self._chain_arguments(begun))
            begun = begun._replace(wanted=wanted, ms=(time.perf_counter() - begun.started) * 1e3)
        return begun

    def end_draft(self, begun, chain=None, ms=0.0) -> Draft:
        """The draft that was begun: of the chain that it wanted, which took so many milliseconds, or made alone."""
        if chain is None:
            try:
                return self._drafted(begun._replace(started=time.perf_counter()))
            except RuntimeError as error:
                raise self.named(error) from error
        started = time.perf_counter()
        self._draft.close_chain(begun.wanted, chain)
        made = self._of_chain(chain)
        return self._made(begun, *made, begun.ms + ms + (time.perf_counter() - started) * 1e3)

    def commit(self, draft, read, hidden, read_ms):
        """Verify a draft by what `read` returned of the target's in so many milliseconds; returns the new token ids and
        the step's record."""
        started = time.perf_counter()
        self._observe(hidden, self.length - 1)
        try:
            emitted = self._agreed(draft, read) if isinstance(read, list) else self._verified(draft, read)
        except RuntimeError as error:
            raise self.named(error) from error
        emitted, accepted = self._keep(emitted)
        verify_ms = read_ms + (time.perf_counter() - started) * 1e3
        record = StepRecord(draft.tokens.shape[1], accepted, len(emitted), draft.ms, verify_ms, draft.signals,
                            draft.promise)
        self.policy.record(record)
        self._steps.append(record)
        if self.finished:
            self._finished = time.perf_counter()
        return emitted, record

    def output(self) -> SpecOutput:
        """The text so far and how it came about."""
        new_ids = self.ids[:, self._prompt_length:self.length]
        sequences = torch.cat([self._given.long(), new_ids.to(self._given.device)], dim=1)
        finished = self._finished if self._steps and self.finished else time.perf_counter()
        return SpecOutput(sequences, self._given.shape[1], finished - self._started, self._prefilled - self._started,
                          self._steps)

    def _begun(self):
        started = time.perf_counter()
        # The target adds a token of its own, so one less than what is missing is worth drafting.
        gamma = min(checked_gamma(self.policy, self._draft), self._longest_draft, self.end - self.length - 1)
        to_draft, to_verify = self._numbers.of_step(self.length - self._prompt_length, gamma)
        if self._host_ids is None:
            to_draft, to_verify = (numbers.to(self.ids.device, non_blocking=True) for numbers in (to_draft, to_verify))
        return BegunDraft(started, gamma, to_draft, to_verify, self._chain_rule(gamma))

    def _drafted(self, begun):
        if begun.rule is None:
            made = self._draft_tokens(begun.gamma, begun.to_draft)
        else:
            made = self._of_chain(self._draft.draft_chain(*self._chain_arguments(begun)))
        return self._made(begun, *made, (time.perf_counter() - begun.started) * 1e3)

    def _made(self, begun, tokens, logits, signals, ms):
        gamma = tokens.shape[1]
        promise = self.policy.promise(gamma) if gamma else None
        return Draft(tokens, logits, signals, promise, begun.to_verify[:, :gamma + 1], ms)

    def _agreed(self, draft, best):
        """As _verified, of a greedy text from the target's most probable tokens: verify_chain would find them first."""
        for count, (token, drafted) in enumerate(zip(best, [*draft.tokens[0].tolist(), None], strict=True), 1):
            if token < 0:
                raise NumericalError(NO_DISTRIBUTION)
            if token != drafted:
                return best[:count]

    def _verified(self, draft, target_logits):
        """The tokens that the step emits: those of the draft that are accepted, and one of the target's own."""
        if self._processors:
            target_logits = process_rows(self._processors, self.request(draft)[0], target_logits)
        if self._numbers.are_of_positions:
            tokens = verify_coupled(target_logits, draft.tokens, self._temperature, draft.uniform, **self._filters)
        else:
            count = draft.tokens.shape[1]
            draft_logits = target_logits[:, :count] if draft.logits is None else draft.logits
            tokens = verify_chain(target_logits, draft_logits, draft.tokens, _as_tensor(count, draft.tokens.device),
                                  self._temperature, draft.uniform, **self._filters)[0][0].tolist()
        emitted = [token for token in tokens if token >= 0]
        if not emitted:
            raise NumericalError(NO_DISTRIBUTION)
        return emitted

    def _chain_rule(self, gamma):
        """By which a draft ends that is made in one call; None where the drafter or the policy goes token by token."""
        kind = self._draft.chains(self.ids[:, :self.length]) if gamma > 0 and self._may_chain else None
        return None if kind is None else self.policy.stop_rule(gamma, kind)

    def _chain_arguments(self, begun):
        return self.ids, self.length, begun.to_draft, self._temperature, self._filters, begun.rule

    def _of_chain(self, chain):
        """As _draft_tokens, of a draft that was made in one call."""
        if not chain.signals:
            return self.ids[:, :0], None, ()
        self.policy.drafted(chain)
        tokens = self.ids[:, self.length:self.length + len(chain.signals)]
        logits = None if self._is_greedy else self._widened(chain.logits, chain.token_ids).unsqueeze(0)
        return tokens, logits, chain.signals

    def _draft_tokens(self, gamma, uniform):
        """Draw up to gamma tokens into ids; returns them [1, n], their logits [1, n, V] or None, and their signals."""
        tokens, logits, signals = [], [], []
        for i in range(gamma):
            row, token_ids = self._proposed(self.ids[:, :self.length + i])
            # Drafter and policy end a draft by what is known before the token was drawn: its distribution and the
            # tokens before it. Every token that was drawn is verified, none is dropped for what it is, so the output's
            # distribution stays the target's.
            if row is None:
                break
            own = self._own_signals() if self._own_signals is not None else None
            token, signal, goes_on = self.policy.draft(row, self._temperature, uniform[:, i], i, own, **self._filters)
            tokens.append(self._place(self.length + i, token, token_ids))
            if not self._is_greedy:
                logits.append(self._widened(row, token_ids))
            signals.append(signal)
            if not goes_on:
                break
        if not tokens:
            return self.ids[:, :0], None, ()
        drawn = _joined(tokens) if self._host_ids is None else self.ids[:, self.length:self.length + len(tokens)]
        return drawn, _joined(logits) if logits else None, read_signals(signals)

    def _proposed(self, ids):
        """The drafter's logits [1, S] of the token after ids, None for no proposal, and the ids [S] of its tokens, None
        for those of the whole vocabulary."""
        row = self._draft.next_logits(ids)
        row, token_ids = row if isinstance(row, OfSome) else (row, None)
        if row is not None and self._processors:
            return process_draft(self._processors, ids, self._widened(row, token_ids)), None
        return row, token_ids

    def _widened(self, row, token_ids):
        """Logits [n, S] of some tokens as those [n, V] of all."""
        if token_ids is None:
            return row
        return row.new_full((len(row), self._vocabulary), float("-inf")).index_copy_(1, token_ids, row)

    def _place(self, position, token, token_ids):
        """Put a token that was drawn into ids; returns it [1], or None on a CPU, where it is read from there."""
        # Triton reports bad logits as token -1, which no model may be fed; verify_chain sees it as padding.
        if self._host_ids is not None:
            number = max(token.item(), 0)
            self._host_ids[position] = number if token_ids is None else token_ids.numpy()[number]
            return None
        if token_ids is not None:
            token = torch.where(token < 0, token, token_ids[token.clamp(min=0)])
        self.ids[0, position] = token.clamp(min=0)
        return token

    def _keep(self, emitted):
        """Keep the emitted tokens up to the first that ends the sequence; returns them and how many were drafted."""
        accepted = len(emitted) - 1
        start = self.length
        # Those before it were drafted, and stand there already.
        if self._host_ids is None:
            self.ids[0, start + accepted] = emitted[-1]
        else:
            self._host_ids[start + accepted] = emitted[-1]
        end = self._end(emitted, start)
        emitted = emitted[:end]
        self.length = start + len(emitted)
        self.finished = end is not None or self.length == self.end
        # The last token emitted has not been fed to either model.
        self.target.rollback(self.length - 1)
        if self._draft is not None:
            self._draft.rollback(self.length - 1)
        return emitted, min(accepted, len(emitted))

    def _end(self, emitted, start):
        """How many of the tokens emitted from `start` on there are up to the first that ends the text; None if none."""
        if not self._criteria and self._eos_ids.isdisjoint(emitted):
            return None
        for count, token in enumerate(emitted, 1):
            has_ended = bool(self._criteria) and ends_text(self._criteria, self.ids[:, :start + count])
            if has_ended or token in self._eos_ids:
                return count
        return None

    def named(self, error):
        """An op's complaint about logits with the step it came in; anything else as it is."""
        ops = r"(draft_sample|draft_step|draft_chains|verify_chain): row \d+"
        if isinstance(error, NumericalError) or re.match(ops, str(error)):
            return NumericalError(f"step {len(self._steps)}: {error}")
        return error


def is_out_of_memory(error) -> bool:
    """Whether an allocation failed: on a GPU, on a CPU in PyTorch's words, or elsewhere."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or bool(
        re.search(r"can't allocate memory|not enough memory|bad_alloc", str(error)))


@lru_cache(maxsize=256)
def _as_tensor(count, device):
    return torch.full((1,), count, device=device)


def _joined(rows):
    """[1, n, …] of n tensors [1, …]; of one without a copy, which for logits is the size of the vocabulary."""
    return rows[0].unsqueeze(1) if len(rows) == 1 else torch.stack(rows, dim=1)


def _will_draft(policy):
    # A policy of the user's own may know nothing but max_draft.
    return policy.will_draft() if hasattr(policy, "will_draft") else policy.max_draft() > 0
