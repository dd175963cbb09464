"""Random models made by transformers, compared in both directions. Needs torch."""

import numpy as np
import pytest

from sparsek_jax.pretrained.exporting import export_model
from sparsek_jax.pretrained.families import AttentionOptions
from sparsek_jax.pretrained.importing import import_model
from tests.pretrained import models
from tests.pretrained.make_fixtures import MODELS, make_model

pytestmark = pytest.mark.transformers


def logits_of_transformers(directory, tokens):
    import torch
    import transformers

    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    assert all(".scorer." in name for name in report["unexpected_keys"])
    with torch.no_grad():
        return model.eval()(torch.as_tensor(tokens, dtype=torch.long)).logits.numpy()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("selects", [False, True])
def test_logits_are_equal_in_both_directions(name, selects, tmp_path):
    model, tokens, logits = make_model(name, seed=100)
    model.save_pretrained(tmp_path / "origin")
    models.add_tokenizer(tmp_path / "origin")
    windowed = "sliding_window" in MODELS[name][1]
    options = AttentionOptions(kind="window" if windowed else "dense")
    if selects:
        options = AttentionOptions(num_selected=8, sliding_window=2)
    import_model(tmp_path / "origin", tmp_path / "run", options=options)
    if not selects:
        ours = models.logits(tmp_path / "run", tokens)
        np.testing.assert_allclose(ours, logits, atol=1e-4, rtol=0)
    export_model(tmp_path / "run", tmp_path / "exported")
    # transformers attends densely where a layer selects.
    if not (selects and windowed):
        theirs = logits_of_transformers(tmp_path / "exported", tokens)
        np.testing.assert_allclose(theirs, logits, atol=1e-4, rtol=0)
    else:
        assert np.isfinite(logits_of_transformers(tmp_path / "exported", tokens)).all()


def test_tokenizer_of_an_export_is_read_by_transformers(tmp_path):
    import transformers

    import_model(models.source(tmp_path, "llama3"), tmp_path / "run")
    export_model(tmp_path / "run", tmp_path / "exported")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert tokenizer("w7 w3")["input_ids"] == [7, 3]
