"""BASED: linear attention for recall, tiny windows and convolutions for the rest (https://arxiv.org/abs/2402.18668).

Every layer has one of three mixers: linear attention over Taylor features, softmax attention over a short sliding
window, or a gated short convolution. The two published layouts are `BasedConfig.based_360m` and `.based_1b4`.
"""

from typing import Any

from huggingface_hub.dataclasses import strict

from ..modeling.configuration import DecoderConfig
from ..modeling.model import model_classes


@strict
class BasedConfig(DecoderConfig):
    """Hybrid of linear attention, sliding windows and convolutions. Defaults are those of the released 360M model.

    Args:
        vocab_size: GPT-2's 50257 tokens, padded to a multiple of 8.
        intermediate_size: width of the SwiGLU feed-forwards.
        feature_dim: width of a head's queries and keys in linear attention.
        feature_map: name of a part in `FEATURE_MAPS`.
        linear_attention_layers: layers, counted from 0, with linear attention. Defaults to 1, 6, 11, ... as long as a
            layer follows for the window.
        sliding_attention_layers: layers with sliding-window attention. Defaults to 2, 7, 12, ...; all layers in
            neither list are convolutions.
        sliding_window: tokens that a window holds, its own among them. The released configs' `window_size: 256` is
            halved in the code and counts tokens before the own one: 128 + 1.
        conv_expand: input width of the convolutions in hidden sizes, half of it for their gate.
        conv_kernel: tokens that a convolution sees.

    Raises:
        ValueError: a layer in both lists, or one that does not exist.
    """

    model_type = "based"

    vocab_size: int = 50264
    hidden_size: int = 1024
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    intermediate_size: int = 2048
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    sliding_window: int | None = 129
    feature_dim: int = 16
    feature_map: str = "taylor"
    linear_attention_layers: list[int] | None = None
    sliding_attention_layers: list[int] | None = None
    conv_expand: int = 4
    conv_kernel: int = 3

    def __post_init__(self, **kwargs: Any) -> None:
        layers = range(self.num_hidden_layers)
        if self.linear_attention_layers is None:
            self.linear_attention_layers = [layer for layer in layers[:-1] if layer % 5 == 1]
        if self.sliding_attention_layers is None:
            self.sliding_attention_layers = [layer for layer in layers if layer % 5 == 2]
        named = [*self.linear_attention_layers, *self.sliding_attention_layers]
        if unknown := sorted(set(named) - set(layers)):
            raise ValueError(f"There are no layers {unknown}: num_hidden_layers={self.num_hidden_layers}.")
        if twice := sorted({layer for layer in named if named.count(layer) > 1}):
            raise ValueError(f"linear_attention_layers and sliding_attention_layers name layers {twice} twice.")
        super().__post_init__(**kwargs)

    @classmethod
    def based_360m(cls, **overrides: Any) -> "BasedConfig":
        """The released 360M model: 27 layers of width 1024 (train/configs/experiment/reference/based-360m.yaml)."""
        layout = {
            "linear_attention_layers": [1, 6, 11, 16, 21],
            "sliding_attention_layers": [2, 7, 12, 17, 22],
        }
        return cls(**{**layout, "bos_token_id": 50256, "eos_token_id": 50256, **overrides})

    @classmethod
    def based_1b4(cls, **overrides: Any) -> "BasedConfig":
        """The released 1.4B model: 36 layers of width 1792 (based-1b.yaml, and based_1.3b_50b_tok.yaml)."""
        layout = {
            "hidden_size": 1792,
            "num_hidden_layers": 36,
            "intermediate_size": 3584,
            "linear_attention_layers": [1, 6, 11, 16, 21, 27, 33],
            "sliding_attention_layers": [2, 7, 12, 17, 22, 28, 34],
        }
        return cls(**{**layout, "bos_token_id": 50256, "eos_token_id": 50256, **overrides})

    @property
    def blocks(self) -> dict[str, dict[str, Any]]:
        """The paper in terms of parts."""
        feature_map = {"type": self.feature_map}
        mixers = {
            "linear": {"type": "based", "feature_dim": self.feature_dim, "feature_map": feature_map},
            "sliding": {"type": "attention", "sliding": True},
            "convolution": {
                "type": "short_convolution",
                "expand": self.conv_expand,
                "kernel_size": self.conv_kernel,
            },
        }
        feed_forward = {"type": "mlp", "intermediate_size": self.intermediate_size}
        return {
            name: {"type": "pre_norm", "mixer": mixer, "feed_forward": feed_forward} for name, mixer in mixers.items()
        }

    @property
    def block_pattern(self) -> list[str]:
        """One name per layer: the published layouts do not repeat."""
        names = dict.fromkeys(self.linear_attention_layers or [], "linear")
        names.update(dict.fromkeys(self.sliding_attention_layers or [], "sliding"))
        return [names.get(layer, "convolution") for layer in range(self.num_hidden_layers)]


BasedModel, BasedForCausalLM, BasedForSequenceClassification, BasedForTokenClassification = model_classes(
    "Based", BasedConfig
)
