"""ESFT: the scores by the paper's formulas, the published lists, and experts that train alone."""

import json
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from hf_moe import moe_layers
from hf_moe.tuning import EsftConfig, esft_config, load_selection, save_selection, score_experts, select_experts

sys.path.insert(0, str(Path(__file__).parent))
import adapters
from adapters import adapted, base, logits

PUBLISHED = Path(__file__).parents[3] / "shared" / "data" / "esft"
# layer 1 of the published token scores for translation would be data of others; these are made up, to four digits
EXAMPLE = ([0.02, 0.09, 0.05, 0.11, 0.01], 0.2, [3, 1])


def naive(scores: list[float], top_p: float) -> list[int]:
    """Word by word: go through the experts in descending order until the sum reaches p."""
    order = sorted(range(len(scores)), key=lambda expert: (-scores[expert], expert))
    for number in range(1, len(order) + 1):
        if sum(scores[expert] for expert in order[:number]) >= top_p:
            return order[:number]
    return order


@settings(deadline=None)
@given(st.lists(st.integers(0, 64), min_size=1, max_size=16), st.integers(1, 64))
def test_the_selection_is_the_naive_one(counts, threshold):
    scores = [count / 64 for count in counts]  # sums without rounding
    assert select_experts(scores, threshold / 64) == naive(scores, threshold / 64)
    assert select_experts(EXAMPLE[0], EXAMPLE[1]) == EXAMPLE[2]


@pytest.mark.skipif(not PUBLISHED.exists(), reason="the published scores are not in this repository")
@pytest.mark.parametrize("task", ["intent", "law", "summary", "translation"])
def test_the_published_lists(task):
    scores = load_file(PUBLISHED / f"esft_golden_{task}.safetensors")["token_scores_shipped"]
    lists = json.loads((PUBLISHED / f"esft_golden_{task}.json").read_text())["shipped_config"]["experts"]
    assert len(lists) == len(scores) == 26
    for number, row in enumerate(scores, start=1):
        assert set(select_experts(row, 0.2)) == set(lists[str(number)])


@pytest.mark.parametrize("by", ["token", "gate"])
@pytest.mark.parametrize("kind", ["qwen3_moe", "deepseek_v3", "mixtral", "hf_moe"])
def test_the_scores_by_hand(kind, by):
    """Padding on both sides does not count."""
    model, rows = base(kind), [torch.arange(3, 12), torch.arange(20, 25)]
    batch = torch.zeros(2, 9, dtype=torch.long)
    batch[0], batch[1, 2:7] = rows[0], rows[1]
    mask = (batch != 0).long()
    found = score_experts(model, [{"input_ids": batch, "attention_mask": mask, "labels": batch}], by)
    expected = {layer.name: torch.zeros(layer.num_experts, dtype=torch.float64) for layer in moe_layers(model)}
    for layer in moe_layers(model):

        def add(module, args, output, name=layer.name):
            weights, indices = (output.weights, output.indices) if hasattr(output, "indices") else output[1:3]
            for token in mask.flatten().nonzero():
                for weight, expert in zip(weights[token[0]], indices[token[0]]):
                    expected[name][expert] += weight.item() if by == "gate" else 1 / indices.shape[1]

        layer.gate.register_forward_hook(add)
    with torch.no_grad():
        model(batch, attention_mask=mask)
    for name, scores in expected.items():
        torch.testing.assert_close(found[name], scores / mask.sum(), atol=1e-7, rtol=1e-6)
        assert by == "gate" or found[name].sum().item() == pytest.approx(1)


def test_from_scores_to_an_adapter_that_trains_only_those(tmp_path):
    model = base("deepseek_v3")
    scores = score_experts(model, [{"input_ids": adapters.tokens()}])
    config = esft_config(model, scores, top_p=0.4)
    assert config.experts == {
        f"{name}.experts": sorted(select_experts(values, 0.4)) for name, values in scores.items()
    }
    from peft import get_peft_model

    number = sum(map(len, config.experts.values()))
    wrapped = get_peft_model(model, config)
    assert wrapped.get_nb_trainable_parameters()[0] == number * 3 * 16 * 32
    assert all(".esft_" in name for name, p in wrapped.named_parameters() if p.requires_grad)


def test_the_published_format(tmp_path):
    model, chosen = base(), {"model.layers.1.mlp.experts": [2, 0]}
    save_selection(chosen, tmp_path / "task.json")
    assert json.loads((tmp_path / "task.json").read_text()) == {
        "experts": {"1": [2, 0]},
        "shared_experts": False,
        "non_expert_modules": False,
    }
    assert load_selection(model, tmp_path / "task.json") == chosen
    assert not list(tmp_path.glob("*.tmp"))
    for content, message in (
        ({"expert": {}}, "has no object 'experts'"),
        ({"experts": {"7": [0]}}, "layer 7 is no MoE"),
    ):
        (tmp_path / "bad.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            load_selection(model, tmp_path / "bad.json")


def test_the_trained_matrices_are_used():
    """By hand: the same matrices written into a plain model."""
    wrapped, plain = adapted("esft", base()), base()
    for layer, original in zip(
        (m for m in wrapped.modules() if type(m).__name__ == "EsftExperts"),
        (layer.experts for layer in moe_layers(plain)),
    ):
        original.gate_up_proj.data[[0, 2]] = layer.esft_in["default"].data
        original.down_proj.data[[0, 2]] = layer.esft_out["default"].data
    torch.testing.assert_close(logits(wrapped), logits(plain), atol=1e-5, rtol=1e-5)


class TestErrors:
    def test_scores(self):
        with pytest.raises(ValueError, match="by='weight' is unknown"):
            score_experts(base(), [], by="weight")
        with pytest.raises(ValueError, match="batches are empty"):
            score_experts(base(), [])
        for top_p in (0, 1.5):
            with pytest.raises(ValueError, match=f"top_p={top_p} must be above 0"):
                select_experts([0.5], top_p)

    def test_names(self):
        with pytest.raises(ValueError, match="There is no MoE layer 'x'"):
            esft_config(base(), {"x": torch.ones(4)})

    def test_ids(self):
        from peft import get_peft_model

        with pytest.raises(ValueError, match=r"must be some of 0 to 3"):
            get_peft_model(base(), EsftConfig(experts={"model.layers.1.mlp.experts": [4]}))
