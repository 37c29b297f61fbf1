"""How many tokens to draft in a step. A policy sees numbers, never a model."""

from dataclasses import dataclass
from typing import Protocol

from speckv.errors import InputError


class Policy(Protocol):
    """What the decoding loop asks; supply your own object with these members."""

    name: str

    def max_draft(self) -> int:
        """The most tokens the next step may draft; 0 is plain decoding."""


@dataclass(frozen=True)
class Fixed:
    """Draft the same number of tokens at every step; gamma 0 is plain decoding through the same loop."""

    gamma: int

    def __post_init__(self):
        if type(self.gamma) is not int:
            raise InputError(f"gamma is {self.gamma!r}: it must be a whole number")
        if self.gamma < 0:
            raise InputError(f"gamma is {self.gamma}: it must be 0 (plain decoding) or more")

    @property
    def name(self) -> str:
        return f"fixed:{self.gamma}" if self.gamma else "off"

    def max_draft(self) -> int:
        return self.gamma


POLICIES = "off, or fixed:N with N draft tokens a step"


def parse_policy(policy) -> Policy:
    """A policy from its name on the command line; a policy object is returned as it is. Raises InputError."""
    if hasattr(policy, "max_draft"):
        return policy
    if not isinstance(policy, str):
        raise InputError(f"policy is {policy!r}: give a name ({POLICIES}) or an object with max_draft()")
    name, _, argument = policy.partition(":")
    if policy == "off":
        return Fixed(0)
    if name == "fixed":
        try:
            return Fixed(int(argument))
        except ValueError as error:
            if isinstance(error, InputError):
                raise
    raise InputError(f"unknown policy {policy!r}: choose {POLICIES}")
