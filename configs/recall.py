r"""Does the scorer learn what will be asked for? Associative recall from far outside the window.

    python train.py --config=configs/recall.py --workdir=runs/recall_short
    python train.py --config=configs/recall.py:runs/recall_short --workdir=runs/recall
    python eval.py --config=configs/recall.py:runs/recall_short --workdir=runs/recall

A row holds pairs of a key and a value, a token each, and then every key once more: its value is
asked for (MQAR of Zoology, arXiv 2312.04927). Of the two layers the first attends to the token and
the one before it, so that a value's key is known at the value; the second is the one in question.

First comes how to recall: short rows of 64 tokens, 8 pairs side by side, dense attention. Without
this, 2,000 steps on long rows taught next to nothing, with dense attention neither. Then comes what
to keep: 32 pairs at random places among the first 1,024 of 2,048 tokens, filler between them
and behind them, each key again at least 513 tokens behind the last pair. A query sees 126 keys that
were selected and the last two. What follows the colon is the model to start from.

`python -m benchmarks.recall` trains the alternatives and the ablations in this way, and
docs/results.md has what came out. Reproduces no paper result.

Seen on one H200 (jax 0.11.2): SparseK and dense attention recall 100.0 % of the values in each of
three seeds, a window of as many keys 1.6 %.
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
    config.model.num_layers = 2
    config.model.d_model = 256
    config.model.mlp_dim = 512
    config.model.tie_embeddings = False  # tied, short rows took longer
    config.model.dtype = "bfloat16"
    config.attention.pattern = ("window", "sparsek" if start else "dense")
    config.attention.num_heads = 4
    config.attention.num_kv_heads = 4
    config.attention.head_dim = 64
    config.attention.num_selected = 126
    config.attention.sliding_window = 2
    config.attention.qk_norm = True
    config.data.tokenizer = "ids:192"
    config.data.packing = "continuous"  # a row is one document
    config.data.recall.num_fillers = 64
    config.train.log_every = 50
    config.train.eval_batches = 0
    config.train.loss_chunk = 16384
    config.train.keep = 1
    config.eval.batch_size = 16
    config.sample.length = 0
    if start:
        config.data.seq_len = 2048
        config.data.recall.num_pairs = 32
        config.data.recall.spread = 1024
        config.data.recall.gap = 512
        config.optimizer.learning_rate = 1e-3
        config.optimizer.scorer_learning_rate = 1e-2
        config.optimizer.warmup_steps = 50
        config.train.batch_size = 32
        config.train.steps = 400
        config.train.eval_every = 100
        config.train.checkpoint_every = 400
    else:
        config.data.seq_len = 64
        config.data.recall.num_pairs = 8
        config.optimizer.learning_rate = 2e-3
        config.train.batch_size = 128
        config.train.steps = 600
        config.train.eval_every = 200
        config.train.checkpoint_every = 600
    return config
