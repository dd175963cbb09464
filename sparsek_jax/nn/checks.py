"""Checks of arguments that layers and decoder share."""

import reprlib
from typing import Any

import jax.numpy as jnp


def check_integers(name: str, array: Any, shape: tuple[int, ...] | None) -> None:
    """Raises ValueError unless it is an array of integers of this shape; None: `[B, T]`."""
    if not hasattr(array, "dtype"):
        raise ValueError(f"{name}={reprlib.repr(array)}; expected an array of integers")
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(f"{name} has dtype {array.dtype}; expected integers")
    if array.ndim != 2 or shape not in (None, array.shape):
        raise ValueError(f"{name} has shape {array.shape}; expected {shape or '[B, T]'}")
