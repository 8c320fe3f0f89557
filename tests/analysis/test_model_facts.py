"""What a config says alone: parameters by formula, the cache against a real one, layers that add up."""

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GptOssConfig,
    JambaConfig,
    LlamaConfig,
    MiniMaxConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
    SwitchTransformersConfig,
)

import hf_moe
from hf_moe.analysis import model_facts
from hf_moe.analysis.cache_growth import collect
from hf_moe.testing import tiny_config

COMMON = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "intermediate_size": 24,
}
SMALL = {
    "qwen3_moe": Qwen3MoeConfig(
        **COMMON, moe_intermediate_size=8, num_experts=6, num_experts_per_tok=2, mlp_only_layers=[0]
    ),
    "gpt_oss": GptOssConfig(**COMMON, num_local_experts=4, num_experts_per_tok=2, sliding_window=100),
    "minimax": MiniMaxConfig(**COMMON, num_local_experts=4, num_experts_per_tok=2),
    "jamba": JambaConfig(
        **{k: v for k, v in COMMON.items() if k != "head_dim"},
        num_experts=4,
        num_experts_per_tok=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_d_state=4,
        mamba_dt_rank=4,
    ),
    "llama": LlamaConfig(**COMMON),
}
OURS = ("based", "bam", "ling", "moa", "rexmoe")


def mixtral_parameters(config, experts: int) -> int:
    """Jiang et al. 2024: attention with grouped queries, `experts` SwiGLUs, a router, two norms per layer."""
    width, keys = config.hidden_size, config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    attention = 2 * width * width + 2 * width * keys
    layer = attention + 3 * experts * width * config.intermediate_size + width * config.num_local_experts + 2 * width
    return config.num_hidden_layers * layer + 2 * config.vocab_size * width + width


def test_mixtral_8x7b_has_its_published_sizes():
    """46.7B parameters, 12.9B active (https://arxiv.org/abs/2401.04088); 8 key-value heads of 128 in 32 layers."""
    config = MixtralConfig()
    facts = model_facts(config, torch.bfloat16)
    assert facts.parameters == mixtral_parameters(config, 8) == 46_702_792_704
    assert facts.active_parameters == mixtral_parameters(config, 2) == 12_879_925_248
    assert facts.cache_bytes_per_token == 2 * 2 * 8 * 128 * 32 and facts.cache_bytes_fixed == 0
    (row,) = facts.layers
    assert (row.first, row.last, row.num_experts, row.top_k, row.expert_width) == (0, 31, 8, 2, 14336)
    assert (row.mixer, row.widths, row.shared_width) == ("MixtralAttention", "q 4096, k 1024, v 1024", 0)
    assert (row.router, row.experts, row.scoring) == ("MixtralTopKRouter", "MixtralExperts", "softmax")
    assert facts.parameters_outside_layers == 2 * 32000 * 4096 + 4096 and facts.dtype == "bfloat16"


@torch.no_grad()
@pytest.mark.allow_warnings("is falling back to its reference PyTorch implementation")
@pytest.mark.parametrize("kind", [*SMALL, *OURS])
def test_a_cache_grows_as_measured_and_layers_add_up(kind):
    config = SMALL.get(kind) or tiny_config(kind, num_hidden_layers=2)
    facts, model = model_facts(config), AutoModelForCausalLM.from_config(config).eval()
    assert facts.parameters == model.num_parameters()
    inside = sum((row.last - row.first + 1) * row.parameters for row in facts.layers)
    assert inside + facts.parameters_outside_layers == facts.parameters and inside > 0
    assert facts.cache_note is None
    for length in (200, 231):
        held: dict[int, torch.Tensor] = {}
        collect(vars(model(torch.ones(1, length, dtype=torch.long), use_cache=True).past_key_values), held)
        expected = facts.cache_bytes_fixed + facts.cache_bytes_per_token * length
        assert sum(tensor.nbytes for tensor in held.values()) == expected


