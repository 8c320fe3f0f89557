"""The cache layer of purely recurrent mixers, inside Transformers' own caches."""

import pytest
import torch
from transformers import DynamicCache, PreTrainedConfig, StaticCache
from transformers.masking_utils import create_masks_for_generate

from hf_moe.modeling.cache import RecurrentLayer
from hf_moe.modeling.packing import Rows


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


def store(cache, layer: int, *states: torch.Tensor, time: int = 1) -> None:
    """What a mixer does after a pass over `time` tokens."""
    cache.layers[layer].store(states, (torch.zeros(states[0].shape[0], time, 4), Rows()))


def test_it_keeps_its_states_and_counts(cache):
    assert all(isinstance(layer, RecurrentLayer) for layer in cache.layers)
    assert cache.get_seq_length() == 0 and cache.layers[0].states == () and not cache.has_previous_state(0)
    first, second = torch.randn(2, 3, 4), torch.randn(2, 5)
    for layer in range(2):
        store(cache, layer, first + layer, second, time=5)
    assert cache.get_seq_length() == 5 and cache.has_previous_state(1)
    assert torch.equal(cache.layers[1].states[0], first + 1) and torch.equal(cache.layers[1].states[1], second)
    store(cache, 0, first * 2, second)
    assert cache.get_seq_length() == 6 and torch.equal(cache.get_recurrent_state(0), first * 2)
    assert cache.layers[0].get_mask_sizes(3) == (9, 0)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.layers[0].states == ()


def test_states_are_replaced_in_place(cache):
    """CUDA graphs read from fixed addresses."""
    store(cache, 0, torch.randn(2, 3))
    address = cache.layers[0].states[0].data_ptr()
    store(cache, 0, torch.ones(2, 3))
    assert cache.layers[0].states[0].data_ptr() == address and torch.equal(cache.layers[0].states[0], torch.ones(2, 3))


def test_rows_can_be_reordered_repeated_and_selected(cache):
    state = torch.arange(6.0).view(3, 2)
    for layer in range(2):
        store(cache, layer, state)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    assert torch.equal(cache.get_recurrent_state(0), state[[2, 0, 0]])
    cache.batch_repeat_interleave(2)
    assert torch.equal(cache.get_recurrent_state(1), state[[2, 2, 0, 0, 0, 0]])
    cache.batch_select_indices(torch.tensor([0, 5]))
    assert torch.equal(cache.get_recurrent_state(1), state[[2, 0]])


def test_a_crop_returns_to_the_states_before_and_says_what_to_read_again(cache):
    layer = cache.layers[0]
    store(cache, 0, torch.zeros(1, 2), time=4)
    cache.activate_past_recording()
    assert layer.is_croppable
    store(cache, 0, torch.ones(1, 2), time=3)
    store(cache, 0, torch.full((1, 2), 2.0), time=2)
    layer.crop(-1)
    layer.crop(-2)
    layer.crop(0)  # nothing is final before it has been read again
    assert cache.get_seq_length() == 6 and torch.equal(layer.states[0], torch.zeros(1, 2))
    assert [hidden_states.shape[1] for hidden_states, _ in layer.take_cropped()] == [2]
    assert layer.take_cropped() == []
    with pytest.raises(ValueError, match="only the last 0 are recorded"):
        layer.crop(-1)


def test_it_refuses_what_it_cannot_do(cache):
    store(cache, 0, torch.zeros(1, 2))
    assert not cache.layers[0].is_croppable
    with pytest.raises(ValueError, match="cannot forget its last tokens"):
        cache.layers[0].crop(-1)
    with pytest.raises(TypeError, match="no keys and values"):
        cache.layers[0].update(torch.zeros(1), torch.zeros(1))


def test_its_mask_is_the_padding_of_the_current_pass():
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    masks = create_masks_for_generate(RecurrentConfig(), torch.zeros(2, 2, 4), mask, None)
    assert torch.equal(masks["recurrent"], mask[:, -2:])
