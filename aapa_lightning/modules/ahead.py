"""Policies whose next rollouts may be drawn while they are trained on the last."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from aapa_lightning.errors import ConfigError
from aapa_lightning.loop.ahead import RolloutsAhead
from aapa_lightning.loop.evaluate import EvalStep
from aapa_lightning.loop.loader import WindowStep
from aapa_lightning.loop.plan import WindowPlan
from aapa_lightning.loop.window import rollout_requests
from aapa_lightning.modules.checkpointing import gather_over_ranks
from aapa_lightning.modules.inference import InferenceModule
from aapa_lightning.modules.windowed import WindowedModule
from aapa_lightning.objectives.correction import CorrectionOptions
from aapa_lightning.rollout.base import RolloutRequest
from aapa_lightning.types import Rollouts


class DrawsAhead(WindowedModule, InferenceModule):
    """Samples windows of rollouts: exactly on policy, or one window ahead.

    Args:
        *args: see ``InferenceModule``.
        correction: see ``PolicyModule``.
        asynchronous: see ``PolicyModule``.
        **kwargs: see ``WindowedModule`` and ``InferenceModule``.
    """

    def __init__(self, *args: Any, correction: CorrectionOptions | None = None, asynchronous: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.correction = correction
        self.asynchronous = asynchronous
        self._ahead = RolloutsAhead()

    def check_asynchronous(self) -> None:
        """Raise ConfigError where rollouts are to be drawn ahead and cannot be."""
        if not self.asynchronous:
            return
        if not self.engine.own_weights:
            raise ConfigError(
                f"asynchronous: expected an engine with weights of its own, found {type(self.engine).__name__}, which generates with the "
                "model in training; set engine: replica (a copy of the weights), vllm, or a vLLM server"
            )
        if self.correction is None or self.correction.mode == "none":
            raise ConfigError(
                "asynchronous: expected a correction, found none: rollouts are one window old, which biases the gradient; set "
                "correction.mode to truncate or mask"
            )

    def drawn_ahead(self, step: WindowStep, plan: WindowPlan, requests: Sequence[RolloutRequest]) -> Rollouts | None:
        """This window's rollouts, drawn while the last one was trained on; the next window's are begun, with the policy as it is now.

        Args:
            step: the window's records.
            plan: its sizes.
            requests: what it samples responses to.

        Returns:
            None unless the module is asynchronous.
        """
        if not self.asynchronous:
            return None
        draw = self._under_this_autocast(partial(self.engine.generate, params=self.sampling, seed=self.seed))
        rollouts = self._ahead.take(step.window, requests, self.device)
        self._ahead.wait()
        self.sync_engine()
        if rollouts is None:
            rollouts = draw(requests, window=step.window)
            self._ahead.keep(step.window, rollouts)
        loader: Any = self.trainer.train_dataloader
        following = loader.window(step.window + 1)
        ahead = rollout_requests(self.tokenizer, following, self.prompt_format, plan)
        self._ahead.start(following.window, partial(draw, ahead, window=following.window))
        return rollouts

    def _under_this_autocast(self, draw: Callable[..., Rollouts]) -> Callable[..., Rollouts]:
        # autocast belongs to a thread
        kind = self.device.type
        dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)

        def drawn(*args: Any, **kwargs: Any) -> Rollouts:
            with torch.autocast(kind, dtype, enabled):
                return draw(*args, **kwargs)

        return drawn

    def sample(self, step: EvalStep, samples: int, temperature: float, purpose: str) -> Rollouts | None:
        """See ``InferenceModule.sample``; waits for the engine."""
        self._ahead.wait()
        return super().sample(step, samples, temperature, purpose)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what was drawn ahead."""
        super().on_save_checkpoint(checkpoint)
        failing = sys.exc_info()[0] is not None  # the other ranks may not come here: do not gather
        if self.asynchronous and not (failing and self.trainer.world_size > 1):
            checkpoint["aapa"]["ahead"] = gather_over_ranks(self._ahead.state())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what was drawn ahead; on another number of ranks it is drawn again, with the policy as it is then."""
        super().on_load_checkpoint(checkpoint)
        shares = checkpoint.get("aapa", {}).get("ahead") or []
        self._ahead.restore(shares[self.global_rank] if self.asynchronous and len(shares) == self.trainer.world_size else {})

    def setup(self, stage: str) -> None:
        """Forget what an earlier fit has drawn, before a checkpoint is read."""
        super().setup(stage)
        if stage == "fit":
            self._ahead.clear()

    def release(self) -> None:
        """Let thread and engine go."""
        self._ahead.close()
        super().release()