@torch.no_grad()
def test_agrees_with_the_measure_of_a_filled_cache():
    config = tiny_config("bam")
    model, cache = AutoModelForCausalLM.from_config(config).bfloat16(), DynamicCache(config=config)
    model(torch.ones(1, 5, dtype=torch.long), past_key_values=cache)
    facts = model_facts(config, torch.bfloat16)
    assert (facts.cache_bytes_per_token, facts.cache_bytes_fixed) == hf_moe.cache_memory(cache)


def test_a_sliding_window_is_a_fixed_part():
    """Two of four layers keep the last 99 tokens: keys and values of one head of 8, in float32."""
    facts = model_facts(SMALL["gpt_oss"])
    assert facts.cache_bytes_per_token == 2 * 2 * 8 * 4 and facts.cache_bytes_fixed == 2 * 99 * 2 * 8 * 4


@pytest.mark.allow_warnings("is falling back to its reference PyTorch implementation")
def test_rows_of_layers():
    rows = model_facts(SMALL["qwen3_moe"]).layers
    assert [(row.first, row.last, row.feed_forward, row.feed_forward_width) for row in rows] == [
        (0, 0, "Qwen3MoeMLP", 24),
        (1, 3, "Qwen3MoeSparseMoeBlock", None),
    ]
    assert [(row.num_experts, row.top_k, row.expert_width) for row in rows] == [(0, None, None), (6, 2, 8)]
    assert rows[1].parameters - rows[1].active_parameters == 4 * 3 * 16 * 8
    jamba = model_facts(SMALL["jamba"]).layers
    assert [row.mixer for row in jamba] == ["JambaMambaMixer (linear)", "JambaAttention (full)"] * 2
    assert [row.num_experts for row in jamba] == [0, 4, 0, 4]


@pytest.mark.parametrize("kind", hf_moe.ARCHITECTURES)
def test_every_architecture_of_ours_has_rows(kind):
    config = tiny_config(kind)
    facts = model_facts(config)
    assert sum(row.last - row.first + 1 for row in facts.layers if row.stack == "model.layers") == 2
    for row in facts.layers:
        if row.stack == "model.layers":
            spec = config.block(row.first)
            assert row.mixer == spec["mixer"]["type"] and row.feed_forward.startswith(spec["feed_forward"]["type"])
    assert facts.cache_note is None and facts.cache_bytes_per_token is not None
    counts = hf_moe.count_parameters(config)
    assert (facts.parameters, facts.active_parameters) == (counts.total, counts.active)


def test_zero_experts_take_their_part_of_the_choices():
    """Of 3 choices among 4 true and 2 zero experts, 2 fall on true ones, in both stacks."""
    latent = {"q_lora_rank": 4, "kv_lora_rank": 4, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
    sizes = {"num_layers": 1, "n_routed_experts": 4, "zero_expert_num": 2, "moe_topk": 3, "expert_ffn_hidden_size": 8}
    config = AutoConfig.for_model("longcat_flash", **latent, **sizes, hidden_size=16, vocab_size=64)
    facts = model_facts(config)
    unread = 2 * 2 * 8 * 16  # rows of the first stack for experts that have no weights
    assert facts.parameters - facts.active_parameters == pytest.approx((4 - 2) * 3 * 8 * 16 + unread, abs=1)


def test_a_dense_model_has_no_experts_and_an_unknown_mixture_is_refused():
    facts = model_facts(SMALL["llama"])
    assert facts.active_parameters == facts.parameters and not any(row.num_experts for row in facts.layers)
    with pytest.raises(ValueError, match="'switch_transformers' are not supported"):
        model_facts(SwitchTransformersConfig(num_layers=1, num_decoder_layers=1, d_model=16, d_ff=16))
    with pytest.raises(ValueError, match="No model class is known for configs of type 'unknown'"):
        model_facts(Unknown())


class Unknown(PreTrainedConfig):
    model_type = "unknown"


def test_why_a_cache_is_not_known():
    kinds = {"num_hidden_layers": 2, "hidden_size": 16, "num_key_value_heads": 2, "kv_channels": 8}
    facts = model_facts(
        AutoConfig.for_model("jetmoe", vocab_size=64, intermediate_size=8, num_local_experts=4, **kinds)
    )
    assert facts.cache_bytes_per_token is None and "does not run without data" in (facts.cache_note or "")
