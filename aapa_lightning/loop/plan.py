"""The window plan: which prompt and which demonstration belongs to which micro-step of which rank. Arithmetic, nothing else.

A *window* is one generation batch. It is cut into minibatches (one optimiser step each), those into ranks, those into micro-steps; a group
(all samples of a prompt) is never cut. Passing over the window again (``passes``) gives further optimiser steps on the same rollouts.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from aapa_lightning.errors import ConfigError


@dataclass(frozen=True, slots=True)
class WindowPlan:
    """Sizes of a window.

    Args:
        prompts: prompts of a window over all ranks; 0 when nothing is sampled.
        samples: responses per prompt (the group size G).
        minibatches: optimiser steps of one pass over the window.
        passes: passes over the same rollouts (mu in the GRPO paper).
        demonstrations: demonstrations of one *optimiser step* over all ranks; 0 for none.
        sample_demonstrations: responses are sampled to the prompts of the demonstrations too, ``samples`` each.
        accumulate: micro-steps of an optimiser step (``accumulate_grad_batches``).
        world_size: number of ranks.

    Raises:
        ConfigError: a size is below its minimum, the numbers do not divide, or nothing is to be done.
    """

    prompts: int = 0
    samples: int = 1
    minibatches: int = 1
    passes: int = 1
    demonstrations: int = 0
    sample_demonstrations: bool = False
    accumulate: int = 1
    world_size: int = 1

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            least = 0 if name in ("prompts", "demonstrations", "sample_demonstrations") else 1
            if value < least:
                raise ConfigError(f"{name}: expected at least {least} in a window, found {value}")
        if self.prompts == 0 and self.demonstrations == 0:
            raise ConfigError("expected prompts or demonstrations in every step, found 0 of both")
        shards = self.world_size * self.accumulate
        self._check_divides(
            "prompts_per_window", self.prompts, self.minibatches * shards, "minibatches x devices x accumulate_grad_batches"
        )
        self._check_divides("demonstrations_per_step", self.demonstrations, shards, "devices x accumulate_grad_batches")

    def _check_divides(self, name: str, value: int, divisor: int, meaning: str) -> None:
        if value % divisor:
            lower = value // divisor * divisor
            raise ConfigError(
                f"{name}={value} does not divide by {meaning} = "
                f"{divisor} (minibatches={self.minibatches}, devices={self.world_size}, accumulate_grad_batches={self.accumulate}); "
                f"use {f'{lower} or ' if lower else ''}{lower + divisor}"
            )

    @property
    def generates(self) -> bool:
        """Whether responses are sampled at all."""
        return self.prompts > 0 or (self.sample_demonstrations and self.demonstrations > 0)

    @property
    def steps_per_window(self) -> int:
        """Optimiser steps of a window."""
        return self.minibatches * self.passes

    @property
    def micro_steps_per_window(self) -> int:
        """Micro-steps of a window on each rank."""
        return self.steps_per_window * self.accumulate

    @property
    def prompts_per_slice(self) -> int:
        """Prompts of one micro-step on one rank."""
        return self.prompts // (self.minibatches * self.world_size * self.accumulate)

    @property
    def demonstrations_per_slice(self) -> int:
        """Demonstrations of one micro-step on one rank."""
        return self.demonstrations // (self.world_size * self.accumulate)

    def locate(self, micro_step: int) -> tuple[int, int]:
        """Window and micro-step inside it of the run's micro-step number ``micro_step``."""
        return divmod(micro_step, self.micro_steps_per_window)

    def prompt_slots(self, rank: int) -> list[int]:
        """Slots (0 .. prompts-1) whose groups this rank generates, in the order of its micro-steps within a pass."""
        per_minibatch = self.prompts // self.minibatches
        per_rank = per_minibatch // self.world_size
        return [minibatch * per_minibatch + rank * per_rank + i for minibatch in range(self.minibatches) for i in range(per_rank)]

    def prompt_slice(self, micro_step: int) -> slice:
        """Which of ``prompt_slots`` the window's micro-step ``micro_step`` trains on."""
        start = micro_step % (self.minibatches * self.accumulate) * self.prompts_per_slice
        return slice(start, start + self.prompts_per_slice)

    def demonstration_places(self, rank: int) -> list[int]:
        """Places (0 .. demonstrations x steps_per_window - 1) that this rank uses in a window, in the order of its micro-steps.

        Place ``k`` of a window is position ``window * demonstrations * steps_per_window + k`` of the endless demonstration stream.
        """
        per_rank = self.demonstrations // self.world_size
        return [step * self.demonstrations + rank * per_rank + i for step in range(self.steps_per_window) for i in range(per_rank)]

    def demonstration_slice(self, micro_step: int) -> slice:
        """Which of ``demonstration_places`` the window's micro-step ``micro_step`` trains on."""
        start = micro_step * self.demonstrations_per_slice
        return slice(start, start + self.demonstrations_per_slice)

    def prompt_rows(self, micro_step: int) -> slice:
        """Rows of a rank's rollouts, whole groups, that answer the prompts of a micro-step."""
        slots = self.prompt_slice(micro_step)
        return slice(slots.start * self.samples, slots.stop * self.samples)

    def demonstration_rows(self, micro_step: int) -> slice:
        """Rows of a rank's rollouts that answer the prompts of a micro-step's demonstrations; they come after all prompts'."""
        places, first = self.demonstration_slice(micro_step), self.prompts // self.world_size
        return slice((first + places.start) * self.samples, (first + places.stop) * self.samples)

    def step_of(self, micro_step: int) -> int:
        """Optimiser step inside the window, 0 .. steps_per_window-1."""
        return micro_step // self.accumulate

    def minibatch_of(self, micro_step: int) -> int:
        """Minibatch, 0 .. minibatches-1; the same in every pass."""
        return self.step_of(micro_step) % self.minibatches

    def windows_per_pass(self, prompts: int, demonstrations: int) -> int:
        """Windows of one epoch: one pass over the prompts (or, without prompts, over the demonstrations), at least 1."""
        if self.prompts:
            return max(prompts // self.prompts, 1)
        return max(demonstrations // (self.demonstrations * self.steps_per_window), 1)

    def fingerprint(self) -> dict[str, int]:
        """Every number, for checkpoints."""
        return asdict(self)
