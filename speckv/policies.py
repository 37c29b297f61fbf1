"""Policies by the names of the command line."""

from speckv.adaptive import Adaptive
from speckv.baselines import SVIP, AdaEDL, HFConfidence, HFHeuristic, Paper, SpecDecPlusPlus
from speckv.controller import shipped_controller
from speckv.errors import InputError
from speckv.names import POLICIES
from speckv.policy import Fixed, Policy

NAMED = {
    "adaptive": Adaptive, "hf-confidence": HFConfidence, "hf-heuristic": HFHeuristic, "adaedl": AdaEDL, "svip": SVIP,
    "specdec++": SpecDecPlusPlus, "paper": lambda: Paper(shipped_controller("paper"))}


def parse_policy(policy) -> Policy:
    """A policy from its name on the command line; a policy object is returned as it is. Raises InputError."""
    if hasattr(policy, "open") and hasattr(policy, "name"):
        return policy
    if not isinstance(policy, str):
        raise InputError(f"policy is {policy!r}: give a name ({POLICIES}) or an object with a name and open()")
    if policy == "off":
        return Fixed(0)
    if policy in NAMED:
        return NAMED[policy]()
    name, _, argument = policy.partition(":")
    if name == "fixed":
        try:
            return Fixed(int(argument))
        except ValueError as error:
            if isinstance(error, InputError):
                raise
    raise InputError(f"unknown policy {policy!r}: choose {POLICIES}")
