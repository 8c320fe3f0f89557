"""Ring-linear 2.0 by its published config, names and mathematics, at tiny size."""

import math
import sys
from pathlib import Path

import pytest
import torch
from published_checkpoints import IDS, load, mlp, random_tensors, saves_back
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "published"))
from naive import rms_norm, rotate, sigmoid, silu, softmax

CONFIG = {  # the fields of Ring-mini-linear-2.0, every one of them
    "architectures": ["BailingMoeLinearV2ForCausalLM"],
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_bailing_moe_linear_v2.BailingMoeLinearV2Config",
        "AutoModelForCausalLM": "modeling_bailing_moe_linear_v2.BailingMoeLinearV2ForCausalLM",
    },
    "embedding_dropout": 0.0,
    "eos_token_id": 2,
    "first_k_dense_replace": 1,
    "group_norm_size": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 24,
    "layer_group_size": 2,
    "linear_silu": False,
    "max_position_embeddings": 64,
    "model_type": "bailing_moe_linear",
    "moe_intermediate_size": 12,
    "moe_router_enable_expert_bias": True,
    "moe_shared_expert_intermediate_size": 12,
    "n_group": 4,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 5,  # the last one is behind the last whole group
    "num_key_value_heads": 2,
    "num_nextn_predict_layers": 0,
    "num_shared_experts": 1,
    "output_dropout": 0.0,
    "pad_token_id": 0,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "router_dtype": "fp32",
    "score_function": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 2,
    "torch_dtype": "bfloat16",
    "use_bias": False,
    "use_cache": True,
    "use_qk_norm": True,
    "use_qkv_bias": False,
    "use_rmsnorm": True,
    "vocab_size": 61,
}
LINEAR = (0, 2)


def tensors(shared: int = 12) -> dict[str, Tensor]:
    """The names of the checkpoints' files."""
    shapes = {"model.word_embeddings.weight": (61, 32), "model.norm.weight": (32,), "lm_head.weight": (61, 32)}
    for layer in range(5):
        name = f"model.layers.{layer}."
        rows = 96 if layer in LINEAR else 64  # linear layers have as many keys as queries
        shapes |= {f"{name}attention.query_key_value.weight": (rows, 32), f"{name}attention.dense.weight": (32, 32)}
        shapes |= {f"{name}attention.{half}_layernorm.weight": (8,) for half in ("query", "key")}
        if layer in LINEAR:
            shapes |= {f"{name}attention.g_proj.weight": (32, 32), f"{name}attention.g_norm.weight": (32,)}
        shapes |= {f"{name}{norm}_layernorm.weight": (32,) for norm in ("input", "post_attention")}
        widths = {f"mlp.experts.{e}.": 12 for e in range(8)} | {"mlp.shared_experts.": shared}
        for part, width in (widths if layer else {"mlp.": 24}).items():
            shapes |= {f"{name}{part}{p}_proj.weight": (width, 32) for p in ("gate", "up")}
            shapes[f"{name}{part}down_proj.weight"] = (32, width)
        if layer:
            shapes |= {f"{name}mlp.gate.weight": (8, 32), f"{name}mlp.gate.expert_bias": (8,)}
    return random_tensors(shapes)


def project(w: dict[str, Tensor], name: str, n: Tensor, position: int, sizes: list[int], act) -> list[Tensor]:
    """Queries, keys and values by head: activation, norm of each head, rotation of its first half."""
    q, k, v = act(w[f"{name}query_key_value.weight"] @ n).view(-1, 8).split(sizes)
    q = torch.stack([rms_norm(head, w[f"{name}query_layernorm.weight"]) for head in q])
    k = torch.stack([rms_norm(head, w[f"{name}key_layernorm.weight"]) for head in k])
    q, k = (torch.stack([torch.cat([rotate(h[:4], position), h[4:]]) for h in heads]) for heads in (q, k))
    return [q, k, v]


def lightning(w: dict[str, Tensor], name: str, ns: list[Tensor], layer: int, act) -> list[Tensor]:
    """S <- exp(-s) S + k v^T, o = S^T q / sqrt(d); the norm of two groups, times a sigmoid gate."""
    slopes = [2 ** (-8 * (h + 1) / 4) * (1 - (layer - 1) / 4 + 1e-5) for h in range(4)]
    states = [torch.zeros(8, 8, dtype=torch.float64) for _ in range(4)]
    outputs = []
    for position, n in enumerate(ns):
        q, k, v = project(w, name, n, position, [4, 4, 4], act)
        states = [math.exp(-s) * state + torch.outer(k[h], v[h]) for h, (s, state) in enumerate(zip(slopes, states))]
        mixed = torch.cat([state.T @ q[h] / math.sqrt(8) for h, state in enumerate(states)])
        weights = w[f"{name}g_norm.weight"].chunk(2)
        normed = torch.cat([rms_norm(part, weight) for part, weight in zip(mixed.chunk(2), weights)])
        outputs.append(w[f"{name}dense.weight"] @ (sigmoid(w[f"{name}g_proj.weight"] @ n) * normed))
    return outputs


