"""Weights moved along the gradient of a loss, for as long as something is measured there: the stress test behind GAPO."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from aapa_lightning.errors import ConfigError, choose
from aapa_lightning.loop.layers import perturbed_parameters
from aapa_lightning.loop.shards import local, sharded_gradient, sum_over_shards
from aapa_lightning.sharding import reshard, shard_units
from aapa_lightning.types import SumOverRanks, identity_sum

#: Keeps a gradient of zero from moving anything.
_EPSILON = 1e-12
#: Values that ranks average in one call: 256 MiB of float32.
_BUCKET = 2**26


class WeightStress:
    r"""Evaluates something at weights moved along a loss's gradient (ASAM), and puts the weights back bit for bit.

    .. math:: \tilde\theta = \theta + \rho \frac{\theta^2 \odot g}{\lVert \theta \odot g \rVert_2 + 10^{-12}}

    ``g`` is the loss's gradient, averaged over the ranks; the norm is one over all perturbed tensors and all shards. Computed in float32
    and rounded once to the stored dtype. How large the loss is does not matter, only where its gradient points.

    With it a training step costs three forwards and two backwards instead of one each (``gaussian``: two and one), and while it lasts one
    copy of the perturbed weights and, before that, one of their gradient.

    Gradients accumulated so far, random states and what the next forward sees are as if nothing had happened. Works under autocast, with
    gradient checkpointing (not the reentrant kind), inside a step of DDP and with ``fully_shard``. Both callables must call the bare
    model, never DDP's wrapper. A graph that the caller has open already stays valid; with ``fully_shard``, evaluate before building one.

    Args:
        model: the policy, as ``probe`` and ``measure`` call it.
        rho: length of the move, relative to the weights; positive.
        start_layer: 0 moves every trainable parameter but an untied head; n > 0 the decoder layers from n on, the final norm and an untied
            head, and the layers below build no graph in the probe.
        direction: ``gradient``; or ``gaussian``, noise in the place of ``g``, equal on all ranks: the control at the same ``rho``.
        sum_over_ranks: sums over the ranks that hold copies of the model; sharded parameters need none.
        world_size: number of those ranks; each holds a batch of the same size.

    Raises:
        ConfigError: ``rho`` is not positive, an unknown direction, a layer that the model lacks, nothing trainable, or a wrapped model.

    Reference: Cho et al., "Geometric Anchor Preference Optimization", arXiv 2602.04909; ASAM: Kwon et al., arXiv 2102.11600.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> _ = nn.init.ones_(model.weight)
    >>> stress = WeightStress(model, rho=0.5)
    >>> x = torch.tensor([[3.0, 4.0]])
    >>> stress.evaluate(lambda: model(x).sum(), lambda: model.weight[0].clone(), seed=0)
    tensor([1.3000, 1.4000])
    >>> stress.metrics["changed_fraction"], round(stress.metrics["perturbation_norm"], 4), model.weight.tolist()
    (1.0, 0.5, [[1.0, 1.0]])
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        rho: float = 0.05,
        start_layer: int = 0,
        direction: Literal["gradient", "gaussian"] = "gradient",
        sum_over_ranks: SumOverRanks = identity_sum,
        world_size: int = 1,
    ) -> None:
        if not (rho > 0 and math.isfinite(rho)):
            raise ConfigError(f"weight stress: expected a finite rho > 0, found {rho}; without a stress test use another objective")
        self.from_probe = choose({"gradient": True, "gaussian": False}, direction, "weight stress: direction")
        self.model = model
        self.rho = rho
        self.start_layer = start_layer
        self.sum_over_ranks = sum_over_ranks
        self.world_size = world_size
        #: Of the last ``evaluate``: ``changed_fraction``, the share of perturbed weights whose stored value changed, and
        #: ``perturbation_norm``, the 2-norm of what was added, after rounding. What autocast rounds later is not seen here.
        self.metrics: dict[str, float] = {}
        self._parameters()

    def evaluate(self, probe: Callable[[], Tensor], measure: Callable[[], Tensor], seed: int) -> Tensor:
        """Call ``probe``, move the weights, call ``measure``, and put the weights back, whatever happens.

        Args:
            probe: a scalar loss with a graph, from a forward of the model. ``gaussian`` never calls it.
            measure: what to know about the moved weights; called without gradients. Both start from the random state of the caller.
            seed: of the noise of ``gaussian``; equal on all ranks.

        Returns:
            What ``measure`` returned, detached.
        """
        reshard(self.model)  # parameters gathered by a forward are not those that hold the weights
        parameters = self._parameters()
        directions = self._gradient(parameters, probe) if self.from_probe else _noise(parameters, seed)
        moved: list[tuple[Tensor, Tensor]] = []
        try:
            with torch.no_grad():
                self._move(parameters, directions, moved)
                with _fresh_casts(), _kept_random_state(parameters):
                    return measure().detach()
        finally:
            _put_back(moved)
            reshard(self.model)

    def _parameters(self) -> list[nn.Parameter]:
        # Anew each time: fully_shard puts other parameters in the place of the ones that the constructor saw.
        for module in self.model.modules():
            if isinstance(module, (DistributedDataParallel, FullyShardedDataParallel)):
                raise ConfigError(
                    f"weight stress: expected the bare model, found {type(module).__name__} around or in it; pass the module inside of "
                    "DDP, and shard with fully_shard (ModelParallelStrategy), not FullyShardedDataParallel"
                )
        return perturbed_parameters(self.model, self.start_layer)

    def _gradient(self, parameters: list[nn.Parameter], probe: Callable[[], Tensor]) -> list[Tensor]:
        chosen = {id(p) for p in parameters}
        others = [p for p in self.model.parameters() if p.requires_grad and id(p) not in chosen]
        try:
            for p in others:
                p.requires_grad_(False)
            with _fresh_casts(), _kept_random_state(parameters), torch.enable_grad():
                loss = probe()
                with torch.autocast(loss.device.type, enabled=False):  # a backward takes its dtypes from its forward
                    if shard_units(self.model):
                        return self._average(sharded_gradient(self.model, loss, parameters))
                    return self._average(list(torch.autograd.grad(loss, parameters, materialize_grads=True)))
        finally:
            for p in others:
                p.requires_grad_(True)
            reshard(self.model)  # gathered parameters take requires_grad over when they are gathered

    def _average(self, gradient: list[Tensor]) -> list[Tensor]:
        if self.world_size == 1:
            return gradient
        averaged = list(gradient)
        plain = [i for i, g in enumerate(gradient) if not isinstance(g, DTensor)]  # shards are averages already
        for bucket in _buckets(plain, gradient):
            flat = torch.cat([_wide(gradient[i]).flatten() for i in bucket])
            flat = self.sum_over_ranks(flat) / self.world_size
            for i, part in zip(bucket, flat.split([gradient[i].numel() for i in bucket]), strict=True):
                averaged[i] = part.view_as(gradient[i])
        return averaged

    def _move(self, parameters: list[nn.Parameter], directions: list[Tensor], moved: list[tuple[Tensor, Tensor]]) -> None:
        products = [(_wide(local(p)) * _wide(local(g))).norm().square()[None] for p, g in zip(parameters, directions, strict=True)]
        scale = self.rho / (math.sqrt(sum_over_shards(parameters, products)[0]) + _EPSILON)
        changes = []
        for p in parameters:
            stored = local(p)
            before = stored.clone()
            moved.append((stored, before))  # first: an interrupt may come at any line
            start = _wide(before)
            stored.copy_(start + start.square() * _wide(local(directions.pop(0))) * scale)
            step = (_wide(stored) - start).norm().square()
            changes.append(torch.stack((step, (stored != before).sum().to(step), torch.full_like(step, stored.numel()))))
        squared, changed, total = sum_over_shards(parameters, changes)
        self.metrics = {"changed_fraction": changed / total, "perturbation_norm": math.sqrt(squared)}


