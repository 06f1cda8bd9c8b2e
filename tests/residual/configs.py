"""Configs of every architecture: at default width with few layers, and tiny. Names of architectures belong in tests.

``config_for`` keeps one layer of each kind that the default config has; ``tiny_config_for`` cuts the width too. Both
are derived from the config's own fields; what cannot be derived is data at the top.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args

import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from spikepatch.residual.survey import config_of, config_parts, keep_one_layer_of_each_kind

Mapping = Literal["causal", "seq2seq", "masked", "tower"]

#: Common encoders for vision, audio and text, by the class that is mapped.
TOWERS = {
    "vit": "ViTModel",
    "dinov2": "Dinov2Model",
    "clip_text_model": "CLIPTextModel",
    "clip_vision_model": "CLIPVisionModel",
    "siglip_text_model": "SiglipTextModel",
    "siglip_vision_model": "SiglipVisionModel",
    "whisper": "WhisperForConditionalGeneration",
    "wav2vec2": "Wav2Vec2Model",
}

CLASSES: dict[Mapping, dict[str, str]] = {
    "causal": dict(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "seq2seq": dict(modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
    "masked": dict(modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
    "tower": TOWERS,
}

_GEMMA3N: dict[str, Any] = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "intermediate_size": [16384] * 4,
    "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
}
_ASSISTANT: dict[str, Any] = {
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 0,
    "num_kv_shared_layers": 2,
}
_SIGLIP = transformers.SiglipVisionConfig(num_hidden_layers=2, vocab_size=128, vocab_offset=262144, rms_norm_eps=1e-6)
_DOTS3: dict[str, Any] = {  # the config keeps values of its own for each layer
    "num_hidden_layers": 3,
    "layer_types": ["indexed_attention", "sliding_attention", "indexed_attention"],
    "mlp_layer_types": ["dense", "sparse", "sparse"],
}
_QWEN4: dict[str, Any] = {
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "indexed_attention"],
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 256,
    "indexer_budget": 1024,
    "indexer_compress_ratio": 4,
}

#: Arguments of the config where the default one builds no model, or where cutting would not keep its kinds of layers.
#: Values are those of the released checkpoints where the type has one.
WRITTEN: dict[str, dict[str, Any]] = {
    # The default config builds no model: what is missing.
    "cohere_compass_text": {
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    },
    "dbrx": {"n_layers": 2, "attn_config": {"kv_n_heads": 8, "rope_theta": 500000.0, "clip_qkv": 8}},
    "deepseek_v2": {"num_hidden_layers": 2, "first_k_dense_replace": 1, "num_experts_per_tok": 6},
    "dots1": {
        "num_hidden_layers": 2,
        "first_k_dense_replace": 1,
        "n_routed_experts": 128,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
    },
    "esm": {"num_hidden_layers": 2, "vocab_size": 33, "mask_token_id": 32, "pad_token_id": 1},
    "gemma3n": {"text_config": _GEMMA3N},
    "gemma3n_text": _GEMMA3N,
    "gemma4_assistant": {"text_config": {"model_type": "gemma4_text", **_ASSISTANT}},
    "gemma4_unified_assistant": {"text_config": {"model_type": "gemma4_unified_text", **_ASSISTANT}},
    "hunyuan_v1_dense": {"num_hidden_layers": 2, "head_dim": 128},
    "hunyuan_v1_moe": {"num_hidden_layers": 2, "head_dim": 128, "num_experts": 16, "moe_topk": 2},
    "lfm2_moe": {
        "num_hidden_layers": 3,
        "num_dense_layers": 1,
        "layer_types": ["conv", "conv", "full_attention"],
    },
    "ministral": {"num_hidden_layers": 2, "head_dim": 128},
    "nemotron": {"num_hidden_layers": 2, "num_key_value_heads": 8},
    "reformer": {
        "num_hidden_layers": 2,
        "attn_layers": ["local", "lsh"],
        "is_decoder": True,
        "num_buckets": 8,
        "axial_pos_shape": [32, 32],
    },
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    # Kinds of layers that a default config does not have, or derives from fields that go by the layer's number.
    "bamba": {"num_hidden_layers": 2, "attn_layer_indices": [1]},
    "dots3_note": {"text_config": _DOTS3},
    "dots3_note_text": _DOTS3,
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"num_hidden_layers": 2, "layer_types": ["mamba", "attention"]},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 3, "attn_layer_offset": 2},
    "lfm2": {"num_hidden_layers": 2, "full_attn_idxs": None, "layer_types": ["conv", "full_attention"]},
    "llama4": {"text_config": {"num_hidden_layers": 2, "moe_layers": [1], "no_rope_layers": [1, 0]}},
    "llama4_text": {"num_hidden_layers": 2, "moe_layers": [1], "no_rope_layers": [1, 0]},
    "mllama": {"text_config": {"num_hidden_layers": 3, "cross_attention_layers": [1]}},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "zamba": {"num_hidden_layers": 6, "attn_layer_period": 3, "attn_layer_offset": 2},
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "num_mem_blocks": 1,
    },
}

#: The same for one mapping only.
WRITTEN_FOR: dict[tuple[Mapping, str], dict[str, Any]] = {
    ("masked", "reformer"): {**WRITTEN["reformer"], "is_decoder": False},
    ("seq2seq", "encoder-decoder"): {
        "encoder": {"model_type": "bert", "num_hidden_layers": 2},
        "decoder": {"model_type": "bert", "num_hidden_layers": 2, "is_decoder": True, "add_cross_attention": True},
        "decoder_start_token_id": 1,
        "pad_token_id": 0,
    },
}

#: Fields to set after the cut, at default width as well.
CHANGED: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"first_k_dense_replace": 1},
    "flint": {"mlp_only_layers": [0]},
    # Its vision tower is timm's, which the tests do without; a text input never reaches it.
    "gemma3n": {"vision_config": _SIGLIP},
    "funnel": {"block_sizes": [2, 2], "block_repeats": [1, 1]},
    "nllb-moe": {"encoder_sparse_step": 2, "decoder_sparse_step": 2},
    "qwen2_moe": {"mlp_only_layers": [0]},
    "qwen3_moe": {"mlp_only_layers": [0]},
    "qwen3_next": {"mlp_only_layers": [0]},
    "xmod": {"default_language": "en_XX"},
    "switch_transformers": {"encoder_sparse_step": 2, "decoder_sparse_step": 2},
}


def entries() -> Iterator[tuple[Mapping, str]]:
    """(mapping, model type) of everything that is to be mapped."""
    for mapping in get_args(Mapping):
        for model_type in CLASSES[mapping]:
            yield mapping, model_type


def model_class(model_type: str, mapping: Mapping) -> type[PreTrainedModel]:
    found: type[PreTrainedModel] = getattr(transformers, CLASSES[mapping][model_type])
    return found


def config_for(model_type: str, mapping: Mapping) -> PreTrainedConfig:
    """The type's default config with one layer of each kind, at least two; what the mapped class is built from."""
    written = WRITTEN_FOR.get((mapping, model_type), WRITTEN.get(model_type))
    config = AutoConfig.for_model(model_type, **(written or {}))
    if written is None:
        for part in config_parts(config):
            keep_one_layer_of_each_kind(part)
    config = config_of(model_class(model_type, mapping), config)
    for name, value in CHANGED.get(model_type, {}).items():
        _set(config, name, value)
    return config


