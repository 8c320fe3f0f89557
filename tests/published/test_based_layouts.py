"""BASED's released layouts: which layer is what, and how many parameters that makes."""

import pytest
import torch
from transformers import AutoConfig

from hf_moe import BasedConfig, BasedForCausalLM
from hf_moe.testing import tiny_config

VOCAB = 50264


def by_hand(width: int, layers: int, pairs: int) -> int:
    """SwiGLU of 2 d in every layer, `pairs` linear and sliding layers, convolutions of 4 d, tied embeddings."""
    feed_forwards = layers * 3 * width * 2 * width
    linear = pairs * (2 * width * 16 * 16 + 2 * width * width)
    sliding = pairs * 4 * width * width
    convolution = (layers - 2 * pairs) * (4 * width * (width + 1) + 2 * width * 3 + (2 * width + 1) * width)
    return VOCAB * width + feed_forwards + linear + sliding + convolution + (2 * layers + 1) * width


@pytest.mark.parametrize(
    "config,linear,total",
    [
        (BasedConfig.based_360m(), [1, 6, 11, 16, 21], 362_620_928),
        (BasedConfig.based_1b4(), [1, 6, 11, 16, 21, 27, 33], 1_349_453_056),
    ],
    ids=["360m", "1.4b"],
)
def test_released_layouts(config, linear, total):
    """Reference configs of HazyResearch/based; the paper rounds to 360M and 1.4B."""
    kinds = dict.fromkeys(linear, "linear") | {layer + 1: "sliding" for layer in linear}
    assert config.block_pattern == [kinds.get(layer, "convolution") for layer in range(config.num_hidden_layers)]
    assert config.layer_types.count("sliding_attention") == len(linear)
    with torch.device("meta"):
        model = BasedForCausalLM(config)
    count = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    assert count == by_hand(config.hidden_size, config.num_hidden_layers, len(linear)) == total


def test_the_defaults_are_the_360m_model():
    released = BasedConfig.based_360m()
    assert BasedConfig(bos_token_id=50256, eos_token_id=50256).to_dict() == released.to_dict()
    assert BasedConfig.based_360m(sliding_window=65).sliding_window == 65


def test_layouts_survive_a_save(tmp_path):
    config = BasedConfig.based_1b4()
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert again.block_pattern == config.block_pattern and again.blocks == config.blocks


@pytest.mark.parametrize(
    "options,message",
    [
        ({"linear_attention_layers": [2]}, r"no layers \[2\]: num_hidden_layers=2"),
        ({"linear_attention_layers": [1]}, r"name layers \[1\] twice"),
        ({"feature_map": "exp"}, "Unknown type 'exp'"),
        ({"sliding_window": None}, "needs `sliding_window`"),
    ],
    ids=str,
)
def test_bad_layouts(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_config("based", **options)
