"""LLaMA-MoE v1 by its published config, names and mathematics, at tiny size."""

import sys
from pathlib import Path

import pytest
import torch
from published_checkpoints import IDS, load, random_tensors, saves_back
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "published"))
from naive import attention, best, rms_norm, softmax, swiglu

CONFIG = {
    "architectures": ["LlamaMoEForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_llama_moe_hf.LlamaMoEForCausalLM"},
    "model_type": "llama_moe",
    "add_weight_norm": False,
    "bos_token_id": 1,
    "calculator_type": "UniversalCalculator",
    "capacity_factor": 1.25,
    "drop_tokens": True,
    "dropped_padding": "zero",
    "eos_token_id": 2,
    "gate_add_noise": True,
    "gate_balance_loss_weight": 0.02,
    "gate_network": "mlp",
    "gate_noise_epsilon": 0.01,
    "gate_type": "TopKBalancedNoisyGate",
    "gate_use_balance": True,
    "gate_use_softmax": True,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 132,
    "max_position_embeddings": 64,
    "multiply_gate_scores": True,
    "num_attention_heads": 4,
    "num_experts": 11,  # more than nine: "10" must not be sorted behind "1"
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "num_selects": 3,
    "pad_token_id": 0,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "score_scale_factor": 4.0,
    "size_experts": [[12] * 11] * 2,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 61,
}
PARTS = {"gate": (12, 32), "up": (12, 32), "down": (32, 12)}


def tensors(network: str = "mlp", noise: bool = True) -> dict[str, Tensor]:
    """The names of the checkpoints' files."""
    shapes = {"model.embed_tokens.weight": (61, 32), "model.norm.weight": (32,), "lm_head.weight": (61, 32)}
    for layer in range(2):
        name = f"model.layers.{layer}."
        shapes |= {f"{name}self_attn.{p}_proj.weight": (32, 32) for p in "qkvo"}
        shapes |= {f"{name}{norm}_layernorm.weight": (32,) for norm in ("input", "post_attention")}
        gate = f"{name}mlp.gate."
        if network == "mlp":
            shapes |= {f"{gate}gate_network.0.weight": (11, 32), f"{gate}gate_network.2.weight": (11, 11)}
        else:
            shapes[f"{gate}gate_network.weight"] = (11, 32)
        shapes |= {f"{gate}weight_noise.weight": (11, 32)} if noise else {}
        experts = f"{name}mlp.calculator.experts.weight_"
        shapes |= {f"{experts}{part}.{e}": shape for part, shape in PARTS.items() for e in range(11)}
    return random_tensors(shapes)


