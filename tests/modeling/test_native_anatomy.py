"""Every native family that the table lists is built, run, and compared with what the table says."""

import re
import sys
from pathlib import Path

import pytest
import torch
import transformers

from hf_moe import moe_layers
from hf_moe.modeling import watch_routers
from hf_moe.modeling.anatomy import BLOCKS_OF_NATIVES
from hf_moe.modeling.expert_counts import counted_choices
from hf_moe.modeling.native_layouts import NATIVE, UNSUPPORTED, table

sys.path.insert(0, str(Path(__file__).parent))
from native_models import tiny_native

MODELS = Path(transformers.__file__).parent / "models"
NOISE = pytest.mark.allow_warnings("")  # families tell about their own missing kernels and tokens


@NOISE
@pytest.mark.parametrize("kind", sorted(set(NATIVE) - {"dbrx"}))
@torch.no_grad()
def test_the_table_says_what_runs(kind):
    model = tiny_native(kind)
    layers, calls, sent = [layer for layer in moe_layers(model) if not layer.name.endswith("vision_moe")], [], []
    assert layers
    handles = watch_routers(model, calls.append)
    for layer in layers:
        if layer.experts is not layer.module:
            handles.append(layer.experts.register_forward_pre_hook(lambda module, args: sent.append(args)))
    tokens = torch.randint(3, 60, (2, 5), generator=torch.Generator().manual_seed(0))
    options = {} if kind == "openai_privacy_filter" else {"use_cache": False}
    model(tokens, **options)
    assert [call.layer.name for call in calls] == [layer.name for layer in layers]
    for call in calls:
        layer, logits = call.layer, call.logits.float()
        choices = layer.num_experts + layer.num_zero_experts
        assert logits.shape == (10, choices) and call.indices.shape == (10, layer.top_k)
        assert call.context.shape == (2, 5)
        scores = logits.sigmoid() if layer.scoring == "sigmoid" else logits.softmax(-1)
        if layer.scoring == "score_fn":
            sigmoid = model.config.scoring_func == "sigmoid"
            scores = logits.sigmoid() if sigmoid else torch.nn.functional.softplus(logits).sqrt()
        if layer.scoring == "sparse_mixer":
            scores = sparse_mixer(logits, call.gate.router_jitter_noise)
        if layer.scoring == "softmax_selected":
            scores = torch.zeros_like(scores).scatter(1, call.indices, logits.gather(1, call.indices).softmax(-1))
        expected = scores.gather(1, call.indices)
        expected = expected / expected.sum(-1, keepdim=True) if layer.normalize else expected
        ratio = call.weights.float() / expected  # a family may scale them all
        same = ratio.mean() if kind != "inkling" else ratio.mean(1, keepdim=True)  # its shared experts take a part
        torch.testing.assert_close(ratio, same.expand_as(ratio), atol=1e-3, rtol=1e-3)
        if layer.selection_bias is not None:
            assert layer.selection_bias.shape == (choices,)
            ranking = (logits if kind == "kolibri1" else scores) + layer.selection_bias.float()
            assert torch.equal(ranking.topk(layer.top_k).indices.sort(-1).values, call.indices.sort(-1).values)
    for layer, args in zip([layer for layer in layers if layer.experts is not layer.module], sent):
        assert kind == "llama4" or args[1].shape[1] == layer.top_k, layer.name
    other = {"phimoe": 2, "longcat_flash": 3}.get(kind, 1)
    before = model.config.to_dict()
    learned = [layer for layer in layers if layer.learns_choice]
    kept = [layer.top_k for layer in learned[1:]]
    for layer in learned[:1]:
        layer.set_top_k(other)
    assert learned and [layer.top_k for layer in learned[1:]] == kept
    for layer in learned:
        layer.set_top_k(other)
    calls.clear()
    model(tokens, **options)
    assert calls and all(call.indices.shape == (10, other) for call in calls if call.layer.learns_choice)
    assert model.config.to_dict() == before
    for handle in handles:
        handle.remove()


SINGLE = ["mixtral", "gpt_oss", "jetmoe", "nemotron_h", "aria", "deepseek_v3", "hunyuan_v1_moe"]
SINGLE += ["dbrx", "llama4", "gemma4"]


def sparse_mixer(logits: torch.Tensor, jitter: float) -> torch.Tensor:
    """Phi-3.5-MoE's two weights, 0 for the others (GRIN, https://arxiv.org/abs/2409.12136): each the softmax over the
    logits near the largest that is left."""
    weights = torch.zeros_like(logits)
    for z, w in zip(logits, weights):
        left = z.clone()
        for _ in range(2):
            best = left.max()
            near = (best - z) / z.abs().clamp(min=best) <= 2 * jitter
            w[left.argmax()] = left.masked_fill(~near, -torch.inf).softmax(-1).max()
            left[left.argmax()] = -torch.inf
    return weights


