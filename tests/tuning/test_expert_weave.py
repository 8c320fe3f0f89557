"""Rows of one batch, each with its adapter: the numbers of each adapter alone."""

import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model

from hf_moe.tuning import EsftConfig, ExpertWeave
from hf_moe.tuning.expert_subset import expert_modules

sys.path.insert(0, str(Path(__file__).parent))
import adapters

KINDS = ["qwen3_moe", "mixtral", "olmoe", "deepseek_v3", "gpt_oss", "hf_moe"]
CHOICES = {"law": [[0, 2], [1]], "code": [[2, 3], []]}  # experts of the first and second MoE layer


def trained(kind: str, path: Path) -> dict[str, str]:
    """Two adapters with one expert in common, of different sizes."""
    folders = {}
    for seed, (name, choice) in enumerate(CHOICES.items()):
        model = adapters.base(kind)
        experts = {module: ids for module, ids in zip(expert_modules(model), choice) if ids}
        wrapped = get_peft_model(model, EsftConfig(experts=experts, task_type="CAUSAL_LM"))
        adapters.disturb(wrapped, seed)
        wrapped.save_pretrained(path / name)
        folders[name] = str(path / name)
    return folders


def prompts() -> dict[str, torch.Tensor]:
    """Four rows, padded on the left."""
    ids = torch.randint(3, 60, (4, 7), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    for row, missing in enumerate((0, 2, 4, 1)):
        mask[row, :missing] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


ROWS = ["code", "__base__", "law", "code"]


@pytest.mark.parametrize("kind", KINDS)
def test_each_row_is_its_adapter_alone(kind, tmp_path):
    folders, batch = trained(kind, tmp_path), prompts()
    alone = {name: PeftModel.from_pretrained(adapters.base(kind), f).eval() for name, f in folders.items()}
    alone["__base__"] = adapters.base(kind)
    model = adapters.base(kind)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    woven = ExpertWeave(model, folders)
    with torch.no_grad():
        expected = {name: m(**batch).logits for name, m in alone.items()}
        with woven.use(ROWS):
            together = model(**batch).logits
            generated = model.generate(**batch, max_new_tokens=4, do_sample=False)
            beams = model.generate(**batch, max_new_tokens=3, num_beams=2, do_sample=False)
        for row, name in enumerate(ROWS):
            real = batch["attention_mask"][row].bool()
            torch.testing.assert_close(together[row][real], expected[name][row][real], atol=1e-5, rtol=1e-5)
            single = {key: value[row : row + 1] for key, value in batch.items()}
            assert torch.equal(alone[name].generate(**single, max_new_tokens=4, do_sample=False)[0], generated[row])
            one = alone[name].generate(**single, max_new_tokens=3, num_beams=2, do_sample=False)[0]
            assert torch.equal(one, beams[row][: len(one)])
        with woven.use(["law"]):
            torch.testing.assert_close(model(**batch).logits[:2], expected["law"][:2], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(expected["law"], expected["code"], atol=1e-3)
        torch.testing.assert_close(model(**batch).logits, expected["__base__"], atol=1e-5, rtol=1e-5)
    assert woven.unload() is model
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_memory_grows_by_trained_experts(tmp_path):
    model = adapters.base()
    size = sum(p.numel() for p in model.parameters())
    expert = sum(p[0].numel() for p in next(iter(expert_modules(model).values())).parameters())
    ExpertWeave(model, trained("qwen3_moe", tmp_path))
    layers = len(expert_modules(model))
    chosen = sum(len(ids) for choice in CHOICES.values() for ids in choice[:layers])
    assert sum(p.numel() for p in model.parameters()) == size + chosen * expert


def test_errors(tmp_path):
    folders = trained("qwen3_moe", tmp_path)
    model = adapters.base()
    woven = ExpertWeave(model, folders)
    with pytest.raises(ValueError, match="There is no adapter 'tax'; choose from"), woven.use(["tax"]):
        pass
    with woven.use(["law", "code", "law"]), pytest.raises(ValueError, match="names 3 rows, and the batch is"):
        model(**prompts())
    with pytest.raises(ValueError, match="trains more than experts: only EsftConfig"):
        adapters.adapted("hydra", adapters.base()).save_pretrained(tmp_path / "hydra")
        ExpertWeave(adapters.base(), {"h": tmp_path / "hydra"})
    with pytest.raises(ValueError, match="which this model has not"):
        ExpertWeave(adapters.base("mixtral"), bad(tmp_path))


def bad(tmp_path: Path) -> dict[str, str]:
    """An adapter of a layer that Mixtral's tiny model has not."""
    config = EsftConfig(experts={"model.layers.9.mlp.experts": [0]}, task_type="CAUSAL_LM")
    (tmp_path / "bad").mkdir()
    config.save_pretrained(str(tmp_path / "bad"))
    from safetensors.torch import save_file

    save_file(
        {"base_model.model.model.layers.9.mlp.experts.esft_out": torch.ones(1, 2, 2)},
        tmp_path / "bad" / "adapter_model.safetensors",
    )
    return {"x": str(tmp_path / "bad")}
