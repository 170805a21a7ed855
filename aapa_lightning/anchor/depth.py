"""Hidden states from the middle of a model, without the layers above them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


class _ReachedError(Exception):
    """Ends a forward pass whose rest nobody reads."""


class ShallowModel:
    """Runs a model's blocks up to the highest layer that is asked for.

    Args:
        model: blocks in a row, each of which takes hidden states and hands them on.
        layers: numbers of hidden states, as in ``hidden_states``: 0 is the embeddings.
    """

    def __init__(self, model: Any, layers: Sequence[int]) -> None:
        self.model, self._count = model, model.config.get_text_config().num_hidden_layers
        self._layers = [layer % (self._count + 1) for layer in layers]
        self._blocks = [list(part) for part in model.modules() if isinstance(part, nn.ModuleList) and len(part) == self._count]

    @torch.no_grad()
    def works(self) -> bool:
        """Whether this saves a layer and gives what the whole model gives: tried out on a few tokens."""
        if max(self._layers) >= self._count or len(self._blocks) != 1:
            return False
        ids = torch.tensor([[0, 1, 2, 1], [2, 0, 1, 0]], device=self.model.device)
        expected = self.model(input_ids=ids, output_hidden_states=True).hidden_states
        try:
            found = self(input_ids=ids)
        except RuntimeError:
            return False
        return all(torch.equal(mine, expected[layer]) for mine, layer in zip(found, self._layers, strict=True))

    def __call__(self, **inputs: Any) -> list[Tensor]:
        """Hidden states of the layers, in their order.

        Raises:
            RuntimeError: the model did not come to a layer, or its blocks take hidden states in another way.
        """
        seen: dict[int, Tensor] = {}

        def look(number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs.get("hidden_states")
            if isinstance(hidden, Tensor):
                seen[number] = hidden
            if number == max(self._layers):
                raise _ReachedError

        blocks = self._blocks[0]
        hooks = [blocks[n].register_forward_pre_hook(partial(look, n), with_kwargs=True) for n in sorted(set(self._layers))]
        try:
            self.model(**inputs)
        except _ReachedError:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        if not seen.keys() >= set(self._layers):
            raise RuntimeError(f"expected to pass the layers {self._layers}, passed {sorted(seen)}")
        return [seen[layer] for layer in self._layers]