def gate_logits(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    if f"{name}gate_network.weight" in w:
        return w[f"{name}gate_network.weight"] @ x
    return w[f"{name}gate_network.2.weight"] @ torch.tanh(w[f"{name}gate_network.0.weight"] @ x)


def reference(tensors: dict[str, Tensor], scales: list[float]) -> Tensor:
    """Token by token in float64, from the published names."""
    w = {name: tensor.double() for name, tensor in tensors.items()}
    xs = [w["model.embed_tokens.weight"][i] for i in IDS]
    for layer, scale in enumerate(scales):
        name = f"model.layers.{layer}."
        projections = (w[f"{name}self_attn.{p}_proj.weight"] for p in "qkv")
        mixed = attention([rms_norm(x, w[f"{name}input_layernorm.weight"]) for x in xs], *projections, 4, 4)
        xs = [x + w[f"{name}self_attn.o_proj.weight"] @ m for x, m in zip(xs, mixed)]
        for i, x in enumerate(xs):
            n = rms_norm(x, w[f"{name}post_attention_layernorm.weight"])
            logits = gate_logits(w, f"{name}mlp.gate.", n)
            chosen = best(logits, 3)
            for e, weight in zip(chosen, softmax(logits[chosen])):
                parts = (w[f"{name}mlp.calculator.experts.weight_{part}.{e}"] for part in PARTS)
                xs[i] = xs[i] + weight * scale * swiglu(n, *parts)
    return torch.stack([w["lm_head.weight"] @ rms_norm(x, w["model.norm.weight"]) for x in xs])


def logits_of(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0]


def test_llama_moe(tmp_path):
    model = load(tmp_path / "published", CONFIG, tensors())
    assert type(model).__name__ == "LlamaMoEForCausalLM"
    actual = logits_of(model)
    torch.testing.assert_close(actual.double(), reference(tensors(), [4.0, 4.0]), atol=1e-4, rtol=1e-4)
    assert (model.config.router_aux_loss_coef, model.config.router_balance_loss) == (0.02, "importance_load")
    saves_back(model, tmp_path / "saved", CONFIG, tensors())
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(logits_of(reloaded), actual)


def test_linear_gates_without_noise_and_a_scale_per_layer(tmp_path):
    own = {"gate_network": "linear", "gate_add_noise": False, "size_experts": None, "score_scale_factor": [4.0, 1.5]}
    config, weights = {**CONFIG, **own, "gate_use_balance": False}, tensors("linear", noise=False)
    model = load(tmp_path / "published", config, weights)
    torch.testing.assert_close(logits_of(model).double(), reference(weights, [4.0, 1.5]), atol=1e-4, rtol=1e-4)
    assert model.config.router_aux_loss_coef == 0
    saves_back(model, tmp_path / "saved", config, weights)


def test_rotary_frequencies_in_old_files_are_no_matter(tmp_path):
    """The published code saved them with each layer."""
    old = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4) for layer in range(2)}
    assert torch.equal(
        logits_of(load(tmp_path / "old", CONFIG, {**tensors(), **old})),
        logits_of(load(tmp_path / "new", CONFIG, tensors())),
    )


def test_trainer_restores_the_experts(tmp_path):
    from hf_moe.training import restore_experts

    model = load(tmp_path / "published", CONFIG, tensors())
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.data.zero_()
    restore_experts(model)
    model.load_state_dict(tensors(), strict=False)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_training_adds_both_losses_of_every_layer(tmp_path):
    """Without noise they are a function of the weights: CV^2 of the weights' sums and of the numbers of tokens."""
    config = {**CONFIG, "gate_add_noise": False}
    model = load(tmp_path / "published", config, tensors(noise=False))
    ids = torch.tensor([IDS])
    plain = model(ids, labels=ids).loss
    routed = model.model(ids, output_router_logits=True)
    expected = 0.0
    for logits in routed.router_logits:
        importance, load_ = torch.zeros(11, dtype=torch.float64), torch.zeros(11, dtype=torch.float64)
        for row in logits.double():
            chosen = best(row, 3)
            for e, weight in zip(chosen, softmax(row[chosen])):
                importance[e] += weight
                load_[e] += 1
        expected += sum(x.var() / x.mean() ** 2 for x in (importance, load_))
    loss = model.train()(ids, labels=ids).loss
    assert (loss - plain).item() == pytest.approx(0.02 * expected.item(), rel=1e-4)


def test_defaults_are_the_released_sizes():
    """Llama 2 7B's 6,738,415,616, and the gates of 32 layers."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama_moe"))
    assert sum(p.numel() for p in model.parameters()) == 6_738_415_616 + 32 * (2 * 4096 * 16 + 16 * 16)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"size_experts": [[688] * 15 + [687]] * 32}, "only experts of equal width are supported, 688"),
        ({"gate_type": "SwitchBalancedGate"}, "gate_type='SwitchBalancedGate' is not supported"),
        ({"add_weight_norm": True}, "add_weight_norm=True is not supported"),
        ({"gate_use_softmax": False}, "gate_use_softmax=False is not supported"),
        ({"score_scale_factor": [1.0, 2.0]}, "score_scale_factor has 2 numbers for 32 layers"),
        ({"num_experts": 15}, "intermediate_size=11008 is not a multiple of num_experts=15"),
        ({"gate_network": "cosine"}, "network='cosine' is unknown"),
    ],
)
def test_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        AutoConfig.for_model("llama_moe", **settings)
