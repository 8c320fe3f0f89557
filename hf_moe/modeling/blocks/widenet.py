"""WideNet: one token mixer and one feed-forward at all depths, each depth with its own norms.

https://arxiv.org/abs/2107.11817, §3; normed before each half as in its released code.
"""

from typing import Any

import torch
from torch import nn

from ..context import NO_CONTEXT, ForwardContext
from ..feed_forwards import FEED_FORWARDS
from ..feed_forwards.base import FeedForwardOutput
from ..layers import RMSNorm
from ..mixers import MIXERS
from ..parts import Part, build
from .base import Block, total

SHARED = "widenet"  # what the decoder calls the halves: `model.shared.widenet`


class SharedHalves(Part):
    """The mixer and the feed-forward of all depths; the decoder owns them, so each parameter exists once."""

    def __init__(self, config: Any, mixer: dict[str, Any], feed_forward: dict[str, Any], layer_idx: int = 0) -> None:
        super().__init__()
        self.specs = {"mixer": mixer, "feed_forward": feed_forward}
        self.self_attn = build(MIXERS, mixer, config, layer_idx)
        self.mlp = build(FEED_FORWARDS, feed_forward, config, layer_idx)

    def extra_repr(self) -> str:
        return str(self.specs)  # two blocks that print the same share them

    def known_depths(self, other: "SharedHalves") -> list[str]:
        """What differs between these halves and those that were built for another layer, beside the mixer's number."""
        first, second = traits(self), traits(other)
        names = sorted(first.keys() | second.keys())
        return [name for name in names if first.get(name) != second.get(name) and name != "self_attn.layer_idx"]


def traits(module: nn.Module) -> dict[str, Any]:
    """The plain attributes of a module and of those inside it, and the shapes of its tensors."""
    found: dict[str, Any] = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    for path, child in module.named_modules():
        for name, value in vars(child).items():
            if not name.startswith("_") and isinstance(value, (int, float, str, tuple, list, dict)):
                found[f"{path}.{name}"] = value
    return found


class Widenet(Block):
    """`x + mixer(norm_l(x))`, then `x + feed_forward(norm'_l(x))`, where only the norms belong to layer l.

    The mixer learns at which depth it is right before it runs, for its cache. All such blocks of a model share their
    halves; other blocks may stand between them. Balance losses and router logits are per depth, and the experts get
    the gradient of all depths.
    """

    homes = {"mixer": f"shared.{SHARED}", "feed_forward": f"shared.{SHARED}"}

    def __init__(self, config: Any, layer_idx: int, *, mixer: dict[str, Any], feed_forward: dict[str, Any]) -> None:
        super(Block, self).__init__()  # Block's own would build a mixer for this depth
        self.layer_idx = layer_idx
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    @classmethod
    def shared_modules(
        cls, config: Any, *, mixer: dict[str, Any], feed_forward: dict[str, Any]
    ) -> dict[str, nn.Module]:
        last = config.num_hidden_layers - 1
        with torch.device("meta"):
            first, *others = (SharedHalves(config, mixer, feed_forward, i) for i in sorted({0, min(1, last), last}))
        for other in others:
            if known := first.known_depths(other):
                raise ValueError(
                    f"A widenet block runs one mixer and one feed-forward at all depths, but {known} of "
                    f"{mixer['type']!r} and {feed_forward['type']!r} depend on the layer; choose others."
                )
        return {SHARED: SharedHalves(config, mixer, feed_forward)}

    def forward(
        self,
        hidden_states: torch.Tensor,
        router_state: torch.Tensor | None = None,
        *,
        context: ForwardContext = NO_CONTEXT,
        **mixer_inputs: Any,
    ) -> FeedForwardOutput:
        assert context.shared is not None, "the decoder hands over the halves"
        halves: Any = context.shared[SHARED]
        halves.self_attn.layer_idx = self.layer_idx  # here, so that checkpointing's repetition finds it too
        mixed, _, mixer_losses = halves.self_attn(self.input_layernorm(hidden_states), context=context, **mixer_inputs)
        hidden_states = hidden_states + mixed.to(hidden_states.device)  # the halves may be on another device
        output, router_state, losses = halves.mlp(self.post_attention_layernorm(hidden_states), router_state, context)
        return hidden_states + output.to(hidden_states.device), router_state, total(mixer_losses, losses)
