"""Models in the form of transformers' own classes, with the same logits.

GPT2LMHeadModel does not scale the attention's output by depth, and stores matrices as [in, out].
Qwen3ForCausalLM stores q, k and v apart, and gate and up.
"""

from typing import Any, cast

import torch
from torch import Tensor

from app.model.gpt import GPT, Block
from app.model.qwen3 import NORM_EPS, ROPE_THETA, Qwen3

TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
# Qwen3's matrices, and the ones they store from top to bottom.
STACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def gpt2_weights(model: GPT, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the weights by GPT2LMHeadModel's names, on the CPU; the tied head is left out.

    The scale of the attention's output is multiplied into its projection, weight and bias.
    """
    attn_scale = cast(Block, model.transformer.h[0]).attn.output_scale
    weights = {}
    for name, value in model.state_dict().items():
        scaled = value * attn_scale if ".attn.c_proj." in name else value
        stored = scaled.T if name.endswith(TRANSPOSED) else scaled
        weights[name] = stored.to("cpu", dtype).contiguous()
    return weights


def gpt2_config(model: GPT) -> dict[str, Any]:
    """Return what config.json has about a GPT-2."""
    config = model.config
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.context_length,
        "n_ctx": config.context_length,
        "n_embd": config.embd_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": None,
        "activation_function": config.activation,
        "layer_norm_epsilon": model.transformer.ln_f.eps,
        "initializer_range": 0.02,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "tie_word_embeddings": True,
        "use_cache": True,
    }


def qwen3_weights(model: Qwen3, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the weights by Qwen3ForCausalLM's names, on the CPU; a tied head is left out."""
    weights = {}
    for name, value in model.state_dict().items():
        layer = name.split(".")[-2]
        parts = STACKED.get(layer, (layer,))
        matrices = value.to("cpu", dtype).chunk(len(parts))
        for part, matrix in zip(parts, matrices, strict=True):
            weights[name.replace(layer, part)] = matrix.contiguous()
    return weights


def qwen3_config(model: Qwen3) -> dict[str, Any]:
    """Return what config.json has about a Qwen3."""
    config = model.config
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "hidden_size": config.embd_size,
        "intermediate_size": config.mlp_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": NORM_EPS,
        # Some programs read one of the two, and take another default without it.
        "rope_theta": ROPE_THETA,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA},
        "attention_bias": False,
        "use_sliding_window": False,
        "tie_word_embeddings": config.tie_embeddings,
    }
