import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsek_jax.nn import AttentionConfig, Decoder, DecoderConfig
from sparsek_jax.nn.alternatives import LAYERS

KINDS = ("sparsek", "dense", "window")
ATTENTION = AttentionConfig(
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    num_selected=3,
    sliding_window=4,
    implementation="reference",
)
CONFIG = DecoderConfig(vocab_size=19, num_layers=2, d_model=16, mlp_dim=24, attention=ATTENTION)
TOKENS = jax.random.randint(jax.random.key(1), (2, 21), 0, 19)


def make(seed=0, attention=None, **changes):
    attention = dataclasses.replace(ATTENTION, **(attention or {}))
    model = Decoder(
        dataclasses.replace(CONFIG, attention=attention, **changes), rngs=nnx.Rngs(seed)
    )
    # Weights far from the small initial ones, so that every part matters.
    graphdef, state = nnx.split(model)
    leaves, structure = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    leaves = [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return nnx.merge(graphdef, jax.tree.unflatten(structure, leaves))


@nnx.jit
def run(model, tokens, positions=None, segment_ids=None):
    return model(tokens, positions=positions, segment_ids=segment_ids)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents_give_what_each_gives_alone(kind):
    model = make(attention={"kind": kind})
    lengths = (5, 1, 8, 7)
    row = TOKENS[:1]
    # The ids 1 and 2 come back: only neighbours of equal id belong together.
    ids = jnp.asarray(np.repeat([1, 2, 1, 2], lengths))[None]
    packed = run(model, row, segment_ids=ids)[0]
    ends = np.cumsum(lengths)
    alone = jnp.stack([jnp.roll(row[0], -(end - n)) for end, n in zip(ends, lengths, strict=True)])
    alone = run(model, alone)
    for i, (end, n) in enumerate(zip(ends, lengths, strict=True)):
        np.testing.assert_allclose(packed[end - n : end], alone[i, :n], atol=1e-4)
    assert jnp.abs(packed - run(model, row)[0])[5:].max() > 1e-2


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_later_token_changes_no_earlier_logit(kind, implementation):
    if kind != "sparsek" and implementation == "xla":
        pytest.skip("an implementation of sparsek")
    model = make(attention={"kind": kind, "implementation": implementation})
    before = run(model, TOKENS)
    after = run(model, TOKENS.at[:, 12].add(1) % 19)
    np.testing.assert_allclose(before[:, :12], after[:, :12], atol=1e-5)
    assert jnp.abs(before - after)[:, 12].max() > 1e-2


def gradients_of(model, ids):
    graphdef, state = nnx.split(model)

    def loss(state):
        hidden, scores = nnx.merge(graphdef, state).hidden(
            TOKENS, segment_ids=ids, return_scores=True
        )
        return (hidden**3).sum(), (hidden, scores)

    return jax.jit(jax.grad(loss, has_aux=True))(state)


def test_scanned_layers_compute_what_separate_layers_do():
    attention = {"pattern": ("window", "sparsek")}
    ids = jnp.asarray(np.repeat([[1, 2], [3, 4]], [9, 12], axis=1))
    separate = make(attention=attention, num_layers=4)
    scanned = make(seed=5, attention=attention, num_layers=4, scan_layers=True, remat="full")

    def stack(state):
        layers = state["layers"]
        stacked = {
            i: jax.tree.map(lambda *x: jnp.stack(x), layers[i], layers[i + 2]) for i in range(2)
        }
        return nnx.State(dict(state) | {"layers": nnx.State(stacked)})

    nnx.update(scanned, stack(nnx.state(separate)))
    gradients, (hidden, scores) = gradients_of(separate, ids)
    scanned_gradients, (scanned_hidden, scanned_scores) = gradients_of(scanned, ids)
    np.testing.assert_allclose(hidden, scanned_hidden, atol=1e-4)
    assert list(scores) == list(scanned_scores) == [1, 3]
    for layer in scores:
        np.testing.assert_allclose(scores[layer], scanned_scores[layer], atol=1e-4)
    expected = dict(nnx.to_flat_state(stack(gradients)))
    computed = dict(nnx.to_flat_state(scanned_gradients))
    assert expected.keys() == computed.keys()
    for path, x in expected.items():
        tolerance = 1e-4 * max(1, jnp.abs(x[...]).max())
        np.testing.assert_allclose(x[...], computed[path][...], atol=tolerance)


def test_scanned_layers_start_with_different_weights():
    attention = dataclasses.replace(ATTENTION, pattern=("window", "dense"))
    config = dataclasses.replace(CONFIG, attention=attention, num_layers=4, scan_layers=True)
    layers = Decoder(config, rngs=nnx.Rngs(0)).layers
    kernels = jnp.concatenate([layer.mlp.up.kernel[...] for layer in layers])
    assert kernels.shape == (4, 16, 24)
    for i in range(4):
        for j in range(i):
            assert jnp.abs(kernels[i] - kernels[j]).max() > 0.1


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_remat_changes_memory_not_values(remat):
    attention = {"pattern": ("sparsek", "dense")}
    expected, (hidden, _) = gradients_of(make(attention=attention), None)
    gradients, (remat_hidden, _) = gradients_of(make(attention=attention, remat=remat), None)
    np.testing.assert_allclose(hidden, remat_hidden, atol=1e-5)
    for x, y in zip(jax.tree.leaves(expected), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-4 * max(1, jnp.abs(x).max()))


def test_remat_names_say_how_much_is_kept():
    def kept(remat):
        graphdef, state = nnx.split(make(attention={"kind": "dense"}, remat=remat))
        _, pullback = jax.vjp(lambda s: nnx.merge(graphdef, s).hidden(TOKENS), state)
        return sum(x.size for x in jax.tree.leaves(pullback))

    assert kept("full") < kept("dots") < kept("none")


LLAMA = {}
QWEN3 = {"attention": {"qk_norm": True, "rope_theta": 1e6}}
NEOX = {
    "norm": "layernorm",
    "norm_eps": 1e-5,
    "activation": "gelu",
    "mlp_bias": True,
    "parallel_residual": True,
    "tie_embeddings": False,
    "attention": {"num_kv_heads": 4, "qkv_bias": True, "out_bias": True, "rotary_fraction": 0.25},
}


@pytest.mark.parametrize("family", [LLAMA, QWEN3, NEOX], ids=["llama", "qwen3", "neox"])
def test_dense_families_match_a_float64_decoder(family):
    model = make(**(family | {"attention": family.get("attention", {}) | {"kind": "dense"}}))
    expected = decoder_oracle(model, np.asarray(TOKENS))
    np.testing.assert_allclose(run(model, TOKENS), expected, atol=2e-3)


def decoder_oracle(model, tokens):
    """A decoder with dense attention in NumPy and float64."""
    config, attention = model.config, model.config.attention
    weights = jax.tree.map(lambda x: np.asarray(x, np.float64), nnx.to_pure_dict(nnx.state(model)))
    batch, length = tokens.shape
    seen = np.tril(np.ones((length, length), bool))

    def norm(parameters, x, layer):
        if layer:
            x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps)
        return x * parameters["scale"] + parameters.get("bias", 0)

    def linear(parameters, x):
        return x @ parameters["kernel"] + parameters.get("bias", 0)

    def rotate(x):
        half = attention.rotary_dim // 2
        angle = np.arange(length)[:, None] * attention.rope_theta ** (-np.arange(half) / half)
        pairs = (x[..., :half] + 1j * x[..., half : 2 * half]) * np.exp(1j * angle)[:, None]
        return np.concatenate([pairs.real, pairs.imag, x[..., 2 * half :]], axis=-1)

    def attend(parameters, x):
        def heads(name, repeats=1):
            out = linear(parameters[name], x).reshape(batch, length, -1, attention.head_dim)
            if attention.qk_norm and name != "value":
                out = norm(parameters[f"{name}_norm"], out, layer=False)
            return np.repeat(out if name == "value" else rotate(out), repeats, axis=2)

        groups = attention.num_heads // attention.num_kv_heads
        query, key, value = heads("query"), heads("key", groups), heads("value", groups)
        logits = np.einsum("btnh,bsnh->bnts", query, key) / math.sqrt(attention.head_dim)
        logits = np.where(seen, logits, -np.inf)
        probabilities = np.exp(logits - logits.max(-1, keepdims=True))
        probabilities /= probabilities.sum(-1, keepdims=True)
        mixed = np.einsum("bnts,bsnh->btnh", probabilities, value)
        return linear(parameters["out"], mixed.reshape(batch, length, -1))

    def mlp(parameters, x):
        up = linear(parameters["up"], x)
        if config.activation == "gelu":
            up *= 0.5 * (1 + np.vectorize(math.erf)(up / math.sqrt(2)))
        else:
            gate = linear(parameters["gate"], x)
            up *= gate / (1 + np.exp(-gate))
        return linear(parameters["down"], up)

    layer_norm = config.norm == "layernorm"
    x = weights["embedding"][tokens]
    for i in range(config.num_layers):
        block = weights["layers"][i]
        attended = attend(block["attention"], norm(block["attention_norm"], x, layer_norm))
        mlp_input = x if config.parallel_residual else x + attended
        x = x + attended + mlp(block["mlp"], norm(block["mlp_norm"], mlp_input, layer_norm))
    x = norm(weights["final_norm"], x, layer_norm)
    return x @ (weights["embedding"] if config.tie_embeddings else weights["output"]).T


