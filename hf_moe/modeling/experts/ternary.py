"""MoTE's ternary experts (https://arxiv.org/abs/2506.14435): weights of -1, 0 and 1, trained from full precision.

    E_e(x) = Q(W_down,e) q(act(Q(W_gate,e) q(x)) * Q(W_up,e) q(x)),   Q(W) = mean|W| round(clip(W / mean|W|, -1, 1))

q rounds each token to 8 bits by its largest magnitude. Both roundings are straight-through, so the full-precision W
learn. MoTE puts these beside the dense feed-forward in full precision, as a shared expert, and starts them from it. No
code is released; absmean and 8-bit inputs are those of BitNet b1.58 (https://arxiv.org/abs/2402.17764).
Letters: N tokens, D width, E experts, F expert width, K chosen, S listed rows.
"""

from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN

from ..ops.grouped import GroupedRows
from ..ops.ternary import absmax_rounded, pack_codes, straight_through, ternary_codes, unpack_codes
from .base import Experts

NUM_MATRICES = {"gate_up": 2, "down": 1}  # gate and up have a scale each


class Ternary(Experts):
    """SwiGLU experts with ternary weights.

    Packed experts hold two bits a weight and a scale a matrix, as buffers: they infer, bit for bit like the experts
    that they come from, and cannot be trained. To pack a trained model, build one whose config says `packed=True` and
    call its `load_state_dict` with the trained model's `state_dict()`.

    Args:
        intermediate_size: width F of one expert.
        activation_bits: bits of what each matrix reads, 2 to 8; None leaves it in full precision.
        packed: hold packed weights. Every forward pass unpacks one layer's experts into the model's dtype.
    """

    attribute = "ternary_experts"  # a module called `experts` would be replaced by FP8 quantisation's own SwiGLU
    takes_rows = True
    per_expert_names = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}

    def __init__(
        self,
        config: Any,
        layer_idx: int,
        num_experts: int,
        *,
        intermediate_size: int,
        activation_bits: int | None = 8,
        packed: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.num_experts = config, num_experts
        self.activation_bits, self.packed = activation_bits, packed
        width = config.hidden_size
        self.shapes = {
            "gate_up": (num_experts, 2 * intermediate_size, width),
            "down": (num_experts, width, intermediate_size),
        }
        for name, (_, outputs, inputs) in self.shapes.items():
            if packed:
                codes = torch.zeros(num_experts, outputs, -(-inputs // 4), dtype=torch.uint8)
                self.register_buffer(f"{name}_codes", codes)
                self.register_buffer(f"{name}_scale", torch.zeros(num_experts, NUM_MATRICES[name]))
            else:
                self.register_parameter(f"{name}_proj", nn.Parameter(torch.empty(num_experts, outputs, inputs)))
        self.act_fn = ACT2FN[config.hidden_act]
        if packed:
            self.register_load_state_dict_pre_hook(pack_full_precision)  # after the hook that stacks

    @classmethod
    def check(cls, config: Any, *, activation_bits: int | None, **options: Any) -> None:
        if activation_bits is not None and not 2 <= activation_bits <= 8:
            raise ValueError(f"activation_bits={activation_bits} must be 2 to 8, or None for full precision.")

    def init_weights(self, std: float) -> None:
        for name, shape in self.shapes.items():
            if not self.packed:
                init.normal_(getattr(self, f"{name}_proj"), std=std)
                continue
            codes = self.get_buffer(f"{name}_codes")
            weight = torch.empty(shape, device=codes.device, dtype=torch.float32).normal_(std=std)
            for buffer, value in zip((codes, self.get_buffer(f"{name}_scale")), packed_weight(name, weight)):
                init.copy_(buffer, value)

    def forward(
        self,
        tokens: torch.Tensor,
        indices: torch.Tensor,
        weights: torch.Tensor,
        token: torch.Tensor | None = None,
    ) -> torch.Tensor:
        rows = GroupedRows(indices, self.num_experts, self.config._experts_implementation, token)
        entering = self.rounded(tokens).index_select(0, rows.token)  # (S, D)
        gate, up = rows.linear(entering, self.ternary_weight("gate_up", tokens.dtype)).chunk(2, dim=-1)
        hidden = self.rounded(self.act_fn(gate) * up)  # (S, F)
        output = rows.linear(hidden, self.ternary_weight("down", tokens.dtype)) * rows.order(weights)[:, None]
        return rows.sum(output, tokens.shape[0]).to(tokens.dtype)

    def rounded(self, values: torch.Tensor) -> torch.Tensor:
        """What a matrix reads (..., I)."""
        return values if self.activation_bits is None else absmax_rounded(values, self.activation_bits)

    def ternary_weight(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """(E, O, I) the matrices `name` of all experts, each entry -1, 0 or 1 times its matrix' scale."""
        if self.packed:
            codes = unpack_codes(self.get_buffer(f"{name}_codes"), self.shapes[name][-1], torch.float32)
            scale = self.get_buffer(f"{name}_scale")[:, :, None, None]
            return (codes.unflatten(1, (NUM_MATRICES[name], -1)) * scale).flatten(1, 2).to(dtype)
        weight = getattr(self, f"{name}_proj")  # PEFT may have put a parametrisation there
        codes, scale = ternary_codes(weight.unflatten(1, (NUM_MATRICES[name], -1)))
        return straight_through(weight, (codes * scale).flatten(1, 2))


def packed_weight(name: str, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Stacked matrices (E, O, I) as bytes (E, O, ceil(I / 4)) and their scales (E, number of matrices)."""
    codes, scale = ternary_codes(weight.unflatten(1, (NUM_MATRICES[name], -1)))
    return pack_codes(codes.flatten(1, 2)), scale.flatten(1).float()


def pack_full_precision(module: Ternary, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Accept the full-precision weights of trained experts in a packed module's `load_state_dict`."""
    for name in NUM_MATRICES:
        if (weight := state_dict.pop(f"{prefix}{name}_proj", None)) is not None:
            packed = packed_weight(name, weight)
            state_dict[f"{prefix}{name}_codes"], state_dict[f"{prefix}{name}_scale"] = packed
