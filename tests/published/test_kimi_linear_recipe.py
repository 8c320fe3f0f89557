"""The recipe of Kimi-Linear, at other sizes, against Transformers' Kimi-Linear with the same weights."""

from pathlib import Path

import pytest
import torch
import yaml
from transformers import KimiLinearConfig, KimiLinearForCausalLM

from hf_moe import HfMoeConfig, HfMoeForCausalLM

RECIPE = yaml.safe_load((Path(__file__).parents[2] / "docs" / "recipes" / "kimi_linear.yaml").read_text())
LATENT = {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
SIZES = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
X = torch.randint(1, 97, (2, 10), generator=torch.Generator().manual_seed(0))


def small_recipe() -> HfMoeConfig:
    blocks = RECIPE["blocks"]
    for name, block in blocks.items():
        block["mixer"] |= LATENT if name == "mla" else {"num_heads": 4, "key_head_dim": 8}
        block["feed_forward"] |= {"intermediate_size": 24} if name == "kda_dense" else {"num_experts": 6}
    sparse = blocks["kda"]["feed_forward"]
    sparse |= {"experts": {"type": "swiglu", "intermediate_size": 16}, "shared_intermediate_size": 16}
    sparse["router"]["top_k"] = 2
    blocks["mla"]["feed_forward"] = sparse
    ends = {"pad_token_id": None, "eos_token_id": None, "initializer_range": 0.2, "head_dim": 8}
    return HfMoeConfig(**{**RECIPE, **SIZES, **ends, "blocks": blocks})


def native_model() -> KimiLinearForCausalLM:
    recipe = RECIPE["blocks"]["kda"]["feed_forward"]["router"]
    config = KimiLinearConfig(
        **SIZES,
        **LATENT,
        intermediate_size=24,
        moe_intermediate_size=16,
        num_local_experts=6,
        num_experts_per_tok=2,
        linear_num_heads=4,
        linear_head_dim=8,
        layer_types=["linear_attention"] * 3 + ["full_attention"],
        mlp_layer_types=["dense"] + ["sparse"] * 3,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    assert config.routed_scaling_factor == recipe["scale"] and config.norm_topk_prob
    return KimiLinearForCausalLM(config).eval()


def translate(weights: dict) -> dict:
    """Our names of the weights -> Transformers'."""
    translated = {}
    for name, tensor in weights.items():
        if name.endswith("_conv1d.weight"):
            if "q_conv1d" in name:
                joint = torch.cat([weights[name.replace("q_conv1d", f"{x}_conv1d")] for x in "qkv"])
                translated[name.replace("q_conv1d", "conv1d")] = joint
            continue
        for inner in ("A_log", "dt_bias", "f_a_proj", "f_b_proj"):
            name = name.replace(f"self_attn.{inner}", f"self_attn.forget_gate.{inner}")
        name = name.replace("shared_expert.", "shared_experts.")
        translated[name] = tensor.view(1, 1, -1, 1) if name.endswith("A_log") else tensor
    return translated


@torch.no_grad()
@pytest.mark.allow_warnings("is falling back to its reference PyTorch implementation")
def test_same_logits():
    torch.manual_seed(0)
    ours, native = HfMoeForCausalLM(small_recipe()).eval(), native_model()
    for name, buffer in ours.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.2)
    native.load_state_dict(translate(ours.state_dict()))
    torch.testing.assert_close(ours(X).logits, native(X).logits, atol=5e-5, rtol=1e-4)
