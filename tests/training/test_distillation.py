"""Distillation against formulas in float64, whatever the accumulation; slimming removes what does not matter."""

import copy
import sys
import types
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import Trainer

from hf_moe import moe_layers
from hf_moe.training import Distillation, Distills, LoadBalancing, TwoPasses, neuron_sensitivity, slim_experts
from hf_moe.training.slimming import top_token_loss

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "conversion")]
import balance
import invariance
from mixture_models import mixture_model

DATA = invariance.padded()
FEATURES = {"layers": [(1, 1), (2, 2)], "feature_coef": 0.3}
WIDER = {"hidden_size": 48, "intermediate_size": 16}


class DistillingTrainer(Distills, Trainer):
    pass


def teacher(**settings) -> torch.nn.Module:
    return mixture_model("mixtral", seed=5, num_hidden_layers=2, vocab_size=256, **settings)


def exact(network) -> torch.nn.Module:
    """In float64, for which the grouped kernel is not made."""
    network.set_experts_implementation("eager")
    return network.double()


def gradients(distillation: Distillation, taught, accumulation: int = 1, trl=None) -> balance.Gradients:
    """Of one optimizer step of a student, under Trainer or SFTTrainer."""
    student, keep = invariance.network("qwen3_moe"), balance.KeepGradients()
    cls, config, extra = DistillingTrainer, balance.TrainingArguments, {}
    if trl is not None:
        from trl import SFTConfig, SFTTrainer

        cls, config = types.new_class("Mixed", (Distills, SFTTrainer)), SFTConfig
        extra = {"activation_checkpointing": False, "bf16": False, "router_aux_loss_coef": 0.0}
        extra["dataset_kwargs"] = {"skip_prepare_dataset": True}
    args = balance.arguments(accumulation, cls=config, logging_steps=1, **extra)
    options = {"processing_class": trl} if trl is not None else {}
    trainer = cls(
        student,
        args,
        data_collator=balance.default_data_collator,
        train_dataset=DATA,
        callbacks=[keep],
        teacher=taught,
        distillation=distillation,
        **options,
    )
    trainer.train()
    entry = next(e for e in trainer.state.log_history if "loss" in e)
    assert entry["distillation_loss"] > 0 and (entry["feature_loss"] > 0 if distillation.layers else True)
    return keep.gradients


def by_formula(settings: Distillation, taught) -> balance.Gradients:
    """Row by row, without padding, in float64."""
    student, taught = exact(invariance.network("qwen3_moe")), exact(copy.deepcopy(taught))
    number, total = 0, 0.0
    for ids in invariance.sequences():
        s = student(ids[None], use_cache=False, output_hidden_states=True)
        with torch.no_grad():
            t = taught(ids[None], use_cache=False, output_hidden_states=True)
        s_log, t_log = (x.logits[0, :-1].div(settings.temperature).log_softmax(-1) for x in (s, t))
        p, q = s_log.exp(), t_log.exp()
        kinds = {
            "forward_kl": (q * (t_log - s_log)).sum(),
            "reverse_kl": (p * (s_log - t_log)).sum(),
            "symmetric_kl": ((p - q) * (s_log - t_log)).sum() / 2,
            "jensen_shannon": ((q * (t_log - ((p + q) / 2).log())) + (p * (s_log - ((p + q) / 2).log()))).sum() / 2,
        }
        ce = -s.logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None]).sum()
        total = total + settings.lm_coef * ce
        total = total + settings.distillation_coef * settings.temperature**2 * kinds[settings.divergence]
        for i, j in settings.layers or []:
            a, b = s.hidden_states[i][0, :-1], t.hidden_states[j][0, :-1]
            if settings.feature_loss == "mse":
                loss = ((a - b) ** 2).mean(-1).sum()
            elif settings.feature_loss == "cosine":
                loss = (1 - (a * b).sum(-1) / a.norm(dim=-1) / b.norm(dim=-1)).sum()
            else:
                grams = [x @ x.T / x.norm(dim=-1)[:, None] / x.norm(dim=-1)[None] for x in (a, b)]
                loss = ((grams[0] - grams[1]) ** 2).mean(-1).sum()
            total = total + settings.feature_coef * loss / len(settings.layers)
        number += len(ids) - 1
    (total / number).backward()
    return {name: p.grad for name, p in student.named_parameters() if p.grad is not None}


