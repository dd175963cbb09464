r"""The configuration of a run or of an imported model, whose directory follows a colon.

    python eval.py --config=configs/of_run.py:runs/smollm2 --workdir=runs/smollm2
    python train.py --config=configs/of_run.py:runs/smollm2 --config.init_from=runs/smollm2 \
        --workdir=runs/tuned --config.data.glob="$HOME/books/**/*.txt" ...

The first evaluates an imported model, the second goes on training it (docs/pretrained.md).
"""

import ml_collections

from sparsek_jax.training.workdir import current_config


def get_config(workdir: str = "") -> ml_collections.ConfigDict:
    """Returns the configuration, with defaults for fields that came later."""
    if not workdir:
        raise ValueError("expected a directory behind a colon: configs/of_run.py:DIRECTORY")
    return current_config(workdir)
