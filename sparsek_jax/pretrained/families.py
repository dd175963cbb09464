"""Families of models: a config.json of Hugging Face, to and from the fields of a decoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from sparsek_jax import nn
from sparsek_jax.nn.config import KINDS
from sparsek_jax.pretrained.source import ConversionError
from sparsek_jax.training.config import ConfigError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt_neox")
# What a config.json made here says about attention in addition, and of which scorers consist.
ENTRY = "sparsek"
_ENTRY_FIELDS = (
    "kind",
    "pattern",
    "num_selected",
    "sliding_window",
    "block_size",
    "gating",
    "shared_scores",
    "timestep_norm",
    "slope",
    "learned_slope",
    "num_sinks",
)
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gpt_neox": "GPTNeoXForCausalLM",
}
# transformers' own, for what a config.json may leave out.
_CONTEXT = {"llama": 2048, "mistral": 131072, "qwen2": 32768, "qwen3": 32768, "gpt_neox": 2048}


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """What an import may ask for; None leaves it to the file, then to the defaults.

    Attributes:
      kind: Of every layer.
      pattern: Kinds repeated over the layers.
      num_selected: k.
      sliding_window: w.
      block_size: Of kinds that select blocks.
      gating: As in `sparsek_attention`.
    """

    kind: str | None = None
    pattern: tuple[str, ...] | None = None
    num_selected: int | None = None
    sliding_window: int | None = None
    block_size: int | None = None
    gating: str | None = None


DEFAULT_OPTIONS = AttentionOptions()


def decoder_fields(
    config: Mapping[str, Any], options: AttentionOptions = DEFAULT_OPTIONS
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields of a model's configuration and of its attention.

    Args:
      config: Contents of a config.json.
      options: The attention to use.

    Returns:
      Fields of `nn.DecoderConfig` but for `attention`, and of `nn.AttentionConfig`.

    Raises:
      ConversionError: A field is missing, or asks for what a decoder cannot do.
      ConfigError: An option does not go with the model.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ConversionError(f"model_type={family!r}; expected one of {FAMILIES}")
    _refuse(config, "quantization_config", (None,))
    num_heads = _size(config, "num_attention_heads")
    model = {
        "vocab_size": _size(config, "vocab_size"),
        "num_layers": _size(config, "num_hidden_layers"),
        "d_model": _size(config, "hidden_size"),
        "mlp_dim": _size(config, "intermediate_size"),
        "tie_embeddings": config.get("tie_word_embeddings", False),
    }
    attention = {"num_heads": num_heads} | _rope(config)
    make = _neox if family == "gpt_neox" else _llama
    family_model, family_attention = make(family, config, model["d_model"], num_heads)
    attention |= family_attention | _mixing(config, _window(family, config), options)
    return model | family_model, attention


def context_length(config: Mapping[str, Any]) -> int:
    """Tokens that a model was made for.

    Raises:
      ConversionError: The field is no number of tokens.
    """
    return _size(config, "max_position_embeddings", _CONTEXT[config["model_type"]])


def huggingface_config(config: nn.DecoderConfig, context: int) -> dict[str, Any]:
    """A config.json for a decoder, with an entry for its attention.

    transformers, which knows no SparseK, attends densely; over a window only where all layers do
    and the family can.

    Args:
      config: Of the decoder.
      context: Tokens it is made for.

    Raises:
      ConversionError: No family of Hugging Face has such blocks.
    """
    attention = config.attention
    family = _family(config)
    fields = {
        "architectures": [_ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": attention.num_heads,
        "max_position_embeddings": context,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": attention.qkv_bias,
        "rope_scaling": _rope_scaling(attention),
    }
    if family == "gpt_neox":
        fields |= {
            "hidden_act": "gelu",
            "layer_norm_eps": config.norm_eps,
            "use_parallel_residual": config.parallel_residual,
            "rotary_pct": attention.rotary_fraction,
            "rotary_emb_base": attention.rope_theta,
        }
    else:
        fields |= {
            "hidden_act": "silu",
            "rms_norm_eps": config.norm_eps,
            "num_key_value_heads": attention.num_kv_heads,
            "head_dim": attention.head_dim,
            "mlp_bias": config.mlp_bias,
            "rope_theta": attention.rope_theta,
        }
    if family in ("mistral", "qwen2", "qwen3"):
        window = attention.sliding_window if _only_windows(config) else None
        fields |= {"sliding_window": window}
        if family != "mistral":
            fields |= {"use_sliding_window": window is not None, "max_window_layers": 0}
    entry = {name: getattr(attention, name) for name in _ENTRY_FIELDS}
    return fields | {ENTRY: entry | {"pattern": list(attention.pattern)}}


def is_neox(config: nn.DecoderConfig) -> bool:
    """Whether a decoder's tensors have the names of GPT-NeoX, rather than those of Llama."""
    return config.norm == "layernorm"


