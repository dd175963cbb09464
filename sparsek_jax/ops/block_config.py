"""Tile sizes of the GPU kernels; `python -m benchmarks.tune` times others."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """Sizes of one kernel's tiles.

    Attributes:
      columns: Of a tile: keys in the forward and query kernels, queries in the key kernels.
      stages: Tiles in flight.
    """

    columns: int
    stages: int

    def __post_init__(self):
        if self.columns not in (64, 128):
            raise ValueError(f"columns={self.columns} must be 64 or 128")
        if self.stages < 2:
            raise ValueError(f"stages={self.stages} must be at least 2")


@dataclasses.dataclass(frozen=True)
class KernelConfigs:
    """A `BlockConfig` for every kind of kernel.

    Attributes:
      forward: Output.
      by_query: Gradients of queries and thresholds.
      by_key: Gradients of keys, values and scores.
    """

    forward: BlockConfig
    by_query: BlockConfig
    by_key: BlockConfig


# By the largest head size that it is for.
TUNED = {
    64: KernelConfigs(BlockConfig(128, 2), BlockConfig(64, 2), BlockConfig(64, 2)),
    128: KernelConfigs(BlockConfig(64, 3), BlockConfig(64, 2), BlockConfig(64, 2)),
}


def tuned(head_dim: int) -> KernelConfigs:
    """Configs for a head size of at most 128."""
    return next(configs for size, configs in TUNED.items() if head_dim <= size)
