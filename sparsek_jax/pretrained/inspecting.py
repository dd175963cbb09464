"""What a foreign file holds, and whether it could be imported."""

from __future__ import annotations

import collections
import dataclasses
import math
from pathlib import Path

from sparsek_jax import nn
from sparsek_jax.pretrained.families import DEFAULT_OPTIONS
from sparsek_jax.pretrained.importing import open_source, planned
from sparsek_jax.pretrained.source import Source
from sparsek_jax.training.config import ConfigError


def describe(path: Path) -> list[str]:
    """Lines about a model: fields, tensors, tokenizer, and what an import would say; reads no data.

    Args:
      path: A Hugging Face directory or a GGUF file.

    Raises:
      ConversionError: It is neither, or damaged.
    """
    source = open_source(path)
    tensors = source.tensors
    dtypes = collections.Counter(tensor.dtype for tensor in tensors.values())
    num_parameters = sum(math.prod(tensor.shape) for tensor in tensors.values())
    num_bytes = sum(tensor.num_bytes for tensor in tensors.values())
    lines = [
        f"{path}: {source.format}, model_type {source.config.get('model_type')!r}",
        f"{len(tensors)} tensors of {num_parameters:,} numbers in {num_bytes:,} bytes: "
        + ", ".join(f"{count} {dtype}" for dtype, count in dtypes.most_common()),
        f"tokenizer: {', '.join(source.tokenizer) or 'none'}",
    ]
    width = max((len(name) for name in tensors), default=0)
    lines += [
        f"  {name:{width}}  {tensor.dtype:5} {list(tensor.shape)}"
        for name, tensor in tensors.items()
    ]
    return lines + _verdict(source)


def _verdict(source: Source) -> list[str]:
    try:
        _, config, plan = planned(source, DEFAULT_OPTIONS)
    except ConfigError as error:
        return [f"cannot be imported: {error}"]
    lines = ["can be imported:"]
    for section, fields in (("model", config), ("attention", config.attention)):
        lines += [
            f"  {section}.{field.name} = {getattr(fields, field.name)!r}"
            for field in dataclasses.fields(fields)
            if not isinstance(getattr(fields, field.name), nn.AttentionConfig)
        ]
    lines += [f"  new: {tensor.name} {list(tensor.shape)}" for tensor in plan.new]
    return lines + [f"  left out: {name}" for name in plan.dropped]
