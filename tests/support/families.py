"""Tiny random models of every text architecture in the installed transformers that carries an RMSNorm.

    model = build("qwen3_moe", seed=0)
    randomize_gains(model, seed=1)
    out = logits(model, text_inputs(model, seed=2))

A family is a `model_type`.  Its configuration is the default one of transformers with every size replaced
from `TEXT_SIZES` / `TOWER_SIZES`; the few families whose sizes are tied to each other in their own way have
an entry in `OVERRIDES`.
"""

import contextlib
import copy
import dataclasses
import functools
import inspect
import re
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import model_type_to_module_name

# The head to build, in this order: a multimodal checkpoint is loaded as a whole, not as its language model.
HEADS = (
    "IMAGE_TEXT_TO_TEXT",
    "MULTIMODAL_LM",
    "CAUSAL_LM",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "MASKED_LM",
    "SPEECH_SEQ_2_SEQ",
)

# Their own code has no RMSNorm: it comes with the language model of another family.
# fmt: off
COMPOSITES = (
    "audioflamingo3", "aya_vision", "cohere2_vision", "cosmos3_omni", "deepseek_vl",
    "deepseek_vl_hybrid", "fast_vlm", "fun_asr_nano", "gemma4_assistant", "gemma4_unified_assistant",
    "glm46v", "glmasr", "got_ocr2", "granite_speech", "granite_speech_plus", "hyperclovax_vision_v2",
    "janus", "kimi_k25", "lfm2_vl", "llava", "llava_next", "llava_next_video", "llava_onevision",
    "minicpm_ocr", "minicpmv4_6", "minicpmv4_7", "moss_transcribe_diarize", "musicflamingo",
    "nemo_speechlm", "paligemma", "perception_lm", "pi0", "qwen2_audio", "qwen3_asr", "shieldgemma2",
    "smolvlm", "video_llama_3", "video_llava", "vipllava", "voxtral",
)
# fmt: on

# Base models that read text but have no head for it.
BASE_MODELS = ("embedding_gemma2", "openai_privacy_filter")

SPREAD = 0.7
EXCLUDED = {
    "fast_vlm": "its vision tower needs timm",
    "gemma3n": "its vision tower needs timm; the language model is gemma3n_text",
    "gemma4_assistant": "attends to the keys and values of another model",
    "gemma4_unified_assistant": "attends to the keys and values of another model",
    "inkling_mm_model": "needs scipy; the language model is inkling_text",
    "kyutai_speech_to_text": "a token is text with 32 audio codes",
    "perception_lm": "its vision tower needs timm",
    "pi0": "predicts the actions of a robot",
    "qwen2_5_omni": "no forward pass of its own; the language model is in qwen2_5_omni_thinker",
    "qwen3_omni_moe": "no forward pass of its own; the language model is in qwen3_omni_moe_thinker",
    "shieldgemma2": "transformers saves its weights under names that it does not read again",
}

VOCABULARY = 128
# Text is made of the ids 30 .. 99.  Default configurations have special tokens below; the others move above.
FIRST_TEXT_TOKEN, FIRST_SPECIAL_TOKEN = 30, 100
TEXT_LENGTH = 11

# All widths differ from each other, so that a gain applied along the wrong dimension cannot go unnoticed.
# heads * head_dim is 96, the keys and values are 48 wide.
TEXT_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "max_position_embeddings": 64,
    "original_max_position_embeddings": 32,
    "sliding_window": 5,
    "sliding_window_size": 5,
    "attention_chunk_size": 6,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 20,
    "ffn_dim": 112,
    "ffn_hidden_size": 112,
    "intermediate_size_mlp": 80,
    "dense_intermediate_size": 80,
    "hidden_size_per_layer_input": 12,
    "vocab_size_per_layer_input": VOCABULARY,
    "unpadded_vocab_size": VOCABULARY,
    "d_rel": 6,
    "rel_extent": 16,
    # mixture of experts
    "num_experts": 6,
    "num_local_experts": 6,
    "n_routed_experts": 6,
    "moe_num_experts": 6,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "n_group": 2,
    "topk_group": 1,
    "num_expert_group": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "moe_intermediate_size": 40,
    "expert_ffn_hidden_size": 40,
    "shared_expert_intermediate_size": 56,
    "shared_intermediate_size": 56,
    "moe_shared_expert_intermediate_size": 56,
    "shared_experts_intermediate_size": 56,
    "share_expert_dim": 56,
    "zero_expert_num": 2,
    "router_hidden_size": 20,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "decoder_sparse_step": 1,
    # latent attention
    "kv_channels": 24,
    "kv_lora_rank": 28,
    "q_lora_rank": 36,
    "o_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 20,
    "v_head_dim": 22,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 4,
    "index_block_size": 2,
    "index_topk_blocks": 2,
    "index_kpool": 2,
    # linear attention and state space models
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 10,
    "linear_value_head_dim": 14,
    "linear_num_heads": 4,
    "linear_head_dim": 14,
    "mamba_d_state": 10,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 2,
    "mamba_chunk_size": 8,
    "mamba_dt_rank": 6,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "state_size": 10,
    "ssm_state_size": 10,
    "time_step_rank": 6,
    "n_groups": 2,
    "chunk_size": 8,
    # T5
    "d_model": 64,
    "d_kv": 24,
    "d_ff": 112,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
}

