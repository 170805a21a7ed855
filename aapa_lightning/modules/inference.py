"""A policy that is looked at, not trained: evaluation and prediction, which every policy module inherits."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import lightning as L
from lightning.pytorch.callbacks import WeightAveraging
from torch import nn

from aapa_lightning.adapter_checkpoints import check_adapters, keep_adapters
from aapa_lightning.adapters import has_adapters
from aapa_lightning.data.encode import (
    OverlongError,
    encode_demonstration,
    encode_prompt,
    end_of_turn_id,
    fit_lengths,
    no_responses,
)
from aapa_lightning.data.prompt_format import PromptFormat
from aapa_lightning.data.records import take
from aapa_lightning.errors import check_numbers, refuse_idle
from aapa_lightning.hyperparameters import RemembersArguments
from aapa_lightning.loop.demonstrations import demonstration_logprobs
from aapa_lightning.loop.evaluate import EvalLoader, EvalStep, PlainBatches, is_pair, judged_responses, predicted_rows
from aapa_lightning.loop.preferences import preferred_texts
from aapa_lightning.modules.evaluation import Evaluator
from aapa_lightning.modules.limits import INFERENCE
from aapa_lightning.modules.parallel import load_placed, sum_over_ranks
from aapa_lightning.modules.precision import refuse_true_precision, trainer_precision
from aapa_lightning.modules.release import release_on_exception
from aapa_lightning.modules.specs import as_spec
from aapa_lightning.policy import PolicySpec, eos_token_ids
from aapa_lightning.reduce import masked_mean
from aapa_lightning.rewards.base import Reward
from aapa_lightning.rewards.compose import RewardSet
from aapa_lightning.rollout.base import EngineFactory, RolloutEngine, RolloutRequest, SamplingParams
from aapa_lightning.rollout.engines import EngineName, build_engine
from aapa_lightning.rollout.probe import WeightProbe
from aapa_lightning.seeds import derive_seed
from aapa_lightning.sharding import gathered_parameters, shard_units
from aapa_lightning.thinking import ScoreThinking, as_thinking
from aapa_lightning.types import Demonstration, Record, Rollouts
from aapa_lightning.users_code import users_code

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class InferenceModule(RemembersArguments):
    """Validates, tests and predicts with a policy. Loads it lazily, in ``configure_model``.

    Args:
        policy: which model.
        prompt_format: how records become tokens.
        sampling: how responses are drawn.
        rewards: the task's rewards.
        reward_weights: one per reward; 1 each by default.
        judges: measures for evaluation alone; no training sees them.
        score_thinking: let rewards and judges see the thinking before an answer too; ``Thinking`` names other tags.
        seed: of data order and sampling; None takes ``seed_everything``'s.
        engine: ``auto``, a name of ``rollout.engines.ENGINES``, or ``class_path`` of an engine, whose first three arguments are filled in.
        rollout_rows: responses that an embedded engine generates at once; None for all.
        engine_tolerance: most that the log-probs of an engine with weights of its own may differ from the policy's after a push, in nats
            a token of a fixed prompt; beyond it the run stops. None does not ask. See ``rollout.probe``.
        eval_batch_size: prompts of an evaluation batch, on each device.
        eval_samples: responses per prompt in evaluation; 0 evaluates expert likelihood alone.
        eval_temperature: of the responses in evaluation; None takes that of ``sampling``.
        predict_temperatures: temperatures at which ``predict`` draws.
        predict_samples: responses per prompt and temperature in ``predict``.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    engine: RolloutEngine
    eos_token_id: int  # ends an expert response; rollouts may end with any of the model's

    def __init__(
        self,
        policy: PolicySpec,
        *,
        prompt_format: PromptFormat | None = None,
        sampling: SamplingParams | None = None,
        rewards: list[Reward] | None = None,
        reward_weights: list[float] | None = None,
        judges: list[Reward] | None = None,
        score_thinking: ScoreThinking = False,
        seed: int | None = None,
        engine: EngineName | EngineFactory = "auto",
        rollout_rows: int | None = None,
        engine_tolerance: float | None = 0.1,
        eval_batch_size: int = 32,
        eval_samples: int = 1,
        eval_temperature: float | None = None,
        predict_temperatures: Sequence[float] = (1.0,),
        predict_samples: int = 1,
    ) -> None:
        check_numbers(locals(), INFERENCE)
        if not rewards:
            refuse_idle(InferenceModule, locals(), ("reward_weights",), "without rewards")
        if eval_samples == 0:
            refuse_idle(InferenceModule, locals(), ("eval_temperature",), "with eval_samples 0")
        super().__init__()
        self.policy = as_spec(policy, "policy")
        self.prompt_format = prompt_format or PromptFormat()
        self.sampling = sampling or SamplingParams()
        self.rewards = RewardSet(rewards, reward_weights, score_thinking=score_thinking) if rewards else None
        self.judges, self.score_thinking = judges or [], score_thinking
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", "0")) if seed is None else seed
        self.engine_choice = engine
        self.rollout_rows = rollout_rows
        self.eval_batch_size = eval_batch_size
        self.eval_samples = eval_samples
        self.eval_temperature = self.sampling.temperature if eval_temperature is None else eval_temperature
        self.predict_temperatures = tuple(predict_temperatures)
        self.predict_samples = predict_samples
        self._weight_probe = WeightProbe(engine_tolerance)
        self._loaded, self._evaluator = False, cast("Evaluator | None", None)
        self._with_experts, self._with_pairs, self._plain = False, False, PlainBatches()

    def configure_model(self) -> None:
        """Load the policy, once. Raises ConfigError for a precision that would round what is kept in float32."""
        if self._loaded:
            return
        refuse_true_precision(trainer_precision(self))
        self.model, self.tokenizer = load_placed(self, self.policy)
        if self.policy.lora is not None:
            keep_adapters(self)
            self.strict_loading = False  # of Lightning, which would miss the base model; ``check_adapters`` misses what is ours
        self.model.train()
        eos_ids = eos_token_ids(self.model, self.tokenizer)
        self.eos_token_id = end_of_turn_id(self.tokenizer, self.prompt_format, eos_ids)
        self.engine = build_engine(self.engine_choice, self.model, self.tokenizer, eos_ids, self.rollout_rows)
        self._loaded = True

    def frozen_copy(self) -> nn.Module:
        """The policy as it starts, on the devices as the policy is, without gradients. All ranks call it together.

        Under adapters there is no copy: it is the policy itself, which ``loop.reference.as_it_started`` asks with the adapters off.
        """
        if has_adapters(self.model):
            return self.model
        if shard_units(self.model):  # FSDP refuses to copy what it has sharded
            model, _ = load_placed(self, self.policy)
        else:
            model = copy.deepcopy(self.model)
        return model.eval().requires_grad_(False)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse whole weights for adapters, and adapters of another base model."""
        super().on_load_checkpoint(checkpoint)
        if self._loaded:
            check_adapters(checkpoint, self.model, self.policy)

    def teardown(self, stage: str) -> None:
        """Let the engine free what it holds."""
        self.release()

    def configure_callbacks(self) -> list[L.Callback]:
        """One that does so after an exception too, when Lightning leaves ``teardown`` out; none where the trainer has it already."""
        return release_on_exception(self.trainer)

    def release(self) -> None:
        """Let the engine free what it holds; it may be used again."""
        if self._loaded:
            self.engine.close()
            self._weight_probe.forget()

    def eval_loader(self, records: Sequence[Record]) -> EvalLoader:
        """Batches of a split for this rank, of records that fit the length limits.

        With ``overlong: drop`` a prompt whose expert response alone is too long stays; only the expert's likelihood is left out.
        """
        strict = self.prompt_format.overlong == "error"
        responses = judged_responses if strict else no_responses
        records = fit_lengths(self.tokenizer, self._select(records), self.prompt_format, self.eos_token_id, responses)
        self._with_experts = any(record.experts for record in records)
        self._with_pairs = any(is_pair(record) for record in records)
        if not (strict or self.trainer.predicting):  # one that cannot be encoded at all must not end a run at its first validation
            for record in records:
                for name, text in judged_responses(record):
                    self._response(record, text, name)
        return EvalLoader(records, self.eval_batch_size, rank=self.trainer.global_rank, world_size=self.trainer.world_size)

    def _select(self, records: Sequence[Record]) -> Sequence[Record]:
        """Records that the rewards can score, or an error that names one that they cannot."""
        if self.rewards is None:
            return records
        kept = self.rewards.select(records)
        return records if len(kept) == len(records) else take(records, kept)

    def sample(self, step: EvalStep, samples: int, temperature: float, purpose: str) -> Rollouts | None:
        """Draw responses whose noise depends on (seed, purpose, temperature, prompt, sample) alone; None for an empty batch."""
        requests = [
            RolloutRequest(encode_prompt(self.tokenizer, record, self.prompt_format), record, index, samples)
            for index, record in zip(step.indices, step.records, strict=True)
        ]
        if samples == 0:
            return None
        self.sync_engine()  # ranks that have run out of prompts, too: they hand weights over together
        if not requests:
            return None
        seed = derive_seed(purpose, self.seed, str(temperature))
        with users_code(f"engine {type(self.engine).__name__}", owner=self.engine):
            return self.engine.generate(requests, replace(self.sampling, temperature=temperature), seed=seed, window=0)

    def _step(self, batch: object, number: int) -> EvalStep:
        if isinstance(batch, EvalStep):
            return batch
        step = self._plain.step(batch, number, rank=self.trainer.global_rank, world_size=self.trainer.world_size)
        self._with_experts |= any(record.experts for record in step.records)
        self._with_pairs |= any(is_pair(record) for record in step.records)
        return step

    def sync_engine(self) -> None:
        """Give the engine the policy's weights. Raises ConfigError where they do not arrive. All ranks call it together."""
        self.engine.sync(self.global_step)
        self._weight_probe.check(self.engine, self.model, self.tokenizer, self.global_step, partial(sum_over_ranks, self))

    def _evaluate(self, step: EvalStep) -> None:
        if self._evaluator is None:
            self._evaluator = Evaluator(self.rewards, self.judges, self.device, score_thinking=self.score_thinking)
        rollouts = self.sample(step, self.eval_samples, self.eval_temperature, "evaluate")
        if rollouts is not None:
            self._evaluator.add_rollouts(rollouts)
        rows = [row for record in step.records for expert in record.experts[:1] if (row := self._response(record, expert)) is not None]
        if rows:
            self._evaluator.add_experts(*demonstration_logprobs(self.model, rows, self.tokenizer.pad_token_id, self.device))
        self._evaluate_pairs(step.records, self._evaluator)

    def _evaluate_pairs(self, records: Sequence[Record], evaluator: Evaluator) -> None:
        pairs = [[self._response(record, text, name) for name, text in preferred_texts(record)] for record in records if is_pair(record)]
        kept = [(chosen, rejected) for chosen, rejected in pairs if chosen is not None and rejected is not None]
        if kept:
            responses = [response for side in zip(*kept, strict=True) for response in side]
            logprobs, mask = demonstration_logprobs(self.model, responses, self.tokenizer.pad_token_id, self.device)
            evaluator.add_pairs(masked_mean(logprobs, mask, dim=-1))

    def _response(self, record: Record, text: str, name: str = "expert response") -> Demonstration | None:
        fmt = replace(self.prompt_format, assistant_turns="last")  # earlier turns are no part of the response
        try:
            return encode_demonstration(self.tokenizer, record, text, fmt, self.eos_token_id, name)
        except OverlongError:
            return None

    def _log_evaluation(self, stage: str) -> None:
        if self._evaluator is None:
            return
        figures = self._evaluator.compute(generated=self.eval_samples > 0, experts=self._with_experts, pairs=self._with_pairs)
        self._evaluator = None
        # of all ranks already: equal values have this mean, and without sync_dist Lightning warns of every figure
        self.log_dict({f"{stage}/{name}": value for name, value in figures.items()}, sync_dist=True)

    def _weights_may_change(self) -> None:
        trainer: Any = self.trainer
        if any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks):
            self.engine.forget()
            self._weight_probe.forget()

    def on_validation_epoch_start(self) -> None:
        """Let the engine take averaged weights."""
        self._weights_may_change()

    def validation_step(self, batch: EvalStep, batch_idx: int) -> None:
        """Evaluate a batch of the validation split: a step of ``eval_loader``, or a list of records."""
        with gathered_parameters(self.model):  # ranks whose split has run out have nothing to call the model for
            self._evaluate(self._step(batch, batch_idx))

    def on_validation_epoch_end(self) -> None:
        """Log ``val/...``, and let the engine take the policy's weights again."""
        self._weights_may_change()
        self._log_evaluation("val")

    def test_step(self, batch: EvalStep, batch_idx: int) -> None:
        """Evaluate a batch of the test split."""
        with gathered_parameters(self.model):
            self._evaluate(self._step(batch, batch_idx))

    def on_test_epoch_end(self) -> None:
        """Log ``test/...``."""
        self._log_evaluation("test")

    def predict_step(self, batch: EvalStep, batch_idx: int) -> list[dict[str, Any]]:
        """Rows of a response file: every temperature, every sample."""
        with gathered_parameters(self.model):
            return self._predicted_rows(self._step(batch, batch_idx))

    def _predicted_rows(self, batch: EvalStep) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        for temperature in self.predict_temperatures:
            rollouts = self.sample(batch, self.predict_samples, temperature, "predict")
            if rollouts is not None:
                rows += predicted_rows(rollouts, self.predict_samples, temperature, as_thinking(self.score_thinking))
        return rows
