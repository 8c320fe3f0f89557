"""QK-clip, the second half of MuonClip, bounds attention logits (Kimi K2, https://arxiv.org/abs/2507.20534, §2.1).

After each optimizer step, a head h whose largest logit S_h of the step (scaled, before the softmax, where the mask
allows) exceeds tau gets its projections scaled, with eta_h = tau / S_h:

    multi-head, grouped   W_q *= eta^alpha,       W_k *= eta^(1 - alpha)
    latent (MLA)          W_q,nope *= eta^alpha,  W_k,nope *= eta^(1 - alpha),  W_q,rope *= eta;  shared k_rope stays

so that its logits are eta times as large. Query heads that share a key head share the eta of the largest.
Letters: B batch, T queries, S keys, H heads, G key heads, d head width.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import TrainerCallback
from transformers.modeling_utils import AttentionInterface

SCORES_AT_ONCE = 2**24  # that are held in memory: 64 MB
KERNELS = ("eager", "sdpa")


class QKClip(TrainerCallback):
    """Scales down queries and keys of the heads whose attention logits exceeded a threshold in the step.

    With `MuonForMixtures` as the optimizer this is MuonClip; any optimizer will do. Kernels hide their logits, so they
    are computed a second time, in blocks and without a gradient: one more product of queries and keys per layer.

    Args:
        threshold: tau; the paper has 100.
        alpha: the queries' part of the scaling.

    Attributes:
        max_logits: attention module -> (H,) largest logits of the last step, over micro-batches and processes.
        num_clipped: heads scaled in the last step.

    Raises:
        ValueError: numbers out of range; a model without layers that can be clipped; a layer that normalises queries
            or keys, which undoes any scaling, or attends without Transformers' kernels; sharded or adapted
            projections; kernels other than eager and sdpa.
    """

    def __init__(self, threshold: float = 100.0, alpha: float = 0.5) -> None:
        if threshold <= 0 or not 0 <= alpha <= 1:
            raise ValueError(f"threshold={threshold} must be above 0 and alpha={alpha} between 0 and 1.")
        self.threshold, self.alpha = threshold, alpha
        self.names: dict[nn.Module, str] = {}
        self.seen: dict[nn.Module, torch.Tensor] = {}
        self.max_logits: dict[str, torch.Tensor] = {}
        self.num_clipped = 0
        self.plain: Callable[..., Any] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.on_train_end(args, state, control)
        kernel = model.config.get_text_config()._attn_implementation
        if kernel not in KERNELS:
            raise ValueError(f"attn_implementation={kernel!r} cannot be watched by QKClip; choose from {KERNELS}.")
        self.names = {module: name for name, module in model.named_modules() if is_attention(module)}
        if not self.names:
            raise ValueError("QKClip found no attention with q_proj and k_proj, or latent attention, in this model.")
        for module, name in self.names.items():
            check(module, name)
        self.watch()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.plain is not None:
            AttentionInterface.get_interface = self.plain
        self.plain, self.seen = None, {}

    def watch(self) -> None:
        """Let every attention function that a model asks Transformers for look at its logits first."""
        plain = self.plain = AttentionInterface.get_interface

        def get_interface(interface: Any, name: Any, default: Callable[..., Any]) -> Callable[..., Any]:
            kernel = plain(interface, name, default)

            def watched(module: nn.Module, query: Any, key: Any, value: Any, mask: Any, *args: Any, **kw: Any) -> Any:
                if module.training and module in self.names:
                    self.see(module, query, key, mask, kw)
                return kernel(module, query, key, value, mask, *args, **kw)

            return watched

        AttentionInterface.get_interface = get_interface  # pyright: ignore[reportAttributeAccessIssue]

    def see(self, module: Any, query: torch.Tensor, key: torch.Tensor, mask: Any, options: dict[str, Any]) -> None:
        """Remember the largest logits (H,) of a layer in this step."""
        scaling, causal = options.get("scaling"), options.get("is_causal")
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        found = largest_logits(query, key, mask, scaling, module.is_causal if causal is None else causal)
        expected = num_heads(module)
        if len(found) != expected:
            raise ValueError(
                f"{self.names[module]!r} attends with {len(found)} heads where its projections have {expected}: "
                "QKClip does not know this attention."
            )
        self.seen[module] = torch.maximum(self.seen[module], found) if module in self.seen else found

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.num_clipped = 0
        for module, name in self.names.items():  # all processes go through all layers in the same order
            if module not in self.seen:
                raise ValueError(f"QKClip saw no logits of {name!r} in this step: it attends without the kernels.")
            largest = self.seen.pop(module)
            if dist.is_available() and dist.is_initialized():
                dist.all_reduce(largest, dist.ReduceOp.MAX)
            self.max_logits[name] = largest
            self.num_clipped += clip(module, largest, self.threshold, self.alpha)


@torch.no_grad()
def largest_logits(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, scaling: float, causal: bool = True
) -> torch.Tensor:
    """The largest of `scaling q k` for every head, among those that a mask allows.

    Args:
        query: (B, H, T, d); key: (B, G, S, d), where each key head serves H / G neighbouring query heads.
        mask: (B or 1, H or 1, T, S), boolean (True: allowed) or added to the scores; None: what `causal` says.
        causal: without a mask, the last query sees all keys and those before it fewer.

    Returns:
        (H,) in float32.
    """
    batch, heads, queries, keys = *query.shape[:3], key.shape[2]
    step = max(1, SCORES_AT_ONCE // (batch * heads * keys))
    grouped, best = query.unflatten(1, (key.shape[1], -1)), []
    for start in range(0, queries, step):
        scores = (grouped[..., start : start + step, :] @ key.unsqueeze(2).mT).flatten(1, 2).float() * scaling
        if mask is None:
            rows = torch.arange(start, min(start + step, queries), device=query.device)
            last = rows[:, None] + keys - queries if causal else keys
            allowed = torch.arange(keys, device=query.device) <= last
        else:
            part = mask[..., start : start + step, :keys]
            allowed = part if part.dtype == torch.bool else part > torch.finfo(part.dtype).min / 2
        best.append(scores.masked_fill(~allowed, -torch.inf).amax((0, 2, 3)))
    return torch.stack(best).amax(0)


@torch.no_grad()
def clip(module: Any, largest: torch.Tensor, threshold: float, alpha: float) -> int:
    """Scale the projections of an attention module; returns the number of heads that were scaled.

    Args:
        module: attention whose layout is known.
        largest: (H,) largest logits.
    """
    latent = is_latent(module)
    key_heads = len(largest) if latent else module.k_proj.out_features // module.head_dim
    of_group = largest.unflatten(0, (key_heads, -1)).amax(1)  # (G,)
    eta = torch.where(of_group > threshold, threshold / of_group, 1.0)
    if not (clipped := int((eta < 1).sum()) * (len(largest) // key_heads)):
        return 0
    per_query = eta.repeat_interleave(len(largest) // key_heads)
    if latent:
        nope = nope_width(module)
        of_key = torch.ones(len(largest), module.kv_b_proj.out_features // len(largest), device=eta.device)
        of_query = torch.ones(len(largest), query_projection(module).out_features // len(largest), device=eta.device)
        of_key[:, :nope] = eta[:, None] ** (1 - alpha)
        of_query[:, :nope], of_query[:, nope:] = eta[:, None] ** alpha, eta[:, None]
        scale_rows(query_projection(module), of_query.flatten())
        scale_rows(module.kv_b_proj, of_key.flatten())
    else:
        scale_rows(module.q_proj, per_query.repeat_interleave(module.head_dim) ** alpha)
        scale_rows(module.k_proj, eta.repeat_interleave(module.head_dim) ** (1 - alpha))
    return clipped


def scale_rows(linear: nn.Linear, factors: torch.Tensor) -> None:
    """Multiply every output of a linear layer by a number of its own."""
    linear.weight.mul_(factors[:, None].to(linear.weight.dtype))
    if linear.bias is not None:
        linear.bias.mul_(factors.to(linear.bias.dtype))


def is_latent(module: Any) -> bool:
    """Whether keys come out of a latent vector, with the names of DeepSeek's checkpoints."""
    return hasattr(module, "kv_b_proj")


