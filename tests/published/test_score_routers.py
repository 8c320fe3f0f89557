"""Routers that score tokens in a way of their own: MoE-X, AdaMoE-VLA, ProMoE, MoFME."""

import math
import sys
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor

from hf_moe import HfMoeConfig, MoeXConfig, MoeXForCausalLM
from hf_moe.modeling.context import ForwardContext
from hf_moe.modeling.routers.prototype import prototype_contrastive_loss
from hf_moe.testing import tiny_config

sys.path.insert(0, str(Path(__file__).parent))
import naive
from routed_layers import EXPERTS, compare, layers, relu_expert, run, tokens

LOSSES = ForwardContext(losses=True)


def mixed(w: naive.Weights, x: Tensor, choices: list[dict[int, Tensor]]) -> Tensor:
    """x + the weighted experts of each token."""
    rows = [t + sum(weight * relu_expert(w, "0", e, t) for e, weight in c.items()) for t, c in zip(x, choices)]
    return torch.stack(rows)


@pytest.mark.parametrize("bias", [False, True])
def test_sparsity_aware(bias):
    """arXiv 2503.07639: the k experts with the least expected activity, statistics over the rows of W_up."""
    modules = layers({"type": "sparsity_aware", "top_k": 2}, experts={"bias": bias})
    if bias:
        for name, parameter in modules.named_parameters():
            if "bias" in name:
                torch.nn.init.normal_(parameter)

    def reference(w, x):
        up = w["0.ungated_experts.up_proj"]
        logits = []
        for t in x:
            scores = []
            for e in range(EXPERTS):
                units, inputs = up[e], t
                if bias:
                    units = torch.cat([units, w["0.ungated_experts.up_proj_bias"][e][:, None]], 1)
                    inputs = torch.cat([t, torch.ones(1, dtype=t.dtype)])
                mean = sum(units) / len(units)
                variance = sum((u - mean) ** 2 for u in units) / len(units)
                spread = sum(v * i * i for v, i in zip(variance, inputs)) + 1e-6
                scores.append(-torch.erf((mean @ inputs) / torch.sqrt(2 * spread)))
            logits.append(torch.stack(scores))
        chosen = [naive.best(s, 2) for s in logits]
        choices = [dict(zip(c, naive.softmax(s[c]))) for s, c in zip(logits, chosen)]
        if bias:
            rows = []
            for t, c in zip(x, choices):
                y = t
                for e, weight in c.items():
                    hidden = up[e] @ t + w["0.ungated_experts.up_proj_bias"][e]
                    hidden = hidden * (hidden > 0)
                    down = w["0.ungated_experts.down_proj"][e] @ hidden + w["0.ungated_experts.down_proj_bias"][e]
                    y = y + weight * down
                rows.append(y)
            output = torch.stack(rows)
        else:
            output = mixed(w, x, choices)
        balance = naive.switch([naive.softmax(s) for s in logits], chosen)
        return output, torch.stack([balance, naive.z_loss(logits), torch.zeros_like(balance)])

    compare(modules, tokens(9), LOSSES, reference)


def test_sparsity_aware_predicts_the_share_of_active_units():
    """With many units whose weights are normal, (1 - score) / 2 is the share of them above 0."""
    torch.manual_seed(0)
    (layer,) = layers({"type": "sparsity_aware"}, experts={"intermediate_size": 4000})
    x = tokens(20).double()
    active = (torch.einsum("nd,efd->nef", x, layer.ungated_experts.up_proj) > 0).double().mean(-1)
    logits = layer.gate(x, None, ForwardContext(experts=layer.ungated_experts)).logits
    assert ((1 - logits) / 2 - active).abs().mean() < 0.02


def test_sparsity_aware_needs_experts_that_tell():
    latent = {"type": "latent", "intermediate_size": 4, "latent_size": 4, "experts_per_group": 1}
    moe = {"type": "moe", "num_experts": 4, "router": {"type": "sparsity_aware"}, "experts": latent}
    with pytest.raises(ValueError, match=r"'latent' tell nothing, use one of \['mlp', 'swiglu'\]"):
        HfMoeConfig(blocks={"b": {"mixer": {"type": "attention"}, "feed_forward": moe}})


@torch.no_grad()
def test_experts_that_are_read_may_be_offloaded():
    """Their weights are in place only while they are called."""
    torch.manual_seed(0)
    model, ids = MoeXForCausalLM(tiny_config("moe_x", tie_word_embeddings=False)).eval(), torch.arange(3, 12)[None]
    expected = model(ids).logits
    offloaded = cpu_offload(model, execution_device=torch.device("cpu"))
    assert offloaded.model.layers[0].mlp.ungated_experts.up_proj.is_meta
    torch.testing.assert_close(offloaded(ids).logits, expected)


def test_experts_that_are_read_stay_whole():
    """A shard of the units, or of the experts, does not have the statistics of all."""
    assert not [name for name in MoeXConfig().base_model_tp_plan if "experts" in name]
    assert not MoeXConfig().base_model_ep_plan


