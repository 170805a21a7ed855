"""The rollout engine protocol."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from aapa_lightning.errors import COUNT, STEPS, WEIGHT, ConfigError, Limit, check_numbers
from aapa_lightning.types import Record, Rollouts

LIMITS = {"max_new_tokens": COUNT, "temperature": WEIGHT, "top_p": Limit(0, 1, above=True), "top_k": STEPS}


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How responses are drawn.

    Args:
        max_new_tokens: response length limit in tokens, EOS included.
        temperature: logits are divided by it; 0 is greedy.
        top_p: keep the smallest set of tokens whose mass reaches it; below 1 the trainer's ratio is biased, a warning says so.
        top_k: keep the k most likely tokens; 0 keeps all.
        stop: stop strings; a response that ends in one is not truncated.

    Raises:
        ConfigError: a value outside its range.
    """

    max_new_tokens: int = 512
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_numbers(asdict(self), LIMITS, "sampling.")
        if not all(self.stop):
            raise ConfigError(f"sampling.stop: expected strings that are not empty, found {self.stop!r}")


@dataclass(frozen=True, slots=True)
class RolloutRequest:
    """One prompt of a window: its tokens, its record, its slot in the window (the group id) and how many responses to draw."""

    prompt_ids: Sequence[int]
    record: Record
    slot: int
    samples: int


class RolloutEngine(ABC):
    """Draws responses from the policy. An engine of your own subclasses this, and need only write ``generate``."""

    #: Whether ``generate`` uses the weights of the last ``sync``, so that it may run while the policy is trained.
    own_weights: bool = False

    @abstractmethod
    def generate(self, requests: Sequence[RolloutRequest], params: SamplingParams, *, seed: int, window: int) -> Rollouts:
        """Draw ``samples`` responses for each request, rows in request order, samples of a request adjacent.

        The noise of a token depends on (seed, window, slot, sample, position) alone, so what is drawn does not depend on how requests are
        batched or spread over ranks.
        """
        ...

    def sync(self, step: int) -> None:
        """Take over the policy's weights as of optimiser step ``step``, before ``generate``; called on all ranks.

        For engines that hold weights of their own; those that generate with the model in training have nothing to do. A second call with
        the same step must cost nothing.
        """
        return

    def check_training(self) -> None:
        """Raise ConfigError where the engine could not follow a policy in training; called before the first step."""
        return

    def check_lengths(self, prompt: int, response: int) -> None:
        """Raise ConfigError where the engine could not draw rows of so many prompt and response tokens; called before the first step."""
        return

    def forget(self) -> None:
        """Take the weights anew at the next ``sync``, whatever its step: they are exchanged for a validation (averaged ones), or back."""
        return

    def close(self) -> None:
        """Free what the engine holds: processes, connections, memory. Called when a run has ended; ``generate`` may come again."""
        return


#: Makes an engine from the policy, its tokenizer and every id that ends a response.
EngineFactory = Callable[[Any, Any, Sequence[int]], RolloutEngine]