def _llama(family, config, d_model, num_heads):
    """Llama, and what differs from it by biases and norms of heads."""
    _refuse(config, "hidden_act", ("silu",))
    if config.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConversionError(
            f"partial_rotary_factor={config['partial_rotary_factor']!r}; expected 1.0 for {family}"
        )
    bias = config.get("attention_bias", False)
    num_kv_heads = _size(config, "num_key_value_heads", num_heads if family == "llama" else None)
    head_dim = _size(config, "head_dim", 128 if family == "qwen3" else d_model // num_heads)
    model = {
        "norm": "rmsnorm",
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "activation": "swiglu",
        "mlp_bias": family == "llama" and config.get("mlp_bias", False),
        "parallel_residual": False,
    }
    attention = {
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "qk_norm": family == "qwen3",
        "qkv_bias": {"qwen2": True, "mistral": False}.get(family, bias),
        "out_bias": {"qwen2": False, "mistral": False}.get(family, bias),
        "rotary_fraction": 1.0,
    }
    return model, attention


def _neox(family, config, d_model, num_heads):
    del family
    _refuse(config, "hidden_act", ("gelu",))
    if d_model % num_heads:
        raise ConversionError(
            f"hidden_size={d_model}; expected a multiple of num_attention_heads={num_heads}"
        )
    bias = config.get("attention_bias", True)
    parameters = _mapping(config, "rope_parameters")
    model = {
        "norm": "layernorm",
        "norm_eps": config.get("layer_norm_eps", 1e-5),
        "activation": "gelu",
        "mlp_bias": True,
        "parallel_residual": config.get("use_parallel_residual", True),
    }
    attention = {
        "num_kv_heads": num_heads,
        "head_dim": d_model // num_heads,
        "qk_norm": False,
        "qkv_bias": bias,
        "out_bias": bias,
        "rotary_fraction": parameters.get("partial_rotary_factor", config.get("rotary_pct", 0.25)),
    }
    return model, attention


def _rope(config):
    """Rotary fields, which transformers 5 keeps in `rope_parameters`."""
    rope = _mapping(config, "rope_scaling") | _mapping(config, "rope_parameters")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise ConversionError(
            f"the rotary embedding is scaled by rope_type={kind!r}, which is not supported; "
            "expected 'default', 'linear' or 'llama3'"
        )
    theta = config.get("rope_theta", config.get("rotary_emb_base", 1e4))
    fields = {"rope_theta": rope.get("rope_theta", theta)}
    if kind == "default":
        return fields | {"rope_scaling": "none"}
    names = {"factor": "rope_factor"}
    if kind == "llama3":
        names |= {
            "low_freq_factor": "rope_low_freq_factor",
            "high_freq_factor": "rope_high_freq_factor",
            "original_max_position_embeddings": "rope_original_length",
        }
    return (
        fields | {"rope_scaling": kind} | {new: _required(rope, old) for old, new in names.items()}
    )


def _rope_scaling(attention):
    kind = attention.rope_scaling
    if kind == "none":
        return None
    fields = {"rope_type": kind, "factor": attention.rope_factor}
    if kind == "llama3":
        fields |= {
            "low_freq_factor": attention.rope_low_freq_factor,
            "high_freq_factor": attention.rope_high_freq_factor,
            "original_max_position_embeddings": attention.rope_original_length,
        }
    return fields


def _window(family, config):
    """Newest keys that the model was trained to see in every layer; None: all."""
    if family in ("llama", "gpt_neox"):
        return None
    num_layers = config["num_hidden_layers"]
    if family == "mistral":
        window, first = config.get("sliding_window", 4096), 0
    else:
        window = config.get("sliding_window") if config.get("use_sliding_window") else None
        first = config.get("max_window_layers", 28)
    if window is not None:
        window = _size(config, "sliding_window", window)
    sliding, full = "sliding_attention", "full_attention"
    kinds = config.get("layer_types") or [
        sliding if window is not None and i >= first else full for i in range(num_layers)
    ]
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        raise ConversionError(
            f"layer_types={kinds!r}; expected a list of num_hidden_layers={num_layers} names"
        )
    if kinds == [full] * num_layers:
        return None
    if kinds != [sliding] * num_layers or window is None:
        raise ConversionError(
            f"sliding_window={window} in some layers only (layer_types or max_window_layers says "
            "so); expected it in all or none"
        )
    return window


def _mixing(config, window, options):
    """Kinds of attention and their budgets: as asked for, else by the file, else by default."""
    entry = _mapping(config, ENTRY)
    unknown = sorted(entry.keys() - set(_ENTRY_FIELDS))
    if unknown:
        raise ConversionError(f"{ENTRY}.{unknown[0]} is unknown; expected some of {_ENTRY_FIELDS}")
    asked = {name: value for name, value in vars(options).items() if value is not None}
    if "kind" in asked:
        # The pattern would hide the kind.
        entry.pop("pattern", None)
    fields = {"kind": "sparsek", "num_selected": nn.AttentionConfig.num_selected} | entry | asked
    fields["pattern"] = tuple(fields.get("pattern", ()))
    kinds = set(fields["pattern"] or (fields["kind"],))
    usual = nn.AttentionConfig.sliding_window
    if window is None:
        return {"sliding_window": usual} | fields
    if "dense" in kinds:
        raise ConfigError(
            f"--kind or --pattern asks for dense attention, but the model was trained with "
            f"sliding_window={window}; expected one of {[x for x in KINDS if x != 'dense']}"
        )
    widest = window if kinds == {"window"} else min(window, usual)
    fields = {"sliding_window": widest} | fields
    if fields["sliding_window"] > window:
        raise ConfigError(
            f"--sliding_window={fields['sliding_window']}; expected at most {window}, with which "
            "the model was trained"
        )
    return fields


def _family(config: nn.DecoderConfig) -> str:
    attention = config.attention
    if is_neox(config):
        needs = {
            "model.activation": (config.activation, "gelu"),
            "model.mlp_bias": (config.mlp_bias, True),
            "attention.out_bias": (attention.out_bias, attention.qkv_bias),
            "attention.qk_norm": (attention.qk_norm, False),
            "attention.num_kv_heads": (attention.num_kv_heads, attention.num_heads),
            "attention.head_dim": (attention.head_dim * attention.num_heads, config.d_model),
        }
        family = "gpt_neox"
    else:
        needs = {
            "model.activation": (config.activation, "swiglu"),
            "model.parallel_residual": (config.parallel_residual, False),
            "attention.rotary_fraction": (attention.rotary_fraction, 1.0),
        }
        if attention.qk_norm:
            family = "qwen3"
        elif attention.qkv_bias and not attention.out_bias:
            family = "qwen2"
        elif _only_windows(config) and not (attention.qkv_bias or config.mlp_bias):
            family = "mistral"
        else:
            family = "llama"
        if family != "qwen2":
            needs["attention.out_bias"] = (attention.out_bias, attention.qkv_bias)
        if family != "llama":
            needs["model.mlp_bias"] = (config.mlp_bias, False)
    for field, (value, expected) in needs.items():
        if value != expected:
            raise ConversionError(
                f"{field} does not fit the family {family!r} of Hugging Face, the nearest one: "
                f"{value!r}; expected {expected!r}"
            )
    return family


def _only_windows(config: nn.DecoderConfig) -> bool:
    return set(config.attention.pattern or (config.attention.kind,)) == {"window"}


def _required(config, name):
    if config.get(name) is None:
        raise ConversionError(f"{name} is missing; expected it")
    return config[name]


def _size(config, name, default=None):
    """A whole number of at least 1; null stands for the default, as it does in transformers."""
    value = config.get(name)
    value = default if value is None else value
    if value is None:
        raise ConversionError(f"{name} is missing; expected it")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConversionError(f"{name}={value!r}; expected an int of at least 1")
    return value


def _mapping(config, name):
    value = config.get(name) or {}
    if not isinstance(value, Mapping):
        raise ConversionError(f"{name}={value!r}; expected an object")
    return dict(value)


def _refuse(config, name, allowed):
    """Refuses a field with another value than those; what is left out is the first one."""
    value = config.get(name, allowed[0])
    if value not in allowed:
        raise ConversionError(f"{name}={value!r}; expected one of {allowed}")