CASES = {
    "mimic": (Distillation(lm_coef=0.0), {}, 1),
    "mimic_sparse": (Distillation(temperature=2.0), {}, 4),
    "reverse": (Distillation("reverse_kl", distillation_coef=0.7), {}, 8),
    "js": (Distillation("jensen_shannon", lm_coef=0.2, feature_loss="cosine", **FEATURES), {}, 4),
    "mse": (Distillation("symmetric_kl", **FEATURES), {}, 4),
    "similarity": (Distillation(feature_loss="similarity", **FEATURES), WIDER, 4),
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_formula(case):
    settings, sizes, accumulation = CASES[case]
    taught = teacher(**sizes)
    actual, expected = gradients(settings, taught, accumulation), by_formula(settings, taught)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name].double(), gradient, atol=3e-5, rtol=1e-3, msg=name)


@pytest.mark.allow_warnings("new PAD/BOS/EOS tokens")
def test_in_sft_trainer(tokenizer):
    settings, taught = CASES["mimic_sparse"][0], teacher()
    actual, expected = gradients(settings, taught, 2, trl=tokenizer), by_formula(settings, taught)
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name].double(), gradient, atol=3e-5, rtol=1e-3, msg=name)


def test_two_passes_agree_with_thors_formula():
    """The same trained by the model itself, under Trainer."""
    own = balance.model("thor")
    coefficient = own.config.consistency_loss_coef
    torch.manual_seed(3)
    expected = balance.with_trainer(own, DATA, 4)
    other = balance.model("thor")
    from hf_moe.modeling.model import DecoderForCausalLM

    other.forward = types.MethodType(DecoderForCausalLM.forward, other)  # one pass
    cls = types.new_class("Mixed", (TwoPasses, Trainer), exec_body=lambda ns: ns.update(consistency_coef=coefficient))
    other.config.model_type = "other"
    torch.manual_seed(3)
    actual = balance.with_trainer(other, DATA, 4, cls=cls)
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.allow_warnings("new PAD/BOS/EOS tokens")
def test_preference_with_the_teacher_as_reference(tokenizer):
    """LLaVA-MoD's last stage is DPO whose reference model is the teacher: TRL's own trainer does it."""
    from trl import DPOConfig, DPOTrainer

    tokenizer.add_tokens(["a", "b", "c", "d", "e"])
    rows = [{"prompt": "a b", "chosen": " c d", "rejected": " e"}, {"prompt": "b", "chosen": " a", "rejected": " d d"}]
    student, taught = invariance.network("qwen3_moe"), teacher()
    extra = {"router_aux_loss_coef": 0.0, "activation_checkpointing": False, "bf16": False}
    args = balance.arguments(4, cls=DPOConfig, beta=0.1, logging_steps=1, **extra)
    trainer = DPOTrainer(
        student,
        ref_model=taught,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[LoadBalancing("switch", coef=0.0)],
    )
    before = copy.deepcopy(student).eval()

    def log_likelihood(model, prompt: str, answer: str) -> torch.Tensor:
        prompts = tokenizer(prompt).input_ids
        ids = torch.tensor(prompts + tokenizer(answer).input_ids + [tokenizer.eos_token_id])
        log = model.eval()(ids[None], use_cache=False).logits[0, :-1].double().log_softmax(-1)
        return log.gather(1, ids[1:, None]).squeeze(1)[len(prompts) - 1 :].sum()

    margins = []
    with torch.no_grad():
        for row in rows:
            of = {
                (m, k): log_likelihood(model, row["prompt"], row[k])
                for m, model in enumerate((before, taught))
                for k in ("chosen", "rejected")
            }
            margins.append(of[0, "chosen"] - of[1, "chosen"] - of[0, "rejected"] + of[1, "rejected"])
    expected = -torch.nn.functional.logsigmoid(0.1 * torch.stack(margins)).mean()
    trainer.train()
    logged = next(e["loss"] for e in trainer.state.log_history if "loss" in e)
    assert abs(logged - expected) < 2e-4


NARROW = ["qwen3_moe", "mixtral", "deepseek_v3", "qwen2_moe", "gpt_oss", "hf_moe"]


