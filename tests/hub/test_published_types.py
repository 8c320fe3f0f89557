"""Public checkpoints by their published config, names and mathematics, at tiny size."""

import sys
from pathlib import Path

import pytest
import torch
from published_checkpoints import IDS, load, mlp, random_tensors, saves_back
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import hf_moe  # registers the types
from hf_moe.testing import tiny_config

sys.path.insert(0, str(Path(__file__).parents[1] / "published"))
from naive import attention, rms_norm, rotate, softmax

DEEPSEEK = {
    "architectures": ["DeepseekForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM"},
    "model_type": "deepseek",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "aux_loss_alpha": 0.01,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "moe_intermediate_size": 12,
    "moe_layer_freq": 1,
    "n_routed_experts": 5,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 61,
}


def deepseek_tensors(bias: bool = False) -> dict[str, Tensor]:
    """The names of deepseek-moe-16b's files."""
    shapes = {"model.embed_tokens.weight": (61, 32), "model.norm.weight": (32,), "lm_head.weight": (61, 32)}
    for layer in range(3):
        name = f"model.layers.{layer}."
        shapes |= {f"{name}self_attn.{p}_proj.weight": (32, 32) for p in "qkvo"}
        shapes |= {f"{name}self_attn.{p}_proj.bias": (32,) for p in "qkvo" if bias}
        shapes |= {f"{name}{norm}_layernorm.weight": (32,) for norm in ("input", "post_attention")}
        widths = (
            {"mlp.": 24} if layer == 0 else {f"mlp.experts.{e}.": 12 for e in range(5)} | {"mlp.shared_experts.": 24}
        )
        for part, width in widths.items():
            shapes |= {f"{name}{part}{p}_proj.weight": (width, 32) for p in ("gate", "up")}
            shapes[f"{name}{part}down_proj.weight"] = (32, width)
        if layer:
            shapes[f"{name}mlp.gate.weight"] = (5, 32)
    return random_tensors(shapes)


def deepseek_logits(tensors: dict[str, Tensor]) -> Tensor:
    """The paper's mathematics, token by token in float64, from the published names."""
    w = {name: tensor.double() for name, tensor in tensors.items()}
    xs = [w["model.embed_tokens.weight"][i] for i in IDS]
    for layer in range(3):
        name = f"model.layers.{layer}."
        projections = (w[f"{name}self_attn.{p}_proj.weight"] for p in "qkv")
        mixed = attention([rms_norm(x, w[f"{name}input_layernorm.weight"]) for x in xs], *projections, 4, 4)
        xs = [x + w[f"{name}self_attn.o_proj.weight"] @ m for x, m in zip(xs, mixed)]
        for i, x in enumerate(xs):
            n = rms_norm(x, w[f"{name}post_attention_layernorm.weight"])
            if layer == 0:
                xs[i] = x + mlp(w, f"{name}mlp.", n)
                continue
            scores = softmax(w[f"{name}mlp.gate.weight"] @ n)
            y = mlp(w, f"{name}mlp.shared_experts.", n)
            for e in sorted(range(5), key=lambda e: -scores[e].item())[:2]:
                y = y + scores[e] * mlp(w, f"{name}mlp.experts.{e}.", n)
            xs[i] = x + y
    return torch.stack([w["lm_head.weight"] @ rms_norm(x, w["model.norm.weight"]) for x in xs])


def test_deepseek_moe_16b(tmp_path):
    tensors = deepseek_tensors()
    model = load(tmp_path / "published", DEEPSEEK, tensors)
    assert type(model).__name__ == "DeepseekForCausalLM"
    with torch.no_grad():
        actual = model(torch.tensor([IDS])).logits[0]
    torch.testing.assert_close(actual.double(), deepseek_logits(tensors), atol=1e-4, rtol=1e-4)
    assert (model.config.router_aux_loss_coef, model.config.router_balance_loss) == (0.01, "sequence")
    saves_back(model, tmp_path / "saved", DEEPSEEK, tensors)
    load(tmp_path / "biased", {**DEEPSEEK, "attention_bias": True}, deepseek_tensors(bias=True))


