"""Settings shared by all tests."""

import gc
import importlib.util

import jax
import pytest
from hypothesis import settings

settings.register_profile("deterministic", derandomize=True, deadline=None, database=None)
settings.load_profile("deterministic")


@pytest.fixture(scope="module", autouse=True)
def forgotten_programs():
    """Frees a module's programs: all together need more memory maps than Linux grants a process."""
    yield
    jax.clear_caches()
    gc.collect()


def pytest_collection_finish():
    """Lets the garbage collector alone what was imported, and look less often: tracing has none."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


def pytest_collection_modifyitems(items):
    lacking = {}
    if jax.default_backend() != "gpu":
        lacking["gpu"] = "needs a GPU"
    if not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        lacking["transformers"] = "needs torch and transformers (docs/pretrained.md)"
    for item in items:
        for marker in lacking.keys() & set(item.keywords):
            item.add_marker(pytest.mark.skip(reason=lacking[marker]))
