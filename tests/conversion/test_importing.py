"""`hf-moe import`: checkpoints with published names and shapes say what their published formulas say.

Formulas of BlockFFN: `pretrain/bmt_to_hf/modeling_minicpm.py` in thunlp/BlockFFN. Those of LLaMA-MoE v2:
`smoe/models/mixtral/modeling_mixtral.py` in OpenSparseLLMs/LLaMA-MoE-v2; here Transformers' Mixtral and what it lacks.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM
from typer.testing import CliRunner

from hf_moe.cli.main import app
from hf_moe.conversion.importing import import_checkpoint, plan_import

sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("published", "hub")]
from naive import attention, rms_norm, rotate, silu, softmax, swiglu
from published_checkpoints import IDS, random_tensors

D, HEADS, EXPERTS, WIDTH, LAYERS, VOCAB = 8, 2, 4, 4, 2, 48
NOPE, ROPE, Q_RANK, KV_RANK = 6, 4, 8, 12
BLOCKFFN: dict[str, Any] = {
    "architectures": ["MiniCPMForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_minicpm.MiniCPMForCausalLM"},
    "model_type": "minicpm",
    "vocab_size": VOCAB,
    "hidden_size": D,
    "intermediate_size": 99,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "attention_type": "mla",
    "qk_nope_head_dim": NOPE,
    "qk_rope_head_dim": ROPE,
    "q_lora_rank": Q_RANK,
    "kv_lora_rank": KV_RANK,
    "ffn_type": "block",
    "ffn_gated": True,
    "hidden_act": "silu",
    "router_act": "relu",
    "expert_size": WIDTH,
    "num_experts": EXPERTS,
    "norm_after_router": "rms",
    "block_implementation": "torch",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "scale_emb": 12,
    "scale_depth": 1.4,
    "dim_model_base": 4,
    "torch_dtype": "float32",
}
LLAMA_MOE: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "vocab_size": VOCAB,
    "hidden_size": D,
    "intermediate_size": 4,
    "num_hidden_layers": 3,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 1,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "sliding_window": None,
    "num_experts_per_tok": 2,
    "num_local_experts": EXPERTS,
    "scale_factor": 4.0,
    "router_aux_loss_coef": 0.01,
    "add_rescale_bias": False,
    "moe_type": "modulelist",
    "use_attn_moe": False,
    "tie_word_embeddings": False,
}


def blockffn_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, D), "model.norm.weight": (D,)}
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = (VOCAB, D)
    for layer in (f"model.layers.{number}" for number in range(LAYERS)):
        found |= {f"{layer}.{name}_layernorm.weight": (D,) for name in ("input", "post_attention")}
        query = NOPE + ROPE
        latent = {"q_a_proj": (Q_RANK, D), "q_a_layernorm": (Q_RANK,), "q_b_proj": (HEADS * query, Q_RANK)}
        latent |= {"kv_a_proj_with_mqa": (KV_RANK + ROPE, D), "kv_a_layernorm": (KV_RANK,), "o_proj": (D, D)}
        latent |= {"kv_b_proj": (HEADS * NOPE + D, KV_RANK)}
        plain = {f"{name}_proj": (D, D) for name in "qkvo"}
        mixer = latent if config["attention_type"] == "mla" else plain
        found |= {f"{layer}.self_attn.{name}.weight": shape for name, shape in mixer.items()}
        found |= {f"{layer}.mlp.router_proj.weight": (EXPERTS, D), f"{layer}.mlp.router_norm.weight": (EXPERTS,)}
        flat = config["ffn_type"] == "block_linear"
        found[f"{layer}.mlp.up_proj"] = (EXPERTS * WIDTH, D) if flat else (EXPERTS, WIDTH, D)
        found[f"{layer}.mlp.down_proj"] = (D, EXPERTS * WIDTH) if flat else (EXPERTS, D, WIDTH)
    return found


def latent_attention(w: dict[str, Tensor], name: str, xs: list[Tensor]) -> list[Tensor]:
    def matrix(part: str) -> Tensor:
        return w[f"{name}.{part}.weight"]

    values, outputs, size = D // HEADS, [], NOPE + ROPE
    keys: list[list[Tensor]] = []
    stored: list[list[Tensor]] = []
    for t, x in enumerate(xs):
        query = matrix("q_b_proj") @ rms_norm(matrix("q_a_proj") @ x, matrix("q_a_layernorm"))
        both = matrix("kv_a_proj_with_mqa") @ x
        latent = matrix("kv_b_proj") @ rms_norm(both[:KV_RANK], matrix("kv_a_layernorm"))
        heads = [latent[h * (NOPE + values) : (h + 1) * (NOPE + values)] for h in range(HEADS)]
        keys.append([torch.cat([head[:NOPE], rotate(both[KV_RANK:], t)]) for head in heads])
        stored.append([head[NOPE:] for head in heads])
        mixed = []
        for h in range(HEADS):
            part = query[h * size : (h + 1) * size]
            part = torch.cat([part[:NOPE], rotate(part[NOPE:], t)])
            chances = softmax(torch.stack([part @ key[h] for key in keys]) / math.sqrt(size))
            mixed.append(sum(chance * value[h] for chance, value in zip(chances, stored)))
        outputs.append(matrix("o_proj") @ torch.cat(mixed))
    return outputs


def block_mlp(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    active = (w[f"{name}.router_proj.weight"] @ x).clamp(min=0)
    weights = rms_norm(active, w[f"{name}.router_norm.weight"], 1e-5)
    output = torch.zeros_like(x)
    for e in range(EXPERTS):
        up, down = w[f"{name}.up_proj"], w[f"{name}.down_proj"]
        rows = slice(e * WIDTH, (e + 1) * WIDTH)
        up, down = (up[rows], down[:, rows]) if up.ndim == 2 else (up[e], down[e])
        output = output + weights[e] * (down @ silu(up @ x))
    return output


def minicpm(w: dict[str, Tensor], config: dict[str, Any]) -> Tensor:
    w = {name: tensor.double() for name, tensor in w.items()}
    xs = [config["scale_emb"] * w["model.embed_tokens.weight"][i] for i in IDS]
    depth = config["scale_depth"] / math.sqrt(LAYERS)
    for layer in (f"model.layers.{number}" for number in range(LAYERS)):
        inner = [rms_norm(x, w[f"{layer}.input_layernorm.weight"], 1e-5) for x in xs]
        if config["attention_type"] == "mla":
            mixed = latent_attention(w, f"{layer}.self_attn", inner)
        else:
            q, k, v, o = (w[f"{layer}.self_attn.{name}_proj.weight"] for name in "qkvo")
            mixed = [o @ y for y in attention(inner, q, k, v, HEADS, HEADS)]
        xs = [x + depth * y for x, y in zip(xs, mixed)]
        inner = [rms_norm(x, w[f"{layer}.post_attention_layernorm.weight"], 1e-5) for x in xs]
        xs = [x + depth * block_mlp(w, f"{layer}.mlp", y) for x, y in zip(xs, inner)]
    head = w["model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"]
    shrink = config["hidden_size"] / config["dim_model_base"]
    return torch.stack([head @ (rms_norm(x, w["model.norm.weight"], 1e-5) / shrink) for x in xs])


def write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "LICENSE").write_text("Apache License, Version 2.0")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def imported(folder: Path, out: Path, **options: Any) -> Any:
    """Import, load as a user would: every key is used, none is missing."""
    import_checkpoint(folder, out, **options)
    assert (out / "LICENSE").exists()
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    return model.eval()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ffn_type": "block_linear", "tie_word_embeddings": False, "block_implementation": "kernel"},
        {"attention_type": "vanilla", "scale_emb": 1},
    ],
    ids=["mla", "linear", "vanilla"],
)
def test_blockffn_is_minicpm_with_blocks(changes: dict[str, Any], tmp_path: Path):
    config = {**BLOCKFFN, **changes}
    tensors = random_tensors(blockffn_shapes(config))
    folder = write(tmp_path / "published", config, tensors)
    model = imported(folder, tmp_path / "ours", max_shard_size=2000)
    assert model.config.model_type == ("hf_moe" if config["attention_type"] == "vanilla" else "blockffn")
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    found = model(torch.tensor([IDS])).logits[0].double()
    torch.testing.assert_close(found, minicpm(tensors, config), rtol=1e-4, atol=1e-5)


def llama_moe_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"lm_head.weight": (VOCAB, D), "model.embed_tokens.weight": (VOCAB, D)}
    found["model.norm.weight"] = (D,)
    width, residual = config["intermediate_size"], config.get("intermediate_size_residual")
    dense = config.get("num_moe_contract_layers", 0)
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}"
        found |= {f"{layer}.{name}_layernorm.weight": (D,) for name in ("input", "post_attention")}
        found |= {f"{layer}.self_attn.{name}_proj.weight": (D, D) for name in "qo"}
        found |= {f"{layer}.self_attn.{name}_proj.weight": (D // HEADS, D) for name in "kv"}
        parts = {f"block_sparse_moe.experts.{e}": width for e in range(EXPERTS)}
        if not dense <= number < config["num_hidden_layers"] - dense:
            parts = {"block_sparse_moe": width * EXPERTS}
        else:
            found[f"{layer}.block_sparse_moe.gate.weight"] = (EXPERTS, D)
            parts |= {"mlp_residual": residual} if residual else {}
        for part, size in parts.items():
            found |= {f"{layer}.{part}.{w}.weight": (size, D) for w in ("w1", "w3")}
            found |= {f"{layer}.{part}.w2.weight": (D, size)}
    return found


def llama_moe(tensors: dict[str, Tensor], config: dict[str, Any]) -> Tensor:
    """Transformers' Mixtral in float64, with a factor, a residual expert and dense layers around its mixtures."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "rms_norm_eps", "sliding_window", "num_experts_per_tok", "num_local_experts")
    rope = {"rope_type": "default", "rope_theta": config["rope_theta"]}
    given = {name: config[name] for name in names}
    native = MixtralForCausalLM(MixtralConfig(**given, rope_parameters=rope)).double().eval()
    native.set_experts_implementation("eager")
    w = {name: tensor.double() for name, tensor in tensors.items()}
    state = {name: w[name] for name in native.state_dict() if name in w}
    for number, layer in enumerate(native.model.layers):
        name = f"model.layers.{number}"
        moe = f"{name}.block_sparse_moe"

        def matrices(part: str) -> list[Tensor]:
            return [w[f"{part}.{matrix}.weight"] for matrix in ("w1", "w3", "w2")]

        if f"{moe}.gate.weight" in w:
            experts = [matrices(f"{moe}.experts.{e}") for e in range(EXPERTS)]
            state[f"{name}.mlp.gate.weight"] = w[f"{moe}.gate.weight"]
            gate_up = torch.stack([torch.cat([gate, up]) for gate, up, _ in experts])
            state[f"{name}.mlp.experts.gate_up_proj"] = gate_up
            state[f"{name}.mlp.experts.down_proj"] = torch.stack([down for _, _, down in experts])

        def around(module: Any, inputs: Any, output: Tensor, name: str = name, moe: str = moe) -> Tensor:
            (x,) = inputs
            if f"{moe}.w1.weight" in w:
                return torch.stack([swiglu(each, *matrices(moe)) for each in x[0]])[None]
            output = output * config["scale_factor"]
            if f"{name}.mlp_residual.w1.weight" in w:
                output = output + torch.stack([swiglu(each, *matrices(f"{name}.mlp_residual")) for each in x[0]])[None]
            return output

        layer.mlp.register_forward_hook(around)
    missing, unexpected = native.load_state_dict(state, strict=False)
    assert not unexpected and all(".mlp." in name for name in missing)
    with torch.no_grad():
        return native(torch.tensor([IDS])).logits[0]


