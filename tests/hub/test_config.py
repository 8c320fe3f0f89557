"""Configs survive every way of being written down, and a named architecture writes its paper's flat fields only."""

import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

import hf_moe
from hf_moe.modeling import BLOCKS, DecoderConfig, resolve
from hf_moe.testing import tiny_config

heads = st.sampled_from([(4, 1), (4, 2), (4, 4), (8, 2)])
sizes = st.integers(1, 64)
common = st.fixed_dictionaries(
    {
        "num_hidden_layers": st.integers(1, 4),
        "tie_word_embeddings": st.booleans(),
        "router_aux_loss_coef": st.sampled_from([0.0, 0.001, 0.02]),
        "rope_parameters": st.sampled_from(
            [{"rope_type": "default", "rope_theta": 1e6}, {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}]
        ),
        "eos_token_id": st.sampled_from([None, 2, [2, 3]]),
    }
)
experts = st.integers(1, 6).flatmap(
    lambda number: st.fixed_dictionaries(
        {"num_experts": st.just(number), "num_experts_per_tok": st.integers(1, number)}
    )
)
own = {
    "bam": st.fixed_dictionaries(
        {
            "block_type": st.sampled_from(["parallel", "pre_norm"]),
            "num_attention_experts": st.none() | st.integers(1, 4),
            "share_key_value": st.booleans(),
            "qk_norm": st.booleans(),
            "qkv_bias": st.booleans(),
            "norm_topk_prob": st.booleans(),
            "intermediate_size": sizes,
            "sliding_window": st.none() | sizes,
        }
    ),
    "based": st.fixed_dictionaries({"num_hidden_layers": st.integers(3, 4), "intermediate_size": sizes}),
    "peer": st.fixed_dictionaries(
        {
            "peer_layers": st.none() | st.just([0]),
            "peer_num_keys": st.integers(2, 6),
            "peer_scoring": st.sampled_from(["softmax", "sigmoid", "relu"]),
            "peer_query_norm": st.sampled_from(["batch", None]),
            "intermediate_size": sizes,
        }
    ),
    "peripheral_lm": st.fixed_dictionaries(
        {"q_lora_rank": st.none() | sizes, "rope_interleave": st.booleans(), "intermediate_size": sizes}
    ),
    "blockffn": st.fixed_dictionaries(
        {"num_experts": sizes, "moe_intermediate_size": sizes, "q_lora_rank": st.none() | sizes, "chunk_size": sizes}
    ),
    "dynamic_moe": st.fixed_dictionaries(
        {
            "num_experts": sizes,
            "intermediate_size": sizes,
            "expert_frequency": st.integers(1, 3),
            "top_p_threshold": st.floats(0, 1),
        }
    ),
    "moge": st.fixed_dictionaries(
        {
            "num_experts": st.sampled_from([8, 12]),
            "num_experts_per_tok": st.sampled_from([4, 8]),
            "num_expert_groups": st.sampled_from([1, 2, 4]),
            "num_shared_experts": st.integers(0, 2),
            "learned_router_scale": st.booleans(),
            "attention_bias": st.booleans(),
        }
    ),
    "rexmoe": st.fixed_dictionaries(
        {
            "num_hidden_layers": st.just(4),
            "layers_per_pool": st.sampled_from([1, 2, 4]),
            "moe_intermediate_size": sizes,
            "candidate_masking": st.sampled_from(["random", "own_first"]),
        }
    ),
    "rmoe": st.fixed_dictionaries(
        {
            "moe_intermediate_size": sizes,
            "router_state_size": sizes,
            "router_cell": st.sampled_from(["gru", "rnn", "lstm"]),
        }
    ),
    "coe": st.fixed_dictionaries(
        {
            "moe_intermediate_size": sizes,
            "num_iterations": st.integers(1, 3),
            "num_shared_experts": st.integers(0, 2),
            "placement": st.sampled_from(["pre_norm", "paper"]),
            "shared_router": st.booleans(),
        }
    ),
    "deepseek_moe": st.fixed_dictionaries(
        {
            "first_k_dense_replace": st.integers(0, 2),
            "moe_layer_freq": st.integers(1, 2),
            "num_shared_experts": st.integers(0, 2),
            "norm_topk_prob": st.booleans(),
            "moe_intermediate_size": sizes,
        }
    ),
    "ling": st.fixed_dictionaries(
        {
            "first_k_dense_replace": st.integers(0, 2),
            "num_shared_experts": st.integers(0, 2),
            "num_nextn_predict_layers": st.integers(0, 2),
            "moe_router_enable_expert_bias": st.booleans(),
            "rotary_fraction": st.sampled_from([0.5, 1.0]),
            "moe_intermediate_size": sizes,
        }
    ),
    "moa": st.fixed_dictionaries(
        {
            "num_attention_experts": st.integers(4, 8),
            "norm_topk_prob": st.booleans(),
            "attention_output_bias": st.booleans(),
            "intermediate_size": sizes,
        }
    ),
    "mole": st.fixed_dictionaries(
        {
            "moe_intermediate_size": sizes,
            "latent_size": st.none() | sizes,
            "experts_per_group": st.just(1),
            "factorize_down": st.booleans(),
        }
    ),
    "moe_x": st.fixed_dictionaries({"moe_intermediate_size": sizes}),
    "smoe_dropout": st.fixed_dictionaries({"moe_intermediate_size": sizes}),
    "thor": st.fixed_dictionaries(
        {
            "num_experts": st.integers(1, 4),
            "intermediate_size": sizes,
            "expert_inference": st.sampled_from(["token", "sequence", "all"]),
            "consistency_loss_coef": st.sampled_from([0, 1.5]),
        }
    ),
    "monet": st.fixed_dictionaries(
        {
            "moe_dim": st.sampled_from([2, 6]),
            "moe_heads": st.integers(1, 3),
            "moe_groups": st.integers(1, 3),
            "moe_decompose": st.sampled_from(["vertical", "horizontal"]),
            "attention_bias": st.booleans(),
        }
    ),
    "sigma": st.fixed_dictionaries({"query_size": st.sampled_from([16, 48]), "intermediate_size": sizes}),
    "widenet": st.fixed_dictionaries(
        {
            "moe_intermediate_size": sizes,
            "expert_activation": st.sampled_from(["gelu", "relu"]),
            "expert_bias": st.booleans(),
            "attention_bias": st.booleans(),
        }
    ),
    "ultramem": st.fixed_dictionaries(
        {
            "memory_layers": st.none() | st.just([0]),
            "memory_share_ratio": st.sampled_from([None, 0.5, 1]),
            "memory_num_cores": st.sampled_from([1, 2, 4]),
            "memory_separate_projections": st.booleans(),
            "intermediate_size": sizes,
        }
    ),
    "switchhead": st.fixed_dictionaries(
        {
            "num_key_value_heads": st.none(),
            "num_attention_experts": st.integers(2, 4),
            "num_attention_experts_per_tok": st.integers(1, 2),
            "rotary_fraction": st.sampled_from([0.5, 1.0]),
            "intermediate_size": sizes,
        }
    ),
}


