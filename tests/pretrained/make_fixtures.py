"""Makes the models in fixtures/: tiny, random, one or two of every family, with their logits.

    pip install torch transformers
    python tests/pretrained/make_fixtures.py

Each directory is what transformers saves, in bfloat16 or float16, and expected.npz: tokens, and the
logits that transformers computes for them in float32. So tests need neither torch nor transformers.
"""

from pathlib import Path

import numpy as np

FIXTURES = Path(__file__).parent / "fixtures"
SIZES = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
GROUPED = SIZES | {"num_key_value_heads": 2, "head_dim": 4}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 50.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# Name: class of transformers, fields, dtype, bytes in a shard.
MODELS = {
    "llama3": (
        "Llama",
        GROUPED | {"head_dim": 8, "tie_word_embeddings": True, "rope_parameters": LLAMA3},
        "bfloat16",
        6000,
    ),
    "llama_biases": (
        "Llama",
        GROUPED
        | {
            "attention_bias": True,
            "mlp_bias": True,
            "rms_norm_eps": 1e-2,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 1e3, "factor": 4.0},
        },
        "bfloat16",
        10**9,
    ),
    "mistral": ("Mistral", GROUPED | {"sliding_window": 7}, "float16", 10**9),
    "qwen2": ("Qwen2", GROUPED, "bfloat16", 10**9),
    "qwen2_window": (
        "Qwen2",
        GROUPED
        | {
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 0,
            "tie_word_embeddings": True,
        },
        "bfloat16",
        10**9,
    ),
    "qwen3": ("Qwen3", GROUPED | {"head_dim": 8}, "bfloat16", 10**9),
    "pythia": (
        "GPTNeoX",
        SIZES
        | {
            "use_parallel_residual": True,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.5,
            },
        },
        "float16",
        10**9,
    ),
    "neox_sequential": (
        "GPTNeoX",
        SIZES
        | {
            "use_parallel_residual": False,
            "attention_bias": False,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e2,
                "partial_rotary_factor": 1.0,
            },
        },
        "bfloat16",
        10**9,
    ),
}


def make_model(name, seed):
    """A random model of transformers, its tokens `[1, 24]` and its float32 logits."""
    import torch
    import transformers

    family, fields, dtype, _ = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**fields, attn_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # The logits are those of what will be stored. (A model that is cast as a whole and
            # back has rounded rotary frequencies too.)
            parameter.normal_(0, 0.4, generator=generator)
            parameter.copy_(parameter.to(getattr(torch, dtype)))
    model.eval()
    tokens = torch.randint(0, SIZES["vocab_size"], (1, 24), generator=generator)
    with torch.no_grad():
        logits = model(tokens).logits
    return model, tokens.numpy().astype(np.int32), logits.numpy()


def main():
    """Makes all of them."""
    import torch

    for seed, (name, (_, _, dtype, shard_size)) in enumerate(MODELS.items()):
        model, tokens, logits = make_model(name, seed)
        directory = FIXTURES / name
        model.to(getattr(torch, dtype)).save_pretrained(directory, max_shard_size=shard_size)
        (directory / "generation_config.json").unlink(missing_ok=True)
        np.savez_compressed(directory / "expected.npz", tokens=tokens, logits=logits)


if __name__ == "__main__":
    main()
