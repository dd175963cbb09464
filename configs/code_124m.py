r"""A 124M-parameter model of source code with 32k context, on one GPU.

The usual 12-layer shape (width 768, 12 heads of 64) with SparseK attention, k = 512, w = 512. A row
joins documents into one context. Reproduces no paper result.

    python train.py --config=configs/code_124m.py --workdir=runs/code_124m
    python train.py --config=configs/code_124m.py --workdir=runs/code_124m_dense \
        --config.attention.kind=dense

Seen on one NVIDIA H100 (jax 0.11.2, the kernels of implementation "mosaic_gpu", the default there),
eight progress lines of 40 steps, with --config.train.steps=40 --config.optimizer.warmup_steps=10
--config.train.log_every=5 --config.train.eval_every=0, range and median; see docs/performance.md:

    attention     ms per step           tokens/s   peak device memory
    sparsek       155 to 168 (156)      209,900              24.3 GiB
    dense (cuDNN) 253 to 259 (256)      128,000              22.9 GiB

At that rate all 2,000 steps take about 5 minutes with sparsek. --config.model.remat=full trades
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