TOWERS = "vision|audio|encoder|codec|projector|qformer|vq|adapt|semantic|timestamp"

# Vision and audio towers.  The spatial sizes fit the pixels of `image_inputs`.
TOWER_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "embed_dim": 32,
    "d_model": 32,
    "num_heads": 2,
    "depth": 2,
    "num_layers": 2,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 72,
    "out_hidden_size": TEXT_SIZES["hidden_size"],
    "output_dim": TEXT_SIZES["hidden_size"],
    "projection_dim": TEXT_SIZES["hidden_size"],
    "image_size": 16,
    "patch_size": 4,
    "num_position_embeddings": 16,
    "num_mel_bins": 16,
    "max_source_positions": 32,
    "max_position_embeddings": 64,
    "fullatt_block_indexes": [1],
    "deepstack_visual_indexes": [0, 1],
    "global_attn_indexes": [1],
    "window_size": 2,
    "mlp_dim": 72,
    "output_channels": 32,
    "downsample_hidden_size": 16,
    "encoder_hidden_size": 32,
    "text_hidden_size": TEXT_SIZES["hidden_size"],
    "vision_output_dim": 48,
    "projector_input_dim": 48,
    "projector_output_dim": 48,
    "position_embedding_size": 32,
    "num_filters": 4,
}

