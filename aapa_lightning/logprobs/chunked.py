"""Log-probs and entropies from hidden states and a head's weight: vocabulary-sized logits never exist, in the backward pass neither."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: Tokens and vocabulary entries of a tile, the fastest of those measured on a CPU: 16 MiB in float32.
CPU_TILE = (1024, 4096)
#: Elsewhere larger products, so that every multiprocessor has work: 128 MiB in float32. By reasoning, not by measurement.
DEVICE_TILE = (4096, 8192)
#: exp of this is 0 in every dtype; a floor for differences of logits, so that a forbidden token (-inf) gives 0 * -1e4 and not NaN.
_NOTHING = -1e4


@dataclass(frozen=True, slots=True)
class Cap:
    """What a model does to its head's output: ``x -> cap * tanh(scale * x / cap)``, or ``scale * x`` without a cap."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """Apply it."""
        logits = logits if self.scale == 1.0 else logits * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


_PLAIN = Cap()


@dataclass(slots=True)
class _Tiles:
    """The head's output at ``softmax(cap(logits) / temperature)``, tile by tile, in the accumulation dtype."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    cap: Cap
    temperature: float
    compute: torch.dtype
    sums: torch.dtype
    rows: int
    columns: int

    def vocabulary(self) -> Iterator[tuple[slice, Tensor]]:
        """Slices of the vocabulary and their weights in the dtype of the products."""
        for start in range(0, len(self.weight), self.columns):
            part = slice(start, min(start + self.columns, len(self.weight)))
            yield part, self.weight[part].to(self.compute)

    def tokens(self) -> list[tuple[slice, Tensor]]:
        """Slices of the tokens and their hidden states in the dtype of the products."""
        hidden = self.hidden.to(self.compute)
        return [(slice(i, i + self.rows), hidden[i : i + self.rows]) for i in range(0, len(hidden), self.rows)]

    def buffer(self) -> Tensor:
        """Room for the largest tile."""
        size = min(self.rows, len(self.hidden)) * min(self.columns, len(self.weight))
        return torch.empty(size, dtype=self.compute, device=self.hidden.device)

    def logits(self, hidden: Tensor, weight: Tensor, part: slice, buffer: Tensor) -> tuple[Tensor, Tensor | None]:
        """A tile of scaled logits, and tanh's values where there is a cap. It may lie in ``buffer``."""
        out = buffer[: len(hidden) * len(weight)].view(len(hidden), len(weight))
        # In a 16-bit dtype the product is rounded as the model's own head rounds it, and scaled after; else the scale comes for free.
        free = self.compute == self.sums and self.cap.cap is None
        alpha = self.cap.scale / self.temperature if free else 1.0
        bias = out if self.bias is None else self.bias[part].to(self.compute)
        torch.addmm(bias, hidden, weight.t(), beta=0.0 if self.bias is None else alpha, alpha=alpha, out=out)
        tile = out.to(self.sums)
        if self.cap.cap is None:
            return (tile if free or self.factor == 1.0 else tile.mul_(self.factor)), None
        bent = tile.mul_(self.cap.scale / self.cap.cap).tanh_()
        return bent * (self.cap.cap / self.temperature), bent

    @property
    def factor(self) -> float:
        """Derivative of a scaled logit by the head's output, tanh's own left out."""
        return self.cap.scale / self.temperature


