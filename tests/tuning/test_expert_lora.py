"""LoRA on some experts: PEFT's numbers where PEFT can, the formula where it cannot, at a cost that grows with them."""

import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hf_moe.tuning import ExpertLoraConfig, lora_config
from hf_moe.tuning.expert_lora import ExpertLora
from hf_moe.tuning.expert_subset import expert_modules

sys.path.insert(0, str(Path(__file__).parent))
import adapters
from adapters import base, logits


def layers(model) -> list[ExpertLora]:
    return [module for module in model.modules() if isinstance(module, ExpertLora)]


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "hf_moe", "gpt_oss"])
def test_all_experts_give_pefts_own_numbers(kind):
    """Same matrices: outputs and gradients of PEFT's `target_parameters`."""
    stacks = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    stock = get_peft_model(base(kind), LoraConfig(r=3, lora_alpha=5, target_modules=[], target_parameters=stacks))
    network = base(kind)
    everyone = dict.fromkeys(expert_modules(network))
    config = ExpertLoraConfig(r=3, lora_alpha=5, target_modules=list(everyone), experts=everyone)
    ours = get_peft_model(network, config)
    adapters.disturb(ours)
    wrappers = {name: module for name, module in stock.named_modules() if hasattr(module, "parameter_name")}
    for layer in layers(ours):
        for stack, a, b in layer.pairs():
            wrapper = next(
                module
                for name, module in wrappers.items()
                if layer.layer_name in name and module.parameter_name == stack
            )
            first, second = a["default"].data, b["default"].data
            wrapper.lora_A["default"].weight.data = first.flatten(0, 1).clone()
            wrapper.lora_B["default"].weight.data = second.permute(1, 2, 0).flatten(1).clone()
    found, expected = (model(adapters.tokens(), labels=adapters.tokens(), use_cache=False) for model in (ours, stock))
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-5, rtol=1e-4)
    found.loss.backward(), expected.loss.backward()
    for layer in layers(ours):
        for stack, a, b in layer.pairs():
            wrapper = next(m for n, m in wrappers.items() if layer.layer_name in n and m.parameter_name == stack)
            expected_a = wrapper.lora_A["default"].weight.grad.view_as(a["default"])
            torch.testing.assert_close(a["default"].grad, expected_a, atol=1e-5, rtol=1e-4)
            shape = b["default"].permute(1, 2, 0).shape
            expected_b = wrapper.lora_B["default"].weight.grad.view(shape).permute(2, 0, 1)
            torch.testing.assert_close(b["default"].grad, expected_b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "hf_moe"])
def test_a_subset_is_the_model_with_those_matrices_changed(kind):
    """By hand: `W + s B A` written into the stacks of a plain model."""
    network, plain = base(kind), base(kind)
    wrapped = get_peft_model(
        network,
        lora_config(network, [1, 3], attention=False, shared_experts=False, rank=2, lora_alpha=3, verbose=False),
    )
    adapters.disturb(wrapped)
    wrapped.eval()
    stacks = dict(expert_modules(plain))
    for layer in layers(wrapped):
        for stack, a, b in layer.pairs():
            weight = getattr(stacks[layer.layer_name], stack)
            for row, expert in enumerate([1, 3]):
                delta = 3 / 2 * (b["default"][row] @ a["default"][row])
                weight.data[expert] += delta.T.data if kind == "gpt_oss" else delta.data
    torch.testing.assert_close(logits(wrapped), logits(plain), atol=1e-5, rtol=1e-5)


def test_a_token_that_chose_no_adapted_expert_is_untouched():
    network = base("mixtral")
    expected = logits(network)
    chosen = []
    handle = network.model.layers[0].mlp.gate.register_forward_hook(lambda m, a, output: chosen.append(output[2]))
    logits(network)
    handle.remove()
    wrapped = get_peft_model(
        network, lora_config(network, {1: [2]}, attention=False, shared_experts=False, verbose=False)
    )
    adapters.disturb(wrapped)
    gate = wrapped.base_model.model.model.layers[1].mlp.gate
    gate.register_forward_hook(lambda m, a, output: chosen.append(output[2]))
    difference = (logits(wrapped) - expected).abs().amax(-1).flatten()
    used = (chosen[-1] == 2).any(-1)
    assert used.any() and not used.all()
    assert (difference[used] > 1e-4).all() and (difference[~used] < 1e-5).all()


