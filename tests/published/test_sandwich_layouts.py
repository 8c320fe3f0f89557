"""Gemma 2, Gemma 3 and OLMo 2 against Transformers: their weights in our dense composition give their logits."""

import pytest
import torch
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Olmo2Config,
    Olmo2ForCausalLM,
)

from hf_moe import HfMoeConfig, HfMoeForCausalLM
from hf_moe.modeling.mixers import Attention
from hf_moe.modeling.ops.soft_cap import soft_cap

SIZES = {
    "vocab_size": 97,
    "hidden_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GEMMA = {**SIZES, "intermediate_size": 48, "head_dim": 16, "query_pre_attn_scalar": 10, "sliding_window": 4}
LINEAR = {"rope_type": "linear", "rope_theta": 1e5, "factor": 8.0}
LOCAL = {"rope_type": "default", "rope_theta": 100.0}
STOCK = {
    "gemma2": (Gemma2ForCausalLM, Gemma2Config(**GEMMA, attn_logit_softcapping=1.5, final_logit_softcapping=3.0)),
    "gemma2-uncapped": (
        Gemma2ForCausalLM,
        Gemma2Config(**GEMMA, attn_logit_softcapping=None, final_logit_softcapping=None),
    ),
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig(
            **GEMMA,
            sliding_window_pattern=2,
            rope_parameters={"full_attention": LINEAR, "sliding_attention": LOCAL},
        ),
    ),
    "olmo2": (Olmo2ForCausalLM, Olmo2Config(**SIZES, intermediate_size=48, rms_norm_eps=1e-5)),
}
IDS = torch.randint(3, 97, (2, 13), generator=torch.Generator().manual_seed(1))


def block(kind: str, **mixer) -> dict:
    return {
        "type": kind,
        "mixer": {"type": "attention", **mixer},
        "feed_forward": {"type": "mlp", "intermediate_size": 48},
    }


def our_config(case: str, stock) -> HfMoeConfig:
    """The same model in our words."""
    shared = {name: getattr(stock, name) for name in (*SIZES, "rms_norm_eps", "rope_parameters")}
    if case == "olmo2":
        return HfMoeConfig(**shared, blocks={"b": block("post_norm", qk_norm="full")})
    shared |= {"head_dim": 16, "hidden_act": "gelu_pytorch_tanh", "sliding_window": 4}
    if case == "gemma3":
        shared["rope_parameters"] = LINEAR
        local, everywhere = {"rope_parameters": LOCAL}, {"qk_norm": True}
    else:
        local, everywhere = {}, {"logit_softcapping": stock.attn_logit_softcapping}
    blocks = {
        "local": block("sandwich", sliding=True, **local, **everywhere),
        "global": block("sandwich", **everywhere),
    }
    return HfMoeConfig(**shared, final_logit_softcapping=stock.final_logit_softcapping, blocks=blocks)


def our_weights(case: str, stock) -> dict[str, torch.Tensor]:
    """What Gemma multiplies by at run time, multiplied into the weights by hand."""
    state = {name: tensor.double() for name, tensor in stock.state_dict().items()}
    if case == "olmo2":
        return state
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    state["model.embed_tokens.weight"] *= 40**0.5
    queries = "q_norm" if case == "gemma3" else "q_proj"
    for name, tensor in state.items():
        if "norm" in name:
            tensor += 1
        if queries in name:
            tensor *= (16 / 10) ** 0.5  # scores are divided by sqrt(10), ours by sqrt(16)
    return state


@pytest.fixture(scope="module", params=STOCK)
def pair(request):
    """A stock model with random norms, and ours with its weights."""
    stock_class, config = STOCK[request.param]
    torch.manual_seed(0)
    stock = stock_class._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    ours = HfMoeForCausalLM(our_config(request.param, config)).eval()
    ours.load_state_dict(our_weights(request.param, stock))
    return stock, ours


@torch.no_grad()
@pytest.mark.parametrize("padded", [0, 3])
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_same_logits(pair, backend, padded):
    stock, ours = pair
    ours.set_attn_implementation(backend)
    mask = torch.ones_like(IDS)
    mask[0, :padded] = 0
    expected = stock(IDS, attention_mask=mask).logits[:, padded:]
    torch.testing.assert_close(ours(IDS, attention_mask=mask).logits[:, padded:], expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_same_logits_with_a_cache(pair):
    """The prompt is longer than the window, and the steps leave it."""
    pair[1].set_attn_implementation("sdpa")
    caches = [DynamicCache(config=model.config) for model in pair]
    for piece in IDS.split([6, 4, 1, 1, 1], dim=1):
        expected, actual = (m(piece, past_key_values=c).logits for m, c in zip(pair, caches, strict=True))
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_static_cache_generates_the_same(pair):
    stock, ours = pair
    ours.set_attn_implementation("sdpa")
    expected = stock.generate(IDS[:1], max_new_tokens=6, do_sample=False, eos_token_id=None)
    kwargs = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert torch.equal(ours.generate(IDS[:1], **kwargs), expected)
    assert torch.equal(ours.generate(IDS[:1], **kwargs, cache_implementation="static"), expected)


def test_the_cap():
    values = torch.tensor([-1e6, -0.01, 0.0, 2.0, 1e6])
    torch.testing.assert_close(soft_cap(values, 2.0), 2 * (values.double() / 2).tanh().float())
    assert soft_cap(values, None) is values


def test_unknown_kernels_never_skip_the_cap():
    """Transformers' kernels take any argument and ignore it."""
    config = our_config("gemma2", STOCK["gemma2"][1])
    config._attn_implementation = "paged|eager"
    mixer = Attention(config, 0, logit_softcapping=2.0)
    tables = (torch.ones(1, 4, 16), torch.zeros(1, 4, 16))
    with pytest.raises(ValueError, match=r"attn_implementation='paged\|eager' is not known to cap scores"):
        mixer(torch.randn(1, 4, 40), tables)


@pytest.mark.parametrize(
    ("mixer", "message"),
    [
        ({"qk_norm": "heads"}, r"qk_norm='heads' is unknown; choose from \(False, True, 'full'\)"),
        ({"logit_softcapping": 0.0}, "logit_softcapping=0.0 must be positive"),
        ({"rope_parameters": {"rope_type": "default"}}, "need 'rope_type' and 'rope_theta'"),
        ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "rope_type='spiral' is unknown; choose"),
        ({"rope_parameters": {**LOCAL, "partial_rotary_factor": 0.5}}, "is an option of the mixer"),
        ({"rope_parameters": LOCAL, "rotary": False}, "no effect with rotary=False"),
    ],
)
def test_bad_options(mixer, message):
    with pytest.raises(ValueError, match=message):
        HfMoeConfig(**SIZES, blocks={"b": block("sandwich", **mixer)})


def test_bad_cap_of_the_logits():
    with pytest.raises(ValueError, match="final_logit_softcapping=-1 must be positive"):
        HfMoeConfig(**SIZES, final_logit_softcapping=-1, blocks={"b": block("pre_norm")})