def model(kind: str) -> torch.nn.Module:
    if kind == "gpt_oss":
        sys.path.insert(0, str(Path(__file__).parents[1] / "tuning"))
        import adapters

        return adapters.base("gpt_oss")
    return (mixture_model(kind) if kind == "qwen2_moe" else invariance.network(kind)).eval()


def batches() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[0, 5:] = 0
    return [{"input_ids": torch.randint(3, 60, (2, 8), generator=generator), "attention_mask": mask} for _ in range(2)]


@pytest.mark.parametrize("kind", NARROW)
def test_dead_neurons_go_first(kind):
    """Half of the neurons of each expert write nothing: what is left computes the same, from saved files too."""
    network = model(kind)
    layers = list(moe_layers(network))
    for layer in layers:
        for expert in range(layer.num_experts):
            down = layer.expert_tensors(expert)["down_proj"]
            down[:, torch.randperm(down.shape[1], generator=torch.Generator().manual_seed(expert))[::2]] = 0
        if kind == "deepseek_v3":
            layer.shared_experts.down_proj.weight.data[:, ::2] = 0
    found = neuron_sensitivity(network, network, batches())
    for name, score in found.items():
        assert (score == 0).float().mean() >= 0.5 or ("shared" in name and kind == "qwen2_moe"), name
    old = layers[0].expert_tensors(0)["down_proj"].shape[1]
    slim = slim_experts(network, old // 2, found)
    assert next(iter(moe_layers(slim))).expert_tensors(0)["down_proj"].shape[1] == old // 2
    for batch in batches():
        with torch.no_grad():
            expected, actual = (m(**batch, use_cache=False).logits for m in (network, slim))
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_slim_models_save(tmp_path):
    network = model("deepseek_v3")
    slim = slim_experts(network, 5, neuron_sensitivity(network, network, batches()))
    slim.save_pretrained(tmp_path)
    again = type(network).from_pretrained(tmp_path)
    assert again.config.moe_intermediate_size == 5
    for name, tensor in slim.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_sensitivity_is_the_change_by_removal():
    """To first order: against the loss with each neuron scaled down and up a little."""
    network, taught = exact(model("mixtral")), exact(teacher())
    batch = batches()[0]
    kept = {name: p.requires_grad for name, p in network.named_parameters()}
    found = neuron_sensitivity(network, taught, [batch])
    assert kept == {name: p.requires_grad for name, p in network.named_parameters()}
    assert not any(p.grad is not None for p in network.parameters())
    name, step = next(iter(found)), 1e-2
    down = network.get_submodule(name).down_proj
    for expert, neuron in ((0, 1), (1, 3), (3, 0)):
        losses, whole = [], down[expert, :, neuron].detach().clone()
        for factor in (1 - step, 1 + step):
            with torch.no_grad():
                down[expert, :, neuron] = factor * whole
                losses.append(top_token_loss(network, taught, batch).item())
                down[expert, :, neuron] = whole
        change = abs(losses[1] - losses[0]) / (2 * step)
        assert change == pytest.approx(found[name][expert, neuron].item(), rel=1e-2, abs=1e-5)


class TestErrors:
    def test_settings(self):
        with pytest.raises(ValueError, match="divergence='kl' is unknown; choose from"):
            Distillation("kl")
        with pytest.raises(ValueError, match=r"layers=None and feature_coef=1.0 need each other"):
            Distillation(feature_coef=1.0)
        with pytest.raises(ValueError, match=r"must be 0 to 2 of the student and 0 to 2"):
            gradients(Distillation(layers=[(3, 1)], feature_coef=1.0), teacher())

    def test_models(self):
        with pytest.raises(ValueError, match="vocab_size is 256 in the student and 64 in the teacher"):
            gradients(Distillation(), mixture_model("mixtral", num_hidden_layers=1, vocab_size=64))
        with pytest.raises(ValueError, match="hidden_size is 32 in the student and 48"):
            gradients(Distillation(**FEATURES), teacher(**WIDER))

    def test_slimming(self):
        network = model("mixtral")
        with pytest.raises(ValueError, match="batches is empty"):
            neuron_sensitivity(network, network, [])
        with pytest.raises(ValueError, match=r"missing: \['model.layers.0"):
            slim_experts(network, 4, {})
