"""PEER against a float64 loop over tokens, heads and all n^2 experts."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hf_moe import FEED_FORWARDS, HfMoeConfig, PeerConfig
from hf_moe.modeling.context import ForwardContext
from hf_moe.testing import tiny_config

sys.path.insert(0, str(Path(__file__).parent))
import naive

WIDTH, KEYS, SIZE, HEADS, TOKENS = 12, 5, 4, 3, 7
EXPERTS = KEYS**2


def tiny(**options) -> HfMoeConfig:
    spec = {"type": "peer", "num_keys": KEYS, "key_size": SIZE, "num_heads": HEADS, "top_k": 4, **options}
    block = {"mixer": {"type": "attention"}, "feed_forward": spec}
    return tiny_config("hf_moe", hidden_size=WIDTH, head_dim=4, blocks={"b": block})


def build(**options) -> nn.Module:
    """The feed-forward alone, in float64, with random weights and running statistics."""
    torch.manual_seed(0)
    config = tiny(**options)
    parts = dict(config.block(0)["feed_forward"])
    peer = FEED_FORWARDS[parts.pop("type")](config, 0, **parts).double()
    for tensor in (*peer.parameters(), *peer.buffers()):
        torch.nn.init.normal_(tensor, std=0.6)
    if peer.query_norm is not None:
        peer.query_norm.running_var.data.abs_()
    return peer


def normal_cdf(x: Tensor) -> Tensor:
    return (1 + torch.erf(x / 2**0.5)) / 2


def reference(xs: list[Tensor], w: naive.Weights, top_k: int, scoring: str, real: list[int] | None) -> Tensor:
    """y = sum_h sum_{e of the k best of all n^2} g(s_h)_e gelu(u_e . x) v_e; `real` tokens give the batch's mean."""
    queries = [w["query_proj.weight"] @ x for x in xs]
    if "query_norm.weight" in w:
        mean, variance = w["query_norm.running_mean"], w["query_norm.running_var"]
        if real is not None:
            mean = sum(queries[t] for t in real) / len(real)
            variance = sum((queries[t] - mean) ** 2 for t in real) / len(real)
        scale = w["query_norm.weight"] / torch.sqrt(variance + 1e-5)
        queries = [(q - mean) * scale + w["query_norm.bias"] for q in queries]
    outputs = []
    for x, query in zip(xs, queries):
        output = torch.zeros_like(x)
        for h in range(HEADS):
            first, second = query[2 * h * SIZE :][:SIZE], query[(2 * h + 1) * SIZE :][:SIZE]
            keys = w["keys"][h % len(w["keys"])]
            scores = torch.stack([keys[0, e // KEYS] @ first + keys[1, e % KEYS] @ second for e in range(EXPERTS)])
            chosen = naive.best(scores, top_k)
            gates = {"softmax": naive.softmax, "sigmoid": naive.sigmoid, "relu": lambda s: s.clamp(min=0)}[scoring]
            for e, gate in zip(chosen, gates(scores[chosen])):
                neuron = w["w_down"][e] @ x
                output = output + gate * neuron * normal_cdf(neuron) * w["w_up"][e]
        outputs.append(output)
    return torch.stack(outputs)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"query_norm": None, "keys_per_head": True},
        {"scoring": "sigmoid", "top_k": 1},
        {"scoring": "relu", "top_k": 8},  # more than one half has keys
        {"top_k": EXPERTS},
    ],
    ids=str,
)
def test_peer_searches_all_experts(options, training):
    peer = build(**options).train(training)
    weights = naive.double(peer)
    x = torch.randn(1, TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    mask = torch.tensor([True] * 5 + [False] * 2)
    output, state, losses = peer(x, torch.ones(1), ForwardContext(token_mask=mask))
    arguments = options.get("top_k", 4), options.get("scoring", "softmax")
    expected = reference(list(y[0]), weights, *arguments, [0, 1, 2, 3, 4] if training else None)[None]
    assert torch.equal(state, torch.ones(1)) and losses is None
    direction = torch.randn_like(output)
    direction[:, 5:] = 0
    (output * direction).sum().backward()
    (expected * direction).sum().backward()
    torch.testing.assert_close(output, expected, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(x.grad, y.grad, atol=1e-9, rtol=1e-9)
    for name, parameter in peer.named_parameters():
        torch.testing.assert_close(parameter.grad, weights[name].grad, atol=1e-9, rtol=1e-9, msg=name)


def test_the_running_statistics_are_those_of_torch():
    norm = build().query_norm.train()
    theirs = nn.BatchNorm1d(norm.weight.numel()).double().train()
    theirs.load_state_dict({**norm.state_dict(), "num_batches_tracked": torch.tensor(0)})
    x = torch.randn(9, norm.weight.numel(), dtype=torch.float64)
    torch.testing.assert_close(norm(x), theirs(x))
    assert torch.allclose(norm.running_mean, theirs.running_mean)
    assert torch.allclose(norm.running_var, theirs.running_var)
    torch.testing.assert_close(norm.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize(
    "options,message",
    [
        ({"top_k": 26}, "top_k=26 must be 1 to num_keys.* = 25"),
        ({"top_k": 0}, "top_k=0 must be 1 to"),
        ({"num_heads": 0}, "num_heads=0 must be at least 1"),
        ({"scoring": "max"}, r"scoring='max' is unknown; choose from \['softmax', 'sigmoid', 'relu'\]"),
        ({"query_norm": "layer"}, r"query_norm='layer' is unknown; choose from \['batch', None\]"),
        ({"activation": "gelo"}, "Unknown activation 'gelo'; choose from"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tiny(**options)


def test_which_layers_of_the_architecture_have_experts():
    assert PeerConfig(num_hidden_layers=5).block_pattern == ["dense", "dense", "peer", "dense", "dense"]
    assert PeerConfig(num_hidden_layers=3, peer_layers=[0, 2]).block_pattern == ["peer", "dense", "peer"]
    with pytest.raises(ValueError, match=r"peer_layers names \[3\]; layers are 0 to 2"):
        PeerConfig(num_hidden_layers=3, peer_layers=[0, 3])
