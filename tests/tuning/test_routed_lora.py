"""Routed adapters against their formulas in float64, token by token, and against each other where they coincide."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import Gemma3nTextConfig, LlamaConfig, LlamaForCausalLM
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nTextMLP

from hf_moe.modeling.router_calls import CurrentRows
from hf_moe.tuning import HydraLoraConfig, MixLoraConfig, MolaConfig, SmoraBalancing, SmoraConfig, set_accumulation
from hf_moe.tuning.mix_lora import MixLora, feed_forwards
from hf_moe.tuning.smora import Smora

sys.path.insert(0, str(Path(__file__).parent))
import adapters

WIDTH, OUT, N = 6, 5, 7


class Toy(nn.Module):
    """One linear layer and one feed-forward, in float64."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(WIDTH, OUT)
        self.mlp = nn.Module()
        self.mlp.gate_proj, self.mlp.up_proj = nn.Linear(WIDTH, 4, bias=False), nn.Linear(WIDTH, 4, bias=False)
        self.mlp.down_proj, self.mlp.act_fn = nn.Linear(4, WIDTH, bias=False), nn.SiLU()
        self.mlp.forward = lambda x: self.mlp.down_proj(F.silu(self.mlp.gate_proj(x)) * self.mlp.up_proj(x))


def layer(config, target: str = "linear"):
    """An adapted layer of the toy, trained so to say, in float64; PEFT itself is tested elsewhere."""
    from hf_moe.tuning.hydra_lora import HydraLora
    from hf_moe.tuning.mola import Mola

    kinds = {"SMORA": Smora, "HYDRA_LORA": HydraLora, "MOLA": Mola, "MIX_LORA": MixLora}
    toy = Toy()
    made = kinds[config.peft_type.value](getattr(toy, target), f"layers.1.{target}", CurrentRows())
    made._active_adapter = ["default"]
    made.update_layer("default", config)
    made.double()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in made.named_parameters():
        if "default" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator).double()
    return made.eval()


def compare(made, formula) -> None:
    """Outputs, and the gradients of everything that trains and of the input."""
    x = torch.randn(N, WIDTH, generator=torch.Generator().manual_seed(2)).double().requires_grad_()
    parameters = [p for name, p in made.named_parameters() if "default" in name]
    weights = torch.randn(N, made(x).shape[-1], generator=torch.Generator().manual_seed(3)).double()
    found, expected = made(x), torch.stack([formula(token) for token in x])
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)
    found_grads = torch.autograd.grad((found * weights).sum(), [x, *parameters])
    expected_grads = torch.autograd.grad((expected * weights).sum(), [x, *parameters])
    assert all(grad.any() for grad in expected_grads)
    for actual, wanted in zip(found_grads, expected_grads):
        torch.testing.assert_close(actual, wanted, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_smora(scoring):
    made = layer(SmoraConfig(r=4, lora_alpha=3, top_k=2, scoring=scoring))
    a, b, gate = (getattr(made, f"smora_{name}")["default"] for name in ("A", "B", "gate"))
    made.smora_bias["default"] = bias = torch.tensor([0.5, 0, -0.5, 0.1]).double()

    def formula(x):
        z = gate @ x
        scores = z.sigmoid() if scoring == "sigmoid" else z.softmax(0)
        ranks = sorted(range(4), key=lambda i: -(z[i] + bias[i]).item())[:2]
        total = sum(z[i].exp() for i in ranks)
        y = made.base_layer(x)
        for i in ranks:
            m = scores[i] if scoring == "sigmoid" else z[i].exp() / total
            y = y + 3 / 4 * b[:, i] * m * (a[i] @ x)
        return y

    compare(made, formula)


def test_hydra_lora():
    made = layer(HydraLoraConfig(r=2, lora_alpha=5, num_experts=3))
    a, b, gate = (getattr(made, f"hydra_{name}")["default"] for name in ("A", "B", "gate"))

    def formula(x):
        w = (gate @ x).softmax(0)
        return made.base_layer(x) + 5 / 2 * sum(w[i] * (b[i] @ (a @ x)) for i in range(3))

    compare(made, formula)


def test_mola():
    made = layer(MolaConfig(r=2, lora_alpha=5, num_experts=[2, 4], num_layers=2))
    a, b, gate = (getattr(made, f"mola_{name}")["default"] for name in ("A", "B", "gate"))
    assert len(a) == 4

    def formula(x):
        p = (gate @ x).softmax(0)
        chosen = sorted(range(4), key=lambda i: -p[i].item())[:2]
        total = sum(p[i] for i in chosen)
        return made.base_layer(x) + 5 / 2 * sum(p[i] / total * (b[i] @ (a[i] @ x)) for i in chosen)

    compare(made, formula)


def test_mix_lora():
    made = layer(MixLoraConfig(r=2, lora_alpha=3, num_experts=3, top_k=2), "mlp")
    router = made.lora_router["default"]
    base = made.base_layer

    def matrix(name: str, expert: int) -> torch.Tensor:
        a, b = made.matrices(name)
        return getattr(base, name).weight + 3 / 2 * b["default"][expert] @ a["default"][expert]

    def formula(x):
        z = router @ x
        chosen = sorted(range(3), key=lambda i: -z[i].item())[:2]
        weights = torch.stack([z[i] for i in chosen]).softmax(0)
        y = 0
        for weight, i in zip(weights, chosen):
            hidden = F.silu(matrix("gate_proj", i) @ x) * (matrix("up_proj", i) @ x)
            y = y + weight * (matrix("down_proj", i) @ hidden)
        return y

    compare_float32_router(made, formula)


def compare_float32_router(made, formula) -> None:
    """The router computes in float32, so the tolerance is its."""
    x = torch.randn(N, WIDTH, generator=torch.Generator().manual_seed(2)).double()
    parameters = [p for name, p in made.named_parameters() if "default" in name]
    found, expected = made(x), torch.stack([formula(token) for token in x])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(3)).double()
    found_grads = torch.autograd.grad((found * weights).sum(), parameters)
    expected_grads = torch.autograd.grad((expected * weights).sum(), parameters)
    for actual, wanted in zip(found_grads, expected_grads):
        assert wanted.any()
        torch.testing.assert_close(actual, wanted, atol=1e-4, rtol=1e-4)


