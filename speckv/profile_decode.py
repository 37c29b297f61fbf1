"""Where the time of one decode goes: the objects that a run calls are wrapped in timers for that run alone.

The decoding loop itself has no timer in it. What a wrapped call spends in another wrapped call counts for the inner
one, so the parts add up to the wall time, the rest being what nothing wrapped did.
"""

import time
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps

from rich.table import Table

from speckv import adaptive, controller, decode, policy, randomness
from speckv.cache import vocabulary_size
from speckv.drafters import as_drafter
from speckv.policies import parse_policy
from speckv.records import SpecOutput

PROMPT, TARGET, DRAFT = "prompt", "target forward", "draft forward"
POLICY, ROLLBACK, REST = "policy", "cache rollback", "rest"
CHAIN = "draft_chain"  # what is not the drafter's forward in it
OPS = ("draft_step", "draft_sample", "plan_gamma", "verify_chain")
FORWARDS = (PROMPT, TARGET, DRAFT)
PARTS = (*FORWARDS, CHAIN, *OPS, POLICY, ROLLBACK, REST)
_OP_CALLERS = (("verify_chain", decode), ("draft_sample", policy), ("draft_sample", randomness),
               ("draft_step", adaptive), ("plan_gamma", controller))
_TARGET_METHODS = {"read": TARGET, "read_best": TARGET, "rollback": ROLLBACK}
# A drafter's rollback and what it makes of the hidden states it is shown are part of what a draft costs.
_DRAFT_METHODS = dict.fromkeys(
    ("prefill", "next_logits", "chains", "draft_chain", "signals", "observe", "rollback"), DRAFT)
_POLICY_METHODS = dict.fromkeys(
    ("max_draft", "will_draft", "may_draft", "stop_rule", "draft", "drafted", "promise", "record"), POLICY)


@dataclass(frozen=True)
class Profile:
    """Of one decode: seconds and calls of each of PARTS (the prompt's are the target's and the drafter's together)."""

    output: SpecOutput
    wall_seconds: float
    seconds: dict
    calls: dict

    @property
    def share_outside_forwards(self) -> float:
        """Of the wall time, what was spent in neither model."""
        return 1 - sum(self.seconds[part] for part in FORWARDS) / self.wall_seconds


class _Timers:
    """Seconds and calls by part; a call's time is its own, without that of timed calls inside it."""

    def __init__(self):
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.calls = dict.fromkeys(PARTS, 0)
        self._inside = []  # seconds that timed calls took inside each open one
        self._is_prompt = False

    def timed(self, function, part):
        """The function, its time counted for a part; inside the prompt all is the prompt's."""
        def call(*args, **kwargs):
            if self._is_prompt:
                return function(*args, **kwargs)
            self._is_prompt = part == PROMPT
            self._inside.append(0.0)
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                taken = time.perf_counter() - started
                self.seconds[part] += taken - self._inside.pop()
                self.calls[part] += 1
                if self._inside:
                    self._inside[-1] += taken
                self._is_prompt = False
        return call

    def time_methods(self, thing, methods):
        """Time an object's methods on the object itself, which lives no longer than the run."""
        for name, part in methods.items():
            if hasattr(thing, name):
                method = getattr(thing, name)
                setattr(thing, name, self.timed(self._parted(method) if name == CHAIN else method, part))
        return thing

    def _parted(self, draft_chain):
        """The call with what it says of its own time counted for CHAIN."""
        def call(*args):
            chain = draft_chain(*args)
            self.seconds[CHAIN] += chain.seconds
            self.calls[CHAIN] += 1
            self._inside[-1] += chain.seconds
            return chain
        return call


class _Opened:
    """A drafter or a policy whose sessions are timed."""

    def __init__(self, opened, timers, methods):
        @wraps(opened.open)  # whoever opens it looks at what it takes
        def open_timed(*args, **kwargs):
            return timers.time_methods(opened.open(*args, **kwargs), methods)
        self._opened, self.open = opened, open_timed

    def __getattr__(self, name):
        return getattr(self._opened, name)


def profile(target, drafter, input_ids, policy="adaptive", **settings) -> Profile:
    """speckv.generate with the same arguments and the same text, timed."""
    timers = _Timers()
    drafter = None if drafter is None else _Opened(as_drafter(drafter, vocabulary_size(target)), timers, _DRAFT_METHODS)
    timed_policy = _Opened(parse_policy(policy), timers, _POLICY_METHODS)
    with _replaced(timers):
        started = time.perf_counter()
        output = decode.generate(target, drafter, input_ids, policy=timed_policy, **settings)
        wall = time.perf_counter() - started
    seconds = timers.seconds | {REST: wall - sum(timers.seconds.values())}
    return Profile(output, wall, seconds, timers.calls)


@contextmanager
def _replaced(timers):
    """The ops, the target's session and the reading of the prompt timed where the loop finds them, until the end."""
    def open_target(*args):
        return timers.time_methods(opened(*args), _TARGET_METHODS)
    opened = decode.open_target
    timed = [(module, op, timers.timed(getattr(module, op), op)) for op, module in _OP_CALLERS]
    timed += [(decode, "open_target", open_target), (decode.Run, "prefill", timers.timed(decode.Run.prefill, PROMPT))]
    original = [(owner, name, getattr(owner, name)) for owner, name, _ in timed]
    try:
        for owner, name, function in timed:
            setattr(owner, name, function)
        yield
    finally:
        for owner, name, function in original:
            setattr(owner, name, function)


def table(profiled: Profile) -> Table:
    """A row a part: milliseconds, per step, calls, and the share of the wall time."""
    output, steps = profiled.output, max(1, len(profiled.output.steps))
    result = Table(title=f"{output.new_tokens} tokens in {len(output.steps)} steps, "
                         f"{output.tokens_per_second:.1f} tokens/s", title_justify="left")
    for column in ("part", "ms", "ms a step", "calls", "share"):
        result.add_column(column, justify="left" if column == "part" else "right")
    for part in PARTS:
        seconds, calls = profiled.seconds[part], profiled.calls[part]
        if calls or part == REST:
            result.add_row(part, f"{1e3 * seconds:.2f}", "" if part == PROMPT else f"{1e3 * seconds / steps:.4f}",
                           f"{calls}" if calls else "", f"{seconds / profiled.wall_seconds:.2%}",
                           end_section=part in (DRAFT, ROLLBACK))
    result.add_row("outside the models", f"{1e3 * profiled.share_outside_forwards * profiled.wall_seconds:.2f}", "",
                   "", f"{profiled.share_outside_forwards:.2%}")
    result.add_row("wall", f"{1e3 * profiled.wall_seconds:.2f}", "", "", "100.00%")
    return result
