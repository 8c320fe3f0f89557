"""The same model in another form says the same, and what no native type computes is refused with what differs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import hf_moe
from hf_moe.cli.main import app
from hf_moe.conversion.exporting import export
from hf_moe.conversion.native_equals import NATIVE_EQUALS, native_config
from hf_moe.modeling import DecoderConfig
from hf_moe.testing import tiny_config

SWIGLU = {"type": "swiglu", "intermediate_size": 16}
DENSE = {"type": "mlp", "intermediate_size": 24}


def attention(**options: Any) -> dict[str, Any]:
    return {"type": "attention", **options}


def moe(router: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    chosen = {"type": "top_k", "top_k": 2, **(router or {})}
    return {"type": "moe", "num_experts": 8, "router": chosen, "experts": SWIGLU, **options}


SIGMOID = {"scoring": "sigmoid", "normalize": True, "selection_bias": True, "scale": 2.5}
BIASES = {"qkv_bias": True, "output_bias": True}
COMPOSITIONS: dict[str, list[tuple[str, dict[str, Any], list[dict[str, Any]]]]] = {
    # native type -> (name, mixer, feed-forwards of the layers)
    "mixtral": [
        ("normalised", attention(), [moe({"normalize": True})]),
        ("sliding", attention(sliding=True), [moe({"scoring": "softmax_selected"})]),
    ],
    "qwen3_moe": [
        ("plain", attention(qk_norm=True), [moe({"normalize": False})]),
        ("dense", attention(qk_norm=True, **BIASES), [DENSE, moe({"normalize": True})]),
    ],
    "qwen2_moe": [
        (
            "plain",
            attention(qkv_bias=True),
            [moe({"normalize": False}, shared_intermediate_size=24, shared_gate=True), DENSE],
        )
    ],
    "olmoe": [("plain", attention(qk_norm="full"), [moe({"normalize": False})])],
    "glm4_moe": [
        (
            "ling",
            attention(qk_norm=True, partial_rotary_factor=0.5),
            [DENSE, moe({**SIGMOID, "num_groups": 4, "groups_per_token": 2}, shared_intermediate_size=16)],
        ),
        (
            "biased",
            attention(qkv_bias=True),
            [moe({**SIGMOID, "normalize": False}, shared_intermediate_size=16, num_shared_experts=2)],
        ),
    ],
    "llama": [("plain", attention(), [DENSE]), ("biased", attention(**BIASES), [DENSE])],
    "qwen2": [("plain", attention(qkv_bias=True), [DENSE])],
    "qwen3": [("plain", attention(qk_norm=True), [DENSE])],
}
CASES = [
    pytest.param(native, mixer, layers, id=f"{native}-{name}")
    for native, cases in COMPOSITIONS.items()
    for name, mixer, layers in cases
]


def composed(mixer: dict[str, Any], layers: list[dict[str, Any]], **fields: Any) -> DecoderConfig:
    blocks = {f"b{number}": {"mixer": mixer, "feed_forward": layer} for number, layer in enumerate(layers)}
    return tiny_config(
        "hf_moe", blocks=blocks, block_pattern=list(blocks), num_hidden_layers=2, sliding_window=4, **fields
    )


def spread(model: torch.nn.Module) -> torch.nn.Module:
    """Weights of a size at which every option matters: norms, biases, selection biases."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" not in name:
                tensor.copy_(torch.randn_like(tensor) * 0.3 + (1 if "norm" in name else 0))
    return model.eval()


def test_every_native_type_has_a_case():
    assert COMPOSITIONS.keys() == NATIVE_EQUALS.keys()


@torch.no_grad()
@pytest.mark.parametrize(("native", "mixer", "layers"), CASES)
def test_native_says_the_same(native: str, mixer: dict, layers: list[dict], tmp_path: Path):
    model = spread(hf_moe.HfMoeForCausalLM(composed(mixer, layers, tie_word_embeddings=native == "llama")))
    model.save_pretrained(tmp_path / "ours")
    (tmp_path / "ours" / "tokenizer.json").write_text("{}")
    export(tmp_path / "ours", tmp_path / "theirs", "native", model_type=native)
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert theirs.config.model_type == native and type(theirs).__module__.startswith("transformers.")
    assert not any(info.values()), info
    ids = torch.arange(3, 35).view(2, 16)
    torch.testing.assert_close(theirs(ids).logits, model(ids).logits, atol=2e-5, rtol=1e-5)
    names = {path.name for path in (tmp_path / "theirs").iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}


