"""Heads that are rotated in part, against Transformers' Phi; rotary embeddings that a mixer owns."""

import pytest
import torch
from transformers import AutoModelForCausalLM, PhiConfig
from transformers.models.phi.modeling_phi import PhiAttention, PhiRotaryEmbedding

from hf_moe import HfMoeConfig, HfMoeForCausalLM
from hf_moe.modeling.layers import rotary_embedding, rotate
from hf_moe.modeling.mixers import Attention
from hf_moe.testing import tiny_config

POSITIONS = torch.tensor([[0, 1, 2, 3, 4, 5], [3, 4, 5, 6, 0, 1]])
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}


def build_config(factor: float = 0.5, rope: dict | None = None, **options) -> HfMoeConfig:
    mixer = {"type": "attention", "qkv_bias": True, "output_bias": True, "partial_rotary_factor": factor, **options}
    block = {"mixer": mixer, "feed_forward": {"type": "mlp", "intermediate_size": 32}}
    config = tiny_config("hf_moe", rope_parameters=rope, initializer_range=0.3, blocks={"b": block})
    config._attn_implementation = "sdpa"
    return config


@torch.no_grad()
@pytest.mark.parametrize("rope", [None, YARN], ids=["default", "yarn"])
@pytest.mark.parametrize("factor", [0.25, 0.5, 0.75, 1.0])
def test_phi(factor, rope):
    """The first entries of each head, with the frequencies of a head that wide."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    scaling = {**(rope or {"rope_type": "default", "rope_theta": 1e4}), "partial_rotary_factor": factor}
    phi = PhiConfig(**sizes, rope_parameters=scaling, partial_rotary_factor=factor, attn_implementation="sdpa")
    native = PhiAttention(phi, 0).eval()
    config = build_config(factor, rope)
    ours = Attention(config, 0, qkv_bias=True, output_bias=True, partial_rotary_factor=factor).eval()
    ours.load_state_dict({name.replace("dense", "o_proj"): value for name, value in native.state_dict().items()})
    hidden_states = torch.randn(2, 6, 32)
    tables = PhiRotaryEmbedding(phi)(hidden_states, POSITIONS)
    # of the width of whole heads, of use only if they are rotated whole
    own = tables if factor == 1 else (torch.empty(0), torch.empty(0))
    expected = native(hidden_states, tables, None)[0]
    torch.testing.assert_close(ours(hidden_states, own, position_ids=POSITIONS)[0], expected)
    assert (ours.rotary_emb is None) == (factor == 1)


@torch.no_grad()
def test_frequencies_survive_a_reload(tmp_path):
    """They are in no checkpoint, and a model is built without memory before it is loaded."""
    torch.manual_seed(0)
    model, ids = HfMoeForCausalLM(build_config()).eval(), torch.randint(3, 99, (2, 9))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(ids).logits, model(ids).logits)
    whole = HfMoeForCausalLM(build_config(1.0)).eval()
    whole.load_state_dict(model.state_dict())
    assert not torch.allclose(whole(ids).logits, model(ids).logits, atol=1e-2)


@torch.no_grad()
def test_pairs_of_neighbours_and_halves_differ_by_an_order():
    query, key = torch.randn(2, 3, 6, 8), torch.randn(2, 1, 6, 8)
    embedding = rotary_embedding(build_config(), 4)
    assert embedding is not None
    tables = embedding(query, POSITIONS)
    halves = [torch.cat([x[..., :4:2], x[..., 1:4:2], x[..., 4:]], -1) for x in (query, key)]
    for actual, expected in zip(rotate(query, key, *tables, interleaved=True), rotate(*halves, *tables)):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("factor", [0.0, 0.1, 0.4, 1.5, -0.5])  # of heads of 8
def test_bad_factor(factor):
    with pytest.raises(ValueError, match=f"partial_rotary_factor={factor} would rotate .* of 8 entries"):
        build_config(factor)


def test_a_factor_without_rotation_is_refused():
    with pytest.raises(ValueError, match="has no effect with rotary=False"):
        build_config(rotary=False)
