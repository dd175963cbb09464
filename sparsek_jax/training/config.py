"""The whole configuration of a run: fields, defaults and the checks made before any compilation."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import jax
import ml_collections

from sparsek_jax import nn
from sparsek_jax.data import default_data_config, validate_data_config
from sparsek_jax.nn.alternatives import LAYERS
from sparsek_jax.nn.attention import SelectiveAttention
from sparsek_jax.ops.attention import no_kernels


class ConfigError(ValueError):
    """A configuration that cannot work. The message names the field, its value and the remedy."""


def default_config() -> ml_collections.ConfigDict:
    """Returns every field of a run with its default value; a recipe in configs/ changes some."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    # Directory of a run, or of an imported model, whose newest weights this run starts from.
    config.init_from = ""

    config.model = ml_collections.ConfigDict()
    config.model.vocab_size = 0  # 0: the tokenizer's
    config.model.num_layers = 4
    config.model.d_model = 256
    config.model.mlp_dim = 768
    config.model.norm = "rmsnorm"  # or "layernorm"
    config.model.norm_eps = 1e-6
    config.model.activation = "swiglu"  # or "gelu"
    config.model.mlp_bias = False
    config.model.parallel_residual = False
    config.model.tie_embeddings = True
    config.model.remat = "none"  # "full": recompute each block; "dots": keep matrix products
    config.model.scan_layers = False  # one compiled block for all layers: compiles faster
    config.model.dtype = "float32"  # of the computation; parameters are always float32

    config.attention = ml_collections.ConfigDict()
    # "dense", "window", or selection by other than learned scores: "sinks" (the first keys),
    # "random", "key_norm" (keys of low norm), "strided" (keys at equal distances);
    # or of blocks: "bigbird" (the first and random ones), "moba" (by mean keys),
    # "nsa" (by compressed keys); or "lsh" (keys in the query's hash buckets);
    # or the window and "gated_linear" attention; or SparseK and "sparsek_linear" attention to the
    # keys that it dropped
    config.attention.kind = "sparsek"
    # Kinds repeated over the layers; (): `kind` in every layer. On the command line:
    # --config.attention.pattern="('window','sparsek')"
    config.attention.pattern = ()
    config.attention.num_heads = 4
    config.attention.num_kv_heads = 4
    config.attention.head_dim = 64
    config.attention.num_selected = 128
    config.attention.sliding_window = 128
    config.attention.block_size = 64  # of "bigbird", "moba" and "nsa"
    config.attention.gating = "soft"  # of learned scores only; others: sparsek_jax/ops/gating.py
    config.attention.implementation = ""  # "": the best; "reference", "xla", "mosaic_gpu"
    config.attention.qk_norm = False
    config.attention.qkv_bias = False
    config.attention.out_bias = False
    config.attention.rope_theta = 1e4
    # "linear" divides all rotary frequencies by rope_factor, "llama3" the low ones: those that turn
    # fewer than rope_low_freq_factor times in rope_original_length tokens, and in part those up to
    # rope_high_freq_factor.
    config.attention.rope_scaling = "none"
    config.attention.rope_factor = 1.0
    config.attention.rope_low_freq_factor = 1.0
    config.attention.rope_high_freq_factor = 4.0
    config.attention.rope_original_length = 8192
    config.attention.rotary_fraction = 1.0
    config.attention.shared_scores = False
    config.attention.timestep_norm = True
    config.attention.score_scale = 1.0  # standard deviation of the first scores
    config.attention.slope = 1e-6  # what scores gain per position
    config.attention.learned_slope = False  # each score learns a slope in addition, from 0
    config.attention.num_sinks = 0  # first tokens of a document, always among the selected ones

    config.data = default_data_config()

    config.optimizer = ml_collections.ConfigDict()
    config.optimizer.learning_rate = 1e-3  # at the end of the warm-up
    config.optimizer.warmup_steps = 100
    config.optimizer.end_fraction = 0.1  # of learning_rate, at the last step of the cosine
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.95
    config.optimizer.eps = 1e-8
    config.optimizer.weight_decay = 0.1  # on matrices only
    # Of the scorers, at the end of their warm-up; 0: learning_rate.
    config.optimizer.scorer_learning_rate = 0.0
    # First steps, in which nothing but the scorers moves; then the rest begins with its warm-up.
    # Without effect where there are no scorers.
    config.optimizer.freeze_steps = 0
    # Learning rate of a layer relative to that of the layer after it; the embedding counts as the
    # layer before the first, scorers as none. 1: the same rate for all.
    config.optimizer.layer_decay = 1.0
    config.optimizer.clip_norm = 1.0  # of the global gradient; 0: no clipping
    config.optimizer.z_loss = 0.0  # weight of mean(logsumexp(logits)^2)
    config.optimizer.accumulate = 1  # microbatches that a batch is cut into

    # Devices along each axis; -1 on one of them: all that remain.
    config.mesh = ml_collections.ConfigDict()
    config.mesh.data = -1
    config.mesh.fsdp = 1
    config.mesh.tensor = 1

    config.train = ml_collections.ConfigDict()
    config.train.steps = 1000
    config.train.batch_size = 8  # rows in a step, over all devices and microbatches
    config.train.loss_chunk = 1024  # tokens per device whose logits exist at a time
    config.train.log_every = 10
    config.train.eval_every = 200  # 0: only at the end
    config.train.eval_batches = 16  # 0: the whole validation split
    config.train.checkpoint_every = 200
    config.train.keep = 3  # newest checkpoints kept
    config.train.max_bad_steps = 5  # stop after so many non-finite steps in a row
    # A document that is longer than a row goes on in the same row of the next step, with what the
    # attention remembers of it; docs/recurrent.md. Else it is cut into rows that know nothing of
    # each other.
    config.train.recurrent = False
    # With train.recurrent: what is remembered also learns from the next row's loss.
    config.train.recurrent_gradient = False

    # Text that train.py prints at the end.
    config.sample = ml_collections.ConfigDict()
    config.sample.prompt = "def "
    config.sample.length = 200  # tokens; 0: none
    config.sample.temperature = 0.8  # 0: the likeliest token

    config.eval = ml_collections.ConfigDict()
    config.eval.batch_size = 8
    config.eval.batches = 0  # 0: the whole validation split
    config.eval.position_buckets = 8  # of context, each double the last
    # Edges between buckets instead of these, such as (2048, 4096, 6144).
    config.eval.position_edges = ()
    # Context is all of the document before a token, even what a model without train.recurrent does
    # not see of it, for being in another row: what that costs.
    config.eval.by_document = False
    # Of eval.py --tasks: tokens of the prompts, how far into them the answer stands (0 to 1),
    # examples for each pair of these, and the seed of all examples.
    config.eval.task_lengths = (512, 1024, 2048)
    config.eval.task_depths = (0.0, 0.25, 0.5, 0.75, 1.0)
    config.eval.task_samples = 8
    config.eval.task_seed = 0
    # A recipe that mistypes a field fails instead of adding one.
    config.lock()
    return config


