"""Adapters per expert are the same function as those of stacks, and come back bit for bit."""

import json
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from hf_moe import lora_config, moe_layers
from hf_moe.tuning import (
    EsftConfig,
    ExpertLoraConfig,
    ExpertWeave,
    export_adapter,
    export_esft,
    import_adapter,
    import_esft,
    save_selection,
)
from hf_moe.tuning.expert_subset import expert_modules

sys.path.insert(0, str(Path(__file__).parent))
import adapters

KINDS = ["qwen3_moe", "mixtral", "deepseek_v3", "olmoe", "hf_moe"]
NAMES = {"gate_proj": ("gate_proj", "w1"), "up_proj": ("up_proj", "w3"), "down_proj": ("down_proj", "w2")}


def make(kind: str, folder: Path, form: str, **options) -> tuple[torch.nn.Module, Path]:
    """A base, and a folder with an adapter that has been trained, so to say."""
    model = adapters.base(kind)
    if form == "stock":
        names = [n for n, m in model.named_modules() if any(m is layer.experts for layer in moe_layers(model))]
        targets = [
            f"{name}.{stack}" for name in names for stack in options.pop("order", ("gate_up_proj", "down_proj"))
        ]
        config = LoraConfig(r=3, lora_alpha=5, target_modules=["o_proj"], target_parameters=targets, **options)
    else:
        config = lora_config(model, [0, 2] if form == "subset" else "all", rank=3, verbose=False, **options)
    wrapped = get_peft_model(model, config)
    adapters.disturb(wrapped)
    wrapped.save_pretrained(folder / "saved")
    return adapters.base(kind), folder / "saved"


