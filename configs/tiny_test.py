"""A model of 27,000 parameters that trains in seconds; for tests and for trying things.

Reproduces no paper result.

    python train.py --config=configs/tiny_test.py --workdir=runs/tiny_test

Seen on two cores of an AMD EPYC (Python 3.12.1, jax 0.11.2): 23 seconds, nearly all start-up and
compilation; the training loss falls from 5.6 to 3.8 nats per byte in its twelve steps.
"""

import ml_collections

from sparsek_jax.training.config import default_config


def get_config() -> ml_collections.ConfigDict:
    """Returns the configuration."""
    config = default_config()
    config.model.num_layers = 2
    config.model.d_model = 32
    config.model.mlp_dim = 64
    config.attention.num_heads = 4
    config.attention.num_kv_heads = 2
    config.attention.head_dim = 8
    config.attention.num_selected = 8
    config.attention.sliding_window = 8
    config.data.seq_len = 64
    config.data.max_documents = 24
    config.optimizer.learning_rate = 1e-2
    config.optimizer.warmup_steps = 2
    config.train.steps = 12
    config.train.batch_size = 8
    config.train.log_every = 1
    config.train.eval_every = 6
    config.train.eval_batches = 2
    config.train.checkpoint_every = 4
    config.eval.batches = 4
    config.sample.length = 20
    return config
