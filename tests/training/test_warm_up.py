"""Routers learn, everything else keeps every bit, in memory and in files."""

import hashlib
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    FlexOlmoConfig,
    MixtralConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from hf_moe.testing import tiny_config
from hf_moe.training.warm_up import collate, next_token_loss, warm_up_folder, warm_up_routers, write_routers

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 32,
    "intermediate_size": 8,
    "num_experts_per_tok": 2,
    "initializer_range": 0.5,
    "pad_token_id": 0,
    "max_position_embeddings": 32,
}
MLA = {"q_lora_rank": 4, "kv_lora_rank": 4, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
DEEPSEEK = {"n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
CONFIGS = {
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4),
    "qwen2_moe": Qwen2MoeConfig(
        **SIZES, num_experts=4, moe_intermediate_size=8, shared_expert_intermediate_size=8, norm_topk_prob=True
    ),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, num_experts=4, moe_intermediate_size=8, norm_topk_prob=True),
    "flex_olmo": FlexOlmoConfig(**SIZES, num_experts=4, norm_topk_prob=True),
    "deepseek_v3": DeepseekV3Config(**SIZES, **MLA, **DEEPSEEK, moe_intermediate_size=8),
    "hf_moe": tiny_config("hf_moe", vocab_size=32),
    "bam": tiny_config("bam", vocab_size=32),
}


def model(case, dtype=torch.float32):
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(CONFIGS[case]).to(dtype)


def examples(count=16):
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(2, 12, (count,), generator=generator).tolist()
    return [{"input_ids": torch.randint(1, 32, (length,), generator=generator)} for length in lengths]


def is_router(name):
    return ".gate." in name and not name.startswith("shared") and "self_attn" not in name


def naive_loss(network, rows):
    """Mean cross-entropy of the next token, one row at a time in float64."""
    total, count = 0.0, 0
    with torch.no_grad():
        for row in rows:
            ids = row["input_ids"]
            logits = network(ids[None], use_cache=False).logits[0, :-1].double()
            total += F.cross_entropy(logits, ids[1:], reduction="sum").item()
            count += len(ids) - 1
    return total / count


@pytest.mark.parametrize("case", CONFIGS)
def test_only_routers_change_and_the_loss_falls(case):
    network, rows = model(case).eval(), examples()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    flags, returned = [p.requires_grad for p in network.parameters()], network.config.output_router_logits
    first = naive_loss(network, rows)
    result = warm_up_routers(network, rows, steps=8, learning_rate=3e-2, batch_size=8)
    changed = {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if is_router(name)}
    assert len(result["losses"]) == 8
    assert result["loss_before"] == pytest.approx(first, abs=1e-5)
    assert result["loss_after"] == pytest.approx(naive_loss(network, rows), abs=1e-5)
    assert result["loss_after"] < result["loss_before"]
    assert [p.requires_grad for p in network.parameters()] == flags and not network.training
    assert network.config.output_router_logits == returned


def test_the_balance_loss_takes_part():
    """The first step's loss is that of the tokens plus the coefficient times the stock balance loss of the batch."""
    rows, losses = examples(4), {}
    for coefficient in (0.0, 3.0):
        network = model("mixtral")
        network.config.router_aux_loss_coef = network.router_aux_loss_coef = coefficient
        losses[coefficient] = warm_up_routers(network, rows, steps=1, batch_size=4)["losses"][0]
    batch = collate([row["input_ids"].tolist() for row in rows])
    balance = model("mixtral")(**batch, output_router_logits=True).aux_loss.item()
    assert losses[0.0] == pytest.approx(naive_loss(model("mixtral"), rows), rel=1e-3)
    assert losses[3.0] - losses[0.0] == pytest.approx(3 * balance, rel=1e-3)


def test_narrow_routers_learn_in_float32():
    """One step of AdamW moves a weight by the learning rate: 5e-4 added to bfloat16 weights near 1 would be lost."""
    network = model("mixtral", torch.bfloat16)
    for layer in network.model.layers:
        layer.mlp.gate.weight.data.fill_(1)
        layer.mlp.gate.weight.data[::2] = -1
    before = network.state_dict()["model.layers.0.mlp.gate.weight"].clone()
    warm_up_routers(network, examples(), steps=20, learning_rate=5e-4, batch_size=2)
    after = network.state_dict()["model.layers.0.mlp.gate.weight"]
    assert after.dtype == torch.bfloat16 and not torch.equal(before, after)
    assert {parameter.dtype for parameter in network.parameters()} == {torch.bfloat16}


def test_a_seed_decides():
    results = []
    for seed in (0, 0, 1):
        network = model("mixtral")
        warm_up_routers(network, examples(), steps=2, batch_size=4, seed=seed)
        results.append(network.model.layers[1].mlp.gate.weight.detach())
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


@pytest.mark.parametrize("case", ["mixtral", "deepseek_v3", "hf_moe"])
def test_files_change_where_routers_are_and_nowhere_else(case, tmp_path):
    dtype = torch.bfloat16 if case == "mixtral" else torch.float32
    network = model(case, dtype)
    network.save_pretrained(tmp_path / "before", max_shard_size="8KB")
    shutil.copytree(tmp_path / "before", tmp_path / "after")
    result = warm_up_folder(tmp_path / "after", examples(), steps=2, learning_rate=1e-2)
    assert {"loss_before", "loss_after", "losses", "shards"} == result.keys()
    files = sorted(path.name for path in (tmp_path / "before").glob("*.safetensors"))
    assert len(files) > 1
    for file in files:
        old, new = (load_file(tmp_path / folder / file) for folder in ("before", "after"))
        assert old.keys() == new.keys()
        changed = {name for name in old if not torch.equal(old[name], new[name])}
        assert changed == {name for name in old if is_router(name)}
        assert (file in result["shards"]) == bool(changed)
    for file, sha256 in result["shards"].items():
        assert hashlib.sha256((tmp_path / "after" / file).read_bytes()).hexdigest() == sha256
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "after", dtype="auto")
    probe = [{"input_ids": row["input_ids"][None], "labels": row["input_ids"][None]} for row in examples()]
    assert next_token_loss(trained, probe) == pytest.approx(
        result["loss_after"], rel=2e-2 if case == "mixtral" else 1e-5
    )


def test_what_does_not_fit_is_refused(tmp_path):
    network = model("mixtral")
    network.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        name = next(key for key in file.keys() if ".gate." in key)  # noqa: SIM118 - not a dict
        old = file.get_tensor(name)
    with pytest.raises(ValueError, match=r"gate.weight' is \[4, 16\] F32, the trained router is \[4, 16\] BF16"):
        write_routers(network.to(torch.bfloat16), tmp_path)
    assert torch.equal(load_file(tmp_path / "model.safetensors")[name], old)
    with pytest.raises(ValueError, match=r"no file holds the router 'model.layers.0.mlp.gate.weight'"):
        write_routers(model("qwen3_moe"), tmp_path)
    with pytest.raises(ValueError, match="steps=0 must be at least 1"):
        warm_up_routers(network, examples(), steps=0)
    with pytest.raises(ValueError, match="nothing to predict"):
        warm_up_routers(network, [{"input_ids": [3]}], steps=1)
    blocks = {"d": {"mixer": {"type": "attention"}, "feed_forward": {"type": "mlp", "intermediate_size": 8}}}
    dense = AutoModelForCausalLM.from_config(tiny_config("hf_moe", blocks=blocks))
    with pytest.raises(ValueError, match="no routers that could be trained"):
        warm_up_routers(dense, examples(), steps=1)
