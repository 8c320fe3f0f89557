"""A quarter of a million experts: a forward pass makes nothing that large, a backward pass only their gradient."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_moe import FEED_FORWARDS
from hf_moe.modeling.context import ForwardContext
from hf_moe.testing import tiny_config

KEYS, WIDTH, TOKENS = 512, 16, 12
EXPERTS = KEYS**2
SPECS = {
    "peer": {"type": "peer", "num_keys": KEYS, "key_size": 8, "num_heads": 2, "top_k": 16},
    "ultra_mem": {
        "type": "ultra_mem",
        "num_keys": KEYS,
        "value_size": WIDTH,
        "intermediate_size": 16,
        "pre_value_size": WIDTH,
        "top_k": 16,
        "key_size": 8,
    },
    "ultra_mem, expanded": {
        "type": "ultra_mem",
        "num_keys": KEYS // 2,
        "value_size": WIDTH,
        "intermediate_size": 16,
        "top_k": 16,
        "key_size": 8,
        "num_heads": 2,
        "key_expansion": 2,
        "separate_projections": True,
        "key_balance_loss_coef": 0.1,
    },
}


class Allocations(TorchDispatchMode):
    """Notes the sizes of all tensors that operations make, views of what was there before left out."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        made = [x for x in tree_leaves(outputs) if isinstance(x, torch.Tensor)]
        self.sizes += [x.numel() for x in made if x.untyped_storage().data_ptr() not in known]
        return outputs


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", SPECS)
def test_nothing_of_the_size_of_all_experts(name, training):
    torch.manual_seed(0)
    block = {"mixer": {"type": "attention"}, "feed_forward": SPECS[name]}
    config = tiny_config("hf_moe", hidden_size=WIDTH, head_dim=4, num_hidden_layers=1, blocks={"b": block})
    options = dict(config.block(0)["feed_forward"])
    layer = FEED_FORWARDS[options.pop("type")](config, 0, **options).train(training)
    for module in layer.modules():
        if hasattr(module, "init_weights"):
            module.init_weights(0.1)
    x = torch.randn(1, TOKENS, WIDTH, requires_grad=True)
    with Allocations() as forward:
        output, _, losses = layer(x, None, ForwardContext(losses=training))
    if training:
        with Allocations() as backward:
            (output.sum() + (0 if losses is None else losses.sum())).backward()
        large = [size for size in backward.sizes if size >= EXPERTS / 4]
        tables = [x.numel() for x in layer.parameters() if x.numel() >= EXPERTS]
        assert large == tables  # their gradients
    assert len(forward.sizes) > 20
    assert max(forward.sizes) < EXPERTS / 4  # the largest: the scores of the keys, 2 n per token and head
