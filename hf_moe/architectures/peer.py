"""PEER: a layer of a million experts of one neuron each, found by product keys (https://arxiv.org/abs/2407.04153)."""

from typing import Any

from huggingface_hub.dataclasses import strict

from ..modeling.configuration import DecoderConfig
from ..modeling.model import model_classes


@strict
class PeerConfig(DecoderConfig):
    """A decoder some of whose feed-forwards are PEER layers. Number of experts, heads and experts per head are those
    that the paper settles on; it gives no list of its models' sizes, so the others are free choices.

    Args:
        peer_layers: layers with single-neuron experts; the others are dense. Defaults to the one in the middle, as in
            the product-key memories that the paper compares with; that the paper does the same is a recollection.
        peer_num_keys: keys per half; a layer has their square in experts.
        peer_key_size: width of a key, half that of a query.
        peer_num_heads: queries per token.
        peer_top_k: experts per head.
        peer_scoring: `softmax` (the paper), `sigmoid` or `relu`.
        peer_query_norm: `batch` or None.
        intermediate_size: width of the dense feed-forwards, which have no gate.
        hidden_act: activation of the experts and of the dense feed-forwards.

    Raises:
        ValueError: a number in `peer_layers` that is no layer.
    """

    model_type = "peer"

    hidden_size: int = 1024
    num_hidden_layers: int = 12
    num_attention_heads: int = 16
    peer_layers: list[int] | None = None
    peer_num_keys: int = 1024
    peer_key_size: int = 128
    peer_num_heads: int = 8
    peer_top_k: int = 16
    peer_scoring: str = "softmax"
    peer_query_norm: str | None = "batch"
    intermediate_size: int = 4096
    hidden_act: str = "gelu"

    def check_blocks(self) -> None:
        check_layer_numbers("peer_layers", self.sparse_layers, self.num_hidden_layers)
        super().check_blocks()

    @property
    def sparse_layers(self) -> list[int]:
        """The layers with single-neuron experts."""
        return [self.num_hidden_layers // 2] if self.peer_layers is None else self.peer_layers

    @property
    def block_pattern(self) -> list[str]:
        """Which block each layer is."""
        return ["peer" if i in self.sparse_layers else "dense" for i in range(self.num_hidden_layers)]

    @property
    def blocks(self) -> dict[str, dict[str, Any]]:
        """The paper in terms of parts."""
        feed_forwards = {
            "peer": {
                "type": "peer",
                "num_keys": self.peer_num_keys,
                "key_size": self.peer_key_size,
                "num_heads": self.peer_num_heads,
                "top_k": self.peer_top_k,
                "scoring": self.peer_scoring,
                "query_norm": self.peer_query_norm,
                "activation": self.hidden_act,
            },
            "dense": {
                "type": "ungated_mlp",
                "intermediate_size": self.intermediate_size,
                "activation": self.hidden_act,
            },
        }
        return {
            name: {"type": "pre_norm", "mixer": {"type": "attention"}, "feed_forward": spec}
            for name, spec in feed_forwards.items()
        }


def check_layer_numbers(field: str, layers: list[int], num_layers: int) -> None:
    """Raise `ValueError` for numbers that are no layer."""
    if wrong := [i for i in layers if not 0 <= i < num_layers]:
        raise ValueError(f"{field} names {wrong}; layers are 0 to {num_layers - 1}.")


PeerModel, PeerForCausalLM, PeerForSequenceClassification, PeerForTokenClassification = model_classes(
    "Peer", PeerConfig
)
