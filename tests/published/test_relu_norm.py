"""BlockFFN's router and its two losses (https://arxiv.org/abs/2507.08771)."""

import itertools
import math
import sys
from pathlib import Path

import pytest
import torch

import hf_moe
from hf_moe import HfMoeConfig
from hf_moe.modeling.context import ForwardContext
from hf_moe.modeling.routers.relu_norm import activation_locality_loss, chunk_sparsification_loss
from hf_moe.testing import tiny_config

sys.path.insert(0, str(Path(__file__).parent))
import naive
from mixtures import agrees, close, feed_forward, inputs


def locality(logits, rows):
    """Mean BCE of neighbours in each row; `rows` lists the numbers of its real tokens."""
    terms = []
    for row in rows:
        for left, right in itertools.pairwise(row):
            if right != left + 1:
                continue
            for e in range(len(logits[0])):
                predicted, target = naive.sigmoid(100 * logits[left][e]), naive.sigmoid(100 * logits[right][e])
                logit = 100 * logits[left][e]
                log_p = -torch.nn.functional.softplus(-logit)
                log_q = -torch.nn.functional.softplus(logit)
                close(log_p.exp().detach(), predicted.detach(), 1e-6)
                terms.append(-(target * log_p + (1 - target) * log_q))
    return sum(terms) / len(terms)


def sparsification(logits, rows, size):
    terms = []
    for row in rows:
        for start in range(0, len(row), size):
            for e in range(len(logits[0])):
                unused = 1.0
                for n in row[start : start + size]:
                    active = logits[n].relu()
                    unused = unused * (1 - active[e] / (active.sum() + 1e-5) + 1e-5)
                terms.append(1 - unused)
    return sum(terms) / len(terms)


def route(coefs, rows, size):
    def choose(weights, tokens):
        logits = [weights["gate.weight"] @ x for x in tokens]
        chosen = []
        for logit in logits:
            active = logit.relu()
            normed = weights["gate.norm_weight"] * active / torch.sqrt((active * active).mean() + 1e-6)
            chosen.append({e: normed[e] for e in range(len(logit)) if logit[e] > 0})
        own = coefs[0] * locality(logits, rows) + coefs[1] * sparsification(logits, rows, size)
        return chosen, [], own

    return choose


def layer_with(coefs=(0.3, 0.7), size=3):
    layer = feed_forward(
        {
            "type": "relu_norm",
            "activation_locality_loss_coef": coefs[0],
            "chunk_sparsification_loss_coef": coefs[1],
            "chunk_size": size,
        }
    )
    torch.nn.init.uniform_(layer.gate.norm_weight, 0.5, 2)
    return layer


@pytest.mark.parametrize("size", [1, 3, 64])
def test_layer_is_the_papers(size):
    agrees(layer_with(size=size), route((0.3, 0.7), [list(range(7)), list(range(7, 14))], size), inputs())


def test_padding_counts_in_no_loss():
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, :3] = mask[1, 5:] = False
    agrees(layer_with(), route((0.3, 0.7), [[3, 4, 5, 6], [7, 8, 9, 10, 11]], 3), inputs(), mask)


def test_packed_sequences_are_no_neighbours():
    layer, x = layer_with(), inputs()
    segments = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1]])
    losses = layer(x, None, ForwardContext(losses=True, shape=(2, 7), segments=segments))[2]
    logits = list(torch.nn.functional.linear(x, layer.gate.weight).flatten(0, 1))
    rows = [[0, 1, 2], [3, 4, 5, 6], [7, 8], [9, 10, 11, 12, 13]]
    close(losses[2], 0.3 * locality(logits, rows) + 0.7 * sparsification(logits, rows, 3))


@torch.no_grad()
def test_a_token_without_a_positive_logit_gets_nothing():
    layer, x = layer_with(), inputs()
    layer.gate.weight.copy_(-x[0, 0].expand_as(layer.gate.weight))
    output = layer(x)[0]
    assert (output[0, 0] == 0).all() and output.isfinite().all()


@torch.no_grad()
def test_blockffn_is_one_wide_feed_forward():
    """As its code computes it: the router's weights scale blocks of hidden units."""
    torch.manual_seed(0)
    model = hf_moe.BlockFfnForCausalLM(tiny_config("blockffn", initializer_range=0.3))
    layer, x = model.model.layers[0].mlp, torch.randn(2, 5, 32)
    experts = getattr(layer, layer.experts_attribute)
    weights = layer.gate(x.flatten(0, 1)).weights.repeat_interleave(experts.up_proj.shape[1], -1)
    hidden = torch.nn.functional.silu(x.flatten(0, 1) @ experts.up_proj.flatten(0, 1).T)
    expected = (hidden * weights) @ experts.down_proj.transpose(1, 2).flatten(0, 1)
    assert (weights == 0).any() and (weights != 0).any()
    torch.testing.assert_close(layer(x)[0].flatten(0, 1), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "config, billions",
    [
        (hf_moe.BlockFfnConfig.paper_100m, 0.119),
        (hf_moe.BlockFfnConfig.paper_500m, 0.495),
        (hf_moe.BlockFfnConfig.paper_800m, 0.817),
        (hf_moe.BlockFfnConfig, 1.188),
    ],
)
def test_blockffn_has_the_sizes_of_the_released_configurations(config, billions):
    """Without embeddings, as the paper's 0.1, 0.5, 0.8 and 1.2 B must be meant; figures counted by hand."""
    sizes = config()
    with torch.device("meta"):
        model = hf_moe.BlockFfnModel(sizes)
    embeddings = sizes.vocab_size * sizes.hidden_size
    number = sum(parameter.numel() for parameter in model.parameters()) - embeddings
    d, m, e, h = sizes.hidden_size, sizes.moe_intermediate_size, sizes.num_experts, sizes.num_attention_heads
    attention = d * 768 + 768 * h * 192 + d * 320 + 256 * h * 256 + h * 128 * d
    norms = 2 * d + 768 + 256 + e
    assert number == sizes.num_hidden_layers * (2 * d * m * e + d * e + attention + norms) + d
    assert abs(number / 1e9 - billions) < 0.01 * billions


def test_losses_at_their_bounds():
    """E = 4, one row of 8 tokens, chunks of 8."""
    start, real = torch.zeros(8, dtype=torch.long), torch.ones(8, dtype=torch.long)
    one = torch.tensor([[5.0, 0, 0, 0]] * 8)
    close(chunk_sparsification_loss(one, start, real, 8), torch.tensor(1 / 4).double(), 1e-4)
    close(chunk_sparsification_loss(one * 0 + 1, start, real, 8), torch.tensor(1 - 0.75**8).double(), 1e-4)
    close(chunk_sparsification_loss(one * 0, start, real, 8), torch.zeros(()).double(), 1e-4)
    sure = torch.tensor([[5.0, -5, 5, -5]] * 8)
    close(activation_locality_loss(sure, start, real), torch.zeros(()).double())
    sure[1::2] *= -1  # neighbours never agree
    close(activation_locality_loss(sure, start, real), torch.tensor(500.0).double())
    close(activation_locality_loss(sure * 0, start, real), torch.tensor(math.log(2)).double())


def test_refusal():
    router = {"type": "relu_norm", "chunk_size": 0}
    spec = {"type": "moe", "num_experts": 4, "router": router, "experts": {"type": "swiglu", "intermediate_size": 8}}
    with pytest.raises(ValueError, match="a chunk has at least 1 token"):
        HfMoeConfig(blocks={"b": {"mixer": {"type": "attention"}, "feed_forward": spec}})
