"""Optimizer steps whose balancing looks at the whole step: a model with selection biases, rows with padding.

Run as a script it is one process of two: `torchrun --nproc-per-node 2 steps.py OUT.safetensors`.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import save_file
from transformers import PreTrainedModel

from hf_moe.modeling.routers import Router
from hf_moe.training import BiasBalancing, CountsAhead, LoadBalancing

sys.path.insert(0, str(Path(__file__).parent))
import balance

TOP_K, RATE = 2, 0.125  # a rate that fp32 adds without rounding


def model(zero_experts: int = 0, **overrides: Any) -> PreTrainedModel:
    """Two layers of sigmoid routers with selection biases."""
    router = {"type": "top_k", "top_k": TOP_K, "scoring": "sigmoid", "selection_bias": True}
    moe = {
        "type": "moe",
        "num_experts": 4,
        "num_zero_experts": zero_experts,
        "router": router,
        "experts": {"type": "swiglu", "intermediate_size": 16},
    }
    return balance.model("hf_moe", blocks={"moe": {"mixer": {"type": "attention"}, "feed_forward": moe}}, **overrides)


def padded_rows() -> Dataset:
    """Eight rows of different tokens, of which row i has i + 3."""

    def pad(row: dict[str, Any], i: int) -> dict[str, Any]:
        real = i + 3
        return {
            "input_ids": row["input_ids"][:real] + [0] * (balance.LENGTH - real),
            "attention_mask": [1] * real + [0] * (balance.LENGTH - real),
            "labels": row["labels"][:real] + [-100] * (balance.LENGTH - real),
        }

    return balance.rows(same_tokens=False).map(pad, with_indices=True)


def biases(network: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The selection bias of every router."""
    return {
        name: module.e_score_correction_bias.clone()
        for name, module in network.named_modules()
        if isinstance(module, Router)
    }


def biased(accumulation: int = 1, processes: int = 1, **extra: Any) -> dict[str, torch.Tensor]:
    """The selection biases after one step over the padded rows."""
    network = model()
    balance.with_trainer(
        network, padded_rows(), accumulation, processes, callbacks=[BiasBalancing(rate=RATE)], **extra
    )
    return biases(network)


def global_gradients(accumulation: int = 1, processes: int = 1, ahead: bool = True, **extra: Any) -> balance.Gradients:
    """The gradients of the global-batch loss on different rows."""
    cls = CountsAhead if ahead else balance.Trainer
    callbacks, rows = [LoadBalancing()], balance.rows(same_tokens=False)
    return balance.with_trainer(model(), rows, accumulation, processes, cls, callbacks, **extra)


if __name__ == "__main__":
    torch.set_num_threads(1)
    results = {f"ahead/{n}": g for n, g in global_gradients(accumulation=2, processes=2).items()}
    results |= {f"whole/{n}": g for n, g in global_gradients(processes=2, ahead=False).items()}
    results |= {f"bias/{n}": b for n, b in biased(accumulation=2, processes=2).items()}
    if torch.distributed.get_rank() == 0:
        save_file({name.replace("module.", ""): t.contiguous() for name, t in results.items()}, Path(sys.argv[1]))
    torch.distributed.destroy_process_group()
