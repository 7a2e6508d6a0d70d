"""A small random model of any family that transformers knows: its own configuration with the sizes made small.

A configuration names its sizes in its own way; `SIZES` says what each name becomes, at every depth of nested
configurations. `SPECIAL` holds what a family needs beyond it, because its sizes must fit one another in a way of its
own.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

WIDTH, HEADS, LAYERS, WINDOW, POSITIONS = 32, 4, 4, 8, 512
SPREAD = 0.2  # more, and recurrent layers multiply roundings until they look like faults
SIZES: dict[str, float] = {
    "hidden_size d_model n_embd model_dim dim lru_width embedding_size embedding_dim word_embed_proj_dim": WIDTH,
    "attention_hidden_size": WIDTH,
    "intermediate_size ffn_dim d_ff n_inner ffn_hidden_size block_ff_dim decoder_ffn_dim feed_forward_size dim_ff": 64,
    "d_inner shared_intermediate_size": 64,
    "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_blocks num_decoder_layers": LAYERS,
    "num_encoder_layers": LAYERS,
    "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads": HEADS,
    "encoder_attention_heads linear_num_value_heads linear_num_heads index_n_heads num_query_groups": HEADS,
    "swa_num_attention_heads": HEADS,
    "num_key_value_heads num_kv_heads kv_n_heads linear_num_key_heads n_group topk_group swa_num_key_value_heads": 2,
    "num_expert_group": 2,
    "num_experts_per_tok top_k_experts moe_topk moe_top_k num_experts_per_token": 2,
    "num_experts num_local_experts n_routed_experts moe_num_experts num_moe_experts": 4,
    "n_shared_experts num_shared_experts": 1,
    "head_dim qk_nope_head_dim v_head_dim linear_key_head_dim linear_value_head_dim kv_channels attention_head_dim": 8,
    "swa_head_dim linear_head_dim d_head dim_head index_head_dim hidden_size_per_layer_input": 8,
    "qk_rope_head_dim rotary_dim": 4,
    "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size expert_intermediate_size": 16,
    "q_lora_rank kv_lora_rank o_lora_rank mamba_d_state state_size ssm_state_size time_step_rank mamba_dt_rank": 16,
    "mamba_d_head mamba_headdim mamba_head_dim router_hidden_size": 16,
    "mamba_n_heads mamba_num_heads": 4,
    "sliding_window attention_window_size sliding_window_size attention_window window_size": WINDOW,
    "attention_chunk_size": WINDOW,
    "max_position_embeddings n_positions max_seq_len max_sequence_length n_ctx max_target_positions": POSITIONS,
    "model_max_length": POSITIONS,
    # What is 1 by default, or so small that its absence would not be seen, is not 1 here.
    "logits_scaling": 4.0,
    "logit_scale": 0.25,
    "lm_head_multiplier residual_multiplier": 0.5,
    "embedding_multiplier logits_mup_width_multiplier": 2.0,
}
NAMED = {name: size for names, size in SIZES.items() for name in names.split()}


def small_config(family: str, vocabulary: int, ids: dict[str, Any]) -> PreTrainedConfig:
    """The family's default configuration made small; `ids` are its special tokens."""
    cls = CONFIG_MAPPING[family]
    return cls(**_small(cls(), vocabulary, ids) | SPECIAL.get(family, {}))


def _small(default: PreTrainedConfig, vocabulary: int, ids: dict[str, Any]) -> dict[str, Any]:
    own = vars(default)
    found = {name: size for name, size in NAMED.items() if name in own}
    found |= {name: id for name, id in ids.items() if name in own}
    found |= {name: vocabulary for name in ("vocab_size", "vocab_size_per_layer_input") if name in own}
    if "qk_rope_head_dim" in own:
        # Multi-head latent attention: the rotary part is what its configurations call a head's width.
        found |= {"head_dim": found["qk_rope_head_dim"], "num_key_value_heads": HEADS}
    if "is_decoder" in own:
        found["is_decoder"] = True
    nested = {name: value for name, value in own.items() if isinstance(value, PreTrainedConfig)}
    return found | {name: _small(value, vocabulary, ids) for name, value in nested.items()}


# An attention layer among recurrent ones, and the other way round.
MIXED = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
HYBRID = ["linear_attention", "hybrid", "linear_attention", "hybrid"]
WIDE_ATTENTION = {"attention_head_dim": 16, "attention_hidden_size": 2 * WIDTH, "num_key_value_heads": HEADS}
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3], "mamba_expand": 2},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v4": {
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        "head_dim": 16,
        "partial_rotary_factor": 0.5,
        "o_groups": 2,
    },
    "ernie4_5_moe": {"moe_k": 2},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {"num_kv_shared_layers": 2, "intermediate_size": 64, "laurel_rank": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], LAYERS // 2]]},
    "granitemoehybrid": {"layer_types": MIXED},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 2},
    "minicpm3": {"dim_model_base": WIDTH // 2},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"], "n_groups": 2},
    "roc_bert": {"shape_vocab_size": 64, "pronunciation_vocab_size": 64},
    "xlm": {"emb_dim": WIDTH},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": HYBRID, **WIDE_ATTENTION},
    "zamba2": {"layers_block_type": HYBRID, **WIDE_ATTENTION, "n_mamba_heads": 4},
    "zaya": {"num_experts_per_tok": 1},
}


def small_model(config: PreTrainedConfig, seed: int = 0) -> Any:
    """An untrained model that has opinions: matrices that start near zero are spread to a deviation of SPREAD."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim > 1 and float(weight.std()) < 0.1:
                    weight.normal_(std=SPREAD)
    return model.eval()