SLIDING_AND_FULL = ["sliding_attention", "full_attention"] * 2
LINEAR_AND_FULL = ["linear_attention", "full_attention"] * 2
CONV_AND_FULL = ["conv", "full_attention"] * 2
DENSE_AND_SPARSE = ["dense", "sparse", "sparse", "sparse"]
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
ROPE_PER_LAYER_TYPE = {"sliding_attention": ROPE, "full_attention": ROPE}
# The sections of a multimodal rotary embedding add up to half of the rotated width, here of heads of 16.
MROPE_16 = ROPE | {"mrope_section": [2, 3, 3]}
ERNIE_ROPE_16 = ROPE | {"mrope_section": [3, 3, 2]}
VQ = {
    "base_channels": 32,
    "num_res_blocks": 1,
    "channel_multiplier": [1, 1],
    "embed_dim": 8,
    "num_embeddings": 16,
    "latent_channels": 8,
}
SPEECH = {
    "input_dim": 16,
    "hidden_dim": 32,
    "dim_head": 16,
    "output_dim": 20,
    "context_size": 8,
    "max_pos_emb": 16,
}
ACOUSTIC = {"hidden_size": 16, "num_filters": 4, "downsampling_ratios": [2, 2], "depths": [1, 1, 1]}
DOTS3 = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 36,
    "swa_kv_lora_rank": 28,
    "swa_head_dim": 20,
    "swa_qk_nope_head_dim": 12,
    "swa_v_head_dim": 22,
}
QWEN4 = {
    "eos_token_id": 2,
    "pad_token_id": 0,
    "ple_layer_ids": [1],
    "ple_embed_dim": 24,
    "ngram_size": 2,
    "heads_per_ngram": 2,
    "ngram_vocab_size_base": 50,
    "make_ngram_vocab_size_divisible_by": 2,
    "split_ngram_parts": 1,
    "hc_count": 2,
    "hc_lowrank": 10,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 24,
    "indexer_budget": 2,
    "indexer_compress_ratio": 2,
}
GEMMA3N = {
    "laurel_rank": 10,
    "num_kv_shared_layers": 2,
    "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0],
    "intermediate_size": [112] * 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
# The small ones share keys and values between layers; the large ones are sparse, with values = keys.
GEMMA4_SMALL = {
    "num_kv_shared_layers": 2,
    "global_head_dim": 32,
}
GEMMA4_MOE = {
    "hidden_size_per_layer_input": 0,
    "global_head_dim": 32,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "enable_moe_block": True,
}

COHERE_COMPASS = {
    "rope_parameters": dict.fromkeys(["sliding_attention", "full_attention"], ERNIE_ROPE_16),
    "layer_types": SLIDING_AND_FULL,
}
MINIMAX_M3 = {"layer_types": ["full_attention", "minimax_m3_sparse"] * 2, "mlp_layer_types": DENSE_AND_SPARSE}
QWEN_SLIDING = {"use_sliding_window": True, "layer_types": SLIDING_AND_FULL}

# What the tables above cannot know.  A nested dictionary is for the configuration of that name.
OVERRIDES = {
    "apertus1p5": {
        "audio_config": {"codebook_dim": 32, "codebook_size": 16},
        "vision_config": {"codebook_size": 16},
        "image_token_offset": 90,
        "audio_token_offset": 106,
    },
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {
        "encoder_hash_byte_group_vocab": 100,
        "patching_threshold": 4.5,
        "encoder_config": {"hidden_size_global": 64},
        "decoder_config": {"hidden_size": 32, "hidden_size_global": 64},
    },
    "chameleon": {"vocabulary_map": {"<image>": 100}, "vq_config": VQ},
    "cohere": {"use_qk_norm": True},
    "cohere2_moe": {"mlp_layer_types": DENSE_AND_SPARSE},
    "cohere2_vision": {"alignment_intermediate_size": 72},
    "cohere_compass": {"text_config": COHERE_COMPASS},
    "cohere_compass_text": COHERE_COMPASS,
    "cosmos3_edge": {"projector_hidden_size": 48},
    "cpmant": {
        "dim_ff": 112,
        "dim_head": 24,
        "prompt_length": 4,
        "position_bias_num_buckets": 32,
        "position_bias_max_distance": 64,
    },
    "deepseek_ocr2": {
        "vision_config": {"sam_config": {"downsample_channels": [40, 32]}},
        "text_config": {"mlp_layer_types": DENSE_AND_SPARSE, "n_group": 1, "topk_group": 1},
    },
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4}},
    "dia": {
        "delay_pattern": [0],
        "decoder_config": {
            "num_channels": 1,
            "cross_hidden_size": 32,
            "cross_num_attention_heads": 4,
            "cross_num_key_value_heads": 2,
            "cross_head_dim": 20,
        },
    },
    "diffusion_gemma": {
        "canvas_length": TEXT_LENGTH,
        "text_config": {"model_type": "diffusion_gemma_text", "global_head_dim": 32},
        "vision_config": {"model_type": "gemma4_vision"},
    },
    "dots1": {"layer_types": SLIDING_AND_FULL},
    "dots3_note": {
        "text_config": DOTS3,
        "vision_config": {"adapter_in_dim": 32, "adapter_out_dim": 64, "moe_intermediate_size": 20},
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 64},
    },
    "dots3_note_text": DOTS3,
    "embedding_gemma2": {"text_config": {"embedding_dim": 40, "global_head_dim": 32}},
    "emu3": {
        "vocabulary_map": {"<image>": 100, "<|extra_200|>": 101, "<|visual token 000000|>": 102},
        "vq_config": VQ,
    },
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": ERNIE_ROPE_16, "moe_intermediate_size": [40, 36]}},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_rms_norm": True},
    "fun_asr_nano": {"adaptor_config": {"hidden_size": 64, "intermediate_size": 16}},
    "gemma3": {"mm_tokens_per_image": 4},
    "gemma3n_text": GEMMA3N,
    "gemma4": {"text_config": GEMMA4_SMALL},
    "gemma4_text": GEMMA4_MOE,
    "gemma4_unified": {"text_config": GEMMA4_SMALL},
    "gemma4_unified_text": GEMMA4_MOE,
    "glm46v": {"text_config": {"rope_parameters": MROPE_16}},
    "glm4_moe": {"use_qk_norm": True},
    "glm4v": {"text_config": {"rope_parameters": MROPE_16}},
    "glm4v_moe": {"text_config": {"rope_parameters": ROPE | {"mrope_section": [1, 1, 2]}}},
    "glm5_next": {
        "text_config": {"head_dim": 0, "qk_rope_head_dim": 0},
        "vision_config": {"projection_intermediate_size": 72},
    },
    "glm_moe_dsa": {"indexer_types": ["full", "shared"] * 2},
    "glm_ocr": {"text_config": {"rope_parameters": MROPE_16}},
    "granite4_vision": {
        "vision_config": {"hidden_size": 64},
        "deepstack_layer_map": [[0, 0], [1, 1]],
        "spatial_target_layers": [0, 1],
        "downsample_rate": "2/4",
        "text_config": {"model_type": "granite"},
    },
    "granite_speech": {"encoder_config": SPEECH},
    "granite_speech_plus": {"encoder_config": SPEECH},
    "granitemoehybrid": {"layer_types": LINEAR_AND_FULL},
    "helium": {"head_dim": 16},
    "hunyuan_vl": {
        "vision_config": {"max_image_size": 16, "img_max_token_num": 16, "max_vit_seq_len": 16},
        "text_config": {"rope_parameters": ROPE | {"mrope_section": [4, 4, 4]}},
    },
    "idefics": {"alpha_initializer": "ones", "qk_layer_norms": True},
    "inkling_text": {"mlp_layer_types": DENSE_AND_SPARSE},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 3},
    "janus": {"vq_config": VQ, "vision_config": {"num_image_tokens": 16}},
    "kosmos-2.5": {
        "latent_query_num": 5,
        "text_config": {"embed_dim": 64, "layers": 2, "ffn_dim": 112, "attention_heads": 4},
        "vision_config": {"patch_embed_hidden_size": 48, "max_num_patches": 16},
    },
    "laguna": {"layer_types": SLIDING_AND_FULL},
    "lfm2": {"layer_types": CONV_AND_FULL},
    "lfm2_moe": {"layer_types": CONV_AND_FULL},
    "lfm2_vl": {"text_config": {"layer_types": CONV_AND_FULL}},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "mellum": {"layer_types": SLIDING_AND_FULL, "mlp_layer_types": DENSE_AND_SPARSE},
    "minimax_m3_vl": {"projector_hidden_size": 48, "text_config": MINIMAX_M3},
    "minimax_m3_vl_text": MINIMAX_M3,
    "ministral": {"layer_types": SLIDING_AND_FULL},
    "mistral4": {"qk_nope_head_dim": 8},
    "mistral_large4": {
        "text_config": {
            "indexer_types": ["full", "full", "shared", "shared"],
            "kv_source_layers": [0, 1, 0, 1],
        }
    },
    "molmo2": {"vision_config": {"image_size": [16, 16]}, "adapter_config": {"vision_feature_layer": [1, 0]}},
    "muse_glimmer": {"projector_hidden_size": 48, "out_hidden_size": 40},
    "muse_spark": {
        "projector_hidden_size": 48,
        "out_hidden_size": 40,
        "text_config": {"moe_hidden_size": 40},
        "audio_config": {
            "patch_sizes": [4, 4],
            "hidden_sizes": [16, 32],
            "depths": [1, 1],
            "num_hidden_layers": 2,
            "out_hidden_size": 64,
        },
    },
    "nemo_speechlm": {"audio_config": {"diarization_config": {"head_config": {"audio_hidden_size": 32}}}},
    "nemotron_h_omni": {
        "projector_hidden_size": 48,
        "vision_config": {"max_img_size": 16, "video_temporal_patch_size": 2},
        "vision_hidden_size": 32,
    },
    "neomme": {"head_dim": 32},
    "hy_v4_vl": {"text_config": {"rope_parameters": ROPE | {"mrope_section": [1, 1, 2]}}},
    "paddleocr_vl": {"text_config": {"rope_parameters": ROPE | {"mrope_section": [4, 4, 4]}}},
    "phi4_multimodal": {
        "audio_config": {
            "num_blocks": 2,
            "ext_pw_out_channel": 32,
            "depthwise_separable_out_channel": 32,
            "nemo_conv_channels": 32,
        },
        "vision_config": {"crop_size": 16},
    },
    "pix2struct": {"text_config": {"d_kv": 16}, "vision_config": {"hidden_size": 64, "seq_len": 16}},
    "qwen2": QWEN_SLIDING,
    "qwen2_5_omni_thinker": {"vision_start_token_id": 126, "text_config": {"rope_parameters": MROPE_16}},
    "qwen2_5_vl": {"vision_config": {"window_size": 16}, "text_config": {"rope_parameters": MROPE_16}},
    "qwen2_moe": QWEN_SLIDING,
    "qwen2_vl": {"text_config": {"rope_parameters": MROPE_16}, "vision_config": {"hidden_size": 64}},
    "qwen3": QWEN_SLIDING,
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 126, "text_config": {"rope_parameters": MROPE_16}},
    "qwen4_exp": {"text_config": QWEN4},
    "qwen4_exp_text": QWEN4,
    "step3p7": {
        "text_config": {
            "layer_types": SLIDING_AND_FULL,
            "rope_parameters": ROPE_PER_LAYER_TYPE,
            "num_sliding_attention_heads": 4,
        }
    },
    "udop": {"relative_attention_num_buckets": 32, "relative_attention_max_distance": 128},
    "unlimited_ocr": {"vision_config": {"sam_config": {"downsample_channels": [40, 48]}}},
    "vibevoice": {
        "audio_config": ACOUSTIC,
        "semantic_model_config": ACOUSTIC | {"hidden_size": 20},
        "diffusion_head_config": {"latent_size": 16},
    },
    "vibevoice_asr": {
        "acoustic_tokenizer_encoder_config": ACOUSTIC,
        "semantic_tokenizer_encoder_config": ACOUSTIC | {"hidden_size": 20},
    },
    "xlstm": {"embedding_dim": 64, "num_blocks": 4, "qk_dim_factor": 1.0},
    "zaya": {"num_experts_per_tok": 1},
}

