"""One optimizer step with a balance loss on eight sequences of different lengths, by every road and on every model.

Run as a script it is one process of two: `torchrun --nproc-per-node 2 invariance.py OUT.safetensors`.
"""

import functools
import sys
import types
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, JetMoeConfig, PreTrainedModel, Trainer

from hf_moe.training import (
    BiasBalancing,
    CountsAhead,
    Distillation,
    Distills,
    LoadBalancing,
    QKClip,
    SkipsSpikes,
    SpikeSkipping,
)

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "conversion")]
import balance
import steps
from mixture_models import mixture_model

COEF = 0.7
LENGTHS = [10, 3, 7, 12, 5, 9, 4, 6]
NATIVE = ["qwen3_moe", "olmoe", "mixtral", "deepseek_v3", "jetmoe"]
OWN = ["hf_moe", "rmoe", "mole"]


def network(kind: str) -> PreTrainedModel:
    """A tiny model; the native ones have two layers of which one or two are sparse."""
    if kind == "jetmoe":
        return jetmoe()
    if kind in NATIVE:
        extra = {} if kind == "deepseek_v3" else {"router_aux_loss_coef": 0.3}
        return mixture_model(kind, num_hidden_layers=2, vocab_size=256, **extra).train()
    return steps.model() if kind == "hf_moe" else balance.model(kind)


def jetmoe() -> PreTrainedModel:
    """Its attention is a mixture too, whose routers would keep the model's own balance loss."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 8, "num_key_value_heads": 2}
    config = JetMoeConfig(**sizes, **experts, initializer_range=0.3, aux_loss_coef=0.0)
    return AutoModelForCausalLM.from_config(config).train()


def sequences() -> list[torch.Tensor]:
    """Eight sequences of different lengths."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 200, (length,), generator=generator) for length in LENGTHS]


def padded() -> Dataset:
    """The sequences as rows with padding: on the right, on the left in every other row."""

    def row(number: int, ids: torch.Tensor) -> dict[str, list[int]]:
        missing, left = max(LENGTHS) - len(ids), number % 2 == 1
        sides = (missing, 0) if left else (0, missing)
        masked = F.pad(torch.cat([ids.new_full((1,), -100), ids[1:]]), sides, value=-100)  # no label for padding
        mask = F.pad(torch.ones_like(ids), sides)
        return {"input_ids": F.pad(ids, sides).tolist(), "attention_mask": mask.tolist(), "labels": masked.tolist()}

    return Dataset.from_list([row(number, ids) for number, ids in enumerate(sequences())])


def with_trainer(kind: str, accumulation: int = 1, processes: int = 1, loss: str = "global") -> balance.Gradients:
    """Under Trainer, on padded rows."""
    balancing = LoadBalancing(loss, COEF)
    return balance.with_trainer(network(kind), padded(), accumulation, processes, CountsAhead, [balancing])


def with_packing(kind: str, tokenizer: Any, accumulation: int = 1) -> balance.Gradients:
    """Under SFTTrainer, which packs the sequences into rows of 12 tokens at most and flattens them."""
    from trl import SFTConfig, SFTTrainer

    keep, data = balance.KeepGradients(), Dataset.from_list([{"input_ids": ids.tolist()} for ids in sequences()])
    args = balance.arguments(accumulation, cls=SFTConfig, activation_checkpointing=False, bf16=False)
    args.packing, args.max_length, args.per_device_train_batch_size = True, max(LENGTHS), 8 // accumulation
    args.shuffle_dataset = False
    cls = types.new_class("Mixed", (CountsAhead, SFTTrainer))
    callbacks = [keep, LoadBalancing("global", COEF)]
    trainer = cls(network(kind), args, train_dataset=data, callbacks=callbacks, processing_class=tokenizer)
    trainer.train()
    return keep.gradients


def by_formula(kind: str) -> balance.Gradients:
    """Cross-entropy per label and `E sum_e f_e P_e` per layer over all tokens of the step, sequence by sequence."""
    model, calls = network(kind), {}
    gates = [(n, m) for n, m in model.named_modules() if type(m).__name__.endswith(("Router", "TopKGating"))]
    gates = [(n, m) for n, m in gates if "attn" not in n and "attention" not in n]
    if kind in OWN:
        gates = [(n, m) for n, m in model.named_modules() if n.endswith("mlp.gate")]
    assert gates
    for name, gate in gates:
        gate.register_forward_hook(lambda module, args, output, name=name: calls.setdefault(name, []).append(output))
    cross_entropy = sum(
        F.cross_entropy(model(ids[None], use_cache=False).logits[0, :-1], ids[1:], reduction="sum")
        for ids in sequences()
    )
    total = cross_entropy / (sum(LENGTHS) - len(LENGTHS))
    for name, gate in gates:
        outputs = calls[name]
        if kind == "jetmoe":
            logits = torch.cat([output[4] for output in outputs])
            chosen = logits.topk(2).indices
        else:
            logits = torch.cat([output[0] for output in outputs])
            where = (o.indices if kind in OWN else o[2] for o in outputs)
            chosen = torch.cat(list(where))
        sigmoid = kind == "deepseek_v3" or getattr(gate, "scoring", "softmax") == "sigmoid"
        values = logits.float().sigmoid() if sigmoid else logits.float().softmax(-1)
        shares = values / values.sum(-1, keepdim=True)
        counts = torch.bincount(chosen.flatten(), minlength=values.shape[1])
        total = total + COEF * values.shape[1] * (counts / counts.sum() * shares.mean(0)).sum()
    total.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def biases(accumulation: int = 1, processes: int = 1) -> dict[str, torch.Tensor]:
    """DeepSeek-V3's selection biases after one step."""
    model = network("deepseek_v3")
    callback = BiasBalancing(0.125, "sign_zero_mean")
    balance.with_trainer(model, padded(), accumulation, processes, callbacks=[callback])
    return {name: buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")}


def distilled(accumulation: int = 1, processes: int = 1) -> balance.Gradients:
    """A student's gradient beside a teacher."""
    teacher = mixture_model("mixtral", seed=5, num_hidden_layers=2, vocab_size=256)
    cls = types.new_class("Mixed", (Distills, Trainer))
    settings = Distillation(temperature=2.0, layers=[(1, 1)], feature_coef=0.3)
    make: Any = functools.partial(cls, teacher=teacher, distillation=settings)
    return balance.with_trainer(network("qwen3_moe"), padded(), accumulation, processes, make)


def measured(accumulation: int = 1, processes: int = 1) -> dict[str, torch.Tensor]:
    """What QKClip and SkipsSpikes measure in a step: the largest logits of each layer, the loss and the norm."""
    clip, skip = QKClip(1e9), SpikeSkipping()
    cls = types.new_class("Mixed", (SkipsSpikes, Trainer))
    balance.with_trainer(network("deepseek_v3"), padded(), accumulation, processes, cls, [clip, skip])
    return clip.max_logits | {"loss": torch.tensor(skip.losses), "norm": torch.tensor(skip.norms)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    results = {}
    for kind in [*NATIVE, *OWN]:
        results |= {f"{kind}/{name}": g for name, g in with_trainer(kind, 2, 2).items()}
    results |= {f"bias/{name}": bias for name, bias in biases(2, 2).items()}
    results |= {f"distilled/{name}": g for name, g in distilled(2, 2).items()}
    results |= {f"measured/{name}": tensor for name, tensor in measured(2, 2).items()}
    if torch.distributed.get_rank() == 0:
        save_file({name.replace("module.", ""): t.contiguous() for name, t in results.items()}, Path(sys.argv[1]))
    torch.distributed.destroy_process_group()
