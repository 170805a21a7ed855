"""Batches without padding: rows laid one behind the other, told apart by positions that begin at 0 again."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from aapa_lightning.chunked import product_dtype
from aapa_lightning.errors import ConfigError, in_one_line
from aapa_lightning.lm_head import causal_model, compiled, head_answers, text_config, vocabulary
from aapa_lightning.token_logprobs import token_logprobs

#: What a model's rows may see of other rows, as a share of what they would see of them in one row.
_LEAK = 1e-3
#: How far packed rows may be from padded ones, as the same share: in float32, and in 16 bits.
_ERROR, _HALF_ERROR = 0.01, 0.05
#: Lengths of the two rows that a model is tried with.
_PROBE = (13, 11)
#: Why a model cannot be packed ("" for none), by its attention implementation.
_TRIED: WeakKeyDictionary[nn.Module, dict[str, str]] = WeakKeyDictionary()


def set_packing(model: nn.Module, packing: bool | str) -> None:
    """Choose whether log-probs of a model come from packed rows from now on; copies of it keep the choice.

    Args:
        model: a causal language model, wrapped or not.
        packing: ``auto`` packs under flash attention, whose variable-length kernels lose nothing to long rows; True packs under every
            attention; False pads.

    Raises:
        ConfigError: neither of these.
    """
    inner: Any = causal_model(model)
    inner.aapa_packing = check_packing(packing)


def check_packing(packing: bool | str) -> bool | str:
    """The choice, where it is one.

    Raises:
        ConfigError: it is neither ``auto`` nor a bool.
    """
    if packing not in ("auto", True, False):
        raise ConfigError(f"packing: expected auto, true or false; found {packing!r}")
    return packing


def packs(model: nn.Module, device: torch.device) -> bool:
    """Whether a model's rows are packed: chosen, and tried once on two short rows.

    The trial (four forward passes of 24 tokens without gradient, in eval mode, no random numbers drawn) costs one small step per model and
    attention implementation. A model whose rows see each other, or whose packed rows get other log-probs, stays padded, and one warning
    says why. Ranks of a sharded model make it at the same call, as they make every forward pass.

    Args:
        model: a causal language model, wrapped or not.
        device: of its inputs.
    """
    inner: Any = causal_model(model)
    choice = getattr(inner, "aapa_packing", "auto")
    attention = str(getattr(text_config(inner), "_attn_implementation", None))
    if choice is False or (choice == "auto" and "flash" not in attention):
        return False
    tried = _TRIED.setdefault(inner, {})
    if attention not in tried:
        problem = _unfit(model, inner) or _mixes(model, inner, device)
        tried[attention] = problem
        if problem:
            warnings.warn(f"batches of {type(inner).__name__} stay padded: {problem}", stacklevel=2)
    return not tried[attention]


def _unfit(model: nn.Module, inner: Any) -> str:
    """What a model shows of itself that speaks against packing."""
    if compiled(model):
        return "torch.compile has compiled it, and packed batches differ in length"
    if "position_ids" not in inspect.signature(inner.forward).parameters:
        return "it takes no position_ids (ALiBi, state space)"
    if getattr(inner, "_is_stateful", False):
        return "it has a recurrent state, which would cross rows"
    # Chunks of chunked attention are counted from the start of a packed sequence by transformers before 5.16.
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
        with torch.no_grad(), _eval_mode(model), head_answers(inner.get_output_embeddings(), watch):
            alone = tail(padded_inputs(model, padded, mask))
            one_row = tail(_inputs(inner, torch.cat((first, second))[None], together[0], [long + short]))
            packed, beside = (tail(_inputs(inner, torch.cat((row, second))[None], together[1], list(_PROBE))) for row in (first, other))
    except Exception as error:  # every model refuses in its own way what it does not know
        return f"two packed rows end in {in_one_line(error)}"
    effect, leak, wrong = (float((a - b).abs().max()) for a, b in ((one_row, alone), (packed, beside), (packed, alone)))
    if not leak <= _LEAK * effect:
        return "its packed rows see each other"
    tolerance = _ERROR if dtypes <= {torch.float32, torch.float64} else _HALF_ERROR
    return "" if wrong <= tolerance * effect else "its packed rows get other log-probs than padded ones"


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _positions(lengths: Sequence[int], device: torch.device) -> Tensor:
    return torch.cat([torch.arange(length, device=device) for length in lengths])[None]


def padded_inputs(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, keep: int | None = None) -> dict[str, Any]:
    """What a model is called with for rows side by side.

    Args:
        model: a causal language model, wrapped or not.
        input_ids: int64 ``[N, T]``.
        attention_mask: bool ``[N, T]``.
        keep: logits of the last ``keep`` positions only.
    """
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask.long(), "use_cache": False}
    # Models without absolute or rotary positions (ALiBi, state space) have no such argument.
    if "position_ids" in inspect.signature(causal_model(model).forward).parameters:
        inputs["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    return inputs if keep is None else inputs | {"logits_to_keep": keep}


def _inputs(inner: Any, input_ids: Tensor, position_ids: Tensor, lengths: Sequence[int]) -> dict[str, Any]:
    """What a model is called with for rows behind each other. No mask: it follows from the positions."""
    inputs: dict[str, Any] = {"input_ids": input_ids, "position_ids": position_ids, "use_cache": False}
    kinds = [parameter.kind for parameter in inspect.signature(inner.forward).parameters.values()]
    if uses_flash(inner) and inspect.Parameter.VAR_KEYWORD in kinds:
        # Said once; else every layer reads the bounds of the rows off the positions, and waits for the device.
        ends = torch.tensor([0, *lengths], device=input_ids.device).cumsum(0, dtype=torch.int32)
        inputs |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": max(lengths), "max_length_k": max(lengths)}
    return inputs


def uses_flash(inner: Any) -> bool:
    """Whether a model computes with a flash attention, whose variable-length kernels take one long row."""
    return "flash" in str(getattr(text_config(inner), "_attn_implementation", None))


@dataclass(slots=True)
class PackedBatch:
    """Rows of a batch, packed into B rows of S tokens.

    Args:
        inner: the causal language model.
        inputs: what the model is called with.
        ids: int64 ``[B, S - 1]``, the token after each state but the last.
        wanted: bool ``[B, S - 1]``, those to score; M in all.
        rows: int64 ``[M]``, the packed row of each wanted token, in the order of the padded batch.
        columns: int64 ``[M]``, the column of the state before it.
        cells: int64 ``[M]``, its place in the flattened padded result.
        shape: of the padded result, ``[N, K]``.
    """

    inner: Any
    inputs: dict[str, Any]
    ids: Tensor
    wanted: Tensor
    rows: Tensor
    columns: Tensor
    cells: Tensor
    shape: torch.Size

    def pick(self, values: Tensor) -> Tensor:
        """Values ``[M, ...]`` of the wanted tokens out of ``[B, S - 1, ...]`` or ``[B, S, ...]``."""
        return values[self.rows, self.columns]

    def logits(self, model: nn.Module) -> Tensor:
        """Logits ``[M, V]`` before the wanted tokens: the head sees no prompt."""
        size = (self.ids.shape[0], self.ids.shape[1] + 1)

        def answer(original: Any, hidden: Tensor) -> Tensor:
            logits: Tensor = original(self.pick(hidden)[None] if hidden.shape[:2] == size else hidden)
            return logits

        with head_answers(self.inner.get_output_embeddings(), answer):
            logits: Tensor = model(**self.inputs).logits
        # A head that the model does not call through its forward has made all of them.
        return self.pick(logits) if logits.shape[:2] == size else logits[0]

    def spread(self, values: Tensor) -> Tensor:
        """Values ``[M]`` back in the padded layout ``[N, K]``, 0 elsewhere."""
        return values.new_zeros(self.shape.numel()).index_copy(0, self.cells, values).view(self.shape)


def pack(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, wanted: Tensor) -> PackedBatch | None:
    """Pack a batch, where its model is to be packed.

    Under flash attention all rows become one. Elsewhere a mask says who sees whom, and costs its size: rows fill up bins as long as the
    longest of them, the longest first, each into the first bin with room, so that no token sees more keys than in the padded batch.

    Args:
        model: a causal language model, wrapped or not.
        input_ids: int64 ``[N, T]``, padded anywhere.
        attention_mask: bool ``[N, T]``.
        wanted: bool ``[N, K]``, tokens to score among the last K; none is the first of its row.
    """
    if not packs(model, input_ids.device):
        return None
    mask = attention_mask.bool()
    lengths = mask.sum(1).tolist()
    if not any(lengths):
        return None
    inner = causal_model(model)
    places, used = _one_row(lengths) if uses_flash(inner) else _bins(lengths)
    width, device = max(used), input_ids.device
    within = mask.long().cumsum(1) - 1
    cell = torch.tensor([row * width + start for row, start in places], device=device)[:, None] + within
    kept = mask.reshape(-1).nonzero().squeeze(1)
    targets = cell.reshape(-1)[kept]
    ids = input_ids.new_zeros(len(used) * width).index_copy(0, targets, input_ids.reshape(-1)[kept])
    # What is left of a bin is a row of its own.
    rest = torch.arange(width, device=device) - torch.tensor(used, device=device)[:, None]
    positions = rest.clamp(min=0).reshape(-1).index_copy(0, targets, within.reshape(-1)[kept]).view(-1, width)

    scored = wanted.reshape(-1).nonzero().squeeze(1)
    skipped = input_ids.shape[1] - wanted.shape[1]
    found = cell[:, skipped:].reshape(-1)[scored]
    chosen = torch.zeros(len(used) * width, dtype=torch.bool, device=device).index_fill(0, found, True).view(-1, width)
    ids = ids.view(-1, width)
    real = [length for length in lengths if length]
    return PackedBatch(
        inner=inner,
        inputs=_inputs(inner, ids, positions, real),
        ids=ids[:, 1:],
        wanted=chosen[:, 1:],
        rows=found // width,
        columns=found % width - 1,
        cells=scored,
        shape=wanted.shape,
    )


def _one_row(lengths: Sequence[int]) -> tuple[list[tuple[int, int]], list[int]]:
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    return [(0, start) for start in starts[:-1]], [starts[-1]]


def _bins(lengths: Sequence[int]) -> tuple[list[tuple[int, int]], list[int]]:
    """Bin and start of each row, and how far each bin is filled.

    >>> _bins([3, 5, 2, 0])
    ([(1, 0), (0, 0), (1, 3), (0, 5)], [5, 5])
    """
    width, used, places = max(lengths), list[int](), [(0, 0)] * len(lengths)
    for row in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        bin_ = next((i for i, filled in enumerate(used) if filled + lengths[row] <= width), len(used))
        if bin_ == len(used):
            used.append(0)
        places[row] = bin_, used[bin_]
        used[bin_] += lengths[row]
    return places, used
