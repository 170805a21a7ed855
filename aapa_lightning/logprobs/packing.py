"""Batches without padding: rows laid one behind the other, told apart by positions that begin at 0 again."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapreplace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from aapa_lightning.errors import ConfigError
from aapa_lightning.logprobs.head import causal_model, head_answers, text_config
from aapa_lightning.logprobs.inputs import packed_inputs, uses_flash
from aapa_lightning.logprobs.trial import refusal

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
        problem = refusal(model, device)
        tried[attention] = problem
        if problem:
            warnings.warn(f"batches of {type(inner).__name__} stay padded: {problem}", stacklevel=2)
    return not tried[attention]


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

    Under flash attention all rows become one. Elsewhere a mask says who sees whom, and attention costs its size: rows fill bins about as
    wide as the longest of them, so that a token has about as many keys as in the padded batch.

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
    hidden = getattr(text_config(inner), "hidden_size", 1024)
    places, used = _one_row(lengths) if uses_flash(inner) else _bins(lengths, hidden)
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
        inputs=packed_inputs(inner, ids, positions, real),
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


def _bins(lengths: Sequence[int], hidden: int) -> tuple[list[tuple[int, int]], list[int]]:
    """Bin and start of each row, and how far each bin is filled, for the cheapest of a few counts of bins.

    With more bins than the tokens fill, cells are wasted; with fewer, a token's row is wider, and attention dearer. A layer costs about 12
    hidden^2 products a token, its attention 2 hidden x width.

    >>> _bins([3, 5, 2, 0], 64)
    ([(1, 0), (0, 0), (1, 3), (0, 5)], [5, 5])
    """
    fewest = sum(lengths) // max(lengths)
    tries = [_balanced(lengths, count) for count in range(max(fewest - 2, 1), fewest + 2)]
    return min(tries, key=lambda found: len(found[1]) * max(found[1]) * (6 * hidden + max(found[1])))


def _balanced(lengths: Sequence[int], count: int) -> tuple[list[tuple[int, int]], list[int]]:
    """Each row, the longest first, into the bin with most room."""
    heap, used, places = [(0, i) for i in range(count)], [0] * count, [(0, 0)] * len(lengths)
    for row in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        filled, emptiest = heap[0]
        places[row] = emptiest, filled
        used[emptiest] += lengths[row]
        heapreplace(heap, (used[emptiest], emptiest))
    return places, used