def _noise(parameters: Sequence[nn.Parameter], seed: int) -> list[Tensor]:
    """Standard normal noise of the parameters' shapes, float32: the same whole on every rank, of which a sharded one keeps its part."""
    generator = torch.Generator(parameters[0].device).manual_seed(seed)
    drawn: list[Tensor] = []
    for p in parameters:
        whole = torch.randn(p.shape, generator=generator, device=generator.device).to(p.device)
        if isinstance(p, DTensor):
            drawn.append(distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None))
        else:
            drawn.append(whole)
    return drawn


def _wide(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _buckets(indices: Sequence[int], values: Sequence[Tensor]) -> Iterator[list[int]]:
    bucket: list[int] = []
    size = 0
    for i in indices:
        if bucket and size + values[i].numel() > _BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(i)
        size += values[i].numel()
    if bucket:
        yield bucket


def _put_back(moved: Sequence[tuple[Tensor, Tensor]]) -> None:
    interrupt: KeyboardInterrupt | None = None
    while True:
        try:
            for stored, before in moved:
                stored.copy_(before)
            break
        except KeyboardInterrupt as error:  # what saves a checkpoint on an interrupt must not find weights that are half moved
            interrupt = error
    if interrupt is not None:
        raise interrupt


@contextmanager
def _fresh_casts() -> Iterator[None]:
    # Autocast keeps the casts of float32 weights that it made, and serves them also when the weights have moved since.
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.clear_autocast_cache()


@contextmanager
def _kept_random_state(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    devices = {p.device.index for p in parameters if p.device.type == "cuda"}
    if torch.cuda.is_initialized():  # of parameters that wait on the CPU, too
        devices.add(torch.cuda.current_device())
    with torch.random.fork_rng(devices=sorted(devices)):
        yield