# Shapes of the inputs besides text that a family cannot do without.
OTHER_INPUTS = {
    "idefics": {"image_encoder_embeddings": (2, 1, 17, 32), "image_attention_mask": (2, TEXT_LENGTH, 1)},
    "pix2struct": {"flattened_patches": (2, 5, 770)},
    "diffusion_gemma": {"self_conditioning_logits": (2, TEXT_LENGTH, VOCABULARY)},
    "udop": {"bbox": (2, TEXT_LENGTH, 4)},
    "voxtral_realtime": {"encoder_inputs_embeds": (2, 4 * TEXT_LENGTH, 32)},
}

# How many tokens one image of 16 patches is in the text, for the families of `image_inputs`.
IMAGE_TOKENS = {
    "gemma3": 4,
    "llava": 16,
    "mistral3": 4,
    "qwen2_5_vl": 4,
    "qwen2_vl": 4,
    "qwen3_5": 4,
    "qwen3_vl": 4,
    "qwen3_vl_moe": 4,
}


@functools.cache
def families() -> dict[str, str]:
    """`model_type` -> name of the model class, for every family of the installed transformers.

    Read from the sources, without an import of a single model.
    """
    found = {}
    models = Path(transformers.__file__).parent / "models"
    for head in HEADS:
        names = getattr(modeling_auto, f"MODEL_FOR_{head}_MAPPING_NAMES")
        for family, class_name in names.items():
            folder = models / model_type_to_module_name(family)
            source = "".join(file.read_text() for file in sorted(folder.glob("modeling_*.py")))
            own = re.search(r"class \w*RMSNorm|nn\.RMSNorm", source)
            # The norms of T5 and Cohere go by another name.
            own = own or ("rsqrt(" in source and re.search(r"class \w*LayerNorm\(nn\.Module\)", source))
            if own or family in COMPOSITES:
                found.setdefault(family, class_name)
    for family in BASE_MODELS:
        if family in modeling_auto.MODEL_MAPPING_NAMES:
            found[family] = modeling_auto.MODEL_MAPPING_NAMES[family]
    return {family: name for family, name in sorted(found.items()) if family not in EXCLUDED}


