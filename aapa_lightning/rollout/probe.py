"""Whether the weights that an engine was given have arrived: its log-probs of a short fixed prompt, held to the policy's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aapa_lightning.errors import WEIGHT, ConfigError, check_numbers
from aapa_lightning.logprobs import response_logprobs
from aapa_lightning.rollout.base import RolloutEngine, RolloutRequest, SamplingParams
from aapa_lightning.rollout.embedded import generation_mode
from aapa_lightning.types import Record, Rollouts, SumOverRanks, identity_sum

#: What is asked: few tokens of a plain text, with noise of their own, so that nothing else of a run depends on it.
TEXT, TOKENS, SAMPLES, SEED = "The", 16, 4, 0
#: An answer that is the same to the bit may be as far from a policy that has moved as this share of the bound.
_UNCHANGED = 0.1


def takes_weights(engine: RolloutEngine) -> bool:
    """Return whether an engine holds weights that ``sync`` brings up to date, so that they can fail to arrive."""
    return engine.own_weights or type(engine).sync is not RolloutEngine.sync


def draw_probe(engine: RolloutEngine, tokenizer: Any) -> Rollouts:
    """The engine's answers to the probe, ``SAMPLES`` rows of up to ``TOKENS`` tokens at temperature 1."""
    prompt = list(tokenizer(TEXT)["input_ids"]) or [tokenizer.eos_token_id]
    request = RolloutRequest(prompt, Record(TEXT, source="<the probe of the engine's weights>"), 0, SAMPLES)
    return engine.generate([request], SamplingParams(max_new_tokens=TOKENS), seed=SEED, window=0)


@torch.no_grad()
def policy_logprobs(model: Any, rollouts: Rollouts) -> Tensor:
    """The policy's log-probs of the probe's answers in evaluation mode, float32 ``[SAMPLES, L]`` nats."""
    parts = (rollouts.prompt_ids, rollouts.prompt_mask, rollouts.response_ids, rollouts.response_mask)
    with generation_mode(model):
        logprobs, _ = response_logprobs(model, *parts, 1.0)
    torch.clear_autocast_cache()  # casts made without a graph must not serve a loss (pytorch#112583)
    return logprobs


class WeightProbe:
    """Asks an engine after every push of weights, and stops a run whose engine draws from others.

    The gap is ``mean |log pi - log mu|`` over the tokens of the probe's answers and all ranks: mu the engine, pi the policy. What an
    engine that computes otherwise makes of it lies near .02 nats in bfloat16. Weights that never arrive, or half of them, make it grow
    with the training, and a deaf engine's answers stay the same to the bit while the policy moves, which is seen at a tenth of the bound.

    Args:
        bound: largest gap in nats a token; None asks nothing.

    Raises:
        ConfigError: a bound below 0 or not finite.
    """

    def __init__(self, bound: float | None) -> None:
        check_numbers({"engine_tolerance": bound}, {"engine_tolerance": WEIGHT})
        self.bound = bound
        self._step: int | None = None
        self._before: tuple[Tensor, Tensor, Tensor] | None = None
        #: Gap after the last push in nats, to four decimals (below lies rounding); None where nothing was asked.
        self.gap: float | None = None

    def forget(self) -> None:
        """Ask anew at the next ``check``, whatever its step."""
        self._step = None

    def check(self, engine: RolloutEngine, model: Any, tokenizer: Any, step: int, sum_over_ranks: SumOverRanks = identity_sum) -> None:
        """Hold the engine to the policy once a step. All ranks call it together, after ``sync``.

        Args:
            engine: what was given the weights.
            model: the policy they are of.
            tokenizer: its tokenizer.
            step: optimiser step of the push.
            sum_over_ranks: sums a tensor over ranks; called once where the engine is asked.

        Raises:
            ConfigError: the gap is above the bound, or the answers stay while the policy moves; on all ranks alike.
        """
        if self.bound is None or step == self._step or not takes_weights(engine):
            return
        rollouts = draw_probe(engine, tokenizer)
        found = policy_logprobs(model, rollouts)
        known = rollouts.response_mask & rollouts.engine_logprobs.isfinite()
        gap = (found - rollouts.engine_logprobs).abs()[known].double()
        moved = self._moved(rollouts, found)
        total, tokens, drift = sum_over_ranks(
            torch.stack([gap.sum(), gap.new_tensor(gap.numel()), moved[known].double().sum()]).float()
        ).tolist()
        self._step = step
        if not tokens:  # an engine that cannot score what it draws
            return
        self.gap = round(total / tokens, 4)
        self._judge(self.gap, drift / tokens, step)

    def _moved(self, rollouts: Rollouts, found: Tensor) -> Tensor:
        """How far the policy has moved since the engine first gave these very answers; 0 where they are new."""
        ids, logprobs = rollouts.response_ids, rollouts.engine_logprobs
        if self._before is not None and torch.equal(self._before[0], ids) and torch.equal(self._before[1], logprobs):
            return (found - self._before[2]).abs()
        self._before = (ids, logprobs, found)
        return torch.zeros_like(found)

    def _judge(self, gap: float, drift: float, step: int) -> None:
        bound = self.bound or 0.0
        if gap <= bound and drift <= _UNCHANGED * bound:
            return
        seen = (
            f"its log-probs of a fixed prompt are {gap:.3g} nats a token from the policy's, engine_tolerance is {bound:g}"
            if gap > bound
            else f"its answers to a fixed prompt are the same to the bit, and the policy has moved by {drift:.3g} nats a token"
        )
        raise ConfigError(
            f"engine: after it was given the weights of step {step} {seen}: the weights did not arrive, or only some of them. Look at the "
            "engine's own log and version and start it anew; for one that rounds more (quantised weights) raise engine_tolerance"
        )
