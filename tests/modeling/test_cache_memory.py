"""What a cache weighs, measured on a filled one, against the formula of each paper at its published head sizes."""

import pytest
import torch
from transformers import DynamicCache

from hf_moe import HfMoeConfig, HfMoeForCausalLM, cache_memory

FP32 = 4
FEATURES = 1 + 16 + 16 * 17 // 2  # of BASED's Taylor map
# mixer, flat sizes -> bytes per token, bytes per sequence (float32 models)
LAYERS = {
    "softmax, 32 query and 16 key-value heads": (
        {"type": "attention"},
        {"num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 64},
        2048 * FP32,
        0,
    ),
    "Sigma 1.5B: 4 keys and 16 values of 64": (
        {"type": "diff_qkv", "num_key_heads": 4, "query_size": 96},
        {"num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 64},
        1280 * FP32,
        0,
    ),
    "DeepSeek-V3: latents of 512 + 64": (
        {
            "type": "latent_attention",
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
        },
        {"num_attention_heads": 16, "head_dim": 64},
        576 * FP32,
        0,
    ),
    "JetMoE: 16 heads of 128, whatever the number of experts": (
        {"type": "mixture_of_attention", "num_experts": 8, "heads_per_expert": 16},
        {"num_attention_heads": 32, "head_dim": 128},
        4096 * FP32,
        0,
    ),
    "SwitchHead: 2 heads of 64": (
        {"type": "switch_head", "num_heads": 2, "num_experts": 4},
        {"num_attention_heads": 16, "head_dim": 64},
        2 * 2 * 64 * FP32,
        0,
    ),
    "BAM: 4 experts with keys and values": (
        {"type": "soft_mixture_of_attention", "num_experts": 4},
        {"num_attention_heads": 18, "num_key_value_heads": 6, "head_dim": 128},
        4 * 2 * 6 * 128 * FP32,
        0,
    ),
    "BASED: 16 heads of 64": (
        {"type": "based"},
        {"num_attention_heads": 16, "head_dim": 64},
        0,
        16 * (64 + 1) * FEATURES * FP32,
    ),
    "BASED's convolution": ({"type": "short_convolution"}, {"num_attention_heads": 1}, 0, 2 * 64 * 2 * FP32),
    "MiniMax: 64 heads of 128": (
        {"type": "lightning_attention"},
        {"num_attention_heads": 64, "head_dim": 128},
        0,
        64 * 128 * 128 * FP32,
    ),
    "Mamba-2: 64 heads of 64, a state of 128, one group": (
        {"type": "mamba2", "num_heads": 64, "head_dim": 64, "state_size": 128},
        {"num_attention_heads": 1},
        0,
        (64 * 64 * 128 + (64 * 64 + 2 * 128) * 3) * FP32,
    ),
    "Gated DeltaNet: 6 heads of 256, values of 512": (
        {"type": "gated_delta_net", "num_heads": 6, "key_head_dim": 256, "value_head_dim": 512},
        {"num_attention_heads": 1},
        0,
        (6 * 256 * 512 + (2 * 6 * 256 + 6 * 512) * 3) * FP32,
    ),
    "Kimi Linear: 32 heads of 128": (
        {"type": "kimi_delta_attention", "num_heads": 32, "key_head_dim": 128},
        {"num_attention_heads": 1},
        0,
        (524_288 + 3 * 4096 * 3) * FP32,
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_weighs_what_its_paper_says(layer):
    mixer, sizes, per_token, per_sequence = LAYERS[layer]
    block = {"mixer": mixer, "feed_forward": {"type": "mlp", "intermediate_size": 8}}
    config = HfMoeConfig(vocab_size=50, hidden_size=64, num_hidden_layers=1, blocks={"b": block}, **sizes)
    model, cache = HfMoeForCausalLM(config).eval(), DynamicCache(config=config)
    for length in (3, 1, 1):  # the first pass may not differ from the others
        model(torch.ones(2, length, dtype=torch.long), past_key_values=cache)
        assert cache_memory(cache) == (per_token, per_sequence)


def test_a_stack_adds_up():
    block = {"feed_forward": {"type": "mlp", "intermediate_size": 8}}
    blocks = {"a": {"mixer": {"type": "attention"}, **block}, "l": {"mixer": {"type": "lightning_attention"}, **block}}
    config = HfMoeConfig(vocab_size=50, hidden_size=64, num_hidden_layers=4, blocks=blocks)
    cache = DynamicCache(config=config)
    HfMoeForCausalLM(config).eval().bfloat16()(torch.ones(3, 5, dtype=torch.long), past_key_values=cache)
    assert cache_memory(cache) == (2 * 2 * 64 * 2, 2 * 8 * 8 * 8 * FP32)
