"""SparseK beside NSA of flash-linear-attention, on one GPU: the sparse attention others train with.

    pip install flash-linear-attention==0.6.0 fla-core==0.6.0 einops      # and torch, triton
    XLA_PYTHON_CLIENT_PREALLOCATE=false python -m benchmarks.nsa --shape=C --length=65536

NSA selects 16 blocks of 64 keys and attends to a mean of every block besides; its window is left
out (it would need another package), so it attends to the k = 1,024 keys of shape C, plus the
means, without the 512 of the window that SparseK has on top. Both in bfloat16, each measured as the
median of five runs of several calls, in one process. Not a dependency of anything else.
"""

import jax
import torch
from absl import app, flags
from fla.ops.nsa import parallel_nsa

from benchmarks.attention import SHAPES, make_inputs, milliseconds, programs
from benchmarks.inputs import median_milliseconds

_SHAPE = flags.DEFINE_string("shape", "C", "Shape: C, as NSA wants 16 query heads a KV head.")
_LENGTH = flags.DEFINE_integer("length", 65536, "T.")
_BLOCK_SIZE = 64


def nsa_functions(shape, length) -> dict:
    """NSA's forward and forward + backward as functions without arguments."""
    generator = torch.Generator("cuda").manual_seed(0)

    def random(num_heads, *size):
        x = torch.randn(
            1, length, num_heads, *size, generator=generator, device="cuda", dtype=torch.bfloat16
        )
        return x.requires_grad_()

    query, d_out = (random(shape.num_heads, shape.head_dim) for _ in range(2))
    key, value = (random(shape.num_kv_heads, shape.head_dim) for _ in range(2))
    gates = [random(shape.num_heads) for _ in range(2)]
    leaves = (query, key, value, *gates)

    def attend():
        return parallel_nsa(
            query,
            key,
            value,
            g_cmp=gates[0].sigmoid(),
            g_slc=gates[1].sigmoid(),
            block_counts=shape.num_selected // _BLOCK_SIZE,
            block_size=_BLOCK_SIZE,
        )

    def forward():
        with torch.no_grad():
            return attend()

    return {
        "forward": forward,
        "forward+backward": lambda: torch.autograd.grad(attend(), leaves, d_out.detach()),
    }


def main(argv):
    """Prints a line a direction."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    shape, length = SHAPES[_SHAPE.value], _LENGTH.value
    inputs = make_inputs(shape, length)
    ours = programs(shape, length)
    theirs = nsa_functions(shape, length)
    print(
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}, torch {torch.__version__}, "
        f"shape {_SHAPE.value}, T={length}",
        flush=True,
    )
    for mode in ("forward", "forward+backward"):
        nsa = median_milliseconds(theirs[mode], lambda _: torch.cuda.synchronize())
        compiled = jax.jit(ours[f"sparsek {mode}"], keep_unused=True).lower(*inputs).compile()
        sparsek = milliseconds(compiled, inputs)
        print(
            f"{mode}: NSA {nsa:.2f} ms, SparseK {sparsek:.2f} ms, {nsa / sparsek:.2f} times",
            flush=True,
        )


if __name__ == "__main__":
    app.run(main)
