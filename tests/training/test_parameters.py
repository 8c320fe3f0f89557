"""What trains, how fast, and in what precision."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import Trainer

from hf_moe import moe_layers
from hf_moe.modeling import watch_routers
from hf_moe.training import GroupedAdamW, group_of_each, parameter_groups, routers_in_fp32, train_only

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "conversion")]
import balance
import invariance

KINDS = ["qwen3_moe", "deepseek_v3", "mixtral", "hf_moe", "rmoe", "moa"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_is_in_the_group_of_its_name(kind):
    model = balance.model(kind) if kind == "moa" else invariance.network(kind)
    found = group_of_each(model)
    assert found.keys() == dict(model.named_parameters()).keys()
    for name, group in found.items():
        if ".experts." in name:
            assert group == "experts"
        elif "shared_expert" in name:
            assert group == "shared_experts"
        elif "embed_tokens" in name or "lm_head" in name:
            assert group == "embeddings"
        elif "norm" in name and ".gate." not in name:
            assert group in ("norms", "attention_experts")
        elif ".gate." in name:
            assert group == "router", name
        else:
            assert group in ("dense", "attention_experts") or (
                group == "norms" and name.endswith(("bias_ih", "bias_hh", "bias"))
            )
    assert ("attention_experts" in found.values()) == (kind == "moa")


@pytest.mark.parametrize("group", ["router", "experts", "embeddings", "norms", "dense"])
def test_only_what_is_asked_for_moves(group):
    model = invariance.network("deepseek_v3")
    counts = train_only(model, group)
    found = group_of_each(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    args = balance.arguments(1, learning_rate=0.1)
    Trainer(model, args, balance.default_data_collator, train_dataset=invariance.padded()).train()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and {found[name] for name in moved} == {group}
    assert counts == {group: sum(p.numel() for n, p in model.named_parameters() if found[n] == group)}


def test_learning_rates_per_group_in_trainer():
    """One step of SGD-like size: AdamW moves every number by its group's learning rate."""
    model = invariance.network("qwen3_moe")
    found = group_of_each(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rates = {"router": 1e-3, "experts": 1e-2}
    factory = (GroupedAdamW, {"lr": 1e-4, "learning_rates": rates, "eps": 1e-30})
    args = balance.arguments(1, lr_scheduler_type="constant")
    trainer = Trainer(
        model,
        args,
        balance.default_data_collator,
        train_dataset=invariance.padded(),
        optimizer_cls_and_kwargs=factory,
    )
    trainer.train()
    for name, p in model.named_parameters():
        assert (p - before[name]).abs().max().item() == pytest.approx(rates.get(found[name], 1e-4), rel=0.05), name


def test_what_has_one_dimension_does_not_decay():
    groups = parameter_groups(balance.model("hf_moe"), 1e-3, weight_decay=0.1)
    assert {group["weight_decay"] for group in groups} == {0.0, 0.1}
    for group in groups:
        assert all((p.dim() > 1) == (group["weight_decay"] > 0) for p in group["params"])
    model = balance.model("hf_moe")
    assert sum(len(g["params"]) for g in parameter_groups(model, 1e-3)) == len(list(model.parameters()))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", ["qwen3_moe", "deepseek_v3", "hf_moe", "rmoe"])
def test_routers_compute_in_float32(kind, autocast, tmp_path):
    model = invariance.network(kind).to(torch.bfloat16)
    routers_in_fp32(model)
    seen, inputs, weights = [], [], []
    for layer in moe_layers(model):
        layer.gate.register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
        layer.experts.register_forward_pre_hook(lambda m, args: weights.append(args[2]))
    watch_routers(model, seen.append)
    ids = torch.arange(3, 12)[None]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model.train()(ids, labels=ids, use_cache=False)
        output.loss.backward()
    assert output.logits.dtype == torch.bfloat16 and {tensor.dtype for tensor in weights} == {torch.bfloat16}
    for call, tokens in zip(seen, inputs):
        assert call.logits.dtype == tokens.dtype == torch.float32
        if kind in ("qwen3_moe", "hf_moe"):
            torch.testing.assert_close(call.logits, tokens @ call.gate.weight.T, atol=1e-6, rtol=1e-6)
        assert all(p.grad.dtype == torch.float32 for p in call.gate.parameters() if p.grad is not None)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for layer in moe_layers(again) for p in layer.gate.parameters())


def test_small_steps_are_not_lost():
    """What the option is for: 200 steps of 1e-4 on a weight of 1 are nothing in bfloat16."""
    for widen in (False, True):
        model = invariance.network("mixtral").to(torch.bfloat16)
        if widen:
            routers_in_fp32(model)
        weight = next(moe_layers(model)).gate.weight
        weight.data.fill_(1.0)
        optimizer = torch.optim.SGD([weight], lr=1e-4)
        for _ in range(200):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        assert weight.mean().item() == pytest.approx(0.98 if widen else 1.0, abs=1e-3)


class TestErrors:
    def test_groups(self):
        model = invariance.network("mixtral")
        with pytest.raises(
            ValueError, match=r"got \['shared_experts'\]; MixtralForCausalLM has \['router', 'experts'"
        ):
            train_only(model, "shared_experts")
        with pytest.raises(ValueError, match="got no group"):
            train_only(model)
        train_only(model, "router")
        with pytest.raises(ValueError, match=r"names \['experts'\], of which nothing trains"):
            parameter_groups(model, 1e-3, {"experts": 1e-4})
