"""The loop: draft until the policy says stop, verify in one pass of the target, roll both caches back, go on."""

import re
import time

import torch

from speckv.arguments import checked_gamma, checked_settings
from speckv.cache import check_rollback
from speckv.drafters import as_drafter
from speckv.errors import NumericalError
from speckv.fast import open_target
from speckv.kernels import verify_chain
from speckv.policies import parse_policy
from speckv.policy import open_policy
from speckv.records import SpecOutput, StepRecord
from speckv.signals import read_signals


def generate(target, drafter, input_ids, attention_mask=None, max_new_tokens=128, policy="adaptive", temperature=0.0,
             seed=None, eos_token_id=None, on_step=None, top_k=0, top_p=1.0, min_p=0.0, fast=False) -> SpecOutput:
    """Decode with speculation: the target's own output, sooner.

    target is a causal language model of transformers, drafter a model that shares its tokenizer or a Drafter (None
    will do where the policy never drafts). policy is one of speckv.policies.POLICIES, or a Policy of your own, which
    may be given to many calls and keep what it learns. input_ids [1, n] i64; attention_mask [1, n] hides padding. At
    temperature 0 the output is that of greedy decoding, else a sample of softmax(logits / temperature); seed makes it
    repeatable. What is sampled from may be filtered: top_k keeps the k most probable tokens (0: all), top_p the fewest
    that hold this share of the probability (1: all), min_p those with this share of the highest probability (0: all),
    in this order, as in transformers (see speckv.kernels.reference.filter_logits).
    eos_token_id is an id, a list of ids, or None for what the target's generation_config says, of which nothing else
    is used. on_step(tokens, record) is called after every step with the new token ids. fast has the target read by the
    C++ engine of speckv.engine, several times as fast on a CPU; a target that it cannot read is decoded without it,
    with a warning that says why.

    Raises InputError or ModelError before any work where an argument cannot be used, and NumericalError, with the
    step, where a model's logits are not a distribution.
    """
    policy = parse_policy(policy)
    check_rollback(target, "target")
    drafter = as_drafter(drafter) if drafter is not None else None
    session = open_policy(policy, getattr(target, "speckv_compression", None))
    settings = checked_settings(target, drafter, session, input_ids, attention_mask, max_new_tokens, temperature, seed,
                                eos_token_id, top_k, top_p, min_p)

    started = time.perf_counter()
    run = _Run(target, drafter, session, settings, fast)
    run.prefill()
    prefilled = time.perf_counter()
    steps = []
    while not run.finished:
        try:
            tokens, record = run.step()
        except RuntimeError as error:
            raise _named(error, len(steps)) from error
        steps.append(record)
        if on_step is not None:
            on_step(tokens, record)
    new_ids = run.ids[:, settings.prompt.shape[1]:run.length]
    sequences = torch.cat([input_ids.long(), new_ids.to(input_ids.device)], dim=1)
    finished = time.perf_counter()
    return SpecOutput(sequences, input_ids.shape[1], finished - started, prefilled - started, steps)


