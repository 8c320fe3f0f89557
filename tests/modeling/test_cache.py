"""The cache layer of purely recurrent mixers, inside Transformers' own caches."""

import pytest
import torch
from transformers import DynamicCache, PreTrainedConfig, StaticCache
from transformers.masking_utils import create_masks_for_generate

from hf_moe.modeling.cache import RecurrentLayer


class RecurrentConfig(PreTrainedConfig):
    model_type = "hf_moe_test_recurrent"
    num_hidden_layers: int = 2

    @property
    def layer_types(self) -> list[str]:
        return ["recurrent"] * self.num_hidden_layers

    def validate_layer_type(self) -> None: ...


@pytest.fixture(params=[DynamicCache, lambda config: StaticCache(config, max_cache_len=16)], ids=["dynamic", "static"])
def cache(request):
    return request.param(config=RecurrentConfig())


def test_it_keeps_its_state_and_counts(cache):
    assert all(isinstance(layer, RecurrentLayer) for layer in cache.layers)
    assert cache.get_seq_length() == 0 and cache.get_recurrent_state(0) is None
    first = torch.randn(2, 3, 4)
    for layer in range(2):
        cache.update_recurrent_state(first + layer, layer, num_tokens=5)
    assert cache.get_seq_length() == 5 and torch.equal(cache.get_recurrent_state(1), first + 1)
    cache.update_recurrent_state(first * 2, 0, num_tokens=1)
    assert cache.get_seq_length() == 6 and torch.equal(cache.get_recurrent_state(0), first * 2)
    assert cache.layers[0].get_mask_sizes(3) == (9, 0)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.get_recurrent_state(0) is None


def test_rows_can_be_reordered_repeated_and_selected(cache):
    state = torch.arange(6.0).view(3, 2)
    for layer in range(2):
        cache.update_recurrent_state(state, layer, num_tokens=1)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    assert torch.equal(cache.get_recurrent_state(0), state[[2, 0, 0]])
    cache.batch_repeat_interleave(2)
    assert torch.equal(cache.get_recurrent_state(1), state[[2, 2, 0, 0, 0, 0]])
    cache.batch_select_indices(torch.tensor([0, 5]))
    assert torch.equal(cache.get_recurrent_state(1), state[[2, 0]])


def test_it_refuses_what_it_cannot_do(cache):
    cache.update_recurrent_state(torch.zeros(1, 2), 0, num_tokens=1)
    assert not cache.layers[0].is_croppable
    with pytest.raises(ValueError, match="cannot forget its last tokens"):
        cache.layers[0].crop(-1)
    with pytest.raises(TypeError, match="no keys and values"):
        cache.layers[0].update(torch.zeros(1), torch.zeros(1))


def test_its_mask_is_the_padding_of_the_current_pass():
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    masks = create_masks_for_generate(RecurrentConfig(), torch.zeros(2, 2, 4), mask, None)
    assert torch.equal(masks["recurrent"], mask[:, -2:])
