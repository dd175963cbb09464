"""Text from a trained decoder, by running the whole context again for every token."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int32

from sparsek_jax.data import Tokenizer
from sparsek_jax.nn import Decoder


def sample(
    model: Decoder,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    length: int,
    temperature: float = 1.0,
    seed: int = 0,
    context: int = 1024,
) -> str:
    """Continues a prompt as if it began a document.

    Args:
      model: The language model.
      tokenizer: The one it was trained with.
      prompt: Text to continue; may be empty.
      length: Most tokens to generate; fewer if the model ends the document.
      temperature: Divides the logits; 0 takes the likeliest token.
      seed: Decides the text, given everything else.
      context: Most tokens the model sees. The oldest leave when there are more.

    Returns:
      The prompt and its continuation.

    Raises:
      ValueError: An argument is out of range.
    """
    for name, value, least in (
        ("length", length, 0),
        ("temperature", temperature, 0),
        ("context", context, 1),
    ):
        if not value >= least:
            raise ValueError(f"{name}={value!r}; expected at least {least}")
    text = tokenizer.encode(prompt).tolist()
    ids = [tokenizer.bos_id, *text]
    size = min(context, len(ids) + length)
    ids = ids[-size:]
    buffer = jnp.asarray(np.pad(np.array(ids, np.int32), (0, size - len(ids))))

    graphdef, params = nnx.split(model)
    key = jax.random.key(seed)
    filled = jnp.int32(len(ids))
    for step in range(length):
        token, buffer, filled = _next_token(
            graphdef,
            params,
            buffer,
            filled,
            jax.random.fold_in(key, step),
            jnp.float32(temperature),
            vocab_size=tokenizer.vocab_size,
        )
        if int(token) == tokenizer.eos_id:
            break
        text.append(int(token))
    # Decoded together: a token may hold only a part of a character.
    return tokenizer.decode(text)


@functools.partial(jax.jit, static_argnums=0, static_argnames="vocab_size")
def _next_token(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    buffer: Int32[Array, " C"],
    filled: Int32[Array, ""],
    key: Array,
    temperature: Array,
    *,
    vocab_size: int,
) -> tuple[Int32[Array, ""], Int32[Array, " C"], Int32[Array, ""]]:
    """Samples a token after the `filled` first tokens of the buffer and appends it."""
    model = nnx.merge(graphdef, params)
    # Attention is causal: what lies in the buffer beyond `filled` changes nothing.
    hidden = model.hidden(buffer[None])[0]
    # A model may have more rows than the tokenizer has ids; those were never trained.
    logits = model.logits(hidden[filled - 1])[:vocab_size]
    drawn = jax.random.categorical(key, logits / jnp.maximum(temperature, 1e-6))
    token = jnp.where(temperature > 0, drawn, jnp.argmax(logits)).astype(jnp.int32)
    full = filled == len(buffer)
    buffer = jnp.where(full, jnp.roll(buffer, -1), buffer)
    filled = jnp.where(full, filled, filled + 1)
    return token, buffer.at[filled - 1].set(token), filled
