"""Functions of numbers that the Triton kernels of the anchor advantage share."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def log1p(z):
    """log(1 + z), to the last digit also where 1 + z rounds."""
    u = 1.0 + z
    return tl.where(u == 1.0, z, tl.log(u) * (z / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def expm1(x):
    """exp(x) - 1 for x <= 0, to the last digit also where exp(x) rounds to 1."""
    u = tl.exp(x)
    inside = (u < 1.0) & (u > 0.0)
    return tl.where(u >= 1.0, x, tl.where(inside, (u - 1.0) * (x / tl.log(tl.where(inside, u, 0.5))), -1.0))


@triton.jit
def log_sigmoid(x):
    """Log sigma(x), finite for any x."""
    return tl.minimum(x, 0.0) - log1p(tl.exp(-tl.abs(x)))


@triton.jit
def transform_block(b_logit, expert, tau, TRANSFORM: tl.constexpr):
    """The transform g of sentence logits, see ``reference.transform_logits``."""
    if TRANSFORM == "score":
        b_g = b_logit / tau
    elif TRANSFORM == "gan_sat":
        b_g = -log_sigmoid(-b_logit / tau)
    elif TRANSFORM == "bt_gap":
        b_g = log_sigmoid((b_logit - expert) / tau)
    else:
        b_g = log_sigmoid(b_logit / tau)
    return b_g
