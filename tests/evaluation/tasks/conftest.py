import pytest

from sparsek_jax.data import load_tokenizer
from sparsek_jax.data.tokenizer import train_bpe
from sparsek_jax.evaluation.tasks import TASKS


@pytest.fixture(scope="session")
def bpe(tmp_path_factory):
    """A byte-level BPE in which words, digits and quotes are joined with what stands before."""
    directory = tmp_path_factory.mktemp("bpe")
    texts = ["The pass key is 12345. The grass is green. There and back again. 60201 53966"]
    texts += ['{"key": "bd7a1b99-bb91",\n "value": "02dc7358-d1ee-401c"}\n\nKey: "8b351bed"']
    train_bpe(texts * 3, 320, directory / "tokenizer.json")
    return load_tokenizer("bpe:320", directory=directory)


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request):
    return load_tokenizer("bytes") if request.param == "bytes" else request.getfixturevalue("bpe")


@pytest.fixture(params=list(TASKS))
def task(request):
    return TASKS[request.param]