def test_deepseek_defaults_are_the_released_sizes():
    config = AutoConfig.for_model("deepseek")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == 16_375_728_128


BAILING = {
    "architectures": ["BailingMoeV2ForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_bailing_moe_v2.BailingMoeV2ForCausalLM"},
    "model_type": "bailing_moe",
    "attention_dropout": 0.0,
    "eos_token_id": 2,
    "first_k_dense_replace": 1,
    "head_dim": 8,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "moe_intermediate_size": 12,
    "moe_router_enable_expert_bias": True,
    "n_group": 4,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "num_nextn_predict_layers": 0,
    "num_shared_experts": 1,
    "pad_token_id": 0,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "tie_word_embeddings": False,
    "topk_group": 2,
    "torch_dtype": "bfloat16",
    "use_bias": False,
    "use_cache": True,
    "use_qk_norm": True,
    "use_qkv_bias": False,
    "vocab_size": 61,
}
FIRST = {key: value for key, value in BAILING.items() if key not in ("n_group", "topk_group", "partial_rotary_factor")}
FIRST |= {"architectures": ["BailingMoeForCausalLM"], "num_shared_experts": 2, "norm_head": False}
for key in ("moe_router_enable_expert_bias", "use_qk_norm", "routed_scaling_factor", "num_nextn_predict_layers"):
    del FIRST[key]


def bailing_tensors(first: bool) -> dict[str, Tensor]:
    """The names of the files of Ling 1.x and 2.0."""
    shapes = {"model.word_embeddings.weight": (61, 32), "model.norm.weight": (32,), "lm_head.weight": (61, 32)}
    for layer in range(2):
        name = f"model.layers.{layer}."
        shapes |= {f"{name}attention.query_key_value.weight": (64, 32), f"{name}attention.dense.weight": (32, 32)}
        shapes |= {f"{name}{norm}_layernorm.weight": (32,) for norm in ("input", "post_attention")}
        if not first:
            shapes |= {f"{name}attention.{half}_layernorm.weight": (8,) for half in ("query", "key")}
        widths = {f"mlp.experts.{e}.": 12 for e in range(8)} | {"mlp.shared_experts.": 24 if first else 12}
        for part, width in (widths if layer else {"mlp.": 24}).items():
            shapes |= {f"{name}{part}{p}_proj.weight": (width, 32) for p in ("gate", "up")}
            shapes[f"{name}{part}down_proj.weight"] = (32, width)
        if layer:
            shapes[f"{name}mlp.gate.weight"] = (8, 32)
            shapes |= {} if first else {f"{name}mlp.gate.expert_bias": (8,)}
    return random_tensors(shapes)


