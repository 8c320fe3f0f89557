"""PST, R-AMT, ExSSNeT and ScaLearn against their formulas in float64, with all gradients."""

import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments

from hf_moe.tuning import (
    ExssnetConfig,
    PstConfig,
    RamtConfig,
    ScalearnConfig,
    SparsityRamp,
    copy_scores,
    gradient_dropout,
    nearest_task,
    regularized_backward,
    set_density,
    train_weights,
)
from hf_moe.tuning.expert_subset import expert_modules
from hf_moe.tuning.exssnet import Exssnet
from hf_moe.tuning.pst import Pst
from hf_moe.tuning.reweighted import Reweighted, most_important

sys.path.insert(0, str(Path(__file__).parent))
import adapters


class Two(nn.Module):
    """A linear layer, to hold an adapter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 5).double()
        self.config = {"model_type": "custom"}

    def forward(self, x):
        return self.layer(x)


def adapt(config) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    model = get_peft_model(Two(), config, autocast_adapter_dtype=False).double()
    adapters.disturb(model)
    x = torch.randn(7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return model, x, next(m for m in model.modules() if isinstance(m, Reweighted)).base_layer.weight.detach()


def top(scores: torch.Tensor, number: int) -> torch.Tensor:
    mask = torch.zeros_like(scores)
    for _ in range(number):
        i, j = divmod(int(scores.masked_fill(mask == 1, -torch.inf).argmax()), scores.shape[1])
        mask[i, j] = 1
    return mask


def test_pst():
    model, x, weight = adapt(
        PstConfig(r=2, target_modules=["layer"], sparsity=0.6, beta=0.7, alpha_1=0.5, alpha_2=2.0)
    )
    layer = next(m for m in model.modules() if isinstance(m, Pst))
    layer.set_sparsity(1.0)
    u, v, a, b, r, c = (layer.of(letter, "first")["default"] for letter in "UVABRC")
    new = weight + 0.7 * (u @ v)
    ones = torch.ones(6, dtype=torch.float64), torch.ones(5, dtype=torch.float64)
    scores = weight.abs() + 0.5 * a @ b + 2.0 * (r @ ones[0][None] + ones[1][:, None] @ c)
    mask = top(scores.detach(), round(0.4 * 30))
    assert mask.sum() == 12
    expected = x @ (new * mask).T + layer.base_layer.bias
    actual = model(x)
    torch.testing.assert_close(actual, expected)
    probe = torch.randn_like(actual)
    actual.backward(probe)
    to_weight = probe.T @ x  # dL/dW'
    to_scores = (to_weight * new).detach()
    gradients = {"U": 0.7 * (to_weight * mask) @ v.T, "V": 0.7 * u.T @ (to_weight * mask)}
    gradients |= {"A": 0.5 * to_scores @ b.T, "B": 0.5 * a.T @ to_scores}
    gradients |= {"R": 2.0 * to_scores.sum(1, keepdim=True), "C": 2.0 * to_scores.sum(0, keepdim=True)}
    for letter, gradient in gradients.items():
        torch.testing.assert_close(layer.of(letter, "first")["default"].grad, gradient.detach(), msg=letter)


def test_ramt():
    model, x, weight = adapt(RamtConfig(target_modules=["layer"]))
    values = model.base_model.model.layer.ramt_values_first["default"]
    mask = (values > 5e-3).double()
    assert 0 < mask.mean() < 1
    actual = model(x)
    torch.testing.assert_close(actual, x @ (weight * mask).T + model.base_model.model.layer.base_layer.bias)
    probe = torch.randn_like(actual)
    actual.backward(probe)
    torch.testing.assert_close(values.grad, (probe.T @ x) * weight)


def test_gradient_dropout():
    generator = torch.Generator().manual_seed(0)
    ce = torch.tensor([1.0, 1.0, -2.0, 0.5, 0.0]).expand(20_000, 5)
    kl = torch.tensor([3.0, -1.0, 1.0, -4.5, 1.0]).expand(20_000, 5)
    kept = gradient_dropout(ce, kl, 1.0, generator)
    for column, probability in enumerate((1.0, 0.5, 0.5 * (1 + 1 / 3), 0.5 * (1 - 4 / 5))):
        share = (kept[:, column] != 0).double().mean().item()
        assert abs(share - probability) < 0.02
    part = gradient_dropout(ce, kl, 0.3, generator)
    assert part[:, 3].unique().tolist() == pytest.approx([0.35, 0.5])
    w = nn.Parameter(torch.tensor([1.0, 2.0]))
    regularized_backward((w**2).sum(), (3 * w).sum(), [w, nn.Parameter(torch.ones(1), requires_grad=False)])
    assert torch.equal(w.grad, torch.tensor([2.0, 4.0]))  # they agree
    with pytest.raises(ValueError, match="level=2 must be between 0 and 1"):
        regularized_backward(w.sum(), w.sum(), [w], level=2)


def test_exssnet_finds_a_mask_then_trains_what_is_free():
    config = ExssnetConfig(target_modules=["layer"], density=0.4)
    model = get_peft_model(Two(), config, autocast_adapter_dtype=False).double()
    model.add_adapter("second", ExssnetConfig(target_modules=["layer"], density=0.5))
    plain, x = Two(), torch.randn(7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    layer = next(m for m in model.modules() if isinstance(m, Exssnet))
    weight, bias = layer.base_layer.weight.detach(), layer.base_layer.bias
    deltas, masks = {}, {}
    for name, density, earlier in (("default", 0.4, []), ("second", 0.5, ["default"])):
        model.set_adapter(name)
        torch.testing.assert_close(model(x), plain(x))  # identity at first
        set_density(model, density)
        scores, delta = (layer.of(what, "first")[name] for what in ("scores", "delta"))
        masks[name] = mask = top(scores.detach().abs(), round(density * 30))
        start = weight + deltas.get("default", 0)
        torch.testing.assert_close(model(x), x @ (weight * mask).T + bias)
        probe = torch.ones(7, 5, dtype=torch.float64)
        model(x).backward(probe)
        torch.testing.assert_close(scores.grad, (probe.T @ x) * weight * scores.detach().sign())
        assert not delta.grad.any()
        free = train_weights(model, name, earlier)
        taken = masks["default"].bool() if earlier else torch.zeros(5, 6, dtype=torch.bool)
        exclusive = mask.bool() & ~taken
        assert free == pytest.approx(exclusive.sum().item() / mask.sum().item())
        torch.testing.assert_close(model(x), x @ (start * mask).T + bias)  # what earlier tasks trained is there
        delta.grad = None
        model(x).backward(probe)
        torch.testing.assert_close(delta.grad, (probe.T @ x) * exclusive)
        with torch.no_grad():
            delta -= 0.1 * delta.grad
        deltas[name] = delta.detach().clone()
        model.set_adapter(name)  # PEFT lets all of an adapter learn again
        scores.grad = None
        model(x).backward(probe)
        assert scores.grad is None
    before = model(x)
    model.set_adapter("default")
    torch.testing.assert_close(model(x), x @ ((weight + deltas["default"]) * masks["default"]).T + bias)
    model.set_adapter("second")
    model.merge_adapter()
    torch.testing.assert_close(model(x), before)
    model.unmerge_adapter()
    assert torch.equal(layer.base_layer.weight, weight)
    copy_scores(model, "default", "second")
    assert torch.equal(*(layer.of("scores", "first")[name] for name in ("default", "second")))


def test_exssnet_in_trainer_and_from_files(tmp_path):
    """With a ramp, on experts and attention: what is saved is what was trained, and half of each matrix is 0."""
    network = adapters.base()
    names = ["q_proj", *expert_modules(network)]
    expected = adapters.logits(network)
    model = get_peft_model(network, ExssnetConfig(target_modules=names, density=0.5))
    torch.testing.assert_close(adapters.logits(model.eval()), expected)
    rows = [{"input_ids": row, "labels": row} for row in adapters.tokens().tolist()] * 4
    args = TrainingArguments(str(tmp_path / "run"), max_steps=6, learning_rate=2e-2, report_to="none", use_cpu=True,
                             disable_tqdm=True, save_strategy="no", logging_steps=1)  # fmt: skip
    Trainer(model, args, train_dataset=rows, callbacks=[SparsityRamp(0.0, 0.5)]).train()
    model.eval().save_pretrained(tmp_path / "saved")
    again = PeftModel.from_pretrained(adapters.base(), tmp_path / "saved").eval()
    assert torch.equal(adapters.logits(again), adapters.logits(model))
    for layer in model.modules():
        if isinstance(layer, Exssnet):
            for slot in layer.parts:
                assert (layer.mask("default", slot).mean((-2, -1)) - 0.5).abs().max() < 1e-6
    merged = model.merge_and_unload()
    torch.testing.assert_close(adapters.logits(merged), adapters.logits(again), atol=1e-5, rtol=1e-5)


def test_nearest_task():
    torch.manual_seed(0)
    labels = torch.arange(40) % 2
    apart, mixed = torch.randn(40, 3) + 10 * labels[:, None], torch.randn(40, 3)
    assert nearest_task({"mixed": mixed, "apart": apart}, labels) == "apart"


def test_ramp_by_the_cubic_law():
    model = adapters.adapted("pst", adapters.base(), seed=None)
    state = type("State", (), {"max_steps": 10, "global_step": 0})
    layer = next(m for m in model.modules() if isinstance(m, Pst))
    seen = []
    for state.global_step in range(10):
        SparsityRamp(0.2, 0.7).on_step_begin(None, state, None, model=model)
        seen.append(layer.pst_sparsity["default"].item())
    expected = [0.5 * (1 - (1 - min(max((t / 10 - 0.2) / 0.5, 0), 1)) ** 3) for t in range(10)]
    assert seen == pytest.approx(expected, abs=1e-6)
    with pytest.raises(ValueError, match="SparsityRamp is for PST and ExSSNeT"):
        SparsityRamp().on_train_begin(None, state, None, model=adapters.base())


def test_most_important_per_matrix():
    scores = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[9.0, 9.0], [9.0, 9.0]]])
    assert most_important(scores, 0.5).tolist() == [[[0, 0], [1, 1]], [[1, 1], [0, 0]]]


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_scalearn(uniform, shared, tmp_path):
    """The output is the base's and each source's own, scaled; the number of parameters is the paper's."""
    network = adapters.base()
    sources = adapters.trained_sources(network)
    names = ["q_proj", "o_proj"]
    wrapped = get_peft_model(network, ScalearnConfig(sources=sources, uniform=uniform, shared=shared))
    outputs = [getattr(network.model.layers[0].self_attn, name).base_layer.out_features for name in names]
    expected = len(names) if uniform else sum(outputs)
    trained = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    assert trained == 2 * (1 if uniform and shared else expected if shared else 2 * expected)
    adapters.disturb(wrapped)
    wrapped.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(adapters.base(), tmp_path)
    assert torch.equal(adapters.logits(again), adapters.logits(wrapped))
    for name, layer in wrapped.named_modules():
        if hasattr(layer, "scalearn_w"):
            x = torch.randn(3, layer.base_layer.in_features, generator=torch.Generator().manual_seed(1))
            expected = layer.base_layer(x).double()
            w = layer.owners["default"][0].scalearn_w["default"]
            for number, source in enumerate(sources):
                alone = PeftModel.from_pretrained(adapters.base(), source).get_submodule(
                    name.replace("model.base_", "")
                )
                expected = expected + w[number].double() * (alone(x) - layer.base_layer(x)).double()
            torch.testing.assert_close(layer(x).double(), expected, atol=1e-5, rtol=1e-5)


