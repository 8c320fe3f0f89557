"""For mixers that know causality and no other mask: refuse rows with padding or several sequences.

Letters: B batch, T time, S columns of the mask.
"""

from typing import Any

import torch
from torch.compiler import is_compiling
from torch.nn.attention.flex_attention import BlockMask


def check_whole_rows(
    time: int,
    attention_mask: Any,
    token_mask: torch.Tensor | None,
    segments: torch.Tensor | None,
    message: str,
) -> None:
    """
    Args:
        time: T tokens that start their sequences.
        attention_mask: what the attention kernel in use would get, of any kind.
        token_mask: (B T,) False for padding.
        segments: (B, T) which packed sequence a token is of.

    Raises:
        ValueError: with `message`, unless all tokens are real and see just what came before. A compiled graph raises
            RuntimeError when it runs.
    """
    faults = []
    if segments is not None:
        faults.append((segments != segments[:, :1]).any())
    if token_mask is not None:
        faults.append(~token_mask.all())
    if isinstance(attention_mask, BlockMask):  # who is hidden from the last token is padding or another sequence
        rows = torch.arange(attention_mask.shape[0], device=attention_mask.kv_num_blocks.device)[:, None]
        columns = torch.arange(time, device=rows.device)
        faults.append(~attention_mask.mask_mod(rows, torch.zeros_like(rows), columns[-1:, None], columns).all())
    elif attention_mask is not None:
        faults.append(~is_causal_mask(attention_mask, time))
    if not faults:
        return
    fault = torch.stack([x.to(faults[0].device) for x in faults]).any()
    if is_compiling():
        torch._assert_async(~fault, message)  # pyright: ignore[reportPrivateImportUsage]
    elif fault:
        raise ValueError(message)


def is_causal_mask(attention_mask: torch.Tensor, time: int) -> torch.Tensor:
    """Whether a padding mask (B, S) hides nothing, or a mask (B, 1, T, S), boolean or added, just what is to come."""
    if attention_mask.ndim == 2:
        return attention_mask[:, :time].bool().all()
    visible = attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0
    causal = torch.ones(time, time, dtype=torch.bool, device=visible.device).tril()
    return (visible[..., :time] == causal).all()