def test_smora_with_block_gates_is_a_mixture_of_lora_experts():
    """n experts of rank q are n q ranks whose gates are equal within blocks: MoLA's mixture, or MixLoRA's in a linear
    layer (the paper's equivalence)."""
    experts, rank = 3, 2
    mola = layer(MolaConfig(r=rank, lora_alpha=rank, num_experts=[experts], top_k=2))
    smora = layer(SmoraConfig(r=experts * rank, lora_alpha=experts * rank, top_k=2 * rank))
    smora.smora_A["default"].data = mola.mola_A["default"].data.flatten(0, 1)
    smora.smora_B["default"].data = mola.mola_B["default"].data.transpose(0, 1).flatten(1)
    # every rank of a block has its expert's logit; softmax over 2 q equal pairs is 1 / q of that over 2 experts
    smora.smora_gate["default"].data = mola.mola_gate["default"].data.repeat_interleave(rank, 0)
    x = torch.randn(N, WIDTH, generator=torch.Generator().manual_seed(2)).double()
    blocks, plain = mola(x) - mola.base_layer(x), smora(x) - smora.base_layer(x)
    torch.testing.assert_close(plain * rank, blocks, atol=1e-10, rtol=1e-10)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))


def test_mix_lora_makes_a_mixture_of_a_dense_model():
    network = llama()
    config = MixLoraConfig(r=2, target_modules=["q_proj", *feed_forwards(network)], router_aux_loss_coef=0.5)
    wrapped = get_peft_model(network, config)
    mixtures = [module for module in wrapped.modules() if isinstance(module, MixLora)]
    assert len(mixtures) == 2 and "lora_A" in dict(
        wrapped.base_model.model.model.layers[0].self_attn.q_proj.named_children()
    )
    wrapped.train()(adapters.tokens(), labels=adapters.tokens()).loss.backward()
    assert all(m.lora_router["default"].grad.abs().sum() > 0 for m in mixtures)  # only the balance loss: B is 0


