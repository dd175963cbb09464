"""What benchmarks share: inputs, gradients, the error that comes first, compiling and timing."""

import concurrent.futures
import os
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def random_inputs(
    batch: int, length: int, num_heads: int, num_kv_heads: int, head_dim: int, dtype: str
) -> list[jax.Array]:
    """Gaussian query, key, value, scores and output cotangent."""
    keys = jax.random.split(jax.random.key(0), 5)
    heads = (num_heads, num_kv_heads, num_kv_heads, num_heads)
    query, key, value, d_out = (
        jax.random.normal(k, (batch, length, n, head_dim), dtype)
        for k, n in zip(keys, heads, strict=False)
    )
    return [query, key, value, jax.random.normal(keys[4], (batch, length, num_kv_heads)), d_out]


def with_gradients(function: Callable) -> Callable:
    """Output and gradients of an attention function, of (query, key, value, scores, d_out)."""

    def gradients(query, key, value, scores, d_out):
        out, vjp = jax.vjp(function, query, key, value, scores)
        return out, vjp(d_out)

    return gradients


def largest_error(actual: Callable, expected: Callable, inputs: Iterable[jax.Array]) -> float:
    """Largest relative error in norm of output and gradients.

    Args:
      actual: Attention function of (query, key, value, scores).
      expected: Likewise; gets the inputs in float32.
      inputs: From `random_inputs`.
    """
    found = jax.tree.leaves(jax.jit(with_gradients(actual))(*inputs))
    widened = [x.astype(jnp.float32) for x in inputs]
    reference = jax.tree.leaves(jax.jit(with_gradients(expected))(*widened))
    return max(
        float(np.linalg.norm(np.asarray(x, np.float64) - y) / np.linalg.norm(np.float64(y)))
        for x, y in zip(found, reference, strict=True)
    )


def compile_side_by_side(programs: dict[Any, Callable[[], Any] | str]) -> dict[Any, Any]:
    """Compiles programs on all cores.

    Args:
      programs: Functions that return a lowered program each, which are called one after the other,
        or reasons why there is none.

    Returns:
      The compiled programs; reasons where that failed (tiles or arrays may not fit).
    """

    def compile_or_explain(program):
        try:
            return program.compile()
        except Exception as error:
            return reason(error)

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = {
            key: program if isinstance(program, str) else pool.submit(compile_or_explain, program())
            for key, program in programs.items()
        }
    return {key: x if isinstance(x, str) else x.result() for key, x in futures.items()}


def reason(error: Exception) -> str:
    """The first line of an error."""
    return str(error).splitlines()[0][:200]


def median_milliseconds(
    call: Callable[[], Any], wait: Callable[[Any], Any], calls: int | None = None
) -> float:
    """Median time of a call, over five runs of several calls.

    Args:
      call: Starts the work, and returns its result.
      wait: Waits for the result of the last call.
      calls: How many make a run: by default as many as fill about 50 ms. Calls of more than 0.3 s
        are then timed three times, one at a time.
    """
    wait(call())
    start = time.perf_counter()
    wait(call())
    once = time.perf_counter() - start
    runs = 5
    if calls is None:
        calls, runs = int(np.clip(0.05 / once, 1, 50)), 3 if once > 0.3 else 5
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        for _ in range(calls):
            out = call()
        wait(out)
        times.append((time.perf_counter() - start) / calls)
    return 1e3 * float(np.median(times))
