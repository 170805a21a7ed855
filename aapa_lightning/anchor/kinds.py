"""Types of what a reward model's folder says."""

from __future__ import annotations

from typing import Any

#: What ``discriminator.json`` of a ``RewardModelDiscriminator`` holds.
REWARD_MODEL_KINDS: dict[str, Any] = {
    "fingerprint": (str, type(None)),
    "model": (str, type(None)),
    "template": (str, type(None)),
    "server": (dict, type(None)),
    "temperature": (float, type(None)),
    "over_references": str,
    "max_references": (int, type(None)),
    "subtract_self": bool,
    "wrapper": str,
    "max_tokens": int,
    "max_response_tokens": int,
    "dtype": str,
    "batch_tokens": int,
    "device": (str, type(None)),
}