def _set(config: PreTrainedConfig, name: str, value: Any) -> None:
    """Past the validators: fields are consistent only once all are set."""
    vars(config)[type(config).attribute_map.get(name, name)] = value


# --- tiny ------------------------------------------------------------------------------------------------------------

_TINY_FIELDS: dict[int, str] = {
    300: "vocab_size vocab_size_per_layer_input src_vocab_size tgt_vocab_size decoder_vocab_size t2u_vocab_size",
    64: (
        "hidden_size d_model n_embd emb_dim dim embedding_dim word_embed_proj_dim hidden_size_global lru_width"
        " embedding_size max_position_embeddings n_positions max_seq_len n_ctx max_target_positions"
        " backbone_hidden_size encoder_hidden_size"
        " output_dim out_hidden_size projector_input_dim projector_output_dim pooler_hidden_size"
        " prediction_head_size audio_hidden_size d_inner chunk_size block_size context_length"
    ),
    96: (
        "intermediate_size encoder_ffn_dim decoder_ffn_dim ffn_dim d_ff dff ffn_hidden_size dim_ff hidden_dim"
        " intermediate_size_mlp dense_intermediate_size feed_forward_size prefix_dense_intermediate_size"
    ),
    32: (
        "moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size"
        " moe_shared_expert_intermediate_size shared_intermediate_size expert_ffn_hidden_size kv_lora_rank q_lora_rank"
        " input_embedding_size output_embedding_size sliding_window max_source_positions hc_lowrank router_hidden_size"
        " local_attention adapter_rank o_lora_rank num_centroids hidden_size_per_layer_input laurel_rank"
    ),
    16: (
        "head_dim v_head_dim kv_channels d_kv dim_head attention_head_size global_head_dim swa_head_dim index_head_dim"
        " linear_key_head_dim linear_value_head_dim linear_head_dim mamba_d_head mamba_head_dim mamba_headdim d_head"
        " indexer_head_dim swa_v_head_dim time_step_rank mamba_dt_rank"
    ),
    8: (
        "mamba_n_heads mamba_num_heads rotary_dim qk_rope_head_dim qk_nope_head_dim state_size mamba_d_state"
        " ssm_state_size d_rel gated_norm_rank"
    ),
    4: (
        "num_attention_heads n_head n_heads encoder_attention_heads decoder_attention_heads num_heads attention_heads"
        " num_encoder_attention_heads num_decoder_attention_heads num_experts n_routed_experts num_local_experts"
        " moe_num_experts swa_num_attention_heads linear_num_value_heads linear_num_heads index_n_heads"
        " n_mamba_heads indexer_n_heads zero_expert_num"
    ),
    2: (
        "num_key_value_heads kv_n_heads num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k"
        " swa_num_key_value_heads linear_num_key_heads n_shared_experts num_query_groups"
    ),
    1: "n_group topk_group num_expert_group mamba_n_groups n_groups mamba_ngroups",
}
_TINY = {name: size for size, names in _TINY_FIELDS.items() for name in names.split()}

