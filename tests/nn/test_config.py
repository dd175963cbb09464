import pytest

from sparsek_jax.nn import AttentionConfig, DecoderConfig

ATTENTION = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
MODEL = {"vocab_size": 16, "num_layers": 3, "d_model": 32, "mlp_dim": 64}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_heads", 0),
        ("num_heads", 3),
        ("num_heads", 4.0),
        ("num_kv_heads", True),
        ("head_dim", -8),
        ("kind", "linear"),
        ("pattern", ("sparsek", "local")),
        ("pattern", ["sparsek"]),
        ("num_selected", 0),
        ("sliding_window", -1),
        ("block_size", 0),
        ("gating", "hard"),
        ("implementation", "pallas"),
        ("qk_norm", 1),
        ("qkv_bias", None),
        ("out_bias", "yes"),
        ("rope_theta", 0),
        ("rope_theta", float("nan")),
        ("rope_scaling", "yarn"),
        ("rope_factor", 0.0),
        ("rope_low_freq_factor", None),
        ("rope_high_freq_factor", 1.0),
        ("rope_original_length", 8192.0),
        ("rotary_fraction", 1.5),
        ("rotary_fraction", 0.125),
        ("shared_scores", 0),
        ("timestep_norm", 1.0),
        ("slope", -1e-6),
        ("slope", "1e-6"),
    ],
)
def test_attention_errors_name_field_value_and_expectation(field, value):
    with pytest.raises(ValueError, match=rf"attention\.{field}=") as error:
        AttentionConfig(**(ATTENTION | {field: value}))
    assert repr(value) in str(error.value)
    assert "expected" in str(error.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 0),
        ("num_layers", 2.5),
        ("d_model", -1),
        ("mlp_dim", "64"),
        ("attention", None),
        ("norm", "batchnorm"),
        ("norm_eps", 0.0),
        ("activation", "relu"),
        ("mlp_bias", 2),
        ("parallel_residual", "no"),
        ("tie_embeddings", None),
        ("remat", "some"),
        ("scan_layers", 1),
        ("dtype", "float16"),
    ],
)
def test_model_errors_name_field_value_and_expectation(field, value):
    fields = MODEL | {"attention": AttentionConfig(**ATTENTION)} | {field: value}
    with pytest.raises(ValueError, match=rf"model\.{field}=") as error:
        DecoderConfig(**fields)
    assert repr(value) in str(error.value)
    assert "expected" in str(error.value)


def test_a_window_layer_needs_a_window():
    for kinds in (
        {"kind": "window"},
        {"kind": "bigbird"},
        {"kind": "lsh"},
        {"pattern": ("sparsek", "window")},
    ):
        with pytest.raises(
            ValueError, match=r"attention\.sliding_window=0; expected .* at least 1"
        ):
            AttentionConfig(**ATTENTION, **kinds, sliding_window=0)
    AttentionConfig(**ATTENTION, kind="window", pattern=("dense", "sparsek"), sliding_window=0)


@pytest.mark.parametrize(
    ("kind", "k", "w", "message"),
    [
        ("bigbird", 6, 4, r"attention\.num_selected=6; expected a multiple of .*block_size=4"),
        ("moba", 8, 6, r"sliding_window=6; expected a sum with .*num_selected=8 .* of .*_size=4"),
    ],
)
def test_blocks_fill_the_budget(kind, k, w, message):
    fields = ATTENTION | {"num_selected": k, "sliding_window": w, "block_size": 4}
    for kinds in ({"kind": kind}, {"pattern": ("sparsek", kind)}):
        with pytest.raises(ValueError, match=message):
            AttentionConfig(**fields, **kinds)
    AttentionConfig(**fields, kind=kind, pattern=("sparsek",))
    AttentionConfig(**fields | {"num_selected": k + 2}, kind=kind)


def test_hashing_selects_as_many_keys_in_every_round():
    for kinds in ({"kind": "lsh"}, {"pattern": ("sparsek", "lsh")}):
        with pytest.raises(
            ValueError, match=r"num_selected=6; expected a multiple of the 4 rounds"
        ):
            AttentionConfig(**ATTENTION, **kinds, num_selected=6)
    AttentionConfig(**ATTENTION, kind="lsh", pattern=("sparsek",), num_selected=6)
    AttentionConfig(**ATTENTION, kind="lsh", num_selected=8)


def test_scanned_layers_are_whole_periods():
    attention = AttentionConfig(**ATTENTION, pattern=("window", "sparsek"))
    with pytest.raises(ValueError, match=r"model\.num_layers=3; expected a multiple of the 2"):
        DecoderConfig(**MODEL, attention=attention, scan_layers=True)
    assert DecoderConfig(**MODEL, attention=attention).period == 2


def test_pattern_repeats_over_the_layers():
    attention = AttentionConfig(**ATTENTION, pattern=("window", "dense", "sparsek"))
    assert [attention.layer_kind(i) for i in range(4)] == ["window", "dense", "sparsek", "window"]
    assert AttentionConfig(**ATTENTION, kind="dense").layer_kind(7) == "dense"