@NOISE
@torch.no_grad()
def test_dbrx():
    """Its router cannot be watched, for its block makes the weights; the rest of the anatomy is there."""
    model, seen = tiny_native("dbrx"), []
    layers = list(moe_layers(model))
    for layer in layers:
        layer.experts.register_forward_pre_hook(lambda module, args: seen.append(args))
    tokens = torch.randint(3, 60, (2, 5), generator=torch.Generator().manual_seed(0))
    model(tokens, use_cache=False)
    for layer, (hidden, chosen, weights) in zip(layers, seen):
        scores = layer.gate(hidden).softmax(-1).gather(1, chosen)
        torch.testing.assert_close(weights, scores / scores.sum(-1, keepdim=True))
        layer.set_top_k(1)
    seen.clear()
    model(tokens, use_cache=False)
    assert [args[1].shape for args in seen] == [(10, 1)] * 2
    with pytest.raises(ValueError, match="DBRX's router returns logits only"):
        watch_routers(model, seen.append)


@NOISE
def test_layers_whose_choice_is_looked_up():
    first, second = moe_layers(tiny_native("deepseek_v4"))
    assert (first.learns_choice, second.learns_choice) == (False, True)
    with pytest.raises(ValueError, match="looks experts up by token"):
        first.set_top_k(1)
    assert first.selection_bias is None and second.selection_bias is not None


@NOISE
@torch.no_grad()
def test_weights_can_be_replaced():
    """Where a gate returns something of its own kind, what a watcher returns still reaches the experts."""
    for kind in ("llama4", "gemma4", "mixtral", "inkling"):
        model = tiny_native(kind)
        tokens = torch.randint(3, 60, (2, 5), generator=torch.Generator().manual_seed(0))
        run = lambda: model(tokens, use_cache=False).logits  # noqa: B023, E731
        expected = run()
        handles = watch_routers(model, lambda call: (call.logits, call.weights))
        torch.testing.assert_close(run(), expected, atol=1e-5, rtol=1e-5)
        handles += watch_routers(model, lambda call: (call.logits, call.weights * torch.tensor([1.0, 3.0])))
        assert (run() - expected).abs().max() > 1e-3
        for handle in handles:
            handle.remove()
        assert torch.equal(run(), expected)


@NOISE
@pytest.mark.parametrize(
    "kind",
    [
        "dbrx",
        "llama4",
        "gemma4",
        "mixtral",
        "gpt_oss",
        "jetmoe",
        "nemotron_h",
        "aria",
        "deepseek_v3",
        "hunyuan_v1_moe",
    ],
)
@torch.no_grad()
def test_one_expert_is_its_tensors(kind):
    """An expert's feed-forward from `expert_tensors`, against the layer that sends everything to it."""
    model = tiny_native(kind)
    layer = list(moe_layers(model))[-1]
    tensors = layer.expert_tensors(2)
    assert {name for name in tensors if not name.endswith("_bias")} == (
        {"gate_proj", "up_proj", "down_proj"} if layer.has_gate else {"up_proj", "down_proj"}
    )
    x = torch.randn(3, tensors["up_proj"].shape[1], generator=torch.Generator().manual_seed(0))
    if kind == "jetmoe":
        run = lambda: layer.module.output_linear(  # noqa: E731
            glu(layer.module.input_linear(x, [0, 0, 3, 0]), layer.module.activation), [0, 0, 3, 0]
        )
    else:
        run = lambda: layer.experts(x, torch.full((3, 1), 2), torch.ones(3, 1)).view(3, -1)  # noqa: E731
    if kind == "llama4":  # runs every expert on tokens that are sorted by expert
        run = lambda: layer.experts(x.repeat(4, 1)).view(4, 3, -1)[2]  # noqa: E731
    act = getattr(layer.experts, "act_fn", None) or getattr(layer.module, "activation", None)
    act = layer.experts.mlp.activation_fn if kind == "dbrx" else act
    for name in ("gate_up_proj_bias", "down_proj_bias"):
        if hasattr(layer.experts, name):
            getattr(layer.experts, name).zero_()
    up = x @ tensors["up_proj"].T
    if kind == "gpt_oss":
        gate, up = (x @ tensors["gate_proj"].T).clamp(max=7), up.clamp(-7, 7)
        hidden = (up + 1) * gate * torch.sigmoid(1.702 * gate)
    else:
        hidden = act(x @ tensors["gate_proj"].T) * up if layer.has_gate else act(up)
    torch.testing.assert_close(run(), hidden @ tensors["down_proj"].T, atol=1e-5, rtol=1e-4)
    tensors["down_proj"].zero_()  # a view: the model has changed
    assert not run().any()


