"""Runs and imported models as a model of EleutherAI's lm-evaluation-harness.

Only `model.py` imports the harness (the package `lm_eval`), which is optional. The rest is what a
model of it is made of: continuations scored in batches, and text that is written.
"""

import importlib.util

from sparsek_jax.training.config import ConfigError

MODEL_NAME = "sparsek"


def register() -> None:
    """Makes `model="sparsek"` known to the harness, which by itself knows only its own models.

    Raises:
      ConfigError: The harness is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "the package lm_eval is not installed; expected the lm-evaluation-harness, for which "
            "sparsek_jax has an extra: pip install -e '.[lm-eval]' in its checkout"
        )
    from lm_eval.api.registry import model_registry

    if MODEL_NAME not in model_registry:
        model_registry.register(MODEL_NAME, target=f"{__name__}.model:SparseKLM")
