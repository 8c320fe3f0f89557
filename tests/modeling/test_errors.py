"""Bad input gets one clear error that names the choices."""

import pytest

from hf_moe import BamConfig, HfMoeConfig, MoleConfig, RMoeConfig
from hf_moe.testing import tiny_config

ATTENTION = {"type": "attention"}
MLP = {"type": "mlp", "intermediate_size": 8}
MOE = {
    "type": "moe",
    "num_experts": 4,
    "router": {"type": "top_k", "top_k": 2},
    "experts": {"type": "swiglu", "intermediate_size": 8},
}
SMALL = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}


def compose(**block):
    return HfMoeConfig(**SMALL, blocks={"b": {"mixer": ATTENTION, "feed_forward": MLP, **block}})


CASES = {
    "unknown block": (
        lambda: compose(type="reversible"),
        r"'reversible'; choose from \['mixer_only', .*'parallel', .*'pre_norm'",
    ),
    "unknown mixer": (lambda: compose(mixer={"type": "rwkv"}), r"'rwkv'; choose from \['attention', '"),
    "unknown router": (
        lambda: compose(feed_forward={**MOE, "router": {"type": "hash"}}),
        r"'hash'; choose from \['condition', .*'top_k'",
    ),
    "unknown experts": (
        lambda: compose(feed_forward={**MOE, "experts": {"type": "glu"}}),
        r"'glu'; choose from \['compressed', .*'swiglu'",
    ),
    "unknown option": (
        lambda: compose(mixer={**ATTENTION, "heads": 4}),
        r"no option \['heads'\]; it has \['logit_softcapping', 'output_bias'",
    ),
    "missing option": (lambda: compose(feed_forward={"type": "mlp"}), r"'mlp' needs \['intermediate_size'\]"),
    "slot without spec": (lambda: compose(mixer="attention"), r"needs 'mixer' to be a spec such as"),
    "unknown name in pattern": (
        lambda: HfMoeConfig(**SMALL, block_pattern=["x"]),
        r"names \['x'\]; `blocks` has \['dense'\]",
    ),
    "heads do not divide": (
        lambda: tiny_config("bam", num_attention_heads=4, num_key_value_heads=3),
        r"num_key_value_heads=3 does not divide num_attention_heads=4; use one of \[1, 2, 4\]",
    ),
    "width does not divide": (
        lambda: HfMoeConfig(hidden_size=30, num_attention_heads=4),
        "hidden_size=30 is not a multiple",
    ),
    "odd head": (lambda: HfMoeConfig(hidden_size=12, num_attention_heads=4), "head_dim=3 is odd"),
    "too many per token": (
        lambda: tiny_config("rmoe", num_experts_per_tok=5),
        "is 5; with num_experts=4 it must be 1 to 4",
    ),
    "none per token": (lambda: tiny_config("mole", num_experts_per_tok=0), "must be 1 to 4"),
    "group does not divide": (lambda: tiny_config("mole", experts_per_group=3), r"use one of \[1, 2, 4\]"),
    "no attention expert": (lambda: tiny_config("bam", num_attention_experts=0), "at least one expert"),
    "unknown cell": (lambda: tiny_config("rmoe", router_cell="mamba"), r"choose from \['gru', 'lstm', 'rnn'\]"),
    "unknown block type": (
        lambda: tiny_config("bam", block_type="reversible"),
        r"choose from \['mixer_only', .*'parallel', .*'pre_norm'",
    ),
    "unknown scoring": (
        lambda: compose(feed_forward={**MOE, "router": {"type": "top_k", "scoring": "cosine"}}),
        r"choose from \['softmax', 'softmax_selected', 'sigmoid'\]",
    ),
    "selected but not normalized": (
        lambda: compose(
            feed_forward={**MOE, "router": {"type": "top_k", "scoring": "softmax_selected", "normalize": False}}
        ),
        "needs 'softmax'",
    ),
    "window missing": (lambda: compose(mixer={**ATTENTION, "sliding": True}), "needs `sliding_window` set"),
    "gate without shared expert": (
        lambda: compose(feed_forward={**MOE, "shared_gate": True}),
        "shared_intermediate_size",
    ),
    "two router cells": (
        lambda: HfMoeConfig(
            **SMALL,
            blocks={
                name: {
                    "mixer": ATTENTION,
                    "feed_forward": {**MOE, "router": {"type": "recurrent", "state_size": size}},
                }
                for name, size in (("a", 8), ("b", 16))
            },
        ),
        "share one 'router_cell'",
    ),
    "partial rotary factor of the model": (
        lambda: HfMoeConfig(rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        "belongs to a mixer",
    ),
    "unknown tiny type": (lambda: tiny_config("gpt"), r"choose from \['bam', "),
}


@pytest.mark.parametrize("case", CASES)
def test_one_clear_error(case):
    make, message = CASES[case]
    with pytest.raises(ValueError, match=message):
        make()


def test_experts_that_a_backend_cannot_run():
    import torch

    from hf_moe import MoleForCausalLM

    model = MoleForCausalLM(tiny_config("mole"))
    model.config._experts_implementation = "deepgemm"
    with pytest.raises(ValueError, match=r"use one of \['eager', 'batched_mm', 'grouped_mm'\]"):
        model(torch.tensor([[1, 2]]))


@pytest.mark.parametrize("config_class", [BamConfig, RMoeConfig, MoleConfig, HfMoeConfig])
def test_defaults_are_valid(config_class):
    config = config_class()
    assert config.block(0) and len(config.layer_types) == config.num_hidden_layers
