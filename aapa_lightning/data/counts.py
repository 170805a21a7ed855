"""Counts in instructions: what a dataset may ask for."""

from __future__ import annotations

from typing import Any

#: No response has more of anything; larger numbers are mistakes, or made to break arithmetic.
LARGEST = 10**9

COUNT = f"a whole number, 0 or more (at most {LARGEST})"


def is_count(value: Any) -> bool:
    """Return whether a value is ``COUNT``."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST
