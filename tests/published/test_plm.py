"""PLM against a float64 loop of the whole model, its published size, and its authors' checkpoint layout."""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hf_moe import HfMoeConfig, PlmConfig, PlmForCausalLM
from hf_moe.testing import tiny_config

sys.path.insert(0, str(Path(__file__).parent))
import attentions
import naive

IDS = torch.randint(3, 97, (6,), generator=torch.Generator().manual_seed(3))
SIZES = {
    "vocab_size": 97, "hidden_size": 16, "num_attention_heads": 4, "kv_lora_rank": 8, "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4, "v_head_dim": 5, "intermediate_size": 24, "initializer_range": 0.3,
}  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"q_lora_rank": 6}, {"rope_interleave": False}], ids=str)
def test_loop(options):
    """arXiv 2503.12167: latent attention, then W_down relu(W_up x)^2."""
    torch.manual_seed(0)
    model = PlmForCausalLM(tiny_config("peripheral_lm", **SIZES, **options)).double().train()
    w = naive.double(model)
    w["lm_head.weight"] = w["model.embed_tokens.weight"]

    def turn(x, position):
        interleaved = options.get("rope_interleave", True)
        return (attentions.rotate_pairs if interleaved else naive.rotate)(x, position, 100000.0)

    xs = [w["model.embed_tokens.weight"][i] for i in IDS]
    for layer in range(2):
        p = f"model.layers.{layer}."
        normed = [naive.rms_norm(x, w[p + "input_layernorm.weight"]) for x in xs]
        mixed = attentions.latent_attention(w, p + "self_attn.", normed, 4, (6, 4, 5), turn)
        xs = [x + y for x, y in zip(xs, mixed)]
        for t, x in enumerate(xs):
            hidden = w[p + "mlp.up_proj.weight"] @ naive.rms_norm(x, w[p + "post_attention_layernorm.weight"])
            xs[t] = x + w[p + "mlp.down_proj.weight"] @ (hidden * (hidden > 0)) ** 2
    expected = torch.stack([w["lm_head.weight"] @ naive.rms_norm(x, w["model.norm.weight"]) for x in xs])
    logits = model(IDS[None], use_cache=False).logits[0]
    # norms and cosines run in fp32 by design
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (logits * direction).sum().backward()
    (expected * direction).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, w[name].grad, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: n + m)


def test_published_size():
    """PLM-1.8B; its configuration is the authors' (github.com/huggingface/transformers, branch of a pull request)."""
    with torch.device("meta"):
        model = PlmForCausalLM(PlmConfig())
    attention = 2048 * 16 * (128 + 64) + 2048 * (512 + 64) + 512 + 512 * 16 * (128 + 128) + 16 * 128 * 2048
    layer = attention + 2 * 2048 * 8192 + 2 * 2048
    total = sum(parameter.numel() for parameter in model.parameters())
    assert total == 32 * layer + 151936 * 2048 + 2048 == 1_825_458_176
    assert model.config.rope_parameters["rope_theta"] == 100000.0


@pytest.mark.allow_warnings("You are using a model of type `plm`", "model of type plm")
@torch.no_grad()
def test_checkpoints_of_the_authors(tmp_path):
    """Their folder says "plm", has DeepSeek's names and `rope_theta` by itself, and loads by naming our class."""
    torch.manual_seed(0)
    model = PlmForCausalLM(tiny_config("peripheral_lm", **SIZES)).eval()
    model.save_pretrained(tmp_path)
    theirs = {
        **{name: value for name, value in SIZES.items() if name != "initializer_range"},
        "architectures": ["PLMForCausalLM"], "model_type": "plm", "num_hidden_layers": 2, "num_key_value_heads": 4,
        "hidden_act": "relu2", "max_position_embeddings": 256, "q_lora_rank": None, "rms_norm_eps": 1e-6,
        "rope_theta": 100000.0, "rope_scaling": None, "rope_interleave": True, "tie_word_embeddings": True,
        "attention_bias": False, "pretraining_tp": 1, "torch_dtype": "float32", "use_cache": True,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(theirs))
    again, info = PlmForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    torch.testing.assert_close(again(IDS[None]).logits, model(IDS[None]).logits)
    with pytest.raises((KeyError, ValueError), match="plm"):  # nobody's: ours is "peripheral_lm"
        AutoConfig.from_pretrained(tmp_path)
    again.save_pretrained(tmp_path / "ours")
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "ours")) is PlmForCausalLM


def test_head_dim_is_the_rotated_width():
    """As in Transformers' DeepSeek models; another one is allowed and changes nothing."""
    torch.manual_seed(0)
    model = PlmForCausalLM(tiny_config("peripheral_lm", **SIZES)).eval()
    assert model.config.head_dim == SIZES["qk_rope_head_dim"]
    other = PlmForCausalLM(tiny_config("peripheral_lm", **SIZES, head_dim=8)).eval()
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(IDS[None]).logits, model(IDS[None]).logits)


def test_bad_activation():
    with pytest.raises(ValueError, match=r"Unknown activation 'relu3'; choose from \['gelu'"):
        PlmConfig(hidden_act="relu3")
    block = {
        "mixer": {"type": "attention"},
        "feed_forward": {"type": "ungated_mlp", "intermediate_size": 8, "activation": "x"},
    }
    with pytest.raises(ValueError, match="Unknown activation 'x'"):
        HfMoeConfig(blocks={"b": block})
