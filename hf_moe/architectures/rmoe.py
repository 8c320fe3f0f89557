"""RMoE: a mixture of experts whose router is recurrent over the depth (https://arxiv.org/abs/2408.06793)."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from ..modeling.configuration import DecoderConfig
from ..modeling.model import model_classes


@strict
class RMoeConfig(DecoderConfig):
    """Layer-wise recurrent router. Defaults are the paper's large model: 24 layers of width 1280, 16 experts of 448.

    Args:
        num_experts: experts per layer.
        num_experts_per_tok: experts per token.
        moe_intermediate_size: width of one expert.
        router_state_size: width of the state that the router carries from layer to layer.
        router_cell: `gru` (the paper's choice), `rnn` or `lstm`; one cell for all layers.
    """

    model_type = "rmoe"
    block_pattern: ClassVar[tuple[str, ...]] = ("rmoe",)

    hidden_size: int = 1280
    num_hidden_layers: int = 24
    num_attention_heads: int = 20
    num_experts: int = 16
    num_experts_per_tok: int = 4
    moe_intermediate_size: int = 448
    router_state_size: int = 128
    router_cell: str = "gru"

    @property
    def blocks(self) -> dict[str, dict[str, Any]]:
        """The paper in terms of parts."""
        router = {
            "type": "recurrent",
            "top_k": self.num_experts_per_tok,
            "state_size": self.router_state_size,
            "cell": self.router_cell,
        }
        feed_forward = {
            "type": "moe",
            "num_experts": self.num_experts,
            "router": router,
            "experts": {"type": "swiglu", "intermediate_size": self.moe_intermediate_size},
        }
        return {"rmoe": {"type": "pre_norm", "mixer": {"type": "attention"}, "feed_forward": feed_forward}}


RMoeModel, RMoeForCausalLM, RMoeForSequenceClassification, RMoeForTokenClassification = model_classes(
    "RMoe", RMoeConfig
)
