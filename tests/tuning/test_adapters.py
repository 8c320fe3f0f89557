"""What every adapter promises: identity at first, one result merged or not, the same after saving, in any trainer."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import Trainer, TrainingArguments

sys.path.insert(0, str(Path(__file__).parent))
import adapters
from adapters import CANNOT_MERGE, KINDS, adapted, base, home, logits

BASES = ["qwen3_moe", "hf_moe"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", [*BASES, "deepseek_v3", "gpt_oss", "rmoe"])
def test_identity_at_first_and_never_without_training(kind, model):
    plain = base(home(kind, model))
    expected = logits(plain)
    wrapped = adapted(kind, plain, seed=None)
    torch.testing.assert_close(logits(wrapped), expected, atol=1e-5, rtol=1e-5)
    adapters.disturb(wrapped)
    assert (logits(wrapped) - expected).abs().max() > 1e-3
    with wrapped.disable_adapter():
        torch.testing.assert_close(logits(wrapped), expected, atol=1e-5, rtol=1e-5)
    learn_whole = wrapped.active_peft_config.modules_to_save
    restored = wrapped.unload()
    assert type(restored) is type(plain)
    assert learn_whole or torch.equal(logits(restored), expected)  # PEFT leaves such modules as they were trained


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in CANNOT_MERGE])
@pytest.mark.parametrize("model", [*BASES, "gpt_oss"])
def test_merged_equals_unmerged(kind, model):
    wrapped = adapted(kind, base(model))
    expected, untouched = logits(wrapped), logits(base(model))
    wrapped.merge_adapter()
    torch.testing.assert_close(logits(wrapped), expected, atol=1e-5, rtol=1e-5)
    wrapped.unmerge_adapter()
    torch.testing.assert_close(logits(wrapped), expected, atol=1e-5, rtol=1e-5)
    with wrapped.disable_adapter():
        torch.testing.assert_close(logits(wrapped), untouched, atol=1e-5, rtol=1e-5)
    merged = wrapped.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-5)
    assert not any("lora" in name or "esft" in name for name in merged.state_dict())


def test_adapters_reload_in_a_fresh_process(tmp_path):
    for model in ("qwen3_moe", "llama"):
        base(model).save_pretrained(tmp_path / f"base_{model}")
    for kind in KINDS:
        folder = tmp_path / f"base_{home(kind)}"
        wrapped = adapted(kind, type(base(home(kind))).from_pretrained(folder))
        wrapped.save_pretrained(tmp_path / kind)
        save_file({"tokens": adapters.tokens(), "logits": logits(wrapped)}, tmp_path / f"{kind}.safetensors")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, adapters.__file__, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert len(done.stdout.splitlines()) == len(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_adapter_is_saved(kind, tmp_path):
    wrapped = adapted(kind, base(home(kind)))
    wrapped.save_pretrained(tmp_path)
    trained = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    stored = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert trained * 4 <= stored <= trained * 4 + 20_000
    again = PeftModel.from_pretrained(base(home(kind)), tmp_path).eval()
    assert torch.equal(logits(again), logits(wrapped))
    assert not any(p.requires_grad for p in again.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_two_adapters_take_turns(kind, tmp_path):
    wrapped = adapted(kind, base(home(kind)))
    first = logits(wrapped)
    wrapped.add_adapter("other", KINDS[kind](base(home(kind))))
    wrapped.set_adapter("other")
    adapters.disturb(wrapped, seed=2)
    second = logits(wrapped.eval())
    assert (first - second).abs().max() > 1e-3
    wrapped.set_adapter("default")
    assert torch.equal(logits(wrapped), first)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", BASES)
def test_a_trainer_trains_it_alone(kind, model, tmp_path):
    torch.manual_seed(0)
    network = base(home(kind, model))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    wrapped = get_peft_model(network, KINDS[kind](network))
    rows = [{"input_ids": row, "labels": row} for row in adapters.tokens().tolist()] * 4
    settings = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}}
    args = TrainingArguments(
        str(tmp_path),
        max_steps=8,
        learning_rate=2e-2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        **settings,
    )
    trainer = Trainer(wrapped, args, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.03
    whole = wrapped.active_peft_config.modules_to_save or ()
    after = wrapped.unload().state_dict()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor) or name.startswith(tuple(whole)), name


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16(kind):
    network = base(home(kind)).to(torch.bfloat16)
    wrapped = get_peft_model(network, KINDS[kind](network)).train()
    output = wrapped(input_ids=adapters.tokens(), labels=adapters.tokens(), use_cache=False)
    output.loss.backward()
    grads = [p.grad for p in wrapped.parameters() if p.requires_grad]
    assert output.logits.dtype == torch.bfloat16 and all(g is not None and g.isfinite().all() for g in grads)