def attention(w: dict[str, Tensor], name: str, ns: list[Tensor]) -> list[Tensor]:
    keys, values, outputs = [], [], []
    for position, n in enumerate(ns):
        q, k, v = project(w, name, n, position, [4, 2, 2], lambda x: x)
        keys.append(k), values.append(v)
        out = []
        for h in range(4):
            shares = softmax(torch.stack([q[h] @ past[h // 2] for past in keys]) / math.sqrt(8))
            out.append(sum(share * past[h // 2] for share, past in zip(shares, values)))
        outputs.append(w[f"{name}dense.weight"] @ torch.cat(out))
    return outputs


def mixture(w: dict[str, Tensor], name: str, n: Tensor) -> Tensor:
    """Two experts from the two best groups, by biased sigmoid scores, and a shared one."""
    scores = sigmoid(w[f"{name}gate.weight"] @ n)
    biased = scores + w[f"{name}gate.expert_bias"]
    groups = biased.view(4, 2).sum(1).topk(2).indices.tolist()
    allowed = [e for e in range(8) if e // 2 in groups]
    chosen = sorted(allowed, key=lambda e: -biased[e].item())[:2]
    y = mlp(w, f"{name}shared_experts.", n)
    for e in chosen:
        y = y + 2.5 * scores[e] / sum(scores[c] for c in chosen) * mlp(w, f"{name}experts.{e}.", n)
    return y


def reference(tensors: dict[str, Tensor], act=lambda x: x) -> Tensor:
    """Token by token in float64, from the published names."""
    w = {name: tensor.double() for name, tensor in tensors.items()}
    xs = [w["model.word_embeddings.weight"][i] for i in IDS]
    for layer in range(5):
        name = f"model.layers.{layer}."
        ns = [rms_norm(x, w[f"{name}input_layernorm.weight"]) for x in xs]
        mix = (w, f"{name}attention.", ns)
        mixed = lightning(*mix, layer, act) if layer in LINEAR else attention(*mix)
        xs = [x + m for x, m in zip(xs, mixed)]
        for i, x in enumerate(xs):
            n = rms_norm(x, w[f"{name}post_attention_layernorm.weight"])
            xs[i] = x + (mixture(w, f"{name}mlp.", n) if layer else mlp(w, f"{name}mlp.", n))
    return torch.stack([w["lm_head.weight"] @ rms_norm(x, w["model.norm.weight"]) for x in xs])


def logits_of(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0]


def test_ring_linear(tmp_path):
    model = load(tmp_path / "published", CONFIG, tensors())
    assert type(model).__name__ == "BailingMoeLinearV2ForCausalLM"
    actual = logits_of(model)
    torch.testing.assert_close(actual.double(), reference(tensors()), atol=1e-4, rtol=1e-4)
    saves_back(model, tmp_path / "saved", CONFIG, tensors())
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(logits_of(reloaded), actual)
    tokens = model.generate(torch.tensor([IDS]), max_new_tokens=4, do_sample=False, eos_token_id=None)
    with torch.no_grad():  # what the cache and the states of both kinds say, without them
        assert torch.equal(model(tokens[:, :-1], use_cache=False).logits[:, 5:].argmax(-1), tokens[:, 6:])


@pytest.mark.parametrize("field", ["linear_silu", "use_linear_silu"])
def test_silu(field, tmp_path):
    model = load(tmp_path / "published", {**CONFIG, field: True}, tensors())
    torch.testing.assert_close(logits_of(model).double(), reference(tensors(), silu), atol=1e-4, rtol=1e-4)


def test_another_spelling_of_rotary_positions_and_wide_shared_experts(tmp_path):
    config = {key: value for key, value in CONFIG.items() if key != "partial_rotary_factor"}
    config |= {"rotary_dim": 4, "moe_shared_expert_intermediate_size": 20}
    model = load(tmp_path / "published", config, tensors(shared=20))
    torch.testing.assert_close(logits_of(model).double(), reference(tensors(shared=20)), atol=1e-4, rtol=1e-4)


def test_trainer_restores_what_files_hold_as_one(tmp_path):
    from hf_moe.training import restore_experts

    model = load(tmp_path / "published", CONFIG, tensors())
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.data.zero_()
    restore_experts(model)
    model.load_state_dict(tensors(), strict=False)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_defaults_are_ring_mini_linear():
    """16.4 B parameters (model card); softmax attention in every fifth layer."""
    config = AutoConfig.for_model("bailing_moe_linear")
    softmax = [layer for layer, kind in enumerate(config.layer_types) if kind == "full_attention"]
    assert softmax == [4, 9, 14, 19]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(16.4e9, rel=0.01)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"use_qkv_bias": True}, "use_qkv_bias=True is not supported"),
        ({"score_function": "softmax"}, "score_function='softmax' is not supported"),
        ({"linear_rope": False}, "linear_rope=False is not supported"),
        ({"kv_lora_rank": 512}, "belong to latent attention"),
        ({"layer_group_size": 0}, "layer_group_size=0 must be 1"),
        ({"group_norm_size": 3}, "group_norm_size=3 does not divide"),
        ({"norm_head": True}, "norm_head=True is not supported"),
    ],
)
def test_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        AutoConfig.for_model("bailing_moe_linear", **settings)
