"""Models that compute the same in training as in evaluation: what draws random numbers beside dropout is found and put in evaluation mode.

Some routers draw in training (PhiMoE samples its experts, Mixtral, MiniMax and DBRX may jitter their inputs), and so do layers that are
left out at random. Old, new and reference log-probs would then come from different functions: the first ratio of a window would not be 1.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from aapa_lightning.errors import ConfigError
from aapa_lightning.logprobs.head import causal_model

T = TypeVar("T")

#: Models that were looked at.
_STEADY: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
#: Modules that a message names.
_NAMED = 3


def set_steady(model: nn.Module) -> None:
    """Demand of a model that it computes the same in training as in evaluation, from now on; copies of it keep the demand.

    Args:
        model: wrapped or not; its dropouts are 0.
    """
    inner: Any = causal_model(model)
    inner.aapa_steady = True


def steadily(model: nn.Module, call: Callable[[], T], device: torch.device) -> T:
    """Call a model; at its first call in training mode, find modules that draw random numbers and leave them in evaluation mode for good.

    A model that draws nothing costs nothing. The run's own random numbers stay as they were.

    Args:
        model: wrapped or not; one that ``set_steady`` did not name, or that is in evaluation mode, is called as it is.
        call: calls it, and may do so again.
        device: of its inputs.

    Raises:
        ConfigError: it draws in ways that evaluation mode does not end.
    """
    inner: Any = causal_model(model)
    if inner in _STEADY or not model.training or not getattr(inner, "aapa_steady", False):
        return call()
    with _own_draws(device) as drew:
        value = call()
    if drew():
        with torch.no_grad(), _own_draws(device):
            modules = _drawing(model, call, device)
        for module in modules:
            _evaluate_always(module)
        with _own_draws(device) as drew:
            value = call()
        if drew():
            names = [f"{path or 'itself'} ({type(module).__name__})" for path, module in inner.named_modules() if module in modules]
            raise ConfigError(
                f"policy: {type(inner).__name__} draws random numbers beside dropout, in {', '.join(names[:_NAMED]) or 'itself'}, so that "
                "old and new log-probs would not come from one function; use another model, or set policy.disable_dropout to false and "
                "accept that the first ratio of a window is not 1"
            )
    _STEADY[inner] = True
    return value


def _generators(device: torch.device) -> tuple[Any, ...]:
    """The state of every source of random numbers that a model's code may use."""
    import numpy as np

    numpy: Any = np.random.get_state(legacy=True)
    states = [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]
    return (random.getstate(), bytes(numpy[1]), *numpy[2:], *(bytes(state.numpy()) for state in states))


@contextmanager
def _own_draws(device: torch.device) -> Iterator[Callable[[], bool]]:
    """Whatever is drawn inside leaves the run's own random numbers as they were; gives what says afterwards whether anything was."""
    import numpy as np

    python, numpy, before = random.getstate(), np.random.get_state(), _generators(device)
    drew = False
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield lambda: drew
            drew = _generators(device) != before
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _drawing(model: nn.Module, forward: Callable[[], Any], device: torch.device) -> set[nn.Module]:
    """The modules whose own code draws, not that of a module inside them."""
    found: set[nn.Module] = set()
    inside: list[nn.Module] = []
    last = _generators(device)

    def look() -> None:
        nonlocal last
        now = _generators(device)
        if inside and now != last:
            found.add(inside[-1])
        last = now

    def enter(module: nn.Module, inputs: Any) -> None:
        look()
        inside.append(module)

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        look()
        inside.pop()

    handles = [handle for m in model.modules() for handle in (m.register_forward_pre_hook(enter), m.register_forward_hook(leave))]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return found


def _evaluate_always(module: nn.Module) -> None:
    """Evaluation mode from now on, whatever ``train`` says; modules inside it, and copies of it, go on to listen."""
    module.training = False
    setattr(module, "train", MethodType(_train_inside, module))  # noqa: B010 - a method of its own


def _train_inside(module: nn.Module, mode: bool = True) -> nn.Module:
    for child in module.children():
        child.train(mode)
    return module
