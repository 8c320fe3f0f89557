"""Total parameters of the published sizes, on the meta device."""

import pytest
import torch

from hf_moe import BamConfig, BamForCausalLM, HfMoeConfig, HfMoeForCausalLM

TABLE_9 = {"vocab_size": 256000, "hidden_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 8}
EXPERTS = {"type": "swiglu", "intermediate_size": 2048}
MOE = {"type": "moe", "num_experts": 4, "router": {"type": "top_k", "top_k": 1}, "experts": EXPERTS}


def parallel(feed_forward: dict) -> HfMoeConfig:
    block = {"type": "parallel", "mixer": {"type": "attention"}, "feed_forward": feed_forward}
    return HfMoeConfig(**TABLE_9, blocks={"b": block})


@pytest.mark.parametrize(
    "model_class,config,published",
    [
        (BamForCausalLM, BamConfig(**TABLE_9, intermediate_size=2048, num_experts=4), 776_002_560),
        (
            BamForCausalLM,
            BamConfig(**TABLE_9, intermediate_size=2048, num_experts=4, share_key_value=True),
            738_253_824,
        ),
        (HfMoeForCausalLM, parallel({"type": "mlp", "intermediate_size": 2048}), 587_209_728),
        (HfMoeForCausalLM, parallel(MOE), 700_480_512),
    ],
    ids=["bam", "bam-shared-kv", "dense", "btx-4"],
)
def test_bam_table_9(model_class, config, published):
    """BAM, arXiv 2408.08274, Table 9 (590M seed)."""
    with torch.device("meta"):
        model = model_class(config)
    assert sum(p.numel() for p in model.parameters()) == published
