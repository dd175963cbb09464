r"""Continues the training of SmolLM2-135M on long documents, with 16k tokens of context.

    python -m sparsek_jax.data.long_documents ...    # as its docstring has it; writes texts/
    python convert.py import --from=$GGUF --workdir=runs/smollm2    # docs/pretrained.md has $GGUF
    python convert.py calibrate --workdir=runs/smollm2 --to=runs/started --text=FILE,FILE,FILE \
        --length=8192 --rows=1
    python train.py --config=configs/finetune_smollm2.py:runs/started --workdir=runs/tuned
    python -m benchmarks.text_nats --workdir=runs/tuned --tokens=16384 --pieces=4 --buckets=8 \
        --to=runs/tuned/nats.json texts/held_out/*/*.txt

The calibration texts are some of texts/train, of each kind. What follows the colon is the model to
start from. Other attention is trained on the same rows and as many tokens by the same command with
another --workdir and one of these; but for the first two and the last, each query attends to as
many keys:

    --config.attention.num_selected=1024                                          k = 1024, w = 512
    --config.attention.kind=dense
    --config.attention.kind=random
    --config.attention.kind=key_norm
    --config.attention.kind=sinks --config.attention.num_selected=4 \
        --config.attention.sliding_window=1020
    --config.attention.kind=sinks --config.attention.num_selected=4 \
        --config.attention.sliding_window=1532

The recipe: 240 steps of 32,768 tokens, slightly more than an epoch of what the first command writes
with --max_bytes=20000000. Rows are cut from concatenated documents, of which each has more than a
row, and attend across their borders: dense attention is several times slower where it may not.
RoPE's theta is 4e5 for all, four times that of the model, whose context was 8,192. Scorers learn 80
times faster than the rest: of four rates, from 1e-3 to 5e-2, this and the last were best.

Reproduces no paper result. Run on one H100 (80 GB): 0.29 s a step, 23 GiB. Over three kinds of
held-out text SparseK is 2.5 % above fine-tuned dense attention in nats (0.6 % on books),
StreamingLLM of the same budget 4.4 %; after 480 steps 2.1 and 4.2 %. docs/pretrained.md has more.
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
    config.data.packing = "continuous"
    config.data.shuffle_window = 64
    config.optimizer.learning_rate = 2e-4
    config.optimizer.scorer_learning_rate = 1.6e-2
    config.optimizer.warmup_steps = 20
    config.optimizer.weight_decay = 0.01
    config.train.steps = 240
    config.train.batch_size = 2
    config.optimizer.accumulate = 2  # the activations of one row at a time
    config.train.loss_chunk = 4096
    config.train.log_every = 10
    config.train.eval_every = 0
    config.train.eval_batches = 8
    config.train.checkpoint_every = 120
    config.train.keep = 1
    config.eval.batch_size = 1
    config.sample.length = 0
    return config