def test_after_deleting_and_merging():
    """ScaLearn's buffers are no adapters; merging twice is merging once; a ramp to the end of training ends."""
    wrapped = adapters.adapted("scalearn", adapters.base())
    wrapped.add_adapter("other", adapters.KINDS["scalearn"](adapters.base()))
    wrapped.set_adapter("other")
    wrapped.delete_adapter("other")
    wrapped.set_adapter("default")
    expected = adapters.logits(adapters.adapted("scalearn", adapters.base()))
    torch.testing.assert_close(adapters.logits(wrapped), expected)
    masked = adapters.adapted("ramt", adapters.base())
    expected = adapters.logits(masked)
    masked.merge_adapter()
    torch.testing.assert_close(adapters.logits(masked.merge_and_unload()), expected, atol=1e-5, rtol=1e-5)
    model = adapters.adapted("pst", adapters.base(), seed=None)
    state = type("State", (), {"max_steps": 3, "global_step": 3})
    SparsityRamp(0.0, 1.0).on_step_end(None, state, None, model=model)
    assert next(m for m in model.modules() if isinstance(m, Pst)).pst_sparsity["default"] == 0.5


class TestErrors:
    def test_options(self):
        for config, match in (
            (lambda: PstConfig(sparsity=1.0), r"sparsity=1.0 at least 0 and below 1"),
            (lambda: RamtConfig(initial=1e-3), r"initial=0.001 must be above threshold=0.005"),
            (lambda: ExssnetConfig(density=0), "density=0 must be above 0"),
            (lambda: ScalearnConfig(), "sources is empty"),
            (lambda: SparsityRamp(0.5, 0.5), r"start=0.5 and end=0.5"),
        ):
            with pytest.raises(ValueError, match=match):
                config()

    def test_sources(self, tmp_path):
        adapters.adapted("hydra", adapters.base()).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="HydraLoraConfig is no plain LoRA"):
            get_peft_model(adapters.base(), ScalearnConfig(sources=[str(tmp_path)]))

    def test_quantised(self):
        network = adapters.base()
        experts = next(iter(expert_modules(network).values()))
        experts.gate_up_proj = nn.Parameter(experts.gate_up_proj.data.to(torch.int8), requires_grad=False)
        with pytest.raises(ValueError, match="are quantised"):
            get_peft_model(network, RamtConfig(target_modules=list(expert_modules(network))))
