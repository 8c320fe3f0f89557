"""UltraMem: a memory of values beside the feed-forwards (https://arxiv.org/abs/2411.12364; version 2:
https://arxiv.org/abs/2508.18756). Sizes are those of the released scripts (`run_ultramem_v1.sh`, the README).
"""

from typing import Any

from huggingface_hub.dataclasses import strict

from ..modeling.configuration import DecoderConfig
from ..modeling.model import model_classes


@strict
class UltraMemConfig(DecoderConfig):
    """A dense OLMo-like decoder with memory layers. Defaults are version 2 with 1.2B parameters, 0.23B of them active:
    a memory beside every feed-forward, all of which share one table.

    Queries and keys are normed head by head here (`qk_norm`), in the released code over all heads together.

    Args:
        intermediate_size: width of the feed-forwards.
        memory_layers: layers whose feed-forward input a memory reads; None is all.
        memory_output_layers: for each of them the layer to whose output the memory's is added, itself or one before
            the next memory layer (version 1: three layers on); None is itself.
        memory_num_keys: a memory layer adds the square of this many rows.
        memory_key_size: width of a key, half that of a query.
        memory_value_size: width of a value.
        memory_pre_value_size: width of a pre-value; 0 for none (version 1).
        memory_top_k: rows that each head chooses.
        memory_num_heads: retrievals per token.
        memory_share_ratio: share of the one table of all layers that each reads; None gives each its own (version 1).
        memory_key_expansion: e; the keys address e^2 virtual tables of the same rows (version 1: 2).
        memory_separate_projections: an output projection for each virtual table (version 1).
        memory_num_cores: Tucker cores, each with its piece of a value.
        memory_tucker_rank: rank of a core.
        memory_query_per_rank: a query for each entry of that rank.
        memory_norm_power: norms of queries and keys start at `memory_key_size` to this negative power.
        memory_tucker_loss_coef: weight of the penalty for cores of higher rank than one.
        memory_key_balance_loss_coef: weight of the balance loss of the keys.
        qk_norm: RMSNorm over each attention head's query and key.

    Raises:
        ValueError: layer numbers that do not exist or do not fit together.
    """

    model_type = "ultramem"

    vocab_size: int = 50304
    hidden_size: int = 768
    num_hidden_layers: int = 20
    num_attention_heads: int = 12
    intermediate_size: int = 2496
    memory_layers: list[int] | None = None
    memory_output_layers: list[int] | None = None
    memory_num_keys: int = 360
    memory_key_size: int = 192
    memory_value_size: int = 192
    memory_pre_value_size: int = 192
    memory_top_k: int = 32
    memory_num_heads: int = 1
    memory_share_ratio: float | int | None = 0.5
    memory_key_expansion: int = 1
    memory_separate_projections: bool = False
    memory_num_cores: int = 2
    memory_tucker_rank: int = 2
    memory_query_per_rank: bool = False
    memory_norm_power: float | int = 0.4
    memory_tucker_loss_coef: float | int = 0.0
    memory_key_balance_loss_coef: float | int = 0.0
    qk_norm: bool = True
    tie_word_embeddings: bool = True
    rms_norm_eps: float = 1e-5

    @classmethod
    def paper_227m(cls, **overrides: Any) -> "UltraMemConfig":
        """Version 2, 227M active of 1.2B parameters (the defaults)."""
        return cls(**overrides)

    @classmethod
    def version_1_227m(cls, **overrides: Any) -> "UltraMemConfig":
        """Version 1, 227M active of 1.2B parameters: four memories, each added three layers above where it reads."""
        layout = {
            "intermediate_size": 2752,
            "memory_layers": [2, 6, 10, 14],
            "memory_output_layers": [5, 9, 13, 17],
            "memory_num_keys": 808,
            "memory_value_size": 384,
            "memory_pre_value_size": 0,
            "memory_top_k": 80,
            "memory_num_heads": 2,
            "memory_share_ratio": None,
            "memory_key_expansion": 2,
            "memory_separate_projections": True,
            "memory_norm_power": 0.33,
        }
        return cls(**{**layout, **overrides})

    def check_blocks(self) -> None:
        readers, writers = self.readers_and_writers
        if len(readers) != len(writers):
            raise ValueError(f"memory_output_layers={writers} must have one layer for each of {readers}.")
        ends = [*readers[1:], self.num_hidden_layers]
        if wrong := [(r, w) for r, w, end in zip(readers, writers, ends) if not 0 <= r <= w < end]:
            raise ValueError(
                f"Memories that read and add at {wrong}: memory_layers must ascend from 0 to "
                f"{self.num_hidden_layers - 1}, and each memory_output_layers stand at or above its own and below the "
                "next."
            )
        super().check_blocks()

    @property
    def readers_and_writers(self) -> tuple[list[int], list[int]]:
        """The layers where memories read, and those where they add."""
        readers = list(range(self.num_hidden_layers)) if self.memory_layers is None else self.memory_layers
        return readers, readers if self.memory_output_layers is None else self.memory_output_layers

    @property
    def block_pattern(self) -> list[str]:
        """Which block each layer is."""
        kinds = dict.fromkeys(range(self.num_hidden_layers), "dense")
        for reader, writer in zip(*self.readers_and_writers):
            kinds |= {reader: "memory"} if reader == writer else {reader: "delayed_memory", writer: "receiver"}
        return list(kinds.values())

    @property
    def blocks(self) -> dict[str, dict[str, Any]]:
        """The paper in terms of parts."""
        width = {"intermediate_size": self.intermediate_size}
        memory = {
            "type": "ultra_mem",
            **width,
            "num_keys": self.memory_num_keys,
            "value_size": self.memory_value_size,
            "pre_value_size": self.memory_pre_value_size,
            "share_ratio": self.memory_share_ratio,
            "top_k": self.memory_top_k,
            "key_expansion": self.memory_key_expansion,
            "separate_projections": self.memory_separate_projections,
            "num_heads": self.memory_num_heads,
            "key_size": self.memory_key_size,
            "num_cores": self.memory_num_cores,
            "tucker_rank": self.memory_tucker_rank,
            "query_per_rank": self.memory_query_per_rank,
            "norm_power": self.memory_norm_power,
            "tucker_loss_coef": self.memory_tucker_loss_coef,
            "key_balance_loss_coef": self.memory_key_balance_loss_coef,
        }
        feed_forwards = {
            "memory": memory,
            "delayed_memory": {**memory, "delayed": True},
            "receiver": {"type": "memory_receiver", **width},
            "dense": {"type": "mlp", **width},
        }
        mixer = {"type": "attention", "qk_norm": self.qk_norm}
        used = dict.fromkeys(self.block_pattern)
        return {name: {"type": "pre_norm", "mixer": mixer, "feed_forward": feed_forwards[name]} for name in used}


UltraMemModel, UltraMemForCausalLM, UltraMemForSequenceClassification, UltraMemForTokenClassification = model_classes(
    "UltraMem", UltraMemConfig
)