def small_config(family: str) -> PreTrainedConfig:
    config_class = CONFIG_MAPPING[family]
    overrides = copy.deepcopy(OVERRIDES.get(family, {}))  # configurations change what they are given
    return config_class(**_small_arguments(config_class(), overrides, {}))


def _small_arguments(
    default: PreTrainedConfig, overrides: dict, special_tokens: dict[str, int], in_tower: bool = False
) -> dict:
    """The arguments that make a small configuration of the same class as `default`."""
    arguments = {}
    fields = {field.name for field in dataclasses.fields(default)}
    sizes = _sizes(fields, in_tower)
    # Not getattr: where layers differ from each other, it refuses to answer for the whole model.
    for name, value in vars(default).items():
        if name not in fields and name in ("head_dim", "qk_head_dim"):
            continue  # computed from others
        override = overrides.get(name)
        if isinstance(override, dict) and "model_type" in override:  # of another class than the default one
            value = CONFIG_MAPPING[override["model_type"]]()
        if isinstance(value, PreTrainedConfig):
            is_tower = (in_tower or re.search(TOWERS, name)) and not re.search("text|^encoder$", name)
            nested = _small_arguments(value, override or {}, special_tokens, bool(is_tower))
            arguments[name] = {"model_type": value.model_type, **nested}
        elif name in overrides:
            arguments[name] = overrides[name]
        elif re.search("_token_(id|index)$", name) and isinstance(value, int | list):
            if isinstance(value, list) or value >= FIRST_TEXT_TOKEN:
                # One id for one name, also where the outer and the inner configuration have it.
                arguments[name] = special_tokens.setdefault(name, FIRST_SPECIAL_TOKEN + len(special_tokens))
        elif name in sizes and (value is None or isinstance(value, int)):
            arguments[name] = sizes[name]
        elif name == "rope_parameters" and value:
            arguments[name] = _small_rope(value, sizes["head_dim"])
        elif isinstance(value, list | tuple) and len(value) == getattr(default, "num_hidden_layers", 0):
            arguments |= _every_kind(name, list(dict.fromkeys(value)), sizes["num_hidden_layers"])
        elif isinstance(value, list | tuple) and name in sizes:
            arguments[name] = type(value)(sizes[name]) if isinstance(sizes[name], list) else sizes[name]
    return arguments | {name: value for name, value in overrides.items() if name not in arguments}