def test_bfloat16_computes_near_float32_with_float32_parameters():
    full, half = make(), make(dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(nnx.state(half))} == {jnp.dtype("float32")}
    hidden, scores = half.hidden(TOKENS, return_scores=True)
    assert hidden.dtype == jnp.bfloat16
    assert {layer: s.dtype for layer, s in scores.items()} == dict.fromkeys((0, 1), jnp.float32)
    logits = run(half, TOKENS)
    assert logits.dtype == jnp.float32
    expected = run(full, TOKENS)
    # A score that moves by bfloat16's rounding may change a selection, so not all logits are near.
    assert jnp.median(jnp.abs(logits - expected)) < 0.05 * expected.std()


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_a_new_model_predicts_all_tokens_alike(tie_embeddings):
    config = dataclasses.replace(CONFIG, vocab_size=500, d_model=64, tie_embeddings=tie_embeddings)
    logits = run(Decoder(config, rngs=nnx.Rngs(0)), TOKENS)
    loss = -jax.nn.log_softmax(logits)[:, :-1][..., 0].mean()
    assert abs(loss - math.log(500)) < 0.1


def test_writers_to_the_residual_stream_start_smaller_in_deeper_models():
    def deviations(num_layers):
        config = dataclasses.replace(CONFIG, d_model=64, mlp_dim=64, num_layers=num_layers)
        block = Decoder(config, rngs=nnx.Rngs(0)).layers[0]
        kernels = (block.attention.out, block.mlp.down, block.mlp.up)
        return [float(x.kernel[...].std()) for x in kernels]

    shallow, deep = deviations(1), deviations(4)
    np.testing.assert_allclose(np.divide(shallow, deep), [2, 2, 1], rtol=0.05)


