"""Values and gradients against TRL's own GRPO loss code."""

import inspect
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from aapa_lightning.modules.grpo import GRPOModule
from aapa_lightning.objectives.grpo import grpo_loss
from aapa_lightning.reduce import AGGREGATIONS, StepCounts, aggregate, count_step
from aapa_lightning.types import TokenLossInputs

pytest.importorskip("trl", reason="TRL is the oracle; it comes with the extra `test`")

MAX_TOKENS = 9
CLIP = {"clip_low": 0.1, "clip_high": 0.3}
AGREE = {"rtol": 1e-5, "atol": 1e-6}


class Accelerator:
    num_processes = 1
    sync_gradients = False

    def gather(self, value):
        return value

    def reduce(self, value, reduction):
        return value


def trl_loss(batch, *, loss_type, level="token", beta=0.0, kl_ratio=True, entropy_coef=0.0, accumulation=1, tokens_in_step=None):
    from trl.trainer.grpo_trainer import GRPOTrainer

    stub = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (batch["logprobs"], batch["entropy"], None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=level,
        beta=beta,
        loss_type=loss_type,
        epsilon_low=CLIP["clip_low"],
        epsilon_high=CLIP["clip_high"],
        use_vllm=False,
        args=SimpleNamespace(use_bias_correction_kl=kl_ratio, delta=None, steps_per_generation=accumulation),
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=accumulation,
        max_completion_length=MAX_TOKENS,
        accelerator=Accelerator(),
        _entropy_bonus_enabled=entropy_coef != 0.0,
        use_adaptive_entropy=False,
        entropy_coef=entropy_coef,
        _metrics=defaultdict(lambda: defaultdict(list)),
    )
    mask = batch["mask"]
    inputs = {
        "prompt_ids": torch.zeros(len(mask), 1, dtype=torch.long),
        "prompt_mask": torch.ones(len(mask), 1, dtype=torch.long),
        "completion_ids": torch.zeros_like(mask, dtype=torch.long),
        "completion_mask": mask.long(),
        "advantages": batch["advantages"],
        "old_per_token_logps": batch["old"],
        "ref_per_token_logps": batch["ref"],
        "num_items_in_batch": torch.tensor(float(mask.sum() if tokens_in_step is None else tokens_in_step)),
    }
    return GRPOTrainer._compute_loss(stub, None, inputs), stub._metrics["train"]


def our_loss(batch, *, loss_type, level="token", beta=0.0, kl_ratio=True, entropy_coef=0.0, accumulation=1, counts=None):
    mask = batch["mask"]
    inputs = TokenLossInputs(
        batch["logprobs"],
        batch["old"],
        mask,
        batch["advantages"][:, None].expand_as(mask),
        batch["ref"] if beta else None,
        batch["entropy"],
    )
    outputs = grpo_loss(inputs, **CLIP, ratio_level=level, beta=beta, kl_ratio=kl_ratio, entropy_coef=entropy_coef)
    counts = counts or StepCounts.from_tensor(count_step(mask))
    return aggregate(outputs.losses, mask, loss_type, counts, MAX_TOKENS, scale=accumulation) / accumulation, outputs.metrics


def random_batch(seed, rows=6, width=7):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, width + 1, (rows,), generator=g)
    logprobs = -3 * torch.rand(rows, width, generator=g)
    return {
        "logprobs": logprobs.requires_grad_(),
        "old": logprobs.detach() + 0.4 * torch.randn(rows, width, generator=g),
        "ref": logprobs.detach() + 0.7 * torch.randn(rows, width, generator=g),
        "entropy": torch.rand(rows, width, generator=g).requires_grad_(),
        "advantages": torch.randn(rows, generator=g),
        "mask": torch.arange(width) < lengths[:, None],
    }


def test_the_default_is_that_of_trl():
    from trl import GRPOConfig

    assert GRPOConfig.__dataclass_fields__["use_bias_correction_kl"].default is True
    assert inspect.signature(grpo_loss).parameters["kl_ratio"].default is True
    assert inspect.signature(GRPOModule).parameters["kl_ratio"].default is True


@pytest.mark.parametrize("kl", [{}, {"beta": 0.3}, {"beta": 0.3, "kl_ratio": False}])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", list(AGGREGATIONS))
def test_values_gradients_and_clip_fraction_equal_trl(loss_type, level, kl):
    for seed in range(3):
        batch = random_batch(seed)
        options = {"loss_type": loss_type, "level": level, **kl}
        theirs, their_metrics = trl_loss(batch, **options)
        ours, our_metrics = our_loss(batch, **options)
        torch.testing.assert_close(ours, theirs, **AGREE)
        assert theirs.abs() > 1e-3
        (their_grad,) = torch.autograd.grad(theirs, batch["logprobs"])
        (our_grad,) = torch.autograd.grad(ours, batch["logprobs"])
        torch.testing.assert_close(our_grad, their_grad, **AGREE)
        if level == "token":
            clipped = our_metrics["clip_fraction"][batch["mask"]].mean().item()
            assert clipped == pytest.approx(their_metrics["clip_ratio/region_mean"][0])
            assert 0 < clipped < 1


@pytest.mark.parametrize("loss_type", ["bnpo", "dapo"])
def test_entropy_bonus_equals_trl_where_the_loss_is_a_token_mean(loss_type):
    batch = random_batch(3)
    options = {"loss_type": loss_type, "entropy_coef": 0.2}
    theirs, ours = trl_loss(batch, **options)[0], our_loss(batch, **options)[0]
    torch.testing.assert_close(ours, theirs, **AGREE)
    for name in ("logprobs", "entropy"):
        grads = [torch.autograd.grad(loss, batch[name], retain_graph=True)[0] for loss in (ours, theirs)]
        torch.testing.assert_close(*grads, **AGREE)


@pytest.mark.parametrize("loss_type", list(AGGREGATIONS))
def test_each_micro_step_of_an_accumulated_step_equals_trl(loss_type):
    batches = [random_batch(seed) for seed in (4, 5)]
    counts = StepCounts.from_tensor(sum(count_step(b["mask"]) for b in batches))
    for batch in batches:
        theirs, _ = trl_loss(batch, loss_type=loss_type, accumulation=2, tokens_in_step=counts.tokens)
        ours, _ = our_loss(batch, loss_type=loss_type, accumulation=2, counts=counts)
        torch.testing.assert_close(ours, theirs, **AGREE)
