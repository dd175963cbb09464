r"""A 21M-parameter model of long source files, to compare kinds of attention by, at 4k context.

    python -m sparsek_jax.data.long_documents ...    # as its docstring has it; writes texts/
    python train.py --config=configs/long_code.py --workdir=runs/long_code
    python eval.py --config=configs/long_code.py --workdir=runs/long_code

Six layers of width 512, each query attending to 256 selected keys and a window of 256. A row joins
documents into one context. Others of the same budget are trained on the same rows by these:

    --config.attention.kind=dense
    --config.attention.kind=window --config.attention.sliding_window=512
    --config.attention.kind=sinks --config.attention.num_selected=4 \
        --config.attention.sliding_window=508
    --config.attention.kind=random

Longer contexts than in training: eval.py with --config.data.seq_len=65536
--config.eval.batch_size=1. Reproduces no paper result; docs/results.md has what came out.
"""

import ml_collections

from sparsek_jax.training.config import default_config


def get_config() -> ml_collections.ConfigDict:
    """Returns the configuration."""
    config = default_config()
    config.model.num_layers = 6
    config.model.d_model = 512
    config.model.mlp_dim = 1408
    config.model.dtype = "bfloat16"
    config.attention.num_heads = 8
    config.attention.num_kv_heads = 4
    config.attention.head_dim = 64
    config.attention.num_selected = 256
    config.attention.sliding_window = 256
    config.attention.qk_norm = True
    config.data.glob = "texts/train/c/*.txt"
    config.data.tokenizer = "bpe:8192"
    config.data.seq_len = 4096
    config.data.packing = "continuous"
    config.optimizer.learning_rate = 2e-3
    config.optimizer.scorer_learning_rate = 1e-2
    config.optimizer.warmup_steps = 60
    config.train.steps = 600
    config.train.batch_size = 16
    config.train.loss_chunk = 16384
    config.train.log_every = 20
    config.train.eval_every = 200
    config.train.eval_batches = 8
    config.train.checkpoint_every = 600
    config.train.keep = 1
    config.eval.batch_size = 16
    config.eval.batches = 16
    config.eval.position_edges = (512, 1024, 2048, 3072, 4096, 8192, 16384, 32768)
    config.sample.length = 0
    return config
