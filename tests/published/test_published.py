"""Each named architecture against a naive float64 reference of its paper: logits, balance losses and gradients."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_moe import BamForCausalLM, MoleForCausalLM, RMoeForCausalLM
from hf_moe.testing import tiny_config

sys.path.insert(0, str(Path(__file__).parent))
import naive

IDS = torch.randint(3, 97, (6,), generator=torch.Generator().manual_seed(3))
SIZES = {
    "vocab_size": 97,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}


def compare(model: PreTrainedModel, reference: Callable) -> None:
    """Run our model in float64 and the reference on the same weights; compare logits, losses and every gradient."""
    if model.config._experts_implementation == "grouped_mm":
        model.set_experts_implementation(
            "batched_mm"
        )  # grouped_mm has no float64; the contract suite compares the two
    model = model.double().train()
    weights = naive.double(model)
    outputs = model(IDS[None], output_router_logits=True, use_cache=False)
    logits, balance, z = reference(weights)
    # the router's softmax runs in fp32 by design, so that is the precision of everything behind it
    torch.testing.assert_close(outputs.logits[0], logits, atol=1e-5, rtol=1e-5)
    losses = model.model(IDS[None], use_cache=False).router_losses
    torch.testing.assert_close(losses.double(), torch.stack([balance, z, torch.zeros_like(z)]), atol=1e-5, rtol=1e-5)
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ((outputs.logits[0] * direction).sum() + outputs.aux_loss).backward()
    ratio = model.config.router_z_loss_coef / model.config.router_aux_loss_coef
    ((logits * direction).sum() + balance + ratio * z).backward()
    for name, parameter in model.named_parameters():
        expected = weights[name].grad if weights[name].grad is not None else torch.zeros_like(weights[name])
        torch.testing.assert_close(parameter.grad, expected, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def run_layers(weights: naive.Weights, layers: int, layer) -> Tensor:
    """Embedding, layers, final norm, head; `layer(i, xs) -> xs`."""
    xs = [weights["model.embed_tokens.weight"][i] for i in IDS]
    for i in range(layers):
        xs = layer(f"model.layers.{i}.", xs)
    return torch.stack([weights["lm_head.weight"] @ naive.rms_norm(x, weights["model.norm.weight"]) for x in xs])


def bam_attention(
    w: naive.Weights, p: str, xs: list[Tensor], experts: int, heads: int, key_heads: int
) -> list[Tensor]:
    """y_t = sum_e g_e(t) Wo_e A_e(t): the full softmax gate multiplies each expert's output."""
    wq, wk, wv, wo = (w[f"{p}self_attn.{n}_proj.weight"] for n in "qkvo")
    size = len(wq) // experts
    key_size = size // heads * key_heads
    totals = [torch.zeros_like(x) for x in xs]
    for e in range(experts):
        mine = slice(e * size, (e + 1) * size)
        own = e if len(wk) == experts * key_size else 0  # shared keys and values: everybody reads the only ones
        keys, values = (matrix[own * key_size : (own + 1) * key_size] for matrix in (wk, wv))
        mixed = naive.attention(xs, wq[mine], keys, values, heads, key_heads)
        for t, x in enumerate(xs):
            gate = naive.softmax(w[f"{p}self_attn.gate.weight"] @ x)[e]
            totals[t] = totals[t] + gate * (wo[:, mine] @ mixed[t])
    return totals


def top_k_moe(w: naive.Weights, p: str, xs: list[Tensor], k: int, losses: list) -> list[Tensor]:
    """sum over the k most probable experts of (un-renormalised probability) * FFN."""
    logits = [w[f"{p}mlp.gate.weight"] @ x for x in xs]
    scores = [naive.softmax(x) for x in logits]
    chosen = [naive.best(s, k) for s in scores]
    losses.append((naive.switch(scores, chosen), naive.z_loss(logits)))
    outputs = []
    for x, s, experts in zip(xs, scores, chosen):
        total = torch.zeros_like(x)
        for e in experts:
            gate, up = w[f"{p}mlp.experts.gate_up_proj"][e].chunk(2)
            total = total + s[e] * naive.swiglu(x, gate, up, w[f"{p}mlp.experts.down_proj"][e])
        outputs.append(total)
    return outputs


