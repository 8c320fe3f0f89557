"""The shortcut block against Transformers' LongCat-Flash with the same weights, and what it refuses."""

from pathlib import Path

import pytest
import torch
import yaml
from transformers import DynamicCache, LongcatFlashConfig, LongcatFlashForCausalLM

from hf_moe import HfMoeConfig, HfMoeForCausalLM
from hf_moe.testing import tiny_config

LATENT = {"q_lora_rank": 12, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "head_dim": 4,
    "initializer_range": 0.2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    "bos_token_id": 1,
    "eos_token_id": None,
}
RECIPE = yaml.safe_load((Path(__file__).parents[2] / "docs" / "recipes" / "longcat_flash.yaml").read_text())
PUBLISHED = RECIPE["blocks"]["shortcut"]
MLP = {"type": "mlp", "intermediate_size": 24}
ROUTER = {**PUBLISHED["feed_forward"]["router"], "top_k": 3}
EXPERTS = {"type": "swiglu", "intermediate_size": 16}
SMALL = {"num_experts": 4, "num_zero_experts": 2, "router": ROUTER, "experts": EXPERTS}
SHORTCUT = {  # the recipe's options at other sizes
    **PUBLISHED,
    "mixer": {**PUBLISHED["mixer"], **LATENT},
    "feed_forward": {**PUBLISHED["feed_forward"], **SMALL},
    "dense": MLP,
}
ROUTER_NAMES = {
    "mlp.router.classifier.weight": "mlp.gate.weight",
    "mlp.router.e_score_correction_bias": "mlp.gate.e_score_correction_bias",
}
X = torch.randint(1, 97, (2, 10), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def models():
    """Transformers' model and ours with its weights; its biases choose other experts than the scores alone."""
    torch.manual_seed(0)
    native = LongcatFlashForCausalLM(
        LongcatFlashConfig(
            **SIZES,
            **LATENT,
            num_layers=2,
            ffn_hidden_size=24,
            expert_ffn_hidden_size=16,
            n_routed_experts=4,
            zero_expert_num=2,
            moe_topk=3,
        )
    ).eval()
    for layer in native.model.layers:
        layer.mlp.router.e_score_correction_bias.normal_(std=0.3)
    ours = HfMoeForCausalLM(HfMoeConfig(**SIZES, num_hidden_layers=4, blocks={"b": SHORTCUT})).eval()
    ours.load_state_dict(dict(translate(native)))
    return native, ours


def translate(native):
    for name, tensor in native.state_dict().items():
        for theirs, mine in ROUTER_NAMES.items():
            name = name.replace(theirs, mine)
        if name.endswith("experts.gate_up_proj"):
            tensor = tensor[:4]  # Transformers allocates rows for zero experts too
        yield name, tensor


@torch.no_grad()
def test_same_logits(models):
    native, ours = models
    torch.testing.assert_close(ours(X).logits, native(X).logits, atol=2e-5, rtol=1e-5)
    mask = torch.ones_like(X)
    mask[0, :3] = 0
    logits, expected = (model(X, attention_mask=mask).logits[:, 3:] for model in (ours, native))
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-5)


def test_same_gradients(models):
    native, ours = models
    native(X, labels=X).loss.backward()
    ours(X, labels=X).loss.backward()  # in evaluation, so without a balance loss
    expected = {name: parameter.grad for name, parameter in native.named_parameters()}
    for name, parameter in ours.named_parameters():
        for theirs, mine in ROUTER_NAMES.items():
            name = name.replace(mine, theirs)
        grad = expected.pop(name)
        grad = grad[:4] if name.endswith("gate_up_proj") else grad
        torch.testing.assert_close(parameter.grad, grad, atol=2e-5, rtol=1e-4, msg=name)
    assert not expected


@torch.no_grad()
def test_two_cache_layers_per_block(models):
    native, ours = models
    assert len(ours.model.layers) == 2 and ours.config.layer_types == ["full_attention"] * 4
    assert [attention.layer_idx for layer in ours.model.layers for attention in layer.self_attn] == [0, 1, 2, 3]
    caches = [DynamicCache(config=model.config) for model in models]
    for piece in X.split([6, 1, 3], dim=1):
        logits, expected = (m(piece, past_key_values=c).logits for m, c in zip((native, ours), caches))
        torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-5)
    assert len(caches[1].layers) == 4 and all(layer.get_seq_length() == 10 for layer in caches[1].layers)


@torch.no_grad()
def test_the_mixture_reads_behind_the_first_attention_and_is_added_last(models):
    """Without its dense halves and second attention, a block is one attention and a mixture in a row."""
    ours = models[1]
    for layer in ours.model.layers:
        for mlp in layer.mlps:
            mlp.down_proj.weight.zero_()
        layer.self_attn[1].o_proj.weight.zero_()
    plain = {"mixer": SHORTCUT["mixer"], "feed_forward": SHORTCUT["feed_forward"]}
    short = HfMoeForCausalLM(HfMoeConfig(**SIZES, num_hidden_layers=2, blocks={"b": plain})).eval()
    weights = {}
    for name, tensor in ours.state_dict().items():
        if ".mlps." in name or any(f"{half}.1." in name for half in ("self_attn", "layernorm")):
            continue
        weights[name.replace("self_attn.0.", "self_attn.").replace("layernorm.0.", "layernorm.")] = tensor
    short.load_state_dict(weights)
    torch.testing.assert_close(short(X).logits, ours(X).logits)


def test_layers_that_end_inside_a_block():
    with pytest.raises(ValueError, match=r"num_hidden_layers=3 .* use one of \[2, 4\]"):
        HfMoeConfig(**SIZES, num_hidden_layers=3, blocks={"b": SHORTCUT})
    blocks = {"a": {**SHORTCUT}, "b": {"mixer": SHORTCUT["mixer"], "feed_forward": MLP}}
    config = HfMoeConfig(**SIZES, num_hidden_layers=5, blocks=blocks)  # two layers, one, two
    assert config.block_starts == [0, 2, 3]
    assert len(config.layer_types) == 5 and HfMoeForCausalLM(config)(X).logits.isfinite().all()


def test_experts_belong_into_the_shortcut():
    with pytest.raises(ValueError, match=r"`dense` of a shortcut_moe block is 'moe'.*'mlp'"):
        tiny_config("hf_moe", blocks={"b": {**SHORTCUT, "dense": SHORTCUT["feed_forward"]}})