def deltas_of_files(folder: Path) -> dict[tuple[int, int, str], torch.Tensor]:
    """(layer, expert, projection) -> s B A in float64, read as an engine would: one rank and one alpha for all."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and not config["rank_pattern"] and not config["target_parameters"]
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    tensors, found = load_file(folder / "adapter_model.safetensors"), {}
    for key, a in tensors.items():
        if ".experts." in key and key.endswith("lora_A.weight"):
            parts = key.split(".")
            at = parts.index("experts")
            name = next(n for n, others in NAMES.items() if parts[at + 2] in others)
            assert parts[at + 2] in config["target_modules"] and a.shape[0] == config["r"]
            b = tensors[key.replace("lora_A", "lora_B")]
            layer = next(int(p) for p in parts if p.isdecimal())
            found[layer, int(parts[at + 1]), name] = scale * b.double() @ a.double()
    return found


def deltas_of_merging(model, folder: Path) -> dict[tuple[int, int, str], torch.Tensor]:
    """The same as what merging adds to the weights."""
    model = model.double()
    model.set_experts_implementation("eager")

    def weights() -> dict:
        return {
            (int(layer.name.split(".")[2]), expert, name): tensor.clone()
            for layer in moe_layers(model)
            for expert in range(layer.num_experts)
            for name, tensor in layer.expert_tensors(expert).items()
        }

    before = weights()
    PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=False).double().merge_and_unload()
    return {key: tensor - before[key] for key, tensor in weights().items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["subset", "all", "stock"])
def test_deltas_are_those_of_merging(kind, form, tmp_path):
    model, saved = make(kind, tmp_path, form)
    out = export_adapter(saved, tmp_path / "out", model.config, fill=form == "subset" and kind == "olmoe")
    actual, expected = deltas_of_files(out), deltas_of_merging(model, saved)
    assert actual.keys() <= expected.keys()
    if form != "subset":
        assert actual.keys() == expected.keys()
    for key, delta in expected.items():
        found = actual.get(key, torch.zeros_like(delta))
        torch.testing.assert_close(found, delta, atol=1e-6, rtol=1e-6, msg=str(key))
    assert {expert for _, expert, _ in actual} == ({0, 2} if form == "subset" and kind != "olmoe" else set(range(4)))


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_is_bit_exact(kind, tmp_path):
    model, saved = make(kind, tmp_path, "subset")
    back = import_adapter(export_adapter(saved, tmp_path / "out", model), tmp_path / "back", model)
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (saved, back))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    loaded = [PeftModel.from_pretrained(adapters.base(kind), folder) for folder in (saved, back)]
    assert torch.equal(*map(adapters.logits, loaded))


@pytest.mark.parametrize("form", ["subset", "stock"])
def test_ranks_and_scales_that_differ(form, tmp_path):
    """One rank and one alpha in the export; B carries the rest."""
    options = {"use_rslora": True}
    if form == "subset":
        options["rank_per_layer"] = {1: 5}
    else:
        options |= {
            "alpha_pattern": {"o_proj": 11},
            "rank_pattern": {"o_proj": 6},
            "order": ("down_proj", "gate_up_proj"),
        }
    model, saved = make("qwen3_moe", tmp_path, form, **options)
    out = export_adapter(saved, tmp_path / "out", model)
    expected = deltas_of_merging(adapters.base("qwen3_moe"), saved)
    for key, delta in deltas_of_files(out).items():
        torch.testing.assert_close(delta, expected[key], atol=1e-6, rtol=1e-5)
    back = import_adapter(out, tmp_path / "back", model)
    loaded = [PeftModel.from_pretrained(adapters.base("qwen3_moe"), folder) for folder in (saved, back)]
    torch.testing.assert_close(*map(adapters.logits, loaded), atol=1e-5, rtol=1e-5)


STOCK = {"r": 3, "lora_alpha": 5, "target_modules": ["o_proj"]}
PATTERNS = {
    "endings": lambda names: LoraConfig(**STOCK, target_parameters=["gate_up_proj", "experts.down_proj"]),
    "alpha": lambda names: LoraConfig(**STOCK, target_parameters=both(names), alpha_pattern={"down_proj": 20}),
    "rank": lambda names: LoraConfig(**STOCK, target_parameters=both(names), rank_pattern={"down_proj": 6}),
    "regex": lambda names: ExpertLoraConfig(
        experts={name: [0, 2] for name in names},
        target_modules=[*names, "q_proj"],
        alpha_pattern={r".*layers\.1\.mlp\.experts": 30, "q_proj": 7},
        rank_pattern={r".*layers\.0.*": 5},
    ),
}


def both(names: list[str]) -> list[str]:
    return [f"{name}.{stack}" for name in names for stack in ("gate_up_proj", "down_proj")]


@pytest.mark.parametrize("kind", PATTERNS)
def test_patterns_and_endings(kind, tmp_path):
    """Ranks and scales per parameter, targets by their endings, as PEFT understands them."""
    model = adapters.base("olmoe")
    wrapped = get_peft_model(model, PATTERNS[kind](list(expert_modules(model))))
    adapters.disturb(wrapped)
    wrapped.save_pretrained(tmp_path / "saved")
    plain = adapters.base("olmoe")
    back = import_adapter(export_adapter(tmp_path / "saved", tmp_path / "out", plain), tmp_path / "back", plain)
    again = PeftModel.from_pretrained(plain, back).eval()
    torch.testing.assert_close(adapters.logits(again), adapters.logits(wrapped.eval()), atol=2e-5, rtol=1e-5)


def test_adapters_trained_elsewhere(tmp_path):
    """Gate and up with A's of their own, a projection missing: exact at twice the rank."""
    model, saved = make("qwen3_moe", tmp_path, "subset")
    out = export_adapter(saved, tmp_path / "out", model)
    file = out / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if "experts.2.up_proj.lora_A" in key)
    tensors[key] = torch.randn_like(tensors[key])
    for side in "AB":
        del tensors[next(key for key in tensors if f"experts.0.down_proj.lora_{side}" in key)]
    save_file(tensors, file)
    expected = deltas_of_files(out)
    back = import_adapter(out, tmp_path / "back", model)
    actual = deltas_of_merging(adapters.base("qwen3_moe"), back)
    for key, delta in actual.items():
        torch.testing.assert_close(delta, expected.get(key, torch.zeros_like(delta)), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "deepseek_v3", "hf_moe"])
