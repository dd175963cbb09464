r"""A 124M-parameter model of source code with 32k context, on one GPU.

The usual 12-layer shape (width 768, 12 heads of 64) with SparseK attention, k = 512, w = 512. A row
joins documents into one context. Reproduces no paper result.

    python train.py --config=configs/code_124m.py --workdir=runs/code_124m
    python train.py --config=configs/code_124m.py --workdir=runs/code_124m_dense \
        --config.attention.kind=dense

Seen on one NVIDIA H200 (jax 0.11.2, implementation "xla", one run each, 200 steps of 32,768 tokens
with --config.train.steps=200, median over steps 100 to 195):

    attention     ms per step   tokens/s   peak device memory   held-out loss at step 200
    sparsek               572     57,300            24.0 GiB                  4.53 nats
    dense (cuDNN)         261    125,500            23.2 GiB                  4.93 nats

Both ran on the same card, one stepping at a time. "xla" is the portable implementation. With the
kernels (implementation "mosaic_gpu", the default there) on one NVIDIA H100, 60 steps with
--config.train.steps=60 --config.optimizer.warmup_steps=10, range and median of the progress lines:

    attention     ms per step           peak device memory   held-out loss at step 60
    sparsek       185 to 201 (187)                24.5 GiB                  6.34 nats
    dense (cuDNN) 274 to 363 (315)                23.2 GiB                  6.62 nats

At that rate all 2,000 steps take about 6 minutes with sparsek. --config.model.remat=full trades
time for memory.
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
    config.model.remat = "none"
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