class _Run:
    """One sequence being decoded; `ids[:, :length]` is what stands."""

    def __init__(self, target, drafter, policy, settings, fast):
        device = target.device
        self.length = settings.prompt.shape[1]
        self.end = self.length + settings.max_new_tokens
        self.ids = torch.empty(1, self.end, dtype=torch.int64, device=device)
        self.ids[:, :self.length] = settings.prompt
        self.finished = settings.max_new_tokens == 0
        self._eos_ids = settings.eos_ids
        self._target = open_target(target, fast)
        self._draft = drafter.open() if drafter is not None else None
        self._policy = policy
        self._own_signals = getattr(self._draft, "signals", None)
        self._wants_hidden = drafter.wants_hidden if drafter is not None else ()
        self._temperature = torch.full((1,), settings.temperature, device=device)
        self._filters = {name: torch.tensor([value], device=device) for name, value in settings.filters.items()}
        self._random = torch.Generator()
        self._random.manual_seed(settings.seed) if settings.seed is not None else self._random.seed()

    @torch.inference_mode()
    def prefill(self):
        """Read the prompt but for its last token, which the first step feeds."""
        prompt = self.ids[:, :self.length - 1]
        if prompt.shape[1] == 0 or self.finished:
            return
        self._read(prompt, keep=1)
        self._target.rollback(self.length - 1)
        if self._draft is not None and _will_draft(self._policy):
            getattr(self._draft, "prefill", self._draft.next_logits)(prompt)

    def _read(self, ids, keep):
        """The target's logits [1, keep, V] after the last tokens of ids; the drafter sees the hidden states."""
        start = self._target.length
        logits, hidden = self._target.read(ids, keep, self._wants_hidden)
        if self._wants_hidden:
            self._draft.observe(hidden, start)
        return logits

    @torch.inference_mode()
    def step(self):
        """Draft, verify, commit; returns the new token ids and the step's record."""
        started = time.perf_counter()
        # The target adds a token of its own, so one less than what is missing is worth drafting.
        gamma = min(checked_gamma(self._policy, self._draft), self.end - self.length - 1)
        # Fresh numbers for every step: reusing those of a rejected draft would tie the policy's choices to them.
        uniform = torch.rand(1, 2 * gamma + 1, generator=self._random).to(self.ids.device, non_blocking=True)
        draft_tokens, draft_logits, signals = self._draft_tokens(gamma, uniform[:, gamma + 1:])
        gamma = draft_tokens.shape[1]
        promise = self._policy.promise(gamma) if gamma else None
        drafted = time.perf_counter()

        target_logits = self._read(self.ids[:, :self.length + gamma], keep=gamma + 1)
        if draft_logits is None:
            draft_logits = target_logits[:, :0]
        tokens, _ = verify_chain(target_logits, draft_logits, draft_tokens, draft_tokens.new_full((1,), gamma),
                                 self._temperature, uniform[:, :gamma + 1], **self._filters)
        emitted = [token for token in tokens[0].tolist() if token >= 0]
        if not emitted:
            raise NumericalError("verify_chain: row 0: the logits are not a distribution (NaN, +inf, or all -inf)")
        emitted, accepted = self._commit(emitted)
        verified = time.perf_counter()
        record = StepRecord(gamma, accepted, len(emitted), (drafted - started) * 1e3, (verified - drafted) * 1e3,
                            signals, promise)
        self._policy.record(record)
        return emitted, record

    def _draft_tokens(self, gamma, uniform):
        """Draw up to gamma tokens into ids; returns them [1, n], their logits [1, n, V], and their signals."""
        tokens, logits, signals = [], [], []
        for i in range(gamma):
            row = self._draft.next_logits(self.ids[:, :self.length + i])
            # Drafter and policy end a draft by what is known before the token was drawn: its distribution and the
            # tokens before it. Every token that was drawn is verified, none is dropped for what it is, so the output's
            # distribution stays the target's.
            if row is None:
                break
            own = self._own_signals() if self._own_signals is not None else None
            token, signal, goes_on = self._policy.draft(row, self._temperature, uniform[:, i], i, own, **self._filters)
            # A GPU kernel reports bad logits as token -1, which no model may be fed; verify_chain sees it as padding.
            self.ids[:, self.length + i] = token.clamp(min=0)
            tokens.append(token)
            logits.append(row)
            signals.append(signal)
            if not goes_on:
                break
        if not tokens:
            return self.ids[:, :0], None, ()
        return torch.stack(tokens, dim=1), torch.stack(logits, dim=1), read_signals(signals)

    def _commit(self, emitted):
        """Keep the emitted tokens up to the first that ends the sequence; returns them and how many were drafted."""
        accepted = len(emitted) - 1
        end = next((i + 1 for i, token in enumerate(emitted) if token in self._eos_ids), None)
        emitted = emitted[:end]
        self.length += len(emitted)
        self.ids[0, self.length - 1] = emitted[-1]  # those before it were drafted, and stand there already
        self.finished = end is not None or self.length == self.end
        # The last token emitted has not been fed to either model.
        self._target.rollback(self.length - 1)
        if self._draft is not None:
            self._draft.rollback(self.length - 1)
        return emitted, min(accepted, len(emitted))


def _will_draft(policy):
    # A policy of the user's own may know nothing but max_draft.
    return policy.will_draft() if hasattr(policy, "will_draft") else policy.max_draft() > 0


def _named(error, step):
    """An op's complaint about logits with the step it came in; anything else as it is."""
    if isinstance(error, NumericalError) or re.match(r"(draft_sample|verify_chain): row \d+", str(error)):
        return NumericalError(f"step {step}: {error}")
    return error
