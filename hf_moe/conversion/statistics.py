"""What a dense model's neurons do on texts: which fire together, and which matter for each group of texts.

Letters: L layers, G groups of texts, N true tokens of a batch, F neurons.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from .hearing import evaluating

Record = Callable[[int, torch.Tensor], None]


def coactivation(model: Any, batches: Sequence[Any], layers: Sequence[int]) -> dict[int, torch.Tensor]:
    """Layer -> (F, F) sum over true tokens of `|h|^T |h|`, h what the down projection reads, in float32.

    It holds F^2 floats per layer: 0.8 GB for a width of 14336. Ask for few layers at a time.
    """
    found: dict[int, torch.Tensor] = {}
    for batch in batches:
        mask = batch.attention_mask.bool()

        def record(layer: int, hidden: torch.Tensor, mask: torch.Tensor = mask) -> None:
            size = hidden.detach().cpu()[mask].float().abs()  # (N, F)
            if layer not in found:
                found[layer] = torch.zeros(size.shape[1], size.shape[1])
            found[layer].addmm_(size.T, size)

        with torch.no_grad():
            run(model, batch, layers, record)
    for layer, sums in found.items():
        check_finite(layer, sums)
    return found


def importance(model: Any, batches: Sequence[Any], layers: Sequence[int], groups: int) -> dict[int, torch.Tensor]:
    """Layer -> (G, F) mean over a group's true tokens of `|h_j dLoss / dh_j|`, in float64 (LLaMA-MoE,
    https://arxiv.org/abs/2406.16554: first-order Taylor). The loss is the sum over next tokens, so that how texts are
    batched changes nothing; the mean keeps a group with more text from taking more neurons.

    It needs the whole model and the activations of one batch in memory. Parameters get no gradient.
    """
    sums: dict[int, torch.Tensor] = {}
    tokens = torch.zeros(groups, dtype=torch.float64)
    for batch in batches:
        mask, hidden = batch.attention_mask.bool(), {}
        with torch.enable_grad():
            logits = run(model, batch, layers, hidden.__setitem__).logits
            ids, keep = batch.input_ids.to(logits.device), (mask[:, 1:] & mask[:, :-1]).to(logits.device)
            loss = torch.nn.functional.cross_entropy(logits[:, :-1][keep].float(), ids[:, 1:][keep], reduction="sum")
            gradients = torch.autograd.grad(loss, list(hidden.values()))
        tokens[batch.group] += int(mask.sum())
        for (layer, state), gradient in zip(hidden.items(), gradients, strict=True):
            change = (state.detach().cpu()[mask].double() * gradient.cpu()[mask].double()).abs().sum(0)
            sums.setdefault(layer, torch.zeros(groups, len(change), dtype=torch.float64))[batch.group] += change
    for layer, total in sums.items():
        total /= tokens[:, None]
        check_finite(layer, total)
    return sums


def run(model: Any, batch: Any, layers: Sequence[int], record: Record) -> Any:
    """One batch through a model; `record(layer, hidden states)` sees what each down projection reads."""
    decoder = model.base_model
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        handles = []
        if torch.is_grad_enabled():  # so that there are gradients even if all parameters are frozen
            embeddings = decoder.get_input_embeddings()
            handles.append(embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_()))
        for layer in layers:
            module = decoder.layers[layer].mlp.down_proj
            handles.append(module.register_forward_pre_hook(lambda _, args, layer=layer: record(layer, args[0])))
        for handle in handles:
            stack.callback(handle.remove)
        ids, mask = batch.input_ids.to(model.device), batch.attention_mask.to(model.device)
        return model(input_ids=ids, attention_mask=mask, use_cache=False)


def check_finite(layer: int, tensor: torch.Tensor) -> None:
    """Refuse statistics that say nothing."""
    if not tensor.isfinite().all():
        raise ValueError(f"data: layer {layer} has NaN or infinite neurons on it: load the source in float32")