def bailing_route(w: dict[str, Tensor], name: str, n: Tensor, first: bool) -> dict[int, Tensor]:
    """Expert -> weight of one token, from the published gates."""
    logits = w[f"{name}mlp.gate.weight"] @ n
    scores = softmax(logits) if first else 1 / (1 + (-logits).exp())
    if first:
        chosen = scores.topk(2).indices.tolist()
        scale = 1.0
    else:
        biased = scores + w[f"{name}mlp.gate.expert_bias"]
        groups = biased.view(4, 2).sum(1).topk(2).indices  # the two best of each group of two
        allowed = [e for e in range(8) if e // 2 in groups.tolist()]
        chosen = sorted(allowed, key=lambda e: -biased[e].item())[:2]
        scale = 2.5
    total = sum(scores[e] for e in chosen)
    return {e: scale * scores[e] / total for e in chosen}


def bailing_logits(tensors: dict[str, Tensor], first: bool) -> Tensor:
    """Token by token in float64, from the published names."""
    w = {name: tensor.double() for name, tensor in tensors.items()}
    xs = [w["model.word_embeddings.weight"][i] for i in IDS]
    for layer in range(2):
        name, keys, values = f"model.layers.{layer}.", [], []
        mixed = []
        for position, x in enumerate(xs):
            n = rms_norm(x, w[f"{name}input_layernorm.weight"])
            q, k, v = (w[f"{name}attention.query_key_value.weight"] @ n).view(8, 8).split([4, 2, 2])
            if not first:
                q = torch.stack([rms_norm(h, w[f"{name}attention.query_layernorm.weight"]) for h in q])
                k = torch.stack([rms_norm(h, w[f"{name}attention.key_layernorm.weight"]) for h in k])
            turned = 8 if first else 4
            q, k = (
                torch.stack([torch.cat([rotate(h[:turned], position), h[turned:]]) for h in heads]) for heads in (q, k)
            )
            keys.append(k), values.append(v)
            out = []
            for head in range(4):
                shares = softmax(torch.stack([q[head] @ past[head // 2] for past in keys]) / 8**0.5)
                out.append(sum(share * past[head // 2] for share, past in zip(shares, values)))
            mixed.append(w[f"{name}attention.dense.weight"] @ torch.cat(out))
        xs = [x + m for x, m in zip(xs, mixed)]
        for i, x in enumerate(xs):
            n = rms_norm(x, w[f"{name}post_attention_layernorm.weight"])
            if layer == 0:
                xs[i] = x + mlp(w, f"{name}mlp.", n)
                continue
            y = mlp(w, f"{name}mlp.shared_experts.", n)
            for e, weight in bailing_route(w, name, n, first).items():
                y = y + weight * mlp(w, f"{name}mlp.experts.{e}.", n)
            xs[i] = x + y
    return torch.stack([w["lm_head.weight"] @ rms_norm(x, w["model.norm.weight"]) for x in xs])


@pytest.mark.parametrize("first", [False, True], ids=["ling_2", "ling_1"])
def test_bailing_moe(first, tmp_path):
    config, tensors = FIRST if first else BAILING, bailing_tensors(first)
    model = load(tmp_path / "published", config, tensors)
    with torch.no_grad():
        actual = model(torch.tensor([IDS])).logits[0]
    torch.testing.assert_close(actual.double(), bailing_logits(tensors, first), atol=1e-4, rtol=1e-4)
    saves_back(model, tmp_path / "saved", config, tensors)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        assert torch.equal(reloaded(torch.tensor([IDS])).logits[0], actual)
    other = {key: value for key, value in config.items() if key != "partial_rotary_factor"}
    again = load(tmp_path / "other", {**other, "rotary_dim": 8 if first else 4}, tensors)
    with torch.no_grad():
        assert torch.equal(again(torch.tensor([IDS])).logits[0], actual)


def test_trainer_restores_what_files_hold_as_one(tmp_path):
    """Queries, keys and values of a checkpoint, with the callback that does so for native models."""
    from hf_moe.training import restore_experts

    tensors = bailing_tensors(first=False)
    model = load(tmp_path / "published", BAILING, tensors)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.data.zero_()
    restore_experts(model)
    model.load_state_dict(dict(tensors), strict=False)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


class TestErrors:
    def test_norm_head(self):
        with pytest.raises(ValueError, match="norm_head=True is not supported"):
            AutoConfig.for_model("bailing_moe", norm_head=True)

    def test_scoring(self):
        with pytest.raises(ValueError, match="scoring_func='sigmoid' is unknown"):
            AutoConfig.for_model("deepseek", scoring_func="sigmoid")


def test_plm_on_request(tmp_path):
    """The type `plm` is not ours alone: it loads when it was enabled, under its published names."""
    settings = {**tiny_config("peripheral_lm").to_dict(), "model_type": "plm", "architectures": ["PLMForCausalLM"]}
    model = hf_moe.PlmForCausalLM(tiny_config("peripheral_lm")).eval()
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    hf_moe.enable("plm")
    loaded = load(tmp_path / "published", settings, tensors)
    assert type(loaded).__name__ == "PublishedPlmForCausalLM" and loaded.config.model_type == "plm"
    assert torch.equal(loaded(torch.tensor([IDS])).logits, model(torch.tensor([IDS])).logits)
    with pytest.raises(ValueError, match=r"\['minicpm'\] cannot be enabled; choose from \['plm'\]"):
        hf_moe.enable("minicpm")