def is_attention(module: nn.Module) -> bool:
    """Whether a module computes queries and keys for softmax attention, in a way that can be scaled."""
    names = dict(module.named_children())
    grouped = {"q_proj", "k_proj", "v_proj"} <= names.keys() and hasattr(module, "head_dim")
    latent = "kv_b_proj" in names and ("q_b_proj" in names or "q_proj" in names)
    return (grouped or latent) and hasattr(module, "is_causal")


def query_projection(module: Any) -> nn.Linear:
    """What makes the queries of all heads."""
    low_rank = getattr(module, "q_b_proj", None)
    return module.q_proj if low_rank is None else low_rank


def nope_width(module: Any) -> int:
    """Entries of a latent head that know no position; they come first."""
    return module.key_widths[0] if hasattr(module, "key_widths") else module.qk_nope_head_dim


def num_heads(module: Any) -> int:
    """Query heads."""
    return module.num_heads if is_latent(module) else module.q_proj.out_features // module.head_dim


def projections(module: Any) -> Iterator[tuple[str, Any]]:
    """What is scaled."""
    yield "the queries' projection", query_projection(module)
    yield "the keys' projection", module.kv_b_proj if is_latent(module) else module.k_proj


def check(module: Any, name: str) -> None:
    """Raise `ValueError` if scaling an attention's projections would not scale its logits."""
    latent_norms = ("q_a_layernorm", "kv_a_layernorm") if is_latent(module) else ()
    for child, part in module.named_children():
        if "norm" in type(part).__name__.lower() and child not in latent_norms:
            raise ValueError(
                f"{name!r} normalises queries or keys ({child}), which undoes any scaling of their projections and "
                "bounds the logits by itself: train without QKClip."
            )
    for what, linear in projections(module):
        if not isinstance(linear, nn.Linear) or type(linear.weight) is not nn.Parameter:
            raise ValueError(
                f"{what} of {name!r} is {type(linear).__name__} with {type(linear.weight).__name__}: QKClip scales "
                "plain linear layers only, neither adapters nor shards."
            )