def summed(losses: list) -> tuple[Tensor, Tensor]:
    return sum(balance for balance, _ in losses), sum(z for _, z in losses)


@pytest.mark.parametrize("block_type", ["parallel", "pre_norm"])
@pytest.mark.parametrize("share_key_value", [False, True])
@pytest.mark.parametrize("top_k", [1, 2])
def test_bam(block_type, share_key_value, top_k):
    """arXiv 2408.08274: y = x + sum_e g_e A_e(h) + p_k FFN_k(h), h = norm(x); pre_norm has its own second norm."""
    torch.manual_seed(0)
    config = tiny_config(
        "bam",
        **SIZES,
        intermediate_size=12,
        num_experts=3,
        num_attention_experts=2,
        num_experts_per_tok=top_k,
        block_type=block_type,
        share_key_value=share_key_value,
    )

    def reference(w):
        losses: list = []

        def layer(p, xs):
            normed = [naive.rms_norm(x, w[p + "input_layernorm.weight"]) for x in xs]
            mixed = bam_attention(w, p, normed, experts=2, heads=4, key_heads=2)
            xs = [x + a for x, a in zip(xs, mixed)]
            if block_type == "pre_norm":
                normed = [naive.rms_norm(x, w[p + "post_attention_layernorm.weight"]) for x in xs]
            return [x + f for x, f in zip(xs, top_k_moe(w, p, normed, top_k, losses))]

        return run_layers(w, 2, layer), *summed(losses)

    compare(BamForCausalLM(config), reference)


def gru(u, h, w):
    (wi, wh, bi, bh), n = w, len(u)
    i, s = wi @ u + bi, wh @ h + bh
    r, z = naive.sigmoid(i[:n] + s[:n]), naive.sigmoid(i[n : 2 * n] + s[n : 2 * n])
    candidate = torch.tanh(i[2 * n :] + r * s[2 * n :])
    new = (1 - z) * candidate + z * h
    return new, new


def rnn(u, h, w):
    wi, wh, bi, bh = w
    new = torch.tanh(wi @ u + bi + wh @ h + bh)
    return new, new


def lstm(u, state, w):
    (wi, wh, bi, bh), n = w, len(u)
    h, c = state[:n], state[n:]
    a = wi @ u + bi + wh @ h + bh
    i, f, g, o = (
        naive.sigmoid(a[:n]),
        naive.sigmoid(a[n : 2 * n]),
        torch.tanh(a[2 * n : 3 * n]),
        naive.sigmoid(a[3 * n :]),
    )
    c = f * c + i * g
    h = o * torch.tanh(c)
    return h, torch.cat([h, c])


