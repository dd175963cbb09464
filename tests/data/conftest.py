import random

import pytest

from sparsek_jax.data import default_data_config

# Documents of n bytes make n + 1 predictions: with seq_len 8 some end exactly at a row's end.
LENGTHS = (7, 15, 1, 30, 3, 7, 22, 8, 5, 64, 2, 11)


@pytest.fixture
def config(tmp_path):
    """A data section whose corpus is small and whose prepared directories are the test's own."""
    text = tmp_path / "text"
    for index, length in enumerate(LENGTHS):
        path = text / f"part{index % 2}" / f"{index:02d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        letters = random.Random(index).choices("abcdefgh \n", k=length - 1)
        path.write_text("x" + "".join(letters))
    config = default_data_config()
    config.glob = str(text / "**" / "*.txt")
    config.root = str(tmp_path / "prepared")
    config.seq_len = 8
    config.validation_fraction = 0.3
    return config