def test_esft_files(kind, tmp_path):
    """Per-expert matrices are the rows that merging writes; import undoes export, bit for bit."""
    wrapped = adapters.adapted("esft", adapters.base(kind))
    wrapped.save_pretrained(tmp_path / "saved")
    model = adapters.base(kind)
    out = export_esft(tmp_path / "saved", tmp_path / "out", model.config)
    tensors = load_file(out / "model.safetensors")
    merged = wrapped.merge_and_unload()
    for layer in moe_layers(merged):
        for expert in (0, 2):
            for name, matrix in layer.expert_tensors(expert).items():
                number = layer.name.split(".")[2]
                ends = [f".{number}.mlp.experts.{expert}.{name}.weight"]
                ends += [f".{number}.block_sparse_moe.experts.{expert}.{n}.weight" for n in NAMES[name]]
                assert torch.equal(next(t for key, t in tensors.items() if key.endswith(tuple(ends))), matrix)
    assert len(tensors) == 2 * 3 * len(list(moe_layers(merged)))
    assert set(json.loads((out / "expert_cfg.json").read_text())) >= {
        "experts",
        "shared_experts",
        "non_expert_modules",
    }
    back = import_esft(out, tmp_path / "back", model)
    before, after = (load_file(f / "adapter_model.safetensors") for f in (tmp_path / "saved", back))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    torch.testing.assert_close(adapters.logits(PeftModel.from_pretrained(model, back)), adapters.logits(merged))


@pytest.mark.parametrize("kind", ["esft", "lora"])
def test_experts_in_any_order(kind, tmp_path):
    """Published selections are ordered by score, not by number."""
    model = adapters.base()
    experts = {name: [3, 1] for name in expert_modules(model)}
    if kind == "esft":
        config = EsftConfig(experts=experts, task_type="CAUSAL_LM")
    else:
        config = ExpertLoraConfig(experts=experts, target_modules=list(experts), r=2, init_lora_weights=False)
    wrapped = get_peft_model(model, config)
    adapters.disturb(wrapped)
    expected = adapters.logits(wrapped.eval())
    wrapped.save_pretrained(tmp_path / "saved")
    export, imported = (export_esft, import_esft) if kind == "esft" else (export_adapter, import_adapter)
    out = export(tmp_path / "saved", tmp_path / "out", model.config)
    if kind == "esft":
        save_selection(experts, out / "expert_cfg.json")  # as others would have written it
    back = imported(out, tmp_path / "back", model.config)
    torch.testing.assert_close(adapters.logits(PeftModel.from_pretrained(adapters.base(), back).eval()), expected)
    if kind == "esft":
        woven = ExpertWeave(adapters.base(), {"x": tmp_path / "saved"})
        with woven.use(["x"]):
            torch.testing.assert_close(adapters.logits(woven.model), expected)


class TestErrors:
    def test_export(self, tmp_path):
        model, saved = make("qwen3_moe", tmp_path, "all")
        with pytest.raises(ValueError, match="exists already: choose another folder"):
            export_adapter(saved, saved, model)
        with pytest.raises(ValueError, match=r"holds no keys such as base_model.model"):
            import_adapter(saved, tmp_path / "x", model)
        with pytest.raises(ValueError, match=r"hold the experts 'model.layers.0.mlp.experts' as stacks"):
            export_adapter(saved, tmp_path / "x", adapters.base("gpt_oss").config)
        names = list(expert_modules(adapters.base()))
        config = ExpertLoraConfig(experts={name: [0] for name in names}, target_modules=names, r=2)
        config.trainable_token_indices = [3, 4]
        get_peft_model(adapters.base(), config).save_pretrained(tmp_path / "tokens")
        with pytest.raises(ValueError, match="has no form per expert, only pairs of linear layers have"):
            export_adapter(tmp_path / "tokens", tmp_path / "x", model)
        dora = LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)
        get_peft_model(adapters.base(), dora).save_pretrained(tmp_path / "dora")
        with pytest.raises(ValueError, match="use_dora=True has no form per expert"):
            import_adapter(tmp_path / "dora", tmp_path / "x", model)
        assert not (tmp_path / "x").exists() and len(list(tmp_path.iterdir())) == 3

    def test_esft(self, tmp_path):
        model, saved = make("qwen3_moe", tmp_path, "all")
        with pytest.raises(ValueError, match=r"LoraConfig has no place in ESFT's layout"):
            export_esft(saved, tmp_path / "x", model)
        with pytest.raises(ValueError, match=r"holds no safetensors files beside expert_cfg.json"):
            import_esft(tmp_path, tmp_path / "x", model)
        adapters.adapted("esft", model).save_pretrained(tmp_path / "esft")
        out = export_esft(tmp_path / "esft", tmp_path / "out", model.config)
        save_selection({"layers.1": [0, 2]}, out / "expert_cfg.json", shared_experts=True)
        with pytest.raises(ValueError, match="trained shared_experts too"):
            import_esft(out, tmp_path / "x", model.config)