def glu(hidden: torch.Tensor, act) -> torch.Tensor:
    gate, up = hidden.chunk(2, dim=-1)
    return act(gate) * up


def test_every_family_of_transformers_is_in_the_table():
    """Those whose experts go through the experts interface, and what else calls itself a mixture."""
    pattern = re.compile(r"use_experts_implementation|class \w*(SparseMoe|ParallelExperts|MoEBlock|MoE)\w*\(nn")
    found = {path.parent.name for path in MODELS.glob("*/modeling_*.py") if pattern.search(path.read_text())}
    assert found - set(NATIVE) - set(UNSUPPORTED) <= {"granite_docling", "vitpose_backbone"}  # no language mixtures
    assert not set(NATIVE) & set(UNSUPPORTED)
    assert all((MODELS / name).is_dir() for name in (*NATIVE, *UNSUPPORTED))


def test_the_documented_table_is_this_one():
    text = (Path(__file__).parents[2] / "docs" / "anatomy.md").read_text()
    assert table() in text


def test_what_is_not_supported_says_why():
    from hf_moe.modeling.anatomy import _check_type

    with pytest.raises(ValueError, match="'doge' are not supported: it retrieves experts by product keys"):
        _check_type("doge")
    with pytest.raises(ValueError, match="'llama' are not known; choose from our own types"):
        _check_type("llama")


@NOISE
def test_wrappers_hide_nothing():
    """PEFT around experts and routers, FSDP2's subclass of a block."""
    from peft import LoraConfig, get_peft_model

    model = tiny_native("gpt_oss")
    plain = list(moe_layers(model))
    expected = [(layer.transposed, layer.interleaved, layer.top_k, layer.num_experts) for layer in plain]
    assert expected[0][:2] == (True, True) and "gate_proj_bias" in plain[0].expert_tensors(0)
    stacks = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.router.weight"]
    wrapped = get_peft_model(model, LoraConfig(target_modules=[], target_parameters=stacks))
    found = [(layer.transposed, layer.interleaved, layer.top_k, layer.num_experts) for layer in moe_layers(wrapped)]
    assert found == expected
    mixtral = tiny_native("mixtral")
    for layer in list(moe_layers(mixtral)):
        layer.module.__class__ = type("FSDPMixtralSparseMoeBlock", (type(layer.module),), {})
    assert len(list(moe_layers(mixtral))) == 2


@NOISE
def test_wrappers_hide_no_selection_bias_and_nothing_of_ours():
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from hf_moe.testing import tiny_config

    def adapted(model, *names):
        return get_peft_model(model, LoraConfig(target_modules=[], target_parameters=list(names)))

    for layer in moe_layers(adapted(tiny_native("deepseek_v3"), "mlp.gate.weight")):
        assert layer.selection_bias is not None
    ours = adapted(AutoModelForCausalLM.from_config(tiny_config("hf_moe")), "mlp.gate.weight", "experts.gate_up_proj")
    assert [(layer.scoring, layer.num_experts) for layer in moe_layers(ours)] == [("softmax", 4)] * 2


def test_both_mixtures_of_a_composite_are_known():
    assert {"Qwen3OmniMoeTalkerTextSparseMoeBlock", "Dots3NoteVisionMoE"} <= set(BLOCKS_OF_NATIVES)


class TestErrors:
    def test_routers_without_a_number(self):
        from transformers import AutoModelForCausalLM

        from hf_moe.testing import tiny_config

        layer = next(moe_layers(AutoModelForCausalLM.from_config(tiny_config("dynamic_moe"))))
        with pytest.raises(ValueError, match="that TopP chooses cannot be set"):
            layer.set_top_k(1)

    @NOISE
    def test_groups(self):
        layer = next(moe_layers(tiny_native("deepseek_v3", n_group=2, topk_group=1)))
        layer.set_top_k(2)
        with pytest.raises(ValueError, match="top_k=3 must be 1 to 2"):
            layer.set_top_k(3)

    def test_numbers(self):
        layer = next(moe_layers(tiny_native("mixtral")))
        for top_k in (0, 5):
            with pytest.raises(ValueError, match=f"top_k={top_k} must be 1 to 4"):
                layer.set_top_k(top_k)


@torch.no_grad()
def test_choices_are_counted_where_the_block_holds_the_experts():
    model = tiny_native("jetmoe")
    with counted_choices(model) as counts:
        model(torch.arange(3, 9)[None], use_cache=False)
    assert list(counts) == [layer.name for layer in moe_layers(model)]
    assert all(count.sum() == 6 * 2 for count in counts.values())