def flat_fields(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Returns all fields by dotted name, such as "data.recall.gap", with JSON's types."""
    flat = {}

    def visit(prefix, value):
        for name, child in value.items():
            if isinstance(child, dict):
                visit(f"{prefix}{name}.", child)
            else:
                flat[f"{prefix}{name}"] = child

    visit("", json.loads(config.to_json()))
    return flat


def decoder_config(config: ml_collections.ConfigDict, vocab_size: int) -> nn.DecoderConfig:
    """Builds the model's configuration.

    Args:
      config: a run's configuration.
      vocab_size: the tokenizer's; used unless model.vocab_size is set.

    Raises:
      ConfigError: a field is impossible, or model.vocab_size is below the tokenizer's.
    """
    model = config.model.to_dict()
    model["vocab_size"] = model["vocab_size"] or vocab_size
    if model["vocab_size"] < vocab_size:
        raise ConfigError(
            f"model.vocab_size={model['vocab_size']}; expected 0 or at least the tokenizer's "
            f"{vocab_size}"
        )
    attention = config.attention.to_dict()
    attention["pattern"] = tuple(attention["pattern"])
    attention["implementation"] = attention["implementation"] or None
    try:
        return nn.DecoderConfig(**model, attention=nn.AttentionConfig(**attention))
    except ValueError as error:
        raise ConfigError(str(error)) from error


def mesh_shape(config: ml_collections.ConfigDict, device_count: int) -> dict[str, int]:
    """Returns the size of each mesh axis, with -1 replaced by what remains of the devices.

    Raises:
      ConfigError: the axes do not multiply to `device_count`.
    """
    shape = {axis: config.mesh[axis] for axis in ("data", "fsdp", "tensor")}
    for axis, size in shape.items():
        if size < 1 and size != -1:
            raise ConfigError(f"mesh.{axis}={size}; expected a positive size, or -1 for the rest")
    free = [axis for axis, size in shape.items() if size == -1]
    if len(free) > 1:
        raise ConfigError(f"mesh.{free[1]}=-1 beside mesh.{free[0]}=-1; expected at most one -1")
    given = math.prod(size for size in shape.values() if size != -1)
    if free:
        if device_count % given:
            raise ConfigError(
                f"mesh.{free[0]}=-1 with the other axes taking {given}; expected these to divide "
                f"the {device_count} devices"
            )
        shape[free[0]] = device_count // given
    elif given != device_count:
        raise ConfigError(
            f"mesh.data={shape['data']} x mesh.fsdp={shape['fsdp']} x mesh.tensor="
            f"{shape['tensor']} takes {given} devices; this run has {device_count} "
            "(mesh.data=-1 takes all that remain)"
        )
    return shape


def validate_config(
    config: ml_collections.ConfigDict, device_count: int, process_count: int = 1
) -> None:
    """Checks a run's configuration; compiles nothing, reads no text and writes nothing.

    Args:
      config: a run's configuration.
      device_count: devices of all processes together.
      process_count: processes of the run.

    Raises:
      ConfigError: a field is impossible or two fields contradict; the message names them.
    """
    try:
        validate_data_config(config.data)
    except ValueError as error:
        raise ConfigError(str(error)) from error

    if not 0 <= config.seed < 2**32:
        raise ConfigError(f"seed={config.seed}; expected an integer from 0 to 2**32 - 1")
    _at_least(config, "model.vocab_size", 0)
    # The tokenizer may still have to be trained: a stand-in checks every other field now.
    decoder_config(config, config.model.vocab_size or 1)
    validate_implementation(config)

    _positive(config, "optimizer.learning_rate")
    _at_least(config, "optimizer.warmup_steps", 0)
    _within(config, "optimizer.end_fraction", 0.0, 1.0)
    _within(config, "optimizer.b1", 0.0, 1.0, open_end=True)
    _within(config, "optimizer.b2", 0.0, 1.0, open_end=True)
    _positive(config, "optimizer.eps")
    _at_least(config, "optimizer.weight_decay", 0)
    _at_least(config, "optimizer.scorer_learning_rate", 0)
    _at_least(config, "optimizer.freeze_steps", 0)
    _positive(config, "optimizer.layer_decay")
    _within(config, "optimizer.layer_decay", 0.0, 1.0)
    _at_least(config, "optimizer.clip_norm", 0)
    _at_least(config, "optimizer.z_loss", 0)
    _at_least(config, "optimizer.accumulate", 1)
    for field in ("steps", "batch_size", "loss_chunk", "log_every", "checkpoint_every", "keep"):
        _at_least(config, f"train.{field}", 1)
    _at_least(config, "train.max_bad_steps", 1)
    for field in ("train.eval_every", "train.eval_batches", "sample.length"):
        _at_least(config, field, 0)
    _at_least(config, "sample.temperature", 0)
    validate_recurrence(config)
    validate_eval_config(config.eval)
    if config.optimizer.warmup_steps >= config.train.steps:
        raise ConfigError(
            f"optimizer.warmup_steps={config.optimizer.warmup_steps}; expected fewer than "
            f"train.steps={config.train.steps}"
        )
    if config.optimizer.freeze_steps + config.optimizer.warmup_steps >= config.train.steps:
        raise ConfigError(
            f"optimizer.freeze_steps={config.optimizer.freeze_steps} and then optimizer."
            f"warmup_steps={config.optimizer.warmup_steps}; expected together fewer than "
            f"train.steps={config.train.steps}"
        )

    shape = mesh_shape(config, device_count)
    rows = shape["data"] * shape["fsdp"]
    accumulate = config.optimizer.accumulate
    if config.train.batch_size % (accumulate * rows):
        raise ConfigError(
            f"train.batch_size={config.train.batch_size}; expected a multiple of "
            f"optimizer.accumulate={accumulate} x mesh.data={shape['data']} x "
            f"mesh.fsdp={shape['fsdp']}"
        )
    if rows % process_count:
        raise ConfigError(
            f"mesh.data={shape['data']} x mesh.fsdp={shape['fsdp']}; expected a multiple of the "
            f"{process_count} processes, each of which reads its own rows"
        )
    for field in ("attention.num_heads", "attention.num_kv_heads", "model.mlp_dim"):
        if _get(config, field) % shape["tensor"]:
            raise ConfigError(
                f"{field}={_get(config, field)}; expected a multiple of "
                f"mesh.tensor={shape['tensor']}"
            )
    if config.model.d_model % shape["fsdp"]:
        raise ConfigError(
            f"model.d_model={config.model.d_model}; expected a multiple of "
            f"mesh.fsdp={shape['fsdp']}"
        )


def validate_implementation(config: ml_collections.ConfigDict) -> None:
    """Checks that kernels that are asked for by name can run on this machine.

    Raises:
      ConfigError: They cannot; the message names the fields.
    """
    kinds = config.attention.pattern or [config.attention.kind]
    selective = [kind for kind, layer in LAYERS.items() if issubclass(layer, SelectiveAttention)]
    if config.attention.implementation != "mosaic_gpu" or not {*kinds} & {*selective}:
        return
    shape = (1, 1, config.attention.num_heads, config.attention.head_dim)
    if reason := no_kernels(jax.ShapeDtypeStruct(shape, config.model.dtype)):
        raise ConfigError(
            f"attention.implementation='mosaic_gpu' with model.dtype={config.model.dtype!r}: "
            f"{reason}; expected '' for the best that this machine and the dtype allow"
        )


def validate_recurrence(config: ml_collections.ConfigDict) -> None:
    """Checks that rows can go on from the rows before, if they shall.

    Raises:
      ConfigError: They cannot; the message names the fields.
    """
    if not config.train.recurrent:
        if config.train.recurrent_gradient:
            raise ConfigError(
                "train.recurrent_gradient=True with train.recurrent=False; expected "
                "train.recurrent=True, or no gradients that go from row to row"
            )
        return
    field = "pattern" if config.attention.pattern else "kind"
    able = [kind for kind, layer in LAYERS.items() if layer.has_memory]
    if not {*(config.attention.pattern or [config.attention.kind])} <= {*able}:
        raise ConfigError(
            f"attention.{field}={config.attention[field]!r} with train.recurrent=True; expected "
            f"kinds that have a memory ({', '.join(able)}), or train.recurrent=False"
        )
    check_lanes(config, "train.recurrent")


def check_lanes(config: ml_collections.ConfigDict, field: str) -> None:
    """Checks that text can be read in rows that go on from the rows before.

    Args:
      config: A run's configuration.
      field: The field that asks for it.

    Raises:
      ConfigError: It cannot.
    """
    if config.data.packing != "segments":
        raise ConfigError(
            f"data.packing={config.data.packing!r} with {field}=True; expected 'segments', since a "
            f"document goes on from its own past, or {field}=False"
        )
    if config.data.recall.num_pairs:
        raise ConfigError(
            f"data.recall.num_pairs={config.data.recall.num_pairs} with {field}=True; expected 0, "
            f"since what is to be recalled is in one row, or {field}=False"
        )


def validate_eval_config(config: ml_collections.ConfigDict) -> None:
    """Checks the section `eval`.

    Raises:
      ConfigError: A field is impossible; the message names it.
    """
    least = {"batch_size": 1, "batches": 0, "position_buckets": 1}
    least |= {"task_samples": 1, "task_seed": 0}
    for field, minimum in least.items():
        if not config[field] >= minimum:
            raise ConfigError(f"eval.{field}={config[field]!r}; expected at least {minimum}")
    edges, lengths, depths = config.position_edges, config.task_lengths, config.task_depths
    whole = all(isinstance(n, int) and n >= 1 for n in edges)
    if not whole or any(a >= b for a, b in itertools.pairwise(edges)):
        raise ConfigError(
            f"eval.position_edges={edges!r}; expected ascending integers above 0, or ()"
        )
    if not lengths or not all(isinstance(n, int) and n >= 1 for n in lengths):
        raise ConfigError(f"eval.task_lengths={lengths!r}; expected integers above 0")
    if not depths or not all(isinstance(x, int | float) and 0 <= x <= 1 for x in depths):
        raise ConfigError(f"eval.task_depths={depths!r}; expected numbers from 0 to 1")


def _get(config: ml_collections.ConfigDict, field: str) -> Any:
    section, name = field.split(".")
    return config[section][name]


def _at_least(config: ml_collections.ConfigDict, field: str, minimum: float) -> None:
    value = _get(config, field)
    if not minimum <= value < math.inf:
        raise ConfigError(f"{field}={value!r}; expected a finite number of at least {minimum}")


def _positive(config: ml_collections.ConfigDict, field: str) -> None:
    value = _get(config, field)
    if not 0 < value < math.inf:
        raise ConfigError(f"{field}={value!r}; expected a finite number above 0")


def _within(
    config: ml_collections.ConfigDict,
    field: str,
    low: float,
    high: float,
    *,
    open_end: bool = False,
) -> None:
    value = _get(config, field)
    if not (low <= value < high if open_end else low <= value <= high):
        end = "below" if open_end else "at most"
        raise ConfigError(f"{field}={value!r}; expected at least {low} and {end} {high}")
