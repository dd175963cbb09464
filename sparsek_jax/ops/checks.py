"""Checks of arguments, in messages that name the argument, its value and what was expected."""

import math
import reprlib
from typing import Any

import jax.numpy as jnp
import numpy as np

_KINDS = {jnp.floating: "a floating-point", jnp.integer: "an integer"}


def check_array(name: str, array: Any, kind: type) -> None:
    """Raises TypeError unless it is an array of `kind`: `jnp.floating` or `jnp.integer`."""
    dtype = getattr(array, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, kind):
        got = reprlib.repr(array) if dtype is None else f"dtype {dtype}"
        raise TypeError(f"{name} must be {_KINDS[kind]} array, got {got}")


def check_int(name: str, value: Any, least: int | None = None) -> None:
    """Raises TypeError unless it is an int, and ValueError if it is below `least`."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if least is not None and value < least:
        raise ValueError(f"{name}={value} must be at least {least}")


def is_finite_number(value: Any) -> bool:
    """Whether it is one number, no bool, that is finite as a float; of a tracer nobody knows."""
    if isinstance(value, bool | np.bool_):
        return False
    try:
        return np.shape(value) == () and math.isfinite(value)
    # Tracers raise a TypeError too.
    except (TypeError, ValueError, OverflowError):
        return False