def _sizes(fields: set[str], in_tower: bool) -> dict:
    sizes = TOWER_SIZES if in_tower else TEXT_SIZES
    if "kv_lora_rank" not in fields:
        return sizes
    # Latent attention: every head has its own keys, and only a part is rotated.
    return sizes | {"num_key_value_heads": sizes["num_attention_heads"], "head_dim": TEXT_SIZES["qk_rope_head_dim"]}


def _every_kind(name: str, kinds: list, length: int) -> dict:
    """A list with one entry per layer in which every kind of layer occurs, by its name; {} for too many kinds."""
    if len(kinds) > length:
        return {}
    # Attention alternates and the MLP repeats its last kind, so that sparse layers meet every attention.
    fill = kinds * length if name == "layer_types" else kinds + kinds[-1:] * length
    return {name: fill[:length]}


def _small_rope(rope: dict, head_dim: int) -> dict:
    """The same rotary embedding; the sections of a multimodal one must add up to half the rotated width."""
    small = {}
    for key, value in rope.items():
        if isinstance(value, dict):
            value = _small_rope(value, head_dim)
        elif key == "mrope_section":
            value = [int(head_dim * rope.get("partial_rotary_factor", 1.0)) // 6] * 3
        elif key == "original_max_position_embeddings":
            value = 32
        small[key] = value
    return small


def build(family: str, seed: int, config: PreTrainedConfig | None = None) -> PreTrainedModel:
    """A tiny model in float32 with random weights; the gains are up to `randomize_gains`.

    `config` takes the place of `small_config`.
    """
    model_class = getattr(transformers, families()[family])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config or small_config(family)).float().eval()
        _randomize_weights(model)
    return model


@torch.no_grad()
def _randomize_weights(model: nn.Module) -> None:
    """Large enough weights that every part of the model shows in the logits, and no zero matrices."""
    gains = {id(norm.weight) for norm in norms(model).values()}
    for name, weight in model.named_parameters():
        if id(weight) in gains or "A_log" in name:  # A_log is a decay rate, sane only as it was initialized
            continue
        if weight.ndim >= 2:
            nn.init.normal_(weight, std=SPREAD * weight.shape[-1] ** -0.5)
        else:
            weight += 0.1 * torch.randn_like(weight)


