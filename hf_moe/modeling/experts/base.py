"""What every set of experts promises. Letters: N tokens, D width, E experts, K chosen per token, S listed rows."""

from typing import Any, ClassVar

import torch

from ..parts import Part


class Experts(Part):
    """`forward(tokens (N, D), indices (N, K), weights (N, K)) -> (N, D)`: Transformers' ExpertsInterface contract.

    Experts that `take_rows` also run a list, where tokens have different numbers of experts: `forward(tokens (N, D),
    indices (S, 1), weights (S, 1), token (S,))`, which saves copying the tokens of the rows twice.

    Experts that `tell_statistics` answer `forward(tokens, None, None)` with `first_layer_statistics`.
    """

    attribute: ClassVar[str] = "experts"
    per_expert_names: ClassVar[dict[str, tuple[str, ...]]] = {}  # stacked parameter -> its per-expert tensors on disk
    takes_rows: ClassVar[bool] = False
    tells_statistics: ClassVar[bool] = False
    joint: ClassVar[bool] = False  # whether the experts of one token must run together
    num_experts: int

    @classmethod
    def check_number(cls, num_experts: int, spec: dict[str, Any]) -> None:
        """Raise `ValueError` if there cannot be so many experts with the options in `spec`."""

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_pre_hook(stack_per_expert_tensors)

    def first_layer_statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and variance (E, D) over an expert's hidden units of the weights that feed its activation; a bias of
        theirs is one more column."""
        raise NotImplementedError


def stack_per_expert_tensors(module: Experts, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Accept per-expert keys in a plain `load_state_dict`.

    `Trainer` resumes and reloads its best model that way, with `strict=False`, from checkpoints that `save_pretrained`
    wrote per expert: without this hook the experts would silently not be restored (Transformers 5.23).
    """
    for stacked, names in module.per_expert_names.items():
        if prefix + stacked in state_dict or f"{prefix}0.{names[0]}.weight" not in state_dict:
            continue
        tensors = [
            torch.cat([state_dict.pop(f"{prefix}{expert}.{name}.weight") for name in names])
            for expert in range(module.num_experts)
        ]
        state_dict[prefix + stacked] = torch.stack(tensors)


def unit_statistics(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and population variance (E, D), in fp32 or more, of weights (E, F, D) over the F units of each expert.

    By matrix products: on a CPU they take a third of the time of `torch.var_mean`, and save nothing for the backward
    pass but the weights.
    """
    units = weight.shape[1]
    with torch.autocast(weight.device.type, enabled=False):
        ones = weight.new_ones(1, 1, units).expand(weight.shape[0], -1, -1)
        sums = [torch.bmm(ones, values).squeeze(1) for values in (weight, weight.square())]
    dtype = torch.promote_types(weight.dtype, torch.float32)
    mean, second_moment = (total.to(dtype) / units for total in sums)
    return mean, (second_moment - mean.square()).clamp(min=0)
