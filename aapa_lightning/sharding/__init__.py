"""Models whose parameters lie in shards on several ranks: gathered, saved and loaded by rows."""

from aapa_lightning.sharding.parameters import (
    WholeTensors,
    decoder_blocks,
    gather_state,
    gathered_parameters,
    is_sharded,
    parameter_groups,
    reshard,
    shard_model,
    shard_units,
)

__all__ = [
    "WholeTensors",
    "decoder_blocks",
    "gather_state",
    "gathered_parameters",
    "is_sharded",
    "parameter_groups",
    "reshard",
    "shard_model",
    "shard_units",
]
