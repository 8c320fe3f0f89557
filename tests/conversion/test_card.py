"""The card of a conversion says what the receipt says, and nothing about this machine."""

import json

import pytest
from dense_models import dense_models
from huggingface_hub import ModelCard

from hf_moe.conversion import read_receipt, upcycle
from hf_moe.hub import write_card


def make(tmp_path, target, licences=(None,), **options):
    for number, (model, licence) in enumerate(zip(dense_models("llama", len(licences)), licences, strict=True)):
        model.save_pretrained(tmp_path / f"model-{number}")
        if licence:
            text = f"---\nlicense: {licence}\n---\nA model.\n"
            (tmp_path / f"model-{number}" / "README.md").write_text(text)
    folders = [tmp_path / f"model-{number}" for number in range(len(licences))]
    upcycle(folders, target, output=tmp_path / "out", **options)
    return ModelCard.load(tmp_path / "out" / "README.md")


def test_an_exact_native_result(tmp_path):
    card = make(tmp_path, "mixtral", ["apache-2.0"], num_experts=3)
    assert card.data.license == "apache-2.0" and card.data.library_name == "transformers"
    assert {"upcycled", "copy"} <= set(card.data.tags) and card.data.get("base_model") is None
    receipt = read_receipt(tmp_path / "out")
    assert f"{receipt['parameters']['total']:,} parameters" in card.text
    assert "it is **exact**" in card.text and "It can be used as it is." in card.text
    assert "| model-0 | " in card.text and "100.0% |" in card.text and "method: copy" in card.text
    assert "import hf_moe" not in card.text and str(tmp_path) not in card.content
    assert "README.md" not in receipt["shards"]


def test_several_sources_that_need_training(tmp_path):
    card = make(tmp_path, "bam", ["mit", None])
    assert card.data.license is None
    assert "The licences of its sources differ (model-0: mit, model-1: not stated)" in card.text
    assert "**It is not useful without training:**" in card.text and "import hf_moe" in card.text


@pytest.mark.parametrize("verify", [True, False])
def test_what_was_not_measured_is_not_claimed(tmp_path, verify):
    card = make(tmp_path, "mixtral", method="noise", num_experts=2, verify=verify)
    assert ("Not measured." in card.text) is not verify
    assert ("Nobody has measured" in card.text) is not verify


def test_hub_ids_are_base_models(tmp_path):
    """A receipt that names one; the engine's own tests fetch from a local hub."""
    make(tmp_path, "mixtral", num_experts=2)
    receipt = read_receipt(tmp_path / "out")
    receipt["sources"] = [{"hub_id": "someone/llama", "commit": "abc", "shards": {}}]
    (tmp_path / "out" / "conversion.json").write_text(json.dumps(receipt))
    write_card(tmp_path / "out")
    found = ModelCard.load(tmp_path / "out" / "README.md")
    assert found.data.base_model == ["someone/llama"] and "upcycled from someone/llama" in found.text
