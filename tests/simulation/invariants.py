"""What must always hold (docs/architecture.md, "Invariants"): a named function each, raising `Violation`."""

from __future__ import annotations


class Violation(AssertionError):
    """An invariant does not hold. `rule` is the function's name or the rule's."""

    def __init__(self, rule: str, text: str) -> None:
        super().__init__(f"{rule}: {text}")
        self.rule = rule


def require(holds: bool, rule: str, text: str) -> None:
    if not holds:
        raise Violation(rule, text)
