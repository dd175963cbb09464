"""SparseK attention kernels for NVIDIA Hopper GPUs, in Pallas Mosaic GPU.

A chunk of C queries attends to a list of at most k keys, gathered beforehand, and to a contiguous
slab of keys around its window. Both are streamed through shared memory in tiles; each (query, key)
of a tile finds mask and gate from four numbers: the query's position and tau, the key's score and
the query that stops attending to it. Nothing of size T x k is ever stored. What is selected comes
from thresholds that a kernel of their own follows from key to key.

The forward pass is flash attention over these tiles. The backward pass recomputes them twice, by
query for the gradients of queries and thresholds, and by key for those of keys, values and scores.
A key of a list gets one gradient a chunk; these are added up in order along its slot, which it
keeps from chunk to chunk, so the result is deterministic.
"""

from sparsek_jax.ops.mosaic_gpu.attention import sparsek_attention_mosaic_gpu, unsupported

__all__ = ["sparsek_attention_mosaic_gpu", "unsupported"]
