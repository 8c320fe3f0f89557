"""JetMoE is Transformers' own; what `import hf_moe` mends of it."""

import torch
from transformers import JetMoeConfig, JetMoeForCausalLM

import hf_moe  # noqa: F401 - mends it

IDS = torch.arange(24).view(2, 12)


def model() -> JetMoeForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "kv_channels": 8, "num_key_value_heads": 2, "vocab_size": 64}
    config = JetMoeConfig(num_hidden_layers=2, num_local_experts=4, num_experts_per_tok=2, aux_loss_coef=0.5, **sizes)
    return JetMoeForCausalLM(config)


def test_each_router_counts_once_in_the_balance_loss():
    """E sum_e f_e P_e over all routers' rows (Switch, eq. 4-6), each of the four routers once."""
    jetmoe, heard = model().eval(), []
    gates = [module for name, module in jetmoe.named_modules() if name.endswith(".router")]
    for gate in gates:
        gate.register_forward_hook(lambda module, inputs, output: heard.append(output[4].double()))
    outputs = jetmoe(IDS, labels=IDS, output_router_logits=True)
    assert len(gates) == len(outputs.router_logits) == 4
    probabilities = torch.cat(heard).softmax(-1)
    chosen = torch.zeros_like(probabilities).scatter(1, probabilities.topk(2).indices, 1)
    expected = 4 * (chosen.mean(0) * probabilities.mean(0)).sum()
    torch.testing.assert_close(outputs.aux_loss.double(), expected)
    plain = jetmoe(IDS, labels=IDS).loss
    torch.testing.assert_close(outputs.loss, plain + 0.5 * outputs.aux_loss)


def test_checkpointing_gives_the_same_gradients():
    gradients = []
    for reentrant in (None, True, False):
        jetmoe = model().train()
        if reentrant is not None:
            jetmoe.activation_checkpointing_enable({"use_reentrant": reentrant})
        jetmoe(IDS, labels=IDS, use_cache=False).loss.backward()
        gradients.append([parameter.grad for parameter in jetmoe.parameters()])
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0])


def test_the_weight_of_the_loss_has_its_usual_name():
    config = model().config
    assert config.router_aux_loss_coef == 0.5
    assert config.num_experts == 4
    config.router_aux_loss_coef = 0.25
    assert config.aux_loss_coef == 0.25 and "router_aux_loss_coef" not in config.to_dict()
