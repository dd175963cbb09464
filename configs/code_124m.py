"""A 124M-class model of source code with 32k context, on one H200.

The usual 12-layer shape (width 768, 12 heads of 64) with SparseK attention, k = 512, w = 512; a row
rows join documents. Dense attention of the same shape: `--config.attention.kind=dense`.

    python train.py --config=configs/code_124m.py --workdir=runs/code_124m
"""

import ml_collections

from sparsek_jax.training.config import default_config


def get_config() -> ml_collections.ConfigDict:
    """Returns the configuration."""
    config = default_config()
    config.model.num_layers = 12
    config.model.d_model = 768
    config.model.mlp_dim = 2048
    config.model.dtype = "bfloat16"
    config.model.remat = "full"
    config.model.scan_layers = True
    config.attention.num_heads = 12
    config.attention.num_kv_heads = 12
    config.attention.head_dim = 64
    config.attention.num_selected = 512
    config.attention.sliding_window = 512
    config.data.tokenizer = "bpe:50304"
    config.data.seq_len = 32768
    config.data.packing = "continuous"
    config.data.shuffle_window = 16
    config.optimizer.learning_rate = 6e-4
    config.optimizer.warmup_steps = 100
    config.train.steps = 2000
    config.train.batch_size = 1
    config.train.loss_chunk = 4096
    config.train.log_every = 10
    config.train.eval_every = 500
    config.train.eval_batches = 8
    config.train.checkpoint_every = 500
    config.eval.batch_size = 1
    return config