def norms(model: nn.Module) -> dict[str, nn.Module]:
    """Every normalization of the last dimension that has a gain, by its name in the model."""
    others = nn.Embedding | nn.GroupNorm | nn.modules.batchnorm._BatchNorm
    return {
        name: module
        for name, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        and not isinstance(module, others)
        and isinstance(getattr(module, "weight", None), nn.Parameter)
    }


@torch.no_grad()
def randomize_gains(model: nn.Module, seed: int) -> None:
    """Set the gain of every normalization to random numbers from 0.4 to 1.8."""
    generator = torch.Generator().manual_seed(seed)
    for module in norms(model).values():
        gain = torch.empty_like(module.weight).uniform_(0.4, 1.8, generator=generator)
        module.weight.copy_(gain - 1 if adds_one(module) else gain)


@torch.no_grad()
def adds_one(norm: nn.Module) -> bool:
    """Whether the gain is `1 + weight`: only then the output still depends on the input at weight zero."""
    weight = norm.weight.clone()
    norm.weight.zero_()
    first, second = _call(norm, torch.randn(2, 1, 3, *weight.shape))
    norm.weight.copy_(weight)
    return not torch.equal(first, second)


def _call(norm: nn.Module, inputs: torch.Tensor) -> list[torch.Tensor]:
    """`norm` of every input, whatever it wants to be called with."""
    calls = (
        lambda x: norm(x),
        lambda x: norm(x, x),  # with a gate
        lambda x: norm(x.unflatten(-1, (norm.num_heads, norm.head_dim))),  # a flat weight over heads
        lambda x: norm(x.transpose(1, 2).unsqueeze(-1)),  # the channels of an image
    )
    for call in calls:
        with contextlib.suppress(TypeError, AttributeError, RuntimeError, ValueError):
            return [call(x) for x in inputs]
    raise TypeError(f"cannot call {type(norm).__name__}")


def text_inputs(model: PreTrainedModel, seed: int) -> dict[str, torch.Tensor]:
    """Random text for one forward pass."""
    generator = torch.Generator().manual_seed(seed)

    def ids():
        return torch.randint(FIRST_TEXT_TOKEN, FIRST_SPECIAL_TOKEN, (2, TEXT_LENGTH), generator=generator)

    inputs = {"input_ids": ids()}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    accepted = inspect.signature(model.forward).parameters
    if "decoder_input_ids" in accepted:
        inputs["decoder_input_ids"] = ids()
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    for name, shape in OTHER_INPUTS.get(model.config.model_type, {}).items():
        inputs[name] = torch.rand(shape, generator=generator)
    return inputs


def image_inputs(model: PreTrainedModel, seed: int) -> dict[str, torch.Tensor] | None:
    """Random text around one image of 16 x 16 pixels, or None where the family is not prepared for it."""
    family = model.config.model_type
    if family not in IMAGE_TOKENS:
        return None
    inputs = text_inputs(model, seed)
    batch = len(inputs["input_ids"])
    before, after = inputs["input_ids"].split([3, TEXT_LENGTH - 3], dim=1)
    image = before.new_full((batch, IMAGE_TOKENS[family]), model.config.image_token_id)
    inputs["input_ids"] = torch.cat([before, image, after], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    is_image = (inputs["input_ids"] == model.config.image_token_id).long()
    generator = torch.Generator().manual_seed(seed)
    if family.startswith("qwen"):
        # 16 patches per image, each with 3 colors of 2 frames of 4 x 4 pixels
        inputs["pixel_values"] = torch.randn(batch * 16, 3 * 2 * 4 * 4, generator=generator)
        inputs["image_grid_thw"] = torch.tensor([[1, 4, 4]] * batch)
        inputs["mm_token_type_ids"] = is_image
    else:
        inputs["pixel_values"] = torch.randn(batch, 3, 16, 16, generator=generator)
    if family == "gemma3":
        inputs["token_type_ids"] = is_image
    if family == "mistral3":
        inputs["image_sizes"] = torch.tensor([[16, 16]] * batch)
    return inputs


@torch.no_grad()
def logits(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    output = model(**inputs)
    result = output.logits if "logits" in output else output.last_hidden_state
    return result.float()


def save(
    model: PreTrainedModel, folder: str | Path, dtype: torch.dtype | None = None, max_shard_size: str = "5GB"
) -> None:
    """Write a checkpoint; `dtype` casts the weights that are written, not those of `model`."""
    if dtype is not None:
        model = copy.deepcopy(model).to(dtype)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
