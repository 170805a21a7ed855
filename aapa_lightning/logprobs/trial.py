"""Whether packed rows of a model are right: what it shows of itself, then two short rows, packed and padded."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from aapa_lightning.errors import in_one_line
from aapa_lightning.logprobs.chunked import product_dtype
from aapa_lightning.logprobs.head import causal_model, compiled, head_answers, text_config, vocabulary
from aapa_lightning.logprobs.inputs import packed_inputs, padded_inputs
from aapa_lightning.logprobs.tokens import token_logprobs

#: What a model's rows may see of other rows, as a share of what they would see of them in one row.
_LEAK = 1e-3
#: How far rows read in another way may be from what they are alone, as the same share: in float32, and in 16 bits.
TRIAL_ERROR, HALF_ERROR = 0.01, 0.05
#: Lengths of the two rows.
_PROBE = (13, 11)


def refusal(model: nn.Module, device: torch.device) -> str:
    """Why a model cannot be packed, or nothing.

    Four forward passes of 24 tokens, without gradient and in eval mode: no random number is drawn.

    Args:
        model: a causal language model, wrapped or not.
        device: of its inputs.
    """
    inner = causal_model(model)
    return _unfit(model, inner) or _mixes(model, inner, device)


def _unfit(model: nn.Module, inner: Any) -> str:
    """What a model shows of itself that speaks against packing."""
    if compiled(model):
        return "torch.compile has compiled it, and packed batches differ in length"
    if "position_ids" not in inspect.signature(inner.forward).parameters:
        return "it takes no position_ids (ALiBi, state space)"
    if getattr(inner, "_is_stateful", False):
        return "it has a recurrent state, which would cross rows"
    # transformers 5.15 counts the chunks of chunked attention from the start of all rows, which a trial of short rows cannot see.
    odd = set(getattr(text_config(inner), "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    return f"it has layers of kind {', '.join(sorted(odd))}" if odd else ""


def _mixes(model: nn.Module, inner: Any, device: torch.device) -> str:
    """Compare packed rows with padded ones, and with what the first row would do to the second if they were one."""
    size = vocabulary(inner)
    if not size:
        return "it shows no LM head (get_output_embeddings) or no vocabulary size"
    long, short = _PROBE
    ids = (torch.arange(2 * long + short, device=device) * 7919 + 31) % size
    first, other, second = ids.split((long, long, short))
    together = _positions([long + short], device), _positions([long, short], device)
    mask = torch.ones(2, long, dtype=torch.bool, device=device)
    mask[1, : long - short] = False
    padded = torch.stack((first, nn.functional.pad(second, (long - short, 0))))

    dtypes = set()

    def watch(original: Any, hidden: Tensor) -> Tensor:
        dtypes.add(product_dtype(hidden, hidden))
        logits: Tensor = original(hidden)
        return logits

    def tail(inputs: dict[str, Any]) -> Tensor:
        logits = model(**inputs).logits[-1:, -short:-1]
        return token_logprobs(logits, second[None, 1:])[0]

    try:
        with torch.no_grad(), evaluating(model), head_answers(inner.get_output_embeddings(), watch):
            alone = tail(padded_inputs(model, padded, mask))
            one_row = tail(packed_inputs(inner, torch.cat((first, second))[None], together[0], [long + short]))
            packed, beside = (
                tail(packed_inputs(inner, torch.cat((row, second))[None], together[1], list(_PROBE))) for row in (first, other)
            )
    except Exception as error:  # every model refuses in its own way what it does not know
        return f"two packed rows end in {in_one_line(error)}"
    effect, leak, wrong = (float((a - b).abs().max()) for a, b in ((one_row, alone), (packed, beside), (packed, alone)))
    if not leak <= _LEAK * effect:
        return "its packed rows see each other"
    tolerance = TRIAL_ERROR if dtypes <= {torch.float32, torch.float64} else HALF_ERROR
    return "" if wrong <= tolerance * effect else "its packed rows get other log-probs than padded ones"


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode; afterwards, also after an exception, every module is as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def agree(found: Tensor, alone: Tensor, turned: Tensor, *, half: bool) -> bool:
    """Return whether what a trial found is what was expected, measured by what other text before would have changed.

    Args:
        found: read in the way on trial.
        alone: read in the plain way.
        turned: in the plain way, behind other text.
        half: computed in 16 bits.
    """
    effect, wrong = (float((part.float() - alone.float()).abs().max()) for part in (turned, found))
    return wrong <= (HALF_ERROR if half else TRIAL_ERROR) * effect


def half_precision(model: nn.Module, device: torch.device) -> bool:
    """Return whether a forward pass of now computes in 16 bits, in part or whole."""
    half = (torch.bfloat16, torch.float16)
    return torch.is_autocast_enabled(device.type) or any(p.dtype in half for p in model.parameters())


def _positions(lengths: Sequence[int], device: torch.device) -> Tensor:
    return torch.cat([torch.arange(length, device=device) for length in lengths])[None]
