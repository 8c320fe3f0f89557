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
    "peripheral_lm": st.fixed_dictionaries(
        {"q_lora_rank": st.none() | sizes, "rope_interleave": st.booleans(), "intermediate_size": sizes}
    ),
    "rmoe": st.fixed_dictionaries(
        {
            "moe_intermediate_size": sizes,
            "router_state_size": sizes,
            "router_cell": st.sampled_from(["gru", "rnn", "lstm"]),
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
    "sigma": st.fixed_dictionaries({"query_size": st.sampled_from([16, 48]), "intermediate_size": sizes}),
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
        routed = draw(experts) if model_type in ("bam", "rmoe", "mole") else {}  # the others' feed-forwards are dense
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
        assert not [name for name, value in written.items() if isinstance(value, dict) and name != "rope_parameters"]


@pytest.mark.parametrize("model_type", hf_moe.ARCHITECTURES)
def test_printing_the_default_config_names_the_type(model_type: str):
    assert f'"model_type": "{model_type}"' in repr(hf_moe.ARCHITECTURES[model_type][0]())
