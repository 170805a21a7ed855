"""Seeds as arithmetic: every random choice is a pure function of where it happens, so no RNG state is ever saved."""

from __future__ import annotations

import hashlib
import random

import torch


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from a path of names and numbers, equal on every machine."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_everything(*parts: int | str) -> None:
    """Seed torch (all devices), NumPy and Python's ``random`` from a path of names and numbers."""
    import numpy as np

    seed = derive_seed(*parts)
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
