r"""A 21M-parameter model of long source files, to compare kinds of attention by, at 4k context.

    python -m sparsek_jax.data.long_documents ...    # as its docstring has it; writes texts/
    python train.py --config=configs/long_code.py --workdir=runs/short
    python train.py --config=configs/long_code.py:runs/short --workdir=runs/long_code
    python eval.py --config=configs/long_code.py:runs/short --workdir=runs/long_code

First come rows of 512 tokens with dense attention: all that a window of 512 could see, so that what
near tokens tell is learned once, and equally, for every kind of attention. Then come rows of 4,096,
which join documents into one context. What follows the colon is the model to start from. The last
layer attends to 2,304 selected keys, the first four of the document among them, and a window of
128, the others to that window alone: 512 keys a layer on average. Every head learns how fast it
forgets; gates multiply values alone. All of it was chosen by what was measured (docs/results.md).

Others of the same budget are the arms of `python -m benchmarks.long_code`, such as SparseK in every
layer, by --config.attention and

    .pattern='()' .num_selected=256 .sliding_window=256 .gating=soft

Dense attention, which sees more, is .pattern='()' .kind=dense.

Rows of 16,384 are --config.data.seq_len=16384 --config.train.batch_size=4. Longer contexts than in
training: eval.py with --config.data.seq_len=65536 --config.eval.batch_size=1.

Seen on one H100 (jax 0.11.2, three seeds): 1.554 to 1.557 nats, 0.04 to 0.14 % over dense attention
from the same start; from another start, on one H200, 1.556 to 1.565, -0.05 to 0.06 %. Of rows of
16,384, on one H100, 1.518 and 1.519, 0.2 to 0.4 % over it.
Reproduces no paper result.
"""

import ml_collections

from sparsek_jax.training.config import default_config


def get_config(start: str = "") -> ml_collections.ConfigDict:
    """Returns the configuration.

    Args:
      start: Directory of the run on short rows, to go on with long ones; "": that run itself.
    """
    config = default_config()
    config.init_from = start
    config.model.num_layers = 6
    config.model.d_model = 512
    config.model.mlp_dim = 1408
    config.model.dtype = "bfloat16"
    config.attention.kind = "sparsek" if start else "dense"
    config.attention.pattern = ("window",) * 5 + ("sparsek",) if start else ()
    config.attention.gating = "soft_values"
    config.attention.num_heads = 8
    config.attention.num_kv_heads = 4
    config.attention.head_dim = 64
    config.attention.num_selected = 2304
    config.attention.sliding_window = 128
    config.attention.learned_slope = True
    config.attention.num_sinks = 4
    config.attention.qk_norm = True
    config.attention.rope_theta = 1e5
    config.data.glob = "texts/train/c/*.txt"
    config.data.tokenizer = "bpe:8192"
    config.data.seq_len = 4096 if start else 512
    config.data.packing = "continuous"
    config.optimizer.learning_rate = 1e-3 if start else 2e-3
    config.optimizer.scorer_learning_rate = 1e-2
    config.optimizer.warmup_steps = 60
    config.train.steps = 800 if start else 2400
    config.train.batch_size = 16 if start else 128
    config.train.loss_chunk = 16384
    config.train.log_every = 20
    config.train.eval_every = 400
    config.train.eval_batches = 8
    config.train.checkpoint_every = 800
    config.train.keep = 1
    config.eval.batch_size = 16
    config.eval.batches = 16
    config.eval.position_edges = (512, 1024, 2048, 3072, 4096, 8192, 16384, 32768)
    config.sample.length = 0
    return config
