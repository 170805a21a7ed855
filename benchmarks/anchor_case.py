"""The case that the anchor's cost is measured on: a tiny Qwen3, responses of an exact length, and an MLP head on its initial weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from aapa_lightning.anchor.context import Encoding
from aapa_lightning.anchor.encoder import FrozenEncoder
from aapa_lightning.anchor.encoder_head import EncoderHeadDiscriminator
from aapa_lightning.anchor.head import Feature, StackedHead, feature_size
from aapa_lightning.anchor.term import AnchorTerm
from aapa_lightning.data.encode import encode_prompt
from aapa_lightning.data.prompt_format import PromptFormat
from aapa_lightning.data.synthetic import ConstraintReward, generate_records
from aapa_lightning.data.tokenizer import train_tokenizer
from aapa_lightning.loop.collect import collect
from aapa_lightning.loop.experience import Experience
from aapa_lightning.loop.terms import LossTerm, total_loss
from aapa_lightning.loop.window import policy_inputs
from aapa_lightning.objectives.grpo import grpo_loss
from aapa_lightning.reduce import StepCounts, count_step
from aapa_lightning.rewards.compose import RewardSet
from aapa_lightning.rollout.base import RolloutRequest, SamplingParams
from aapa_lightning.rollout.transformers_engine import TransformersEngine
from aapa_lightning.types import Record, Rollouts, SumOverRanks, identity_sum

VOCABULARY = 1024
MODEL = {
    "model_type": "qwen3",
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}


def write_policy(folder: Path) -> str:
    """A tiny Qwen3 of 4 layers, hidden size 256 and vocabulary 1,024, with a tokenizer trained on varied English; returns its folder."""
    texts = [text for record in generate_records(2000, 0, "train") for text in (str(record.prompt), *record.experts)]
    # the synthetic world has too few words for 1,024 tokens
    texts += [path.read_text(encoding="utf-8") for path in sorted((Path(__file__).parent.parent / "docs").glob("*.md"))]
    tokenizer = train_tokenizer(texts, VOCABULARY)
    if len(tokenizer) != VOCABULARY:
        raise SystemExit(f"expected a tokenizer of {VOCABULARY} tokens, found {len(tokenizer)}")
    torch.manual_seed(0)
    ids = {"vocab_size": VOCABULARY, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**MODEL, **ids)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def make_anchor(path: str, features: tuple[Feature, ...] = ("sentence",), bank: Any = None, **encoding: Any) -> AnchorTerm:
    """An anchor whose judge is a perceptron of 256 hidden units on the hidden states of the initial policy."""
    encoder = FrozenEncoder(path, Encoding(**{"max_length": 4096, **encoding}))
    head = StackedHead(1, feature_size(features, encoder.hidden_size), hidden_units=256)
    return AnchorTerm(EncoderHeadDiscriminator(encoder, head, features), weight=0.3, bank=bank)


@dataclass(slots=True)
class Case:
    """A policy with its optimiser, an engine that never stops early, and the parts of a GRPO step."""

    path: str
    model: Any
    tokenizer: Any
    engine: TransformersEngine
    optimizer: torch.optim.Optimizer
    records: list[Record]

    @classmethod
    def make(cls, path: str) -> Case:
        """Load the policy of ``write_policy``."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
        return cls(path, model, tokenizer, TransformersEngine(model, tokenizer, ()), optimizer, generate_records(512, 1, "train"))

    def rollouts(self, prompts: int, samples: int, new_tokens: int, *, seed: int = 0, first: int = 0) -> Rollouts:
        """Draw ``samples`` responses of exactly ``new_tokens`` tokens to each of ``prompts`` prompts."""
        return self.engine.generate(self.requests(prompts, samples, first), SamplingParams(new_tokens), seed=seed, window=0)

    def requests(self, prompts: int, samples: int, first: int = 0) -> list[RolloutRequest]:
        """Of records ``first`` and after, over and over."""
        chosen = [self.records[(first + i) % len(self.records)] for i in range(prompts)]
        return [RolloutRequest(encode_prompt(self.tokenizer, r, PromptFormat()), r, first + i, samples) for i, r in enumerate(chosen)]

    def collect(self, prompts: int, samples: int, new_tokens: int, anchor: AnchorTerm | None, over_ranks: SumOverRanks) -> Experience:
        """Generate, reward, score."""
        return collect(
            self.requests(prompts, samples),
            engine=self.engine,
            sampling=SamplingParams(new_tokens),
            seed=0,
            window=0,
            rewards=RewardSet([ConstraintReward()]),
            anchor=anchor,
            sum_over_ranks=over_ranks,
        )

    def step(
        self, prompts: int, samples: int, new_tokens: int, anchor: AnchorTerm | None = None, *, over_ranks: SumOverRanks = identity_sum
    ) -> float:
        """One GRPO step, anchored or bare; gradients are summed over ranks. Returns the loss."""
        experience = self.collect(prompts, samples, new_tokens, anchor, over_ranks)
        counts = StepCounts.from_tensor(over_ranks(count_step(experience.loss_mask)))
        task = policy_inputs(self.model, experience, experience.advantages, 1.0)
        terms = [LossTerm("policy", grpo_loss(task), task.response_mask, counts)]
        if anchor is not None and experience.anchor_advantages is not None:
            anchored = replace(task, advantages=experience.anchor_advantages)
            terms.append(LossTerm("anchor", grpo_loss(anchored), task.response_mask, counts, weight=anchor.weight(0)))
        loss, _ = total_loss(terms, scale=1)
        loss.backward()
        gradients = [weight.grad for weight in self.model.parameters() if weight.grad is not None]
        summed = over_ranks(torch.cat([gradient.flatten() for gradient in gradients]))
        for gradient, part in zip(gradients, summed.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))
        self.optimizer.step()
        self.optimizer.zero_grad()
        if anchor is not None:
            anchor.advance()
        return float(loss.detach())
