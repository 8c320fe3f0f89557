"""Models split over devices: here the CPU and the disk, the two kinds that every machine has."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_moe
from hf_moe.testing import tiny_config

PLACES = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
ON_DISK = {"model.layers.1": "disk", "model.shared": "disk", "model.rotary_emb": "cpu"}


@pytest.mark.parametrize("model_type", hf_moe.ARCHITECTURES)
@torch.no_grad()
def test_layers_and_shared_modules_on_disk(model_type, tmp_path):
    torch.manual_seed(0)
    model = hf_moe.ARCHITECTURES[model_type][2](tiny_config(model_type, initializer_range=0.2)).eval()
    model.save_pretrained(tmp_path / "model")
    places = {**PLACES, **ON_DISK} | ({"mtp": "cpu"} if hasattr(model, "mtp") else {})
    split = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload"
    )
    assert any(p.is_meta for p in split.parameters())
    ids = torch.randint(3, 99, (2, 6))
    torch.testing.assert_close(split(ids).logits, model(ids).logits)
    assert torch.equal(
        split.generate(ids, max_new_tokens=3, do_sample=False), model.generate(ids, max_new_tokens=3, do_sample=False)
    )