@pytest.mark.parametrize("cell", [gru, rnn, lstm], ids=lambda cell: cell.__name__)
def test_rmoe(cell):
    """arXiv 2408.06793: one cell over the depth, per token, h_0 = 0; the gradient through the state is never cut."""
    torch.manual_seed(0)
    config = tiny_config(
        "rmoe", **SIZES, num_hidden_layers=3, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12,
        router_state_size=8, router_cell=cell.__name__,
    )  # fmt: skip
    model = RMoeForCausalLM(config)
    with torch.no_grad():  # zero biases would hide a swapped pair
        for name, parameter in model.named_parameters():
            if "bias" in name:
                parameter.normal_()

    def reference(w):
        losses: list = []
        shared = [w[f"model.shared.router_cell.{n}"] for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        states = [torch.zeros(16 if cell is lstm else 8, dtype=torch.float64) for _ in IDS]

        def layer(p, xs):
            normed = [naive.rms_norm(x, w[p + "input_layernorm.weight"]) for x in xs]
            wq, wk, wv, wo = (w[f"{p}self_attn.{n}_proj.weight"] for n in "qkvo")
            xs = [x + wo @ a for x, a in zip(xs, naive.attention(normed, wq, wk, wv, 4, 2))]
            outputs, all_logits, all_scores, all_chosen = [], [], [], []
            for t, x in enumerate(xs):
                normed = naive.rms_norm(x, w[p + "post_attention_layernorm.weight"])
                hidden, states[t] = cell(w[p + "mlp.gate.in_proj.weight"] @ normed, states[t], shared)
                logits = w[p + "mlp.gate.out_proj.weight"] @ hidden
                scores = naive.softmax(logits)
                chosen = naive.best(scores, 2)
                total = sum(scores[e] for e in chosen)
                y = x
                for e in chosen:
                    gate, up = w[p + "mlp.experts.gate_up_proj"][e].chunk(2)
                    y = y + scores[e] / total * naive.swiglu(normed, gate, up, w[p + "mlp.experts.down_proj"][e])
                outputs.append(y)
                all_logits.append(logits)
                all_scores.append(scores)
                all_chosen.append(chosen)
            losses.append((naive.switch(all_scores, all_chosen), naive.z_loss(all_logits)))
            return outputs

        return run_layers(w, 3, layer), *summed(losses)

    compare(model, reference)


@pytest.mark.parametrize("factorize_down", [False, True])
@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
def test_mole(factorize_down, implementation):
    """arXiv 2503.23100: W_down,e [(A_up,e B_up,g x) * act(A_gate,e B_gate,g x)], g = floor(e / experts per group)."""
    torch.manual_seed(0)
    config = tiny_config(
        "mole", **SIZES, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=12, latent_size=8,
        experts_per_group=3, factorize_down=factorize_down,
    )  # fmt: skip
    model = MoleForCausalLM(config)
    model.set_experts_implementation(implementation)

    def reference(w):
        losses: list = []

        def layer(p, xs):
            normed = [naive.rms_norm(x, w[p + "input_layernorm.weight"]) for x in xs]
            wq, wk, wv, wo = (w[f"{p}self_attn.{n}_proj.weight"] for n in "qkvo")
            xs = [x + wo @ a for x, a in zip(xs, naive.attention(normed, wq, wk, wv, 4, 2))]
            normed = [naive.rms_norm(x, w[p + "post_attention_layernorm.weight"]) for x in xs]
            logits = [w[p + "mlp.gate.weight"] @ x for x in normed]
            scores = [naive.softmax(x) for x in logits]
            chosen = [naive.best(s, 2) for s in scores]
            losses.append((naive.switch(scores, chosen), naive.z_loss(logits)))
            e_ = p + "mlp.latent_experts."
            outputs = []
            for x, h, s, experts in zip(xs, normed, scores, chosen):
                for e in experts:
                    g = e // 3
                    gate = w[e_ + "gate_proj"][e] @ (w[e_ + "gate_latent_proj"][g] @ h)
                    up = w[e_ + "up_proj"][e] @ (w[e_ + "up_latent_proj"][g] @ h)
                    y = w[e_ + "down_proj"][e] @ (naive.silu(gate) * up)
                    x = x + s[e] * (w[e_ + "down_latent_proj"][g] @ y if factorize_down else y)
                outputs.append(x)
            return outputs

        return run_layers(w, 2, layer), *summed(losses)

    compare(model, reference)


def test_full_rank_latent_experts_are_swiglu_experts():
    """With L = D, B = identity and A = the expert's own matrices, a latent expert is a plain one."""
    from hf_moe import EXPERTS

    config = tiny_config("mole")
    config._experts_implementation = "grouped_mm"
    torch.manual_seed(0)
    plain = EXPERTS["swiglu"](config, 0, 4, intermediate_size=8)
    latent = EXPERTS["latent"](config, 0, 4, intermediate_size=8, latent_size=32, experts_per_group=2)
    with torch.no_grad():
        plain.init_weights(0.3)
        latent.gate_latent_proj.copy_(torch.eye(32).expand(2, -1, -1))
        latent.up_latent_proj.copy_(torch.eye(32).expand(2, -1, -1))
        gate, up = plain.gate_up_proj.chunk(2, dim=1)
        for target, source in ((latent.gate_proj, gate), (latent.up_proj, up), (latent.down_proj, plain.down_proj)):
            target.copy_(source)
    tokens, indices, weights = torch.randn(5, 32), torch.randint(0, 4, (5, 2)), torch.rand(5, 2)
    torch.testing.assert_close(latent(tokens, indices, weights), plain(tokens, indices, weights))
