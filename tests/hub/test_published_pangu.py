"""Pangu Pro MoE by its published config, names and mathematics, at tiny size."""

import sys
from pathlib import Path

import pytest
import torch
from published_checkpoints import IDS, load, mlp, random_tensors, saves_back
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "published"))
from naive import rms_norm, rotate, softmax

CONFIG = {
    "architectures": ["PanguProMoEForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_pangu_moe.PanguProMoEConfig",
        "AutoModelForCausalLM": "modeling_pangu_moe.PanguProMoEForCausalLM",
    },
    "model_type": "PanguProMoE",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "max_position_embeddings": 64,
    "moe_intermediate_size": 12,
    "num_attention_heads": 4,
    "num_experts": 9,
    "num_experts_per_tok": 3,  # one of each group of three
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 16000000.0,
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 20,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 61,
}


def tensors(shared: int = 20) -> dict[str, Tensor]:
    """The names of the checkpoint's files."""
    shapes = {"model.embed_tokens.weight": (61, 32), "model.norm.weight": (32,), "lm_head.weight": (61, 32)}
    for layer in range(2):
        name = f"model.layers.{layer}."
        for p, width in {"q": 32, "k": 16, "v": 16, "o": 32}.items():
            shapes |= {f"{name}self_attn.{p}_proj.weight": (width, 32), f"{name}self_attn.{p}_proj.bias": (width,)}
        shapes |= {f"{name}{norm}_layernorm.weight": (32,) for norm in ("input", "post_attention")}
        shapes |= {f"{name}mlp.gate.weight": (9, 32), f"{name}mlp.router_scale": (1, 9)}
        widths = {f"mlp.experts.{e}.": 12 for e in range(9)} | ({"mlp.shared_expert.": shared} if shared else {})
        for part, width in widths.items():
            shapes |= {f"{name}{part}{p}_proj.weight": (width, 32) for p in ("gate", "up")}
            shapes[f"{name}{part}down_proj.weight"] = (32, width)
    return random_tensors(shapes)


def attention(w: dict[str, Tensor], name: str, xs: list[Tensor]) -> list[Tensor]:
    """Grouped-query attention with biases on all four projections."""
    keys, values, mixed = [], [], []
    for position, x in enumerate(xs):
        q, k, v = ((w[f"{name}{p}_proj.weight"] @ x + w[f"{name}{p}_proj.bias"]).view(-1, 8) for p in "qkv")
        keys.append([rotate(head, position, 16e6) for head in k]), values.append(v)
        out = []
        for h in range(4):
            query = rotate(q[h], position, 16e6)
            shares = softmax(torch.stack([query @ past[h // 2] for past in keys]) / 8**0.5)
            out.append(sum(share * past[h // 2] for share, past in zip(shares, values)))
        mixed.append(w[f"{name}o_proj.weight"] @ torch.cat(out) + w[f"{name}o_proj.bias"])
    return mixed


def mixture(w: dict[str, Tensor], name: str, n: Tensor) -> Tensor:
    """The best of each group, weighed by its share of the softmax over all experts times its scale."""
    scores, scales = softmax(w[f"{name}gate.weight"] @ n), w[f"{name}router_scale"][0]
    y = mlp(w, f"{name}shared_expert.", n)
    for group in range(3):
        e = max(range(3 * group, 3 * group + 3), key=lambda e: scores[e].item())
        y = y + scores[e] * scales[e] * mlp(w, f"{name}experts.{e}.", n)
    return y


def reference(tensors: dict[str, Tensor]) -> Tensor:
    """Token by token in float64, from the published names."""
    w = {name: tensor.double() for name, tensor in tensors.items()}

    def norm(x: Tensor, name: str) -> Tensor:
        return rms_norm(x, w[f"{name}.weight"], 1e-5)

    xs = [w["model.embed_tokens.weight"][i] for i in IDS]
    for layer in range(2):
        name = f"model.layers.{layer}."
        mixed = attention(w, f"{name}self_attn.", [norm(x, f"{name}input_layernorm") for x in xs])
        xs = [x + m for x, m in zip(xs, mixed)]
        xs = [x + mixture(w, f"{name}mlp.", norm(x, f"{name}post_attention_layernorm")) for x in xs]
    return torch.stack([w["lm_head.weight"] @ norm(x, "model.norm") for x in xs])


def logits_of(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0]


def test_pangu_pro_moe(tmp_path):
    model = load(tmp_path / "published", CONFIG, tensors())
    assert type(model).__name__ == "PanguProMoEForCausalLM"
    actual = logits_of(model)
    torch.testing.assert_close(actual.double(), reference(tensors()), atol=1e-4, rtol=1e-4)
    saves_back(model, tmp_path / "saved", CONFIG, tensors())
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(logits_of(reloaded), actual)


def test_without_shared_experts(tmp_path):
    load(tmp_path / "published", {**CONFIG, "shared_expert_intermediate_size": 0}, tensors(shared=0))


def test_trainer_restores_the_scales(tmp_path):
    from hf_moe.training import restore_experts

    model = load(tmp_path / "published", CONFIG, tensors())
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.data.zero_()
    restore_experts(model)
    model.load_state_dict(tensors(), strict=False)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_defaults_are_the_released_sizes():
    config = AutoConfig.for_model("PanguProMoE")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    attention = 2 * 5120 * 5120 + 2 * 5120 * 1024 + 2 * 5120 + 2 * 1024
    mixture = 3 * 5120 * (64 * 1344 + 5376) + 64 * 5120 + 64
    layer = attention + mixture + 2 * 5120
    assert sum(p.numel() for p in model.parameters()) == 2 * 153376 * 5120 + 5120 + 48 * layer
    assert config.rope_parameters["rope_theta"] == 16e6 and config.num_expert_groups == 8


@pytest.mark.parametrize(
    "settings",
    [{"architectures": ["PanguProMoEV2ForCausalLM"]}, {"sandwich_norm": True}, {"mlp_only_layers": [0, 1, 2, 3]}],
)
def test_the_second_generation_is_refused(settings):
    with pytest.raises(ValueError, match="config of the second generation"):
        AutoConfig.for_model("PanguProMoE", **settings)