def test_positions_are_used():
    model = make(attention={"kind": "dense"})
    positions = jnp.broadcast_to(jnp.arange(21), (2, 21))
    np.testing.assert_array_equal(run(model, TOKENS), run(model, TOKENS, positions))
    np.testing.assert_allclose(run(model, TOKENS), run(model, TOKENS, positions + 5), atol=1e-3)
    assert jnp.abs(run(model, TOKENS) - run(model, TOKENS, 2 * positions)).max() > 1e-2


@pytest.mark.parametrize(
    ("kind", "scan_layers"), [*((kind, False) for kind in LAYERS), ("sparsek", True)]
)
def test_no_tokens(kind, scan_layers):
    attention = {"kind": kind, "num_selected": 8, "sliding_window": 8, "block_size": 4}
    model = make(attention=attention, scan_layers=scan_layers)
    for tokens in (TOKENS[:0], TOKENS[:, :0]):
        for ids in (None, tokens):
            assert model(tokens, segment_ids=ids).shape == (*tokens.shape, 19)
        gradients = nnx.grad(lambda model, tokens: model(tokens).sum())(model, tokens)
        assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradients))


def test_an_id_outside_the_vocabulary_is_loud():
    logits = run(make(), TOKENS.at[0, 10].set(19))
    assert jnp.isfinite(logits[1]).all()
    assert jnp.isnan(logits[0, 10]).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": jnp.ones((2, 21))}, "tokens has dtype float32; expected integers"),
        ({"tokens": [[1, 2]]}, r"tokens=\[\[1, 2\]\]; expected an array of integers"),
        ({"tokens": TOKENS[0]}, r"tokens has shape \(21,\); expected \[B, T\]"),
        ({"segment_ids": TOKENS[:1]}, r"segment_ids has shape \(1, 21\); expected \(2, 21\)"),
        ({"segment_ids": TOKENS > 3}, "segment_ids has dtype bool; expected integers"),
        ({"positions": TOKENS[:, :5]}, r"positions has shape \(2, 5\); expected \(2, 21\)"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        make().hidden(**({"tokens": TOKENS} | arguments))
