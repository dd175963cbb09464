r"""Continues the training of SmolLM2-135M on long documents, with 16k tokens of context.

    python -m sparsek_jax.data.long_documents ...    # as its docstring has it; writes texts/
    python convert.py import --from=$GGUF --workdir=runs/smollm2    # docs/pretrained.md has $GGUF
    python convert.py calibrate --workdir=runs/smollm2 --to=runs/started --text=FILE,FILE,FILE
    python train.py --config=configs/finetune_smollm2.py:runs/started --workdir=runs/tuned
    python -m benchmarks.text_nats --workdir=runs/tuned --tokens=16384 --pieces=4 --buckets=8 \
        --to=runs/tuned/nats.json texts/held_out/*/*.txt

The calibration texts are some of texts/train, one of each kind. What follows the colon is the model
to start from. Other attention is trained on the same rows and as many tokens by the same command
with another --workdir and one of these; but for the first two, each query attends to as many keys:

    --config.attention.num_selected=1024                                          k = 1024, w = 512
    --config.attention.kind=dense
    --config.attention.kind=window --config.attention.sliding_window=1024
    --config.attention.kind=sinks --config.attention.num_selected=4 \
        --config.attention.sliding_window=1020
    --config.attention.kind=random
    --config.attention.kind=key_norm

The recipe: 100 steps of 65,536 tokens, about one epoch of what the first command writes with
--max_bytes=20000000. In the first 20 nothing but the scorers learns; then everything does, after a
warm-up of its own. Attention without scorers learns from the first step.
RoPE's theta is 4e5 for all, four times that of the model, whose context was 8,192.

Reproduces no paper result. Not yet run on a GPU: learning rates and the number of frozen steps are
first choices.
"""

import ml_collections

from configs import of_run


def get_config(imported: str) -> ml_collections.ConfigDict:
    """Returns the configuration.

    Args:
      imported: Directory of the imported model.
    """
    config = of_run.get_config(imported)
    config.init_from = imported
    config.model.dtype = "bfloat16"
    config.model.scan_layers = True
    config.attention.kind = "sparsek"
    config.attention.num_selected = 512
    config.attention.sliding_window = 512
    config.attention.rope_theta = 4e5
    config.data.glob = "texts/train/*/*.txt"
    config.data.seq_len = 16384
    config.data.shuffle_window = 64
    config.optimizer.learning_rate = 1e-4
    config.optimizer.scorer_learning_rate = 5e-4
    config.optimizer.freeze_steps = 20
    config.optimizer.warmup_steps = 10
    config.optimizer.weight_decay = 0.01
    config.train.steps = 100
    config.train.batch_size = 4
    config.optimizer.accumulate = 2  # the activations of two rows at a time
    config.train.loss_chunk = 4096
    config.train.log_every = 5
    config.train.eval_every = 0
    config.train.eval_batches = 8
    config.train.checkpoint_every = 50
    config.train.keep = 1
    config.eval.batch_size = 1
    config.sample.length = 0
    return config