@st.composite
def blocks(draw: st.DrawFn) -> dict[str, Any]:
    """A dense or a sparse block, most options left out."""
    number = draw(st.integers(1, 4))
    experts = {"type": "swiglu", "intermediate_size": draw(sizes)}
    router = {"type": draw(st.sampled_from(["top_k", "recurrent"])), "top_k": draw(st.integers(1, number))}
    moe = {"type": "moe", "num_experts": number, "router": router, "experts": experts}
    dense = {"type": "mlp", "intermediate_size": draw(sizes)}
    mixers = [{"type": "attention"}, {"type": "soft_mixture_of_attention", "num_experts": 2}]
    spec = {"mixer": draw(st.sampled_from(mixers)), "feed_forward": draw(st.sampled_from([moe, dense]))}
    return spec | draw(st.sampled_from([{}, {"type": "pre_norm"}, {"type": "parallel"}]))


@st.composite
def configs(draw: st.DrawFn) -> DecoderConfig:
    """Any config of any architecture."""
    model_type = draw(st.sampled_from(sorted(hf_moe.ARCHITECTURES)))
    queries, keys = draw(heads)
    fields = {**draw(common), "num_attention_heads": queries, "num_key_value_heads": keys}
    if model_type != "hf_moe":
        sparse = ("bam", "rmoe", "mole", "deepseek_moe", "coe", "rexmoe", "widenet", "moe_x", "smoe_dropout")
        routed = draw(experts) if model_type in sparse else {}  # the others' feed-forwards are dense
        return tiny_config(model_type, **{**fields, **routed, **draw(own[model_type])})
    named = draw(st.dictionaries(st.sampled_from("abc"), blocks(), min_size=1))
    pattern = draw(st.none() | st.lists(st.sampled_from(sorted(named)), min_size=1, max_size=4))
    return tiny_config(model_type, **fields, blocks=named, block_pattern=pattern)


few = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@few
@given(config=configs())
def test_dict_json_copy_and_file_give_the_same_config(config: DecoderConfig):
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        loaded = AutoConfig.from_pretrained(folder)
    others = [type(config).from_dict(config.to_dict()), copy.deepcopy(config), loaded]
    others.append(type(config).from_dict(json.loads(config.to_json_string(use_diff=False))))
    for other in others:
        assert type(other) is type(config)
        assert other.blocks == config.blocks
        assert list(other.block_pattern) == list(config.block_pattern)
        assert other.layer_types == config.layer_types
        assert {**other.to_dict(), "_name_or_path": ""} == {**config.to_dict(), "_name_or_path": ""}


@few
@given(config=configs())
def test_named_architectures_write_flat_fields_only(config: DecoderConfig):
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        written = json.loads(Path(folder, "config.json").read_text())
    assert written["model_type"] == config.model_type
    derived = {"blocks", "block_pattern", "layer_types", "base_model_tp_plan", "base_model_ep_plan"}
    if config.model_type == "hf_moe":
        assert derived & written.keys() == {"blocks", "block_pattern"}
        assert "num_experts" not in written  # it is in the blocks already
        for spec in written["blocks"].values():
            assert resolve(BLOCKS, spec) == spec  # every default is written out
    else:
        assert not derived & written.keys()
        nested = [name for name, value in written.items() if isinstance(value, dict)]
        assert set(nested) <= {"rope_parameters", "auto_map"}


@pytest.mark.parametrize("model_type", hf_moe.ARCHITECTURES)
def test_printing_the_default_config_names_the_type(model_type: str):
    assert f'"model_type": "{model_type}"' in repr(hf_moe.ARCHITECTURES[model_type][0]())