def test_nobody_routed_gives_gradients_of_zero():
    """A missing gradient would stop data-parallel training."""
    network = base()
    config = lora_config(network, [0], attention=False, shared_experts=False, verbose=False)
    for module in expert_modules(network).values():
        module.register_forward_pre_hook(lambda m, args: (args[0], args[1].clamp(min=1), *args[2:]))
    wrapped = get_peft_model(network, config)
    for layer in layers(wrapped):
        layer.register_forward_pre_hook(lambda m, args: (args[0], args[1].clamp(min=1), *args[2:]))
    wrapped(adapters.tokens(), labels=adapters.tokens()).loss.backward()
    grads = [p.grad for p in wrapped.parameters() if p.requires_grad]
    assert grads and all(grad is not None and not grad.any() for grad in grads)


def test_dropout_acts_in_training_only():
    network = base()
    wrapped = get_peft_model(network, lora_config(network, [0, 1], attention=False, lora_dropout=0.5, verbose=False))
    adapters.disturb(wrapped)
    assert torch.equal(logits(wrapped.eval()), logits(wrapped))
    wrapped.train()
    assert not torch.equal(logits(wrapped), logits(wrapped))


def test_parameters_grow_with_the_number_of_experts():
    def trained(experts) -> int:
        network = base()
        config = lora_config(network, experts, attention=False, shared_experts=False, rank=4, verbose=False)
        return get_peft_model(network, config).get_nb_trainable_parameters()[0]

    assert trained([0, 1]) == 2 * trained([0]) and trained([0, 1, 2, 3]) == 4 * trained([2])


def test_no_stack_is_materialised():
    """What autograd keeps for the backward pass holds no matrix of the whole stack but the base's own."""
    network = base("qwen3_moe")
    wrapped = get_peft_model(network, lora_config(network, [0], attention=False, verbose=False))
    stacks = {p.untyped_storage().data_ptr() for n, p in wrapped.named_parameters() if n.endswith("_proj")}
    sizes = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in stacks:
            sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        wrapped(adapters.tokens()[:1, :2], use_cache=False)
    assert max(sizes) < 4 * 32 * 32


class TestErrors:
    @pytest.mark.parametrize(
        "options,message",
        [
            ({"experts": "some"}, "experts='some' is unknown"),
            ({"experts": [4]}, r"experts=\[4\] of .* must be some of 0 to 3"),
            ({"experts": {9: [1]}}, "layer 9, which has no experts; MoE layers are"),
            ({"rank": 0}, "rank=0 must be at least 1"),
            ({"rank_per_layer": {7: 2}}, "layer 7; the model has 0 to 1"),
            ({"experts": "none", "attention": False}, "adapt nothing"),
            ({"experts": [1], "router": True, "lora_dropout": 0.1}, "exclude each other"),
            ({"experts": [1], "use_dora": True}, "use_dora=True is not possible"),
        ],
    )
    def test_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            lora_config(base(), verbose=False, **options)

    def test_quantised_experts(self):
        network = base()
        for module in expert_modules(network).values():
            module.gate_up_proj = torch.nn.Parameter(module.gate_up_proj.to(torch.int8), requires_grad=False)
        with pytest.raises(ValueError, match=r"quantised \(torch.int8\): load the base model in bfloat16"):
            lora_config(network, [0], verbose=False)

    def test_dense_models(self):
        network = base("deepseek_v3")
        network.config.first_k_dense_replace = 2
        dense = type(network)(network.config)
        with pytest.raises(ValueError, match=r"has no MoE layers: use peft\.LoraConfig"):
            lora_config(dense)


def test_the_coverage_is_printed(capsys):
    lora_config(base("deepseek_v3"), [0, 3], router=False)
    text = capsys.readouterr().out
    for words in ("ExpertLoraConfig, rank 8", "2 of 4 experts", "router", "frozen", "linear layers: mixer"):
        assert words in text, text


def test_every_linear_layer_is_either_adapted_or_named(capsys):
    """A kind that is left out is in the table with `0 of n`."""
    network = base("deepseek_v3")
    config = lora_config(network, "all", attention=False)
    assert "0 of" in capsys.readouterr().out
    wrapped = get_peft_model(network, config)
    adapted = {name.split(".lora_")[0] for name, p in wrapped.named_parameters() if p.requires_grad}
    assert adapted and not any("self_attn" in name for name in adapted)
    assert any("shared_experts" in name for name in adapted)
    assert any("layers.0.mlp.gate_proj" in name for name in adapted)  # PEFT by itself drops these
    assert any("mlp.experts" in name for name in adapted)


@pytest.mark.parametrize("kind", ["mixtral", "olmoe"])
def test_without_dense_feed_forwards_it_is_pefts_own_config(kind):
    network = base(kind)
    assert type(lora_config(network, verbose=False)) is LoraConfig
    assert type(lora_config(network, experts="none", verbose=False)) is LoraConfig


def test_it_is_at_hand():
    import hf_moe

    assert hf_moe.lora_config is lora_config
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        hf_moe.nothing  # noqa: B018
