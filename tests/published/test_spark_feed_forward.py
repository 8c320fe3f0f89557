"""Spark Transformer's feed-forward against a float64 loop over tokens and neurons, and Transformers' Gemma 3n."""

import math
import statistics
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import Gemma3nTextConfig
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nTextMLP

from hf_moe import FEED_FORWARDS, HfMoeConfig
from hf_moe.testing import tiny_config

sys.path.insert(0, str(Path(__file__).parent))
import naive

WIDTH, HIDDEN, TOP, RANK, TOKENS = 8, 40, 6, 3, 5


def tiny(**options) -> HfMoeConfig:
    feed_forward = {"type": "spark", "intermediate_size": HIDDEN, **options}
    blocks = {"b": {"mixer": {"type": "attention"}, "feed_forward": feed_forward}}
    return tiny_config("hf_moe", hidden_size=WIDTH, head_dim=4, num_attention_heads=2, blocks=blocks)


def build(**options) -> torch.nn.Module:
    """The feed-forward alone, with weights large enough for every one of them to matter."""
    config = tiny(**options)
    torch.manual_seed(0)
    parts = dict(config.block(0)["feed_forward"])
    feed_forward = FEED_FORWARDS[parts.pop("type")](config, 0, **parts)
    for parameter in feed_forward.parameters():
        torch.nn.init.normal_(parameter, std=0.6)
    return feed_forward.double()


def hidden_states() -> Tensor:
    return torch.randn(1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def reference(x: Tensor, w: naive.Weights, top_k: int, rank: int) -> Tensor:
    """Neuron by neuron: W_down column times gelu(s_i - theta) (W_up x[r:])_i where s_i > theta."""
    scores = [w["gate_proj.weight"][i] @ x[:rank] for i in range(HIDDEN)]
    mean = sum(scores) / HIDDEN
    deviation = torch.sqrt(sum((s - mean) ** 2 for s in scores) / HIDDEN)
    theta = mean + deviation * statistics.NormalDist().inv_cdf(1 - top_k / HIDDEN)
    y = torch.zeros_like(x)
    for i in range(HIDDEN):
        if scores[i] > theta:
            strength = gelu(scores[i] - theta) * (w["up_proj.weight"][i] @ x[rank:])
            y = y + strength * w["down_proj.weight"][:, i]
    return y


@pytest.mark.parametrize("top_k,rank", [(TOP, RANK), (20, 5), (None, None)])
def test_forward_and_gradients_follow_the_formula(top_k, rank):
    feed_forward = build(top_k=top_k, predictor_size=rank)
    state, inputs = torch.ones(TOKENS, 2), hidden_states().requires_grad_()
    output, passed, losses = feed_forward(inputs, state)
    assert passed is state and losses is None
    w, xs = naive.double(feed_forward), inputs.detach().clone().requires_grad_()
    published = round(0.08 * HIDDEN), WIDTH * 1024 // 2304
    expected = torch.stack([reference(x, w, top_k or published[0], rank or published[1]) for x in xs[0]])[None]
    torch.testing.assert_close(output, expected)
    probe = torch.randn(output.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (output * probe).sum().backward()
    (expected * probe).sum().backward()
    torch.testing.assert_close(inputs.grad, xs.grad)
    for name, parameter in feed_forward.named_parameters():
        torch.testing.assert_close(parameter.grad, w[name].grad)


def test_gemma_3n_without_the_cut_of_the_input():
    """Gemma 3n puts the same threshold before a normal gate: two inputs side by side make one of the other."""
    config = Gemma3nTextConfig(
        hidden_size=WIDTH, intermediate_size=HIDDEN, num_hidden_layers=1, num_kv_shared_layers=0,
        activation_sparsity_pattern=[0.85], layer_types=["full_attention"],
    )  # fmt: skip
    torch.manual_seed(0)
    stock = Gemma3nTextMLP(config, layer_idx=0).double()
    feed_forward = build(top_k=TOP, predictor_size=WIDTH // 2)
    feed_forward.gate_proj = torch.nn.Linear(WIDTH, HIDDEN, bias=False, dtype=torch.float64)
    feed_forward.up_proj = torch.nn.Linear(WIDTH, HIDDEN, bias=False, dtype=torch.float64)
    feed_forward.sizes = (WIDTH, WIDTH)
    feed_forward.load_state_dict(stock.state_dict())
    inputs = hidden_states()
    # their quantile is rounded to fp32
    torch.testing.assert_close(feed_forward(torch.cat([inputs, inputs], -1))[0], stock(inputs), atol=1e-6, rtol=1e-6)


def test_about_k_neurons_are_active_and_the_others_add_nothing():
    torch.manual_seed(0)
    feed_forward = FEED_FORWARDS["spark"](tiny(), 0, intermediate_size=4000, top_k=320)
    hidden = []
    feed_forward.down_proj.register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0]))
    inputs = torch.randn(50, 1, WIDTH)
    output = feed_forward(inputs)[0]
    active = (hidden[0] != 0).sum(-1).float()
    assert abs(active.mean() - 320) < 40  # exact if scores were Gaussian
    with torch.no_grad():  # the first token from the weights of its active neurons alone
        rows = hidden[0][0, 0].nonzero().flatten()
        strength = hidden[0][0, 0][rows]
        torch.testing.assert_close(feed_forward.down_proj.weight[:, rows] @ strength, output[0, 0])
        feed_forward.up_proj.weight[hidden[0][0, 0] == 0] = 1e4
        torch.testing.assert_close(feed_forward(inputs[:1])[0], output[:1])


def test_as_many_parameters_as_a_gated_feed_forward_of_two_thirds_the_width():
    """Gemma-2 2B: d = 2304, d_ff = 9216 gated; Spark with 13824 and r = 1024 is as large."""
    spec = {"type": "spark", "intermediate_size": 13824}
    with torch.device("meta"):
        blocks = {"b": {"mixer": {"type": "attention"}, "feed_forward": spec}}
        config = HfMoeConfig(hidden_size=2304, num_attention_heads=8, head_dim=256, blocks=blocks)
        feed_forward = FEED_FORWARDS["spark"](config, 0, intermediate_size=13824)
    assert feed_forward.sizes == (1024, 1280) and feed_forward.top_k == 1106
    assert sum(p.numel() for p in feed_forward.parameters()) == 3 * 2304 * 9216


@pytest.mark.parametrize(
    "options,message",
    [
        ({"top_k": HIDDEN}, f"top_k={HIDDEN} must be between 1 and intermediate_size - 1 = {HIDDEN - 1}"),
        ({"top_k": 0}, "top_k=0 must be between"),
        ({"predictor_size": WIDTH}, f"predictor_size={WIDTH} must be between 1 and hidden_size - 1 = {WIDTH - 1}"),
        ({"activation": "swoosh"}, "Unknown activation 'swoosh'; choose from"),
        ({"activation": "sigmoid"}, "activation='sigmoid' is not 0 at 0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tiny(**options)
