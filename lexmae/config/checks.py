"""How a dataclass refuses a value."""

from __future__ import annotations

from lexmae.errors import InputError


def require(condition: bool, reason: str) -> None:
    """Raise InputError(reason) unless ``condition`` holds."""
    if not condition:
        raise InputError(reason)