@pytest.mark.parametrize(
    "changes",
    [{}, {"scale_factor": 1.5, "intermediate_size_residual": 8, "num_experts_per_tok": 1}, {"sliding_window": 3}]
    + [{"num_moe_contract_layers": 1}],
    ids=["2 of 4", "residual", "sliding", "dense ends"],
)
def test_llama_moe_v2_is_mixtral_and_more(changes: dict[str, Any], tmp_path: Path):
    config = {**LLAMA_MOE, **changes}
    tensors = random_tensors(llama_moe_shapes(config))
    model = imported(write(tmp_path / "published", config, tensors), tmp_path / "ours")
    assert model.config.router_aux_loss_coef == 0.01
    with torch.no_grad():
        found = model(torch.tensor([IDS])).logits[0].double()
    torch.testing.assert_close(found, llama_moe(tensors, config), rtol=1e-4, atol=1e-5)


def test_plm_keeps_its_names(tmp_path: Path):
    from hf_moe import PlmConfig, PlmForCausalLM

    sizes: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"kv_lora_rank": 4, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4}
    made = PlmForCausalLM(PlmConfig(**sizes, intermediate_size=16)).eval()
    made.save_pretrained(tmp_path / "published")
    raw = json.loads((tmp_path / "published" / "config.json").read_text())
    raw |= {"model_type": "plm", "architectures": ["PLMForCausalLM"], "rope_theta": 100000.0}
    raw.pop("rope_parameters"), raw.pop("auto_map")
    (tmp_path / "published" / "config.json").write_text(json.dumps(raw))
    (tmp_path / "published" / "LICENSE").touch()
    model = imported(tmp_path / "published", tmp_path / "ours")
    assert torch.equal(model(torch.tensor([IDS])).logits, made(torch.tensor([IDS])).logits)


