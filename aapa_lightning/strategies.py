"""``--trainer.strategy fsdp2``: Lightning's strategy of sharded models, set up for data parallelism alone."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from typing_extensions import override


class FSDP2Strategy(ModelParallelStrategy):
    """Parameters, gradients and optimiser state in shards over all devices (FSDP2). Registered as ``fsdp2``.

    Args:
        save_distributed_checkpoint: a checkpoint is a folder to which every rank writes its shards; or one file, written by rank 0.
        **kwargs: ``process_group_backend`` and ``timeout``, see ``ModelParallelStrategy``.
    """

    def __init__(self, save_distributed_checkpoint: bool = True, **kwargs: Any) -> None:
        super().__init__(data_parallel_size=1, tensor_parallel_size=1, save_distributed_checkpoint=save_distributed_checkpoint, **kwargs)

    @override
    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


StrategyRegistry.register("fsdp2", FSDP2Strategy, description="parameters in shards over all devices")
