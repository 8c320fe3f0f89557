"""Checkpoints of stock Transformers models load into the free composition and give the same logits."""

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from hf_moe import HfMoeConfig, HfMoeForCausalLM

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MLP = {"type": "mlp", "intermediate_size": 48}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
YARN_SIZES = {**SIZES, "rope_parameters": YARN, "max_position_embeddings": 256}
DENSE_SIZES = {**SIZES, "intermediate_size": 48}
MOE_SIZES = {**SIZES, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SHARED_SIZES = {**MOE_SIZES, "shared_expert_intermediate_size": 24}
MIXTRAL_NAMES = {  # Mixtral's files have their own names for the experts
    r"block_sparse_moe\.gate": "mlp.gate",
    r"block_sparse_moe\.experts\.(\d+)\.w1": r"mlp.experts.\1.gate_proj",
    r"block_sparse_moe\.experts\.(\d+)\.w3": r"mlp.experts.\1.up_proj",
    r"block_sparse_moe\.experts\.(\d+)\.w2": r"mlp.experts.\1.down_proj",
}


def moe(width: int, normalize: bool, **options) -> dict:
    router = {"type": "top_k", "top_k": 2, "normalize": normalize}
    experts = {"type": "swiglu", "intermediate_size": width}
    return {"type": "moe", "num_experts": 4, "router": router, "experts": experts, **options}


SHARED = {"shared_intermediate_size": 24, "shared_gate": True}
CASES = {  # stock model, its config, our mixer's options, our feed-forward
    "llama": (LlamaForCausalLM, LlamaConfig(**DENSE_SIZES), {}, MLP),
    "llama-yarn": (LlamaForCausalLM, LlamaConfig(**YARN_SIZES, intermediate_size=48), {}, MLP),
    "mistral": (MistralForCausalLM, MistralConfig(**DENSE_SIZES, sliding_window=4), {"sliding": True}, MLP),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**DENSE_SIZES), {"qkv_bias": True}, MLP),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**DENSE_SIZES), {"qk_norm": True}, MLP),
    "mixtral": (MixtralForCausalLM, MixtralConfig(**DENSE_SIZES, num_local_experts=4), {}, moe(48, True)),
    "qwen3_moe": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig(**MOE_SIZES, norm_topk_prob=True),
        {"qk_norm": True},
        moe(16, True),
    ),
    "qwen3_moe-plain": (Qwen3MoeForCausalLM, Qwen3MoeConfig(**MOE_SIZES), {"qk_norm": True}, moe(16, False)),
    "qwen2_moe": (Qwen2MoeForCausalLM, Qwen2MoeConfig(**SHARED_SIZES), {"qkv_bias": True}, moe(16, False, **SHARED)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@torch.no_grad()
def test_same_logits(case, dtype, tmp_path):
    stock_class, stock_config, mixer, feed_forward = CASES[case]
    torch.manual_seed(0)
    stock_class(stock_config).to(dtype).save_pretrained(tmp_path)
    stock = stock_class.from_pretrained(tmp_path, dtype=dtype)
    block = {"mixer": {"type": "attention", **mixer}, "feed_forward": feed_forward}
    shared = {name: getattr(stock_config, name) for name in ("rope_parameters", "max_position_embeddings")}
    shared["sliding_window"] = stock_config.sliding_window if case == "mistral" else None
    load = {"key_mapping": MIXTRAL_NAMES} if case == "mixtral" else {}
    config = HfMoeConfig(**{**SIZES, **shared}, blocks={"b": block})
    ours, info = HfMoeForCausalLM.from_pretrained(
        tmp_path, config=config, output_loading_info=True, dtype=dtype, **load
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ids = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    tolerance = 1e-6
    if dtype == torch.bfloat16:  # stock Mixtral multiplies experts by fp32 gates, we by gates of the model's dtype
        tolerance = 5e-2 if case == "mixtral" else 1e-2
    for inputs in ({"input_ids": ids}, {"input_ids": ids, "attention_mask": mask}):
        actual, expected = ours(**inputs).logits[:, 3:], stock(**inputs).logits[:, 3:]
        torch.testing.assert_close(actual, expected, atol=tolerance, rtol=1e-5)