def test_ling_becomes_glm4_moe():
    config = native_config(hf_moe.LingConfig.ling_mini())
    assert (config.model_type, config.n_group, config.topk_group, config.first_k_dense_replace) == (
        "glm4_moe",
        8,
        4,
        1,
    )
    assert config.rope_parameters["partial_rotary_factor"] == 0.5 and config.n_shared_experts == 1


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (lambda: tiny_config("bam"), "its blocks are not all pre_norm|its type is 'soft_mixture_of_attention'"),
        (lambda: tiny_config("rmoe"), "its router is recurrent"),
        (lambda: tiny_config("mole"), "its experts are latent"),
        (lambda: tiny_config("ling", num_nextn_predict_layers=1), "prediction layers, which would be lost"),
        (lambda: composed(attention(qk_norm=True), [moe(SIGMOID)]), "glm4_moe: its shared experts are no multiple"),
        (lambda: composed(attention(partial_rotary_factor=0.5), [moe()]), "mixtral: it rotates parts of the heads"),
        (lambda: composed(attention(), [moe(), DENSE]), "mixtral: .*qwen3_moe: its qk_norm is False"),
        (lambda: composed(attention(), [DENSE], final_logit_softcapping=3.0), "its logits are capped"),
        (lambda: composed(attention(rotary=False), [DENSE]), "its rotary is False, not True"),
    ],
)
def test_what_no_native_type_computes(config: Any, reason: str):
    with pytest.raises(ValueError, match=f"No native type computes what this .* does .*({reason})"):
        native_config(config())


def test_a_wrong_equation_is_found_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = spread(hf_moe.HfMoeForCausalLM(composed(attention(qk_norm=True), [moe({"normalize": False})])))
    right = NATIVE_EQUALS["qwen3_moe"]
    monkeypatch.setitem(NATIVE_EQUALS, "qwen3_moe", lambda found: {**right(found), "norm_topk_prob": True})
    with pytest.raises(ValueError, match="As qwen3_moe the model says something else"):
        export(model, tmp_path / "out", "native")
    assert list(tmp_path.iterdir()) == []


def test_layouts_and_code_by_the_command(tmp_path: Path):
    hf_moe.BamForCausalLM(tiny_config("bam")).save_pretrained(tmp_path / "bam")
    for form in ("fused", "per-expert", "flat"):
        source, out = tmp_path / ("fused" if form == "per-expert" else "bam"), tmp_path / form
        done = CliRunner().invoke(app, ["export", str(source), "--to", form, "--output", str(out)])
        assert done.exit_code == 0, done.output
        code = {path.name for path in out.glob("*.py")}
        assert code == {"modeling_standalone.py" if form == "flat" else "modeling_hf_moe.py"}
    fused, back = ((tmp_path / form / "model.safetensors").read_bytes() for form in ("fused", "per-expert"))
    assert fused != back and back == (tmp_path / "bam" / "model.safetensors").read_bytes()
    assert json.loads((tmp_path / "flat" / "config.json").read_text())["auto_map"]
    dry = CliRunner().invoke(app, ["export", str(tmp_path / "bam"), "--to", "native", "--dry-run"])
    assert "No native type computes what this bam does" in str(dry.exception)


def test_bad_requests(tmp_path: Path):
    model = hf_moe.HfMoeForCausalLM(composed(attention(), [moe({"normalize": True})]))
    export(model, tmp_path / "mixtral", "native")
    for form, source, reason in (
        ("gguf", model, "form 'gguf' is unknown; choose from"),
        ("native", tmp_path / "mixtral", "is native already: mixtral"),
        ("flat", tmp_path / "mixtral", "Transformers needs no code file"),
        ("fused", tmp_path / "none", "neither a local folder nor"),
    ):
        with pytest.raises(ValueError, match=reason):
            export(source, tmp_path / "out", form)
    with pytest.raises(ValueError, match="model type 'gpt2' is unknown here"):
        export(model, tmp_path / "out", "native", model_type="gpt2")
    with pytest.raises(ValueError, match="already holds a model"):
        export(model, tmp_path / "mixtral", "fused")
    assert not (tmp_path / "out").exists()
