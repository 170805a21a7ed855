"""What the numbers among the options of modules, optimisers and the trainer must be."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from aapa_lightning.errors import COUNT, STEPS, WEIGHT, Limit, check_numbers

#: Options of ``WindowedModule``.
WINDOWED = {"max_skipped_steps": COUNT, "term_norms_every": STEPS}
#: Options of ``InferenceModule``.
INFERENCE = {
    "seed": Limit(whole=True),
    **dict.fromkeys(("rollout_rows", "eval_batch_size", "predict_samples"), COUNT),
    "eval_samples": STEPS,
    **dict.fromkeys(("eval_temperature", "predict_temperatures"), WEIGHT),
}
#: Settings of an optimiser that may not be negative either; the others must be finite.
_OPTIMIZER = dict.fromkeys(("lr", "weight_decay", "eps", "momentum"), WEIGHT)


def check_optimizer_numbers(optimizer: Optimizer) -> None:
    """Raise ConfigError for a setting of an optimiser that is not finite, or a learning rate, decay or momentum below 0."""
    for group in optimizer.param_groups:
        values = {name: value.item() if isinstance(value, Tensor) and value.numel() == 1 else value for name, value in group.items()}
        floats = {name: value for name, value in values.items() if name in _OPTIMIZER or isinstance(value, float)}
        check_numbers(floats, {name: _OPTIMIZER.get(name, Limit()) for name in floats}, "model.optimizer: ")


def check_trainer_numbers(trainer: Any) -> None:
    """Raise ConfigError for a clip of the gradient that Lightning would take for none, or that leaves nothing."""
    check_numbers({"gradient_clip_val": trainer.gradient_clip_val}, {"gradient_clip_val": WEIGHT}, "trainer.")