@pytest.mark.parametrize("kind", ["mola", "mix_lora", "smora"])
def test_the_balance_loss_is_switchs_without_padding(kind):
    """The router's gradient before B has learnt anything is the balance loss's alone."""

    def gradient(coef: float, padded: bool, steps: int = 1) -> torch.Tensor:
        config = {
            "mola": MolaConfig(r=2, target_modules=["q_proj"], num_experts=[5], router_aux_loss_coef=coef),
            "mix_lora": MixLoraConfig(r=2, target_modules=["model.layers.0.mlp"], router_aux_loss_coef=coef),
            "smora": SmoraConfig(r=8, top_k=2, target_modules=["q_proj"], router_aux_loss_coef=coef),
        }[kind]
        torch.manual_seed(0)
        wrapped = get_peft_model(llama(), config).train()
        set_accumulation(wrapped, steps)
        ids = adapters.tokens()
        if padded:
            ids = torch.cat([ids, torch.zeros(2, 4, dtype=torch.long)], 1)
        wrapped(ids, attention_mask=(ids != 0).long()).logits.sum().mul(0).backward()
        name = "lora_router" if kind == "mix_lora" else "_gate"
        return next(p.grad for n, p in wrapped.named_parameters() if name in n)

    one = gradient(1.0, padded=False)
    assert one.abs().max() > 1e-6
    torch.testing.assert_close(gradient(1.0, padded=True), one, atol=1e-7, rtol=1e-4)
    torch.testing.assert_close(gradient(3.0, padded=False, steps=4), one * 3 / 4, atol=1e-7, rtol=1e-4)


def test_smora_balances_its_ranks_without_a_loss():
    torch.manual_seed(0)
    wrapped = get_peft_model(llama(), SmoraConfig(r=4, top_k=1, target_modules=["q_proj"])).train()
    callback = SmoraBalancing(0.25)
    callback.on_train_begin(None, None, None, wrapped)
    ids = torch.cat([adapters.tokens(), torch.zeros(2, 3, dtype=torch.long)], 1)
    wrapped(ids, attention_mask=(ids != 0).long())
    made = next(module for module in wrapped.modules() if isinstance(module, Smora))
    loads = made.loads["default"]
    assert loads.sum() == adapters.tokens().numel()
    callback.on_optimizer_step(None, None, None, wrapped)
    expected = 0.25 * (loads.mean() - loads).sign()
    assert torch.equal(made.smora_bias["default"], expected) and expected.any() and not made.loads
    with pytest.raises(ValueError, match="no SMoRA adapter"):
        callback.on_train_begin(None, None, None, llama())


@pytest.mark.parametrize("kind", ["smora", "hydra", "mola", "mix_lora"])
def test_adapters_come_and_go(kind, tmp_path):
    wrapped = adapters.adapted(kind, adapters.base(adapters.home(kind)))
    first = adapters.logits(wrapped)
    wrapped.save_pretrained(tmp_path)
    spare = PeftModel.from_pretrained(adapters.base(adapters.home(kind)), tmp_path, low_cpu_mem_usage=True).eval()
    assert torch.equal(adapters.logits(spare), first)
    wrapped.add_adapter("other", adapters.KINDS[kind](adapters.base(adapters.home(kind))))
    wrapped.set_adapter("other")
    adapters.logits(wrapped.train())
    with pytest.warns(UserWarning, match="Setting active adapter to default"):
        wrapped.delete_adapter("other")
    assert torch.equal(adapters.logits(wrapped.eval()), first)
    SmoraBalancing().on_optimizer_step(None, None, None, wrapped)  # counts of a deleted adapter are gone
    assert not any(module._forward_pre_hooks for module in wrapped.unload().modules())


@pytest.mark.parametrize("kind", ["smora", "hydra", "mola", "mix_lora"])
def test_transformers_own_interface(kind, tmp_path):
    network = adapters.base(adapters.home(kind))
    plain = adapters.logits(network)
    network.add_adapter(adapters.KINDS[kind](network))
    adapters.disturb(network)
    trained = adapters.logits(network.eval())
    network.save_pretrained(tmp_path)
    loaded = adapters.base(adapters.home(kind))
    loaded.load_adapter(tmp_path)
    assert torch.equal(adapters.logits(loaded.eval()), trained)
    loaded.disable_adapters()
    torch.testing.assert_close(adapters.logits(loaded), plain, atol=1e-5, rtol=1e-5)


