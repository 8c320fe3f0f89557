"""QK-clip scales exactly the heads whose logits exceed the threshold, to exactly the threshold."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV2Config, LlamaConfig, PreTrainedModel, Trainer

from hf_moe.testing import tiny_config
from hf_moe.training import MuonForMixtures, QKClip
from hf_moe.training.qk_clip import is_attention, largest_logits

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "conversion")]
import balance
import invariance
from mixture_models import mixture_model

LATENT = {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
SIZES = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}


def network(kind: str) -> PreTrainedModel:
    """Models without norms between projections and logits, with large ones."""
    torch.manual_seed(0)
    if kind in ("mixtral", "deepseek_v3"):
        model = mixture_model(kind, num_hidden_layers=2, vocab_size=256)
    elif kind == "llama":
        config = LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2, attention_bias=True)
        model = AutoModelForCausalLM.from_config(config)
    elif kind == "deepseek_v2":
        moe = {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
        }
        config = DeepseekV2Config(**SIZES, **moe, **LATENT, num_attention_heads=4, q_lora_rank=None, head_dim=4)
        model = AutoModelForCausalLM.from_config(config)
    else:
        mixer = {"type": "attention"} if kind == "ours" else {"type": "latent_attention", **LATENT, "q_lora_rank": 8}
        dense = {"mixer": mixer, "feed_forward": {"type": "mlp", "intermediate_size": 48}}
        model = AutoModelForCausalLM.from_config(
            tiny_config("hf_moe", blocks={"moe": dense}, num_attention_heads=4, num_key_value_heads=2)
        )
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.train()


def step(model: PreTrainedModel, callback: QKClip, accumulation: int = 2, rate: float = 0.0) -> None:
    """One optimizer step over rows with padding on both sides, without weights changing by default."""
    args = balance.arguments(accumulation, learning_rate=rate)
    collate = balance.default_data_collator
    Trainer(model, args, collate, train_dataset=invariance.padded(), callbacks=[callback]).train()


KINDS = ["mixtral", "llama", "deepseek_v2", "deepseek_v3", "ours", "ours_latent"]


@pytest.mark.parametrize("kind", KINDS)
def test_logits_end_at_the_threshold(kind):
    model, callback = network(kind), QKClip(threshold=1e9)
    step(model, callback)
    before = dict(callback.max_logits)
    assert len(before) == 2 and callback.num_clipped == 0
    first = next(iter(before.values()))
    groups = 2 if kind in ("llama", "ours", "mixtral") else len(first)
    of_group = first.unflatten(0, (groups, -1)).amax(1, keepdim=True)
    callback.threshold = tau = of_group.min().item() * 1.01
    weights = {n: p.clone() for n, p in model.named_parameters()}
    first_logits = model(torch.arange(3, 9)[None], use_cache=False).logits.detach()
    step(model, callback)
    assert callback.num_clipped
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, weights[n])}
    assert changed and all(any(p in n for p in ("q_proj", "q_b_proj", "k_proj", "kv_b_proj")) for n in changed)
    assert not torch.equal(model(torch.arange(3, 9)[None], use_cache=False).logits, first_logits)
    callback.threshold = 1e9
    step(model, callback)
    after = next(iter(callback.max_logits.values()))  # the layers above see other inputs now
    factor = torch.where(of_group > tau, tau / of_group, 1.0).expand(groups, len(first) // groups).flatten()
    assert (factor == 1).any() and (factor < 1).any()
    torch.testing.assert_close(after, first * factor, atol=1e-4, rtol=1e-5)


def test_naive_logits():
    """All pairs, one by one."""
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 5, 3), torch.randn(2, 2, 5, 3)
    lengths = [3, 5]
    mask = torch.ones(5, 5).tril().bool().expand(2, 1, 5, 5).clone()
    mask[0, :, :, lengths[0] :] = False
    expected = torch.full((4,), -torch.inf, dtype=torch.float64)
    for b in range(2):
        for h in range(4):
            for t in range(5):
                for s in range(min(t + 1, lengths[b])):
                    score = 0.7 * (query[b, h, t].double() @ key[b, h // 2, s].double())
                    expected[h] = max(expected[h], score)
    added = torch.zeros(2, 1, 5, 5).masked_fill(~mask, torch.finfo(torch.float32).min)
    import hf_moe.training.qk_clip as module

    for block in (2**24, 1):
        module.SCORES_AT_ONCE, kept = block, module.SCORES_AT_ONCE
        for form in (mask, added):
            torch.testing.assert_close(largest_logits(query, key, form, 0.7).double(), expected)
        module.SCORES_AT_ONCE = kept
    causal = largest_logits(query[1:], key[1:], None, 0.7)
    torch.testing.assert_close(causal, largest_logits(query[1:], key[1:], mask[1:], 0.7))


@pytest.mark.parametrize("kind", ["llama", "deepseek_v3"])
def test_alpha_and_eager(kind):
    """alpha=1 leaves the keys alone; eager and sdpa see the same logits, and so do 1 and 4 micro-batches."""
    found = []
    for kernel, accumulation in (("eager", 1), ("sdpa", 4)):
        model, callback = network(kind), QKClip(threshold=0.1, alpha=1.0)
        model.set_attn_implementation(kernel)
        keys = next(m for m in model.modules() if is_attention(m))
        keys = (keys.k_proj if kind == "llama" else keys.kv_b_proj).weight
        kept = keys.detach().clone()
        step(model, callback, accumulation)
        assert torch.equal(keys, kept) and callback.num_clipped
        found.append(list(callback.max_logits.values()))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_muon_clip_holds_logits():
    """A rate at which logits run away: with the callback the next step's are near the threshold."""
    tops = {}
    for clips in (False, True):
        model, callback = network("mixtral"), QKClip(threshold=4.0 if clips else 1e9)
        args = balance.arguments(1, learning_rate=0.1)
        args.max_steps = 8
        settings = (MuonForMixtures, {"lr": 0.1, "weight_decay": 0.0})
        data, collate = invariance.padded(), balance.default_data_collator
        Trainer(
            model, args, collate, train_dataset=data, optimizer_cls_and_kwargs=settings, callbacks=[callback]
        ).train()
        tops[clips] = max(largest.max().item() for largest in callback.max_logits.values())
    assert tops[False] > 2 * tops[True]


def test_hooks_are_taken_off():
    from transformers.modeling_utils import AttentionInterface

    plain = AttentionInterface.get_interface
    step(network("llama"), QKClip())
    assert AttentionInterface.get_interface is plain


class TestErrors:
    def test_arguments(self):
        with pytest.raises(ValueError, match=r"threshold=0 must be above 0 and alpha=0.5"):
            QKClip(threshold=0)

    def test_norms_undo_it(self):
        with pytest.raises(ValueError, match=r"normalises queries or keys \(q_norm\)"):
            QKClip().on_train_begin(None, None, None, mixture_model("qwen3_moe", num_hidden_layers=1))

    def test_adapters_and_kernels(self):
        from peft import LoraConfig, get_peft_model

        model = network("llama")
        model.config._attn_implementation = "flex_attention"
        with pytest.raises(ValueError, match="'flex_attention' cannot be watched"):
            QKClip().on_train_begin(None, None, None, model)
        model.config._attn_implementation = "sdpa"
        wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
        with pytest.raises(ValueError, match="neither adapters nor shards"):
            QKClip().on_train_begin(None, None, None, wrapped)