def _local(ids: Tensor, part: slice) -> tuple[Tensor, Tensor]:
    """Column of each id in a tile, and whether it lies in it at all. No synchronisation with the device."""
    return (ids - part.start).clamp(0, part.stop - part.start - 1).unsqueeze(1), (ids >= part.start) & (ids < part.stop)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right`` without rounding the product to 16 bits: rounded tile by tile, gradients drift."""
    if left.dtype == right.dtype == total.dtype:
        total.addmm_(left, right)
    elif total.is_cuda:  # 16-bit operands, as autograd's own product would have
        half = left.dtype if left.dtype != total.dtype else right.dtype
        torch.addmm(total, left.to(half), right.to(half), out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))


class _ChunkedLogprobs(torch.autograd.Function):
    """Saves the largest logit and the sum of exponentials of each token; the backward pass makes each tile again."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, entropy: bool, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        tiles = _Tiles(hidden, weight, bias, **options)
        with torch.autocast(hidden.device.type, enabled=False):
            largest, total, target, weighted = _sweep(tiles, ids, entropy)
        normaliser = total.log()
        entropies = normaliser - weighted / total if entropy else None
        ctx.save_for_backward(hidden, weight, bias, ids, largest, total, entropies)
        ctx.options = options
        return target - largest - normaliser, entropies

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("streamed log-probs have no second derivative, found create_graph=True; use logprob backend `full`")
        hidden, weight, bias, ids, *saved = ctx.saved_tensors
        tiles = _Tiles(hidden, weight, bias, **ctx.options)
        if grad_logprobs is None and grad_entropy is None:
            return (None,) * 6
        with torch.autocast(hidden.device.type, enabled=False):
            grads = _gradients(tiles, ids, saved, (grad_logprobs, grad_entropy), ctx.needs_input_grad[:3])
        return *grads, None, None, None