@pytest.mark.parametrize("combination", ["probability", "logit", "concatenated"])
def test_decoupled(combination):
    """arXiv 2510.14300: chosen by the router, weighed by router + adapter, never renormalised."""
    modules = layers({"type": "decoupled", "top_k": 2, "combination": combination, "initializer_range": 0.5})

    def reference(w, x):
        logits = [w["0.gate.weight"] @ t for t in x]
        scores = [naive.softmax(s) for s in logits]
        chosen = [naive.best(s, 2) for s in scores]
        choices = []
        for t, logit, score, c in zip(x, logits, scores, chosen):
            if combination == "concatenated":
                weights = naive.softmax(w["0.gate.scale_weight"] @ torch.cat([t, logit]))
            else:
                weights = (score if combination == "probability" else logit) + w["0.gate.scale_weight"] @ t
            choices.append({e: weights[e] for e in c})
        balance = naive.switch(scores, chosen)
        losses = torch.stack([balance, naive.z_loss(logits), torch.zeros_like(balance)])
        return mixed(w, x, choices), losses

    compare(modules, tokens(9), LOSSES, reference)


@pytest.mark.parametrize("weighting", ["identity", "softmax", "sigmoid"])
@pytest.mark.parametrize("contrast_all", [False, True])
def test_prototype(weighting, contrast_all):
    """arXiv 2510.24711: cosine routing, and prototypes against the means of their tokens; padding is left out."""
    spec = {"type": "prototype", "top_k": 2, "weighting": weighting, "contrast_all": contrast_all}
    modules = layers({**spec, "contrastive_loss_coef": 0.5, "temperature": 0.3})
    real = torch.ones(9, dtype=torch.bool)
    real[2] = False

    def reference(w, x):
        prototypes = w["0.gate.weight"]
        cosines = [torch.stack([p @ t / p.norm() / t.norm() for p in prototypes]) for t in x]
        chosen = [naive.best(s, 2) for s in cosines]
        choices = []
        for s, c in zip(cosines, chosen):
            weights = {"identity": lambda s: s, "softmax": naive.softmax, "sigmoid": naive.sigmoid}[weighting](s)
            choices.append({e: weights[e] for e in c})
        means = {}
        for e in range(EXPERTS):
            mine = [t for t, c, r in zip(x, chosen, real) if r and e in (c if contrast_all else c[:1])]
            if mine:
                means[e] = sum(mine) / len(mine)
        total = torch.zeros((), dtype=torch.float64)
        for i in means:
            similar = torch.stack([prototypes[i] @ m / prototypes[i].norm() / m.norm() / 0.3 for m in means.values()])
            total = total - torch.log(naive.softmax(similar)[list(means).index(i)])
        zero = torch.zeros_like(total)
        return mixed(w, x, choices), torch.stack([zero, zero, 0.5 * total / len(means)])

    compare(modules, tokens(9), ForwardContext(losses=True, token_mask=real), reference)


def test_prototype_contrastive_loss_at_its_corners():
    """Aligned and orthogonal: about 0; all means alike: log n; one cluster: nothing to contrast."""
    eye = torch.eye(4)
    assert prototype_contrastive_loss(eye, 3 * eye, eye, 0.07).item() == pytest.approx(
        math.log1p(3 * math.exp(-1 / 0.07)), abs=1e-6
    )
    alike = prototype_contrastive_loss(torch.randn(4, 4), torch.ones(4, 4), eye)
    assert alike.item() == pytest.approx(math.log(4), abs=1e-5)
    collapsed = torch.zeros(4, 4)
    collapsed[:, 0] = 1
    prototypes, points = torch.randn(4, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    loss = prototype_contrastive_loss(prototypes, points, collapsed)
    loss.backward()
    assert loss == 0 and not prototypes.grad.any() and points.grad.isfinite().all()


def test_uncertainty():
    """Our reading of arXiv 2312.16610 in evaluation: logits in units of their deviation under dropout, exactly."""
    modules = layers({"type": "uncertainty", "dropout": 0.2, "eps": 0.1}).eval()

    def reference(w, x):
        logits = []
        for t in x:
            z = []
            for row in w["0.gate.weight"]:
                # x_i survives with probability 0.8 and is then divided by it
                variance = sum((r * i / 0.8) ** 2 * 0.8 * 0.2 for r, i in zip(row, t))
                z.append(row @ t / torch.sqrt(variance + 0.1))
            logits.append(torch.stack(z))
        scores = [naive.softmax(s) for s in logits]
        chosen = [naive.best(s, 2) for s in scores]
        choices = [{e: s[e] / sum(s[i] for i in c) for e in c} for s, c in zip(scores, chosen)]
        balance = naive.switch(scores, chosen)
        losses = torch.stack([balance, naive.z_loss(logits), torch.zeros_like(balance)])
        return mixed(w, x, choices), losses

    compare(modules, tokens(9), LOSSES, reference)


def test_uncertainty_samples_in_training():
    """The average over many samples settles, one sample does not; the seed decides."""
    (layer,) = layers({"type": "uncertainty", "dropout": 0.3, "num_samples": 400, "top_k": 4})
    x = tokens(5)

    def probabilities(seed):
        torch.manual_seed(seed)
        routing = layer.gate(x)
        return torch.zeros(5, EXPERTS, dtype=torch.float64).scatter(1, routing.indices, routing.weights)

    assert torch.equal(probabilities(1), probabilities(1))
    torch.testing.assert_close(probabilities(1), probabilities(2), atol=0.1, rtol=0)
    layer.gate.num_samples = 1
    assert (probabilities(1) - probabilities(2)).abs().max() > 0.1
    run([layer], x, LOSSES)[0].sum().backward()
    assert layer.gate.weight.grad.isfinite().all()
