"""A GPT in the form of transformers' GPT2LMHeadModel, with the same logits.

GPT2LMHeadModel does not scale the attention's output by depth, and stores matrices as [in, out].
"""

from typing import Any, cast

import torch
from torch import Tensor

from app.model.gpt import GPT, Block

_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def gpt2_weights(model: GPT, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the weights by GPT2LMHeadModel's names, on the CPU; the tied head is left out.

    The scale of the attention's output is multiplied into its projection, weight and bias.
    """
    attn_scale = cast(Block, model.transformer.h[0]).attn.output_scale
    weights = {}
    for name, value in model.state_dict().items():
        scaled = value * attn_scale if ".attn.c_proj." in name else value
        stored = scaled.T if name.endswith(_TRANSPOSED) else scaled
        weights[name] = stored.to("cpu", dtype).contiguous()
    return weights


def gpt2_config(model: GPT, dtype: torch.dtype, end_of_text: int) -> dict[str, Any]:
    """Return the content of config.json.

    Args:
        model: the model to describe.
        dtype: dtype of the stored weights.
        end_of_text: token id that begins and ends documents.
    """
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
        # Exact; GPT-2's own gelu_new approximates it with tanh.
        "activation_function": "gelu",
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
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