#: Sizes of a tiny model that do not follow from the field's name.
TINY: dict[str, dict[str, Any]] = {
    "blt": {"encoder_hash_byte_group_vocab": 300, "patch_in_forward": False},
    "esmc": {"vocab_size": 33},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_d_head": 16},
    "longcat_flash": {"v_head_dim": 16},
    "luke": {"entity_vocab_size": 20},
    "mamba2": {"num_heads": 8},
    "mobilebert": {"embedding_size": 32},
    "reformer": {
        "axial_pos_embds_dim": [16, 48],
        "axial_pos_shape": (3, 4),
        "hidden_dropout_prob": 0.0,
        "local_attention_probs_dropout_prob": 0.0,
        "lsh_attention_probs_dropout_prob": 0.0,
    },
    "roc_bert": {
        "shape_vocab_size": 50,
        "shape_embed_dim": 16,
        "pronunciation_vocab_size": 50,
        "pronunciation_embed_dim": 16,
    },
    "vibevoice_asr": {
        "acoustic_tokenizer_encoder_config.num_filters": 2,
        "semantic_tokenizer_encoder_config.num_filters": 2,
    },
    "switch_transformers": {"num_experts": 2},  # one expert per token: each must be asked
    "t5gemma": {"decoder.cross_attention_hidden_size": 64},
    "zamba": {"attention_hidden_size": 128, "attention_head_dim": 32, "mamba_dt_rank": 8},
    "zamba2": {"attention_hidden_size": 128, "attention_head_dim": 32, "mamba_headdim": 16, "n_mamba_heads": 8},
}


def tiny_config_for(model_type: str, mapping: Mapping) -> PreTrainedConfig:
    """``config_for``, with every size cut: width 64, at most 300 tokens, 4 experts."""
    config = config_for(model_type, mapping)
    for part in config_parts(config):
        _shrink(part)
    for name, value in TINY.get(model_type, {}).items():
        *path, field = name.split(".")
        part = config
        for step in path:
            part = getattr(part, step)
        _set(part, field, value)
    return config


def _shrink(config: PreTrainedConfig) -> None:
    fields = vars(config)
    own_keys = fields.get("num_key_value_heads") == fields.get("num_attention_heads")  # one key head per query head
    for name, value in fields.items():
        small = _TINY.get(name)
        if small is None or isinstance(value, bool):
            continue
        if isinstance(value, int):
            fields[name] = min(value, small)
        elif isinstance(value, (list, tuple)) and all(isinstance(v, int) for v in value):
            fields[name] = [min(v, small) for v in value]
    if {"qk_rope_head_dim", "qk_nope_head_dim"} <= fields.keys():  # latent attention: rotary on a part of each head
        fields["head_dim"] = fields["qk_rope_head_dim"]
        if "qk_head_dim" in fields:
            fields["qk_head_dim"] = fields["qk_rope_head_dim"] + fields["qk_nope_head_dim"]
        own_keys = True
    if own_keys and "num_key_value_heads" in fields:
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"):
        if isinstance(fields.get(name), (int, list)) and not isinstance(fields[name], bool):
            fields[name] = 1 if name == "pad_token_id" else 0
