"""save_pretrained and from_pretrained: the same bits back, in both layouts, whole and in shards."""

from pathlib import Path

import pytest
import torch
from hub_cases import CASES, logits, tiny_model
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import hf_moe
from hf_moe.testing import tiny_config


def saved_names(folder: Path) -> set[str]:
    """The names of all tensors in a folder, which holds no other kind of weights, and the stub."""
    names = set()
    for file in folder.iterdir():
        assert file.suffix in (".json", ".safetensors") or file.name == "modeling_hf_moe.py", file.name
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as tensors:
                names.update(tensors.keys())
    return names


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
@pytest.mark.parametrize("per_expert", [True, False], ids=["per_expert", "fused"])
@pytest.mark.parametrize("case", CASES)
def test_same_bits_back(case: str, per_expert: bool, shard: str, tmp_path: Path):
    model = tiny_model(case)
    model.save_pretrained(tmp_path, save_original_format=per_expert, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "20KB")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is type(model) and not any(info.values())
    state = model.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(tensor.equal(state[name]) for name, tensor in loaded.state_dict().items())
    assert logits(loaded).equal(logits(model))
    per_expert_names = {name for name in saved_names(tmp_path) if "experts.0." in name}
    assert bool(per_expert_names) == (per_expert and any("experts" in name for name in state))


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_stays_bfloat16(case: str, tmp_path: Path):
    model = tiny_model(case).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16
    assert all(tensor.equal(model.state_dict()[name]) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize("case", CASES)
def test_a_layout_survives_being_loaded_and_saved_again(case: str, tmp_path: Path):
    for name, per_expert in (("first", True), ("fused", False)):
        tiny_model(case).save_pretrained(tmp_path / name, save_original_format=per_expert)
        AutoModelForCausalLM.from_pretrained(tmp_path / name).save_pretrained(tmp_path / f"{name}-again")
        assert saved_names(tmp_path / f"{name}-again") == saved_names(tmp_path / name)


@pytest.mark.allow_warnings("LOAD REPORT")  # the head it has no use for
@pytest.mark.parametrize("model_type", hf_moe.ARCHITECTURES)
def test_a_checkpoint_of_one_head_serves_the_others(model_type: str, tmp_path: Path):
    model = tiny_model(model_type)
    model.save_pretrained(tmp_path)
    decoder = AutoModel.from_pretrained(tmp_path)
    assert all(tensor.equal(model.model.state_dict()[name]) for name, tensor in decoder.state_dict().items())


def test_names_on_disk_are_those_of_qwen3_moe(tmp_path: Path):
    block = {
        "mixer": {"type": "attention", "qk_norm": True},
        "feed_forward": {
            "type": "moe",
            "num_experts": 4,
            "router": {"type": "top_k", "top_k": 2},
            "experts": {"type": "swiglu", "intermediate_size": 16},
        },
    }
    ours = tiny_config("hf_moe", blocks={"moe": block})
    sizes = ["vocab_size", "hidden_size", "head_dim"]
    sizes += ["num_hidden_layers", "num_attention_heads", "num_key_value_heads"]
    stock = Qwen3MoeConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, tie_word_embeddings=False)
    for size in sizes:
        setattr(stock, size, getattr(ours, size))
    Qwen3MoeForCausalLM(stock).save_pretrained(tmp_path / "stock")
    hf_moe.HfMoeForCausalLM(ours).save_pretrained(tmp_path / "ours")
    assert saved_names(tmp_path / "ours") == saved_names(tmp_path / "stock")
    assert "model.layers.1.mlp.experts.3.gate_proj.weight" in saved_names(tmp_path / "ours")


@pytest.mark.parametrize("case", ["bam", "rmoe", "mole", "hf_moe_mixed"])
def test_a_plain_state_dict_takes_per_expert_names(case: str, tmp_path: Path):
    model = tiny_model(case)
    model.save_pretrained(tmp_path)
    other = type(model)(model.config)
    result = other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert not result.missing_keys and not result.unexpected_keys
    assert all(tensor.equal(model.state_dict()[name]) for name, tensor in other.state_dict().items())
