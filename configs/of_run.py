r"""The configuration of a run or of an imported model, whose directory follows a colon.

    python eval.py --config=configs/of_run.py:runs/smollm2 --workdir=runs/smollm2
    python train.py --config=configs/of_run.py:runs/smollm2 --config.init_from=runs/smollm2 \
        --workdir=runs/tuned --config.data.glob="$HOME/books/**/*.txt" ...

The first evaluates an imported model, the second goes on training it (docs/pretrained.md).
"""

import json

import ml_collections

from sparsek_jax.training.config import default_config
from sparsek_jax.training.workdir import load_config


def get_config(workdir: str) -> ml_collections.ConfigDict:
    """Returns the configuration, with defaults for fields that came later."""
    config = default_config()
    saved = json.loads(load_config(workdir).to_json())
    for section in filter(lambda value: isinstance(value, dict), saved.values()):
        # JSON has no tuples.
        lists = {name: tuple(x) for name, x in section.items() if isinstance(x, list)}
        section.update(lists)
    config.update(saved)
    return config