def test_bf16_is_rounded_once_and_float32_not_at_all(tmp_path: Path):
    tensors = {name: tensor.bfloat16() for name, tensor in random_tensors(blockffn_shapes(BLOCKFFN)).items()}
    folder = write(tmp_path / "published", BLOCKFFN, tensors)
    name = "model.layers.0.self_attn.o_proj.weight"
    exact = tensors[name].double() * 1.4 / math.sqrt(LAYERS)
    for dtype, unit in ((None, 2**-8), ("float32", 2**-23)):
        out = import_checkpoint(folder, tmp_path / str(dtype), dtype=dtype)
        saved = load_file(out / "model.safetensors")[name]
        assert saved.dtype == (torch.float32 if dtype else torch.bfloat16)
        torch.testing.assert_close(saved.double(), exact, rtol=unit, atol=0)


@pytest.mark.parametrize(
    ("base", "changes", "lost", "says"),
    [
        (BLOCKFFN, {"norm_after_router": "sum"}, None, "norm_after_router='sum'"),
        (BLOCKFFN, {"block_implementation": "megablocks"}, None, "megablocks"),
        (BLOCKFFN, {"ffn_type": "moe"}, None, "needs no import or has no importer"),
        (BLOCKFFN, {"expert_size": 5}, None, "its config asks for"),
        (BLOCKFFN, {}, "model.norm.weight", "lacks 1 tensors, the first is 'model.norm.weight'"),
        (LLAMA_MOE, {"use_attn_moe": True}, None, "use_attn_moe=True"),
        (LLAMA_MOE, {"num_hidden_layers": 2}, None, "unknown to LLaMA-MoE-v2"),
    ],
)
def test_what_cannot_be_imported_is_refused(
    base: dict[str, Any], changes: dict[str, Any], lost: str | None, says: str, tmp_path: Path
):
    tensors = random_tensors(blockffn_shapes(base) if base is BLOCKFFN else llama_moe_shapes(base))
    tensors.pop(lost or "", None)
    folder = write(tmp_path / "published", {**base, **changes}, tensors)
    with pytest.raises(ValueError, match=says):
        import_checkpoint(folder, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_a_field_that_lacks_is_named(tmp_path: Path):
    raw = {name: value for name, value in BLOCKFFN.items() if name != "num_experts"}
    with pytest.raises(ValueError, match="lacks 'num_experts'"):
        plan_import(write(tmp_path / "published", raw, {}))
    with pytest.raises(ValueError, match="choose from"):
        plan_import(tmp_path / "published", "Qwen")


def test_the_command(tmp_path: Path):
    folder = write(tmp_path / "published", LLAMA_MOE, random_tensors(llama_moe_shapes(LLAMA_MOE)))
    dry = CliRunner().invoke(app, ["import", str(folder), "--dry-run"])
    assert "becomes LLaMA-MoE-v2 as hf_moe" in dry.output and not (tmp_path / "ours").exists()
    done = CliRunner().invoke(app, ["import", str(folder), "--output", str(tmp_path / "ours")])
    assert done.exit_code == 0 and "Wrote" in done.output and (tmp_path / "ours" / "config.json").exists()
