"""config.json of transformers: the shape of the model that it describes. Works without torch."""

from collections.abc import Mapping
from typing import Any

VOCAB_SIZE = 50257
# Names of the same function: exact, and approximated with tanh.
_ACTIVATIONS = {
    **dict.fromkeys(("gelu", "gelu_python"), "gelu"),
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), "gelu_new"),
}
# Our fields -> transformers' keys, and what it takes for one that is missing.
_FIELDS: dict[str, dict[str, tuple[str, Any]]] = {
    "gpt2": {
        "context_length": ("n_positions", 1024),
        "num_layers": ("n_layer", 12),
        "embd_size": ("n_embd", 768),
        "num_heads": ("n_head", 12),
        "activation": ("activation_function", "gelu_new"),
    },
    "qwen3": {
        "context_length": ("max_position_embeddings", 32_768),
        "num_layers": ("num_hidden_layers", 32),
        "embd_size": ("hidden_size", 4096),
        "num_heads": ("num_attention_heads", 32),
        "head_dim": ("head_dim", 128),
        "tie_embeddings": ("tie_word_embeddings", False),
    },
}
# Keys without which it takes another value than ours.
_QWEN3_DEFAULTS = {"vocab_size": 151_936, "intermediate_size": 22_016, "num_key_value_heads": 32}


def qwen3_mlp_size(embd_size: int) -> int:
    """Return the width of the hidden layer of our Qwen3's MLP."""
    return -(-8 * embd_size // (3 * 64)) * 64


def model_shape(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the shape of the model that a config.json describes, as build_config takes it.

    Raises:
        ValueError: none of our architectures computes the same; it says why.
    """
    kind = config.get("model_type")
    if kind not in ("gpt2", "qwen3"):
        raise ValueError(f"its architecture is {kind}, not gpt2 or qwen3")
    shape = {field: config.get(key, default) for field, (key, default) in _FIELDS[kind].items()}
    for field in shape.keys() - {"activation", "tie_embeddings"}:
        if type(shape[field]) is not int or shape[field] < 1:
            raise ValueError(f"{_FIELDS[kind][field][0]} is {shape[field]}, not a whole number")
    values = {name: value for name, value in config.items() if value is not None}
    if kind == "gpt2":
        needed = _needs_of_gpt2(shape)
        activation = shape["activation"]
        shape["activation"] = _ACTIVATIONS.get(str(activation))
        if shape["activation"] is None:
            raise ValueError(f"activation_function is {activation}, not a GELU")
    else:
        needed = _needs_of_qwen3(shape)
        # Newer and older versions have the rotary positions in these.
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        values = _QWEN3_DEFAULTS | values | dict(rope)
    faults = [
        f"{name} is {values[name]!s:.60}, not {value}"
        for name, value in needed.items()
        if values.get(name, value) != value
    ]
    if faults:
        raise ValueError("; ".join(faults))
    return {"architecture": kind, "vocab_size": VOCAB_SIZE, **shape}


def _needs_of_gpt2(shape: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that our GPT-2 has for other keys."""
    return {
        "vocab_size": VOCAB_SIZE,
        "quantization_config": None,
        "n_inner": 4 * shape["embd_size"],
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
    }


def _needs_of_qwen3(shape: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that our Qwen3 has for other keys."""
    return {
        "vocab_size": VOCAB_SIZE,
        "quantization_config": None,
        "intermediate_size": qwen3_mlp_size(shape["embd_size"]),
        "num_key_value_heads": shape["num_heads"],
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "use_sliding_window": False,
        "rope_theta": 10_000.0,
        "rope_type": "default",
    }