def _sweep(tiles: _Tiles, ids: Tensor, entropy: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per token ``[M]``: the largest logit z*, sum exp(z - z*), the logit of its id, and sum exp(z - z*) (z - z*) for the entropy."""
    # A finite start instead of -inf: differences are never NaN.
    largest = torch.full(ids.shape, torch.finfo(tiles.sums).min, dtype=tiles.sums, device=ids.device)
    total, target, weighted = torch.zeros_like(largest), torch.zeros_like(largest), torch.zeros_like(largest)
    buffer, tokens = tiles.buffer(), tiles.tokens()
    for part, weight in tiles.vocabulary():
        for rows, hidden in tokens:
            tile, _ = tiles.logits(hidden, weight, part, buffer)
            column, inside = _local(ids[rows], part)
            target[rows] = torch.where(inside, tile.gather(1, column).squeeze(1), target[rows])
            top = torch.maximum(largest[rows], tile.amax(1))
            moved = (largest[rows] - top).clamp(min=_NOTHING)
            largest[rows] = top
            tile.sub_(top.unsqueeze(1))
            masses = tile.clamp_(min=_NOTHING).exp() if entropy else tile.exp_()
            added = masses.sum(1)
            if entropy:
                before = weighted[rows] + total[rows] * moved
                weighted[rows] = before * moved.exp() + masses.mul_(tile).sum(1)
            total[rows] = total[rows] * moved.exp() + added
    return largest, total, target, weighted


def _row_terms(saved: list[Any], grads: tuple[Tensor | None, Tensor | None]) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """``[M, 1]`` each, with y = z - z*: the gradient by z is exp(y) (constant + slope y), plus ``direct`` at the token's id.

    From d logprob / dz_j = 1[j = id] - p_j and d entropy / dz_j = -p_j (log p_j + entropy), where p_j = exp(y_j) / total.
    """
    largest, total, entropies = saved
    by_logprob, by_entropy = grads
    direct = torch.zeros_like(total) if by_logprob is None else by_logprob
    constant, slope = direct, None
    if by_entropy is not None:
        constant, slope = direct + by_entropy * (entropies - total.log()), -(by_entropy / total).unsqueeze(1)
    return largest.unsqueeze(1), direct.unsqueeze(1), -(constant / total).unsqueeze(1), slope


def _room(grad: Tensor | None, part: slice, dtype: torch.dtype) -> Tensor | None:
    """Zeros to sum the gradient of a part of the head in: the gradient's own memory where its dtype allows."""
    if grad is None:
        return None
    return grad[part].zero_() if grad.dtype == dtype else torch.zeros_like(grad[part], dtype=dtype)


def _gradients(
    tiles: _Tiles, ids: Tensor, saved: list[Any], grads: tuple[Tensor | None, Tensor | None], needed: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    hidden, bias = tiles.hidden, tiles.bias
    grad_hidden = torch.zeros_like(hidden, dtype=tiles.sums) if needed[0] else None
    grad_weight = torch.empty_like(tiles.weight) if needed[1] else None
    grad_bias = torch.empty_like(bias) if needed[2] and bias is not None else None
    largest, direct, constant, slope = _row_terms(saved, grads)
    buffer, tokens = tiles.buffer(), tiles.tokens()
    for part, weight in tiles.vocabulary():
        weight_sum, bias_sum = _room(grad_weight, part, tiles.sums), _room(grad_bias, part, tiles.sums)
        for rows, states in tokens:
            tile, bent = tiles.logits(states, weight, part, buffer)
            tile.sub_(largest[rows])
            bend = constant[rows] if slope is None else torch.addcmul(constant[rows], tile.clamp_(min=_NOTHING), slope[rows])
            tile.exp_().mul_(bend)
            column, inside = _local(ids[rows], part)
            tile.scatter_add_(1, column, direct[rows] * inside.unsqueeze(1))
            if tiles.factor != 1.0:
                tile.mul_(tiles.factor)
            if bent is not None:
                tile.mul_(1 - bent.square_())
            if bias_sum is not None:
                bias_sum += tile.sum(0)
            if grad_hidden is not None:
                _add_product(grad_hidden[rows], tile, weight)
            if weight_sum is not None:
                _add_product(weight_sum, tile.t(), states)
        for grad, total in ((grad_weight, weight_sum), (grad_bias, bias_sum)):
            if grad is not None and total is not None and grad.dtype != total.dtype:
                grad[part] = total
    return None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight, grad_bias


def product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype in which a head multiplies: autocast's where it is on (float64 stays)."""
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) and dtype != torch.float64 else dtype


def chunked_logprobs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    cap: Cap = _PLAIN,
    entropy: bool = False,
    entropy_grad: bool = True,
    token_chunk: int | None = None,
    vocab_chunk: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    r"""Log-probs of tokens, and entropies, at softmax(cap(hidden weight^T + bias) / temperature), in tiles of tokens x vocabulary.

    Products are in the inputs' dtype (in autocast's, under autocast), everything else in float32 (float64 stays). Beside inputs and
    gradients it holds a few numbers a token and a few tiles. The backward pass makes the logits a second time; it cannot be
    differentiated again.

    Args:
        hidden: ``[M, H]``, the head's input.
        weight: ``[V, H]``, the head's weight.
        ids: int64 ``[M]``, in ``[0, V)``.
        bias: ``[V]``.
        temperature: positive; 0 (greedy decoding) is treated as 1.
        cap: what the model does to its head's output.
        entropy: also return entropies.
        entropy_grad: entropies carry a gradient; without one the backward pass is a little cheaper.
        token_chunk: tokens a tile; None picks by device.
        vocab_chunk: vocabulary entries a tile; None picks by device.

    Returns:
        Log-probs ``[M]`` and entropies ``[M]`` or None, nats, float32.

    Raises:
        ValueError: shapes or sizes that do not fit.

    >>> chunked_logprobs(torch.zeros(1, 3), torch.zeros(4, 3), torch.tensor([2]), entropy=True)
    (tensor([-1.3863]), tensor([1.3863]))
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or ids.shape != hidden.shape[:1]:
        found = f"{list(hidden.shape)}, {list(weight.shape)} and {list(ids.shape)}"
        raise ValueError(f"chunked_logprobs: expected hidden [M, H], weight [V, H] and ids [M], found {found}")
    sizes = CPU_TILE if hidden.device.type == "cpu" else DEVICE_TILE
    rows, columns = (default if size is None else size for size, default in zip((token_chunk, vocab_chunk), sizes, strict=True))
    if rows < 1 or columns < 1 or temperature < 0:
        raise ValueError(
            f"chunked_logprobs: expected chunks of at least 1 and a temperature of at least 0, found {rows}, {columns}, {temperature}"
        )
    compute = product_dtype(hidden, weight)
    options = {"cap": cap, "temperature": temperature or 1.0, "compute": compute, "sums": torch.promote_types(compute, torch.float32)}
    options |= {"rows": rows, "columns": columns}
    logprobs, entropies = _ChunkedLogprobs.apply(hidden, weight, bias, ids, entropy, options)
    return logprobs, entropies if entropies is None or entropy_grad else entropies.detach()