def test_the_bias_of_smora_is_saved_in_float32(tmp_path):
    torch.manual_seed(0)
    config = SmoraConfig(r=4, top_k=1, target_modules=["q_proj"])
    wrapped = get_peft_model(llama().bfloat16(), config, autocast_adapter_dtype=False)
    made = next(module for module in wrapped.modules() if isinstance(module, Smora))
    made.smora_bias["default"] += torch.tensor([1.0, 1.001, 2.002, 0])
    wrapped.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path)
    loaded = next(module for module in again.modules() if isinstance(module, Smora))
    assert torch.equal(loaded.smora_bias["default"], torch.tensor([1.0, 1.001, 2.002, 0]))


def test_mix_lora_finds_the_feed_forwards():
    wrapped = get_peft_model(llama(), MixLoraConfig(r=2))
    assert sum(isinstance(module, MixLora) for module in wrapped.modules()) == 2
    assert {
        "q_proj",
        "v_proj",
        "model.layers.0.mlp",
        "model.layers.1.mlp",
    } == wrapped.active_peft_config.target_modules


def test_layers_of_mola():
    config = MolaConfig(num_experts=[2, 4, 6, 8], num_layers=32)
    assert [config.experts_in(layer) for layer in (0, 7, 8, 16, 31)] == [2, 2, 4, 6, 8]


class TestErrors:
    @pytest.mark.parametrize(
        "config,options,message",
        [
            (SmoraConfig, {"top_k": 9, "r": 8}, r"top_k=9 must be 1 to 8 \(r\)"),
            (SmoraConfig, {"scoring": "tanh"}, "scoring='tanh' is unknown"),
            (HydraLoraConfig, {"num_experts": 0}, "num_experts=0 must be at least 1"),
            (HydraLoraConfig, {"router_aux_loss_coef": 0.1}, "no load to balance"),
            (MolaConfig, {"num_experts": [1, 2]}, "top_k=2 must be 1 to 1"),
            (MolaConfig, {"num_experts": [2, 4]}, "need num_layers"),
            (MixLoraConfig, {"top_k": 9}, r"top_k=9 must be 1 to 8 \(num_experts\)"),
            (MixLoraConfig, {"use_dora": True}, "not possible in MixLoRA"),
            (MolaConfig, {"r": 0}, "r=0 must be at least 1"),
        ],
    )
    def test_options(self, config, options, message):
        with pytest.raises(ValueError, match=message):
            config(**options)

    def test_merging(self):
        for kind in ("smora", "hydra", "mola", "mix_lora"):
            with pytest.raises(ValueError, match="it cannot be merged"):
                adapters.adapted(kind, adapters.base(adapters.home(kind))).merge_and_unload()

    @pytest.mark.parametrize("targets", ["all-linear", ["q_proj"]])
    def test_no_feed_forward(self, targets):
        with pytest.raises(ValueError, match=r"no dense feed-forward.*plain LoRA: add some of \['model.layers.0.mlp'"):
            get_peft_model(llama(), MixLoraConfig(target_modules=targets))

    def test_parts_of_a_feed_forward(self):
        with pytest.raises(ValueError, match=r"and parts of it, \['model.layers.0.mlp.up_proj'"):
            get_peft_model(llama(), MixLoraConfig(target_modules=["mlp", "up_proj"]))

    def test_a_feed_forward_with_another_formula(self):
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
        odd = Gemma3nTextMLP(Gemma3nTextConfig(**sizes, activation_sparsity_pattern=[0.5]), 0)
        with pytest.raises(ValueError, match=r"'mlp' \(Gemma3nTextMLP\) does not compute down_proj"):
            MixLora(odd, "mlp", CurrentRows())

    def test_targets(self):
        with pytest.raises(ValueError, match="no linear layer: leave it out of target_modules"):
            get_peft_model(llama(), MolaConfig(target_modules=["embed_tokens"]))
        quantised = llama()
        weight = quantised.model.layers[0].self_attn.q_proj
        weight.weight = nn.Parameter(weight.weight.to(torch.int8), requires_grad=False)
        with pytest.raises(ValueError, match=r"quantised \(torch.int8\): load the base model in bfloat16"):
            get_peft_model(quantised, MolaConfig(target_modules=["q_proj"]))
