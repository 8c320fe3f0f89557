"""One config for every architecture: sizes of the whole model are fields, everything else is a part's spec."""

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters

from .blocks import BLOCKS
from .code_files import CarriesCode, carry_code
from .experts import Experts
from .feed_forwards import FEED_FORWARDS
from .losses import BALANCE_LOSSES
from .mixers import MIXERS
from .parts import resolve, walk
from .routers import Router


@strict
class DecoderConfig(CarriesCode, PreTrainedConfig):
    """Sizes shared by all layers. A subclass says what its `blocks` are made of and in which `block_pattern`.

    Args:
        num_hidden_layers: token mixers over the depth, which are the layers of a cache; a block with two mixers counts
            as two (as in Transformers' LongCat-Flash).
        num_key_value_heads: defaults to `num_attention_heads`.
        head_dim: defaults to `hidden_size // num_attention_heads`.
        rope_parameters: defaults to `{"rope_type": "default", "rope_theta": 10000.0}`.
        sliding_window: tokens that a mixer with `sliding=True` looks back on.
        final_logit_softcapping: c, which bounds the logits by `c tanh(logit / c)` (Gemma 2: 30); None for no bound.
        output_router_logits: return the router logits of every MoE layer, and the balance loss outside training too.
        router_aux_loss_coef: weight of the load-balancing loss of each MoE layer, added to the loss in training; 0
            turns it off. Switch Transformer's 0.01.
        router_z_loss_coef: weight of the router z-loss of each MoE layer (ST-MoE's 0.001); off by default.
        router_balance_loss: which loss `router_aux_loss_coef` weighs, a name in `modeling.losses.BALANCE_LOSSES`:
            `switch` within each micro-batch, `sequence` within each sequence (DeepSeek-V3), `global` over the whole
            optimizer step (with `hf_moe.training.LoadBalancing`), `averaged_null` (AdaMoE), `importance`,
            `score_importance`, `importance_load` (LLaMA-MoE).

    Raises:
        ValueError: unknown part or option, head counts that do not divide, more experts per token than experts.
    """

    if TYPE_CHECKING:  # subclasses have them as fields, class attributes or properties
        blocks: ClassVar[Any]
        block_pattern: ClassVar[Any]

    keys_to_ignore_at_inference = ["past_key_values", "aux_loss", "router_logits"]
    # the beginning of a name inside a layer: as published checkpoints have it, and as we do; saved as published
    published_names: ClassVar[dict[str, str]] = {}

    vocab_size: int = 32000
    hidden_size: int = 512
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    rope_parameters: RopeParameters | dict | None = None
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    attention_dropout: float | int = 0.0
    sliding_window: int | None = None
    final_logit_softcapping: float | int | None = None
    use_cache: bool = True
    tie_word_embeddings: bool = False
    output_router_logits: bool = False
    router_aux_loss_coef: float | int = 0.01
    router_z_loss_coef: float | int = 0.0
    router_balance_loss: str = "switch"
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    @classmethod
    def published_converters(cls) -> list[Any]:
        """Transformers' weight converters between published files and memory, beside `published_names`."""
        return []

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads="
                    f"{self.num_attention_heads}; change one of them or set head_dim."
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        self.validate_parts()
        kwargs = self.convert_rope_params_to_dict(**kwargs)  # from here on, parts with rotary positions can be built
        self.validate_shared_modules()
        super().__post_init__(**kwargs)

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """As in Transformers, and the file by which `trust_remote_code=True` finds the classes."""
        carry_code(self, save_directory)
        super().save_pretrained(save_directory, push_to_hub, **kwargs)

    def validate_parts(self) -> None:
        """Check again what may have changed since construction; huggingface_hub calls this when a config is saved."""
        if self.router_balance_loss not in BALANCE_LOSSES:
            raise ValueError(
                f"router_balance_loss={self.router_balance_loss!r} is unknown; choose from {sorted(BALANCE_LOSSES)}."
            )
        if self.final_logit_softcapping is not None and self.final_logit_softcapping <= 0:
            raise ValueError(
                f"final_logit_softcapping={self.final_logit_softcapping} must be positive, or None for no bound."
            )
        self.check_heads()
        self.check_blocks()

    def validate_shared_modules(self) -> None:
        """Blocks that share a module under one name must want the same."""
        with torch.device("meta"):
            self.shared_modules()

    def check_heads(self) -> None:
        """Query heads must come in equal groups per key head, and rotary positions need an even head width."""
        assert self.num_key_value_heads and self.head_dim, "filled by __post_init__"
        if self.num_attention_heads % self.num_key_value_heads:
            divisors = [n for n in range(1, self.num_attention_heads + 1) if self.num_attention_heads % n == 0]
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads} does not divide num_attention_heads="
                f"{self.num_attention_heads}; use one of {divisors}."
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd; rotary positions need an even one.")
        if (self.rope_parameters or {}).get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError(
                "partial_rotary_factor belongs to a mixer, as one model may rotate differently in different layers: "
                "set it in the spec, e.g. {'type': 'attention', 'partial_rotary_factor': 0.5}."
            )

    def check_blocks(self) -> None:
        """Every named block must exist and its parts must accept their options."""
        blocks, pattern = self.blocks, self.block_pattern
        if unknown := sorted(set(pattern) - blocks.keys()):
            raise ValueError(f"block_pattern names {unknown}; `blocks` has {sorted(blocks)}.")
        carriers = set()
        for spec in blocks.values():
            for _, part, options in walk(BLOCKS, resolve(BLOCKS, spec)):
                part.check(self, **options)
                carriers |= {part.__name__} if part.carries_state else set()
        if len(carriers) > 1:
            raise ValueError(
                f"{sorted(carriers)} each send a state of their own from layer to layer; a model can have one of them."
            )
        self.check_depth()

    def check_depth(self) -> None:
        """Blocks with several mixers must end where the layers do."""
        starts = self.block_starts
        ends = starts[-1] + BLOCKS[self.block(len(starts) - 1)["type"]].num_mixers if starts else 0
        if ends != self.num_hidden_layers:
            raise ValueError(
                f"num_hidden_layers={self.num_hidden_layers} counts token mixers and ends inside a block that has "
                f"several: use one of {[depth for depth in (starts[-1], ends) if depth]}."
            )

    def validate_layer_type(self) -> None:
        """`layer_types` is derived from checked specs and may name cache layers of our own."""

    def block(self, number: int) -> dict[str, Any]:
        """The resolved spec of one block; the pattern repeats over the depth."""
        return resolve(BLOCKS, self.blocks[self.block_pattern[number % len(self.block_pattern)]])

    def shared_modules(self) -> dict[str, nn.Module]:
        """Build the modules that parts share over the depth; blocks that want different ones under a name conflict."""
        shared: dict[str, nn.Module] = {}
        for spec in self.blocks.values():
            for _, part, options in walk(BLOCKS, resolve(BLOCKS, spec)):
                for name, module in part.shared_modules(self, **options).items():
                    if str(shared.setdefault(name, module)) != str(module):
                        raise ValueError(
                            f"All blocks share one {name!r}, but they ask for {shared[name]} and {module}."
                        )
        return shared

    @property
    def num_experts(self) -> int:
        """Routed experts of the first sparse block (0 if there is none), where other tools look for them."""
        return next((block["feed_forward"]["num_experts"] for block in self.sparse_blocks), 0)

    @property
    def num_experts_per_tok(self) -> int:
        """Experts per token of the first sparse block (0 if there is none)."""
        block = next(iter(self.sparse_blocks), None)
        return block["feed_forward"]["router"].get("top_k", self.num_experts) if block else 0

    @property
    def sparse_blocks(self) -> list[dict[str, Any]]:
        """The blocks that route, in the order of the pattern."""
        used = [self.blocks[name] for name in self.block_pattern]
        kinds = [block.get("feed_forward", {}).get("type") for block in used]
        return [block for block, kind in zip(used, kinds) if kind and FEED_FORWARDS[kind].routed]

    @property
    def block_starts(self) -> list[int]:
        """The first layer of each block in order of depth: a block spans as many layers as it has mixers."""
        blocks, pattern = self.blocks, self.block_pattern
        starts, layer_idx = [], 0
        while layer_idx < self.num_hidden_layers:
            spec = blocks[pattern[len(starts) % len(pattern)]]
            starts.append(layer_idx)
            layer_idx += BLOCKS[spec["type"]].num_mixers
        return starts

    @property
    def layer_types(self) -> list[str]:
        """What Transformers needs to choose each layer's cache and mask."""
        blocks = self.blocks  # not resolved again: this runs in every forward pass, compiled ones too
        specs = [blocks[name] for name in self.block_pattern for _ in range(BLOCKS[blocks[name]["type"]].num_mixers)]
        types = [MIXERS[spec["mixer"]["type"]].layer_type_of(spec["mixer"]) for spec in specs]
        return [types[layer_idx % len(types)] for layer_idx in range(self.num_hidden_layers)]

    @property
    def base_model_tp_plan(self) -> dict[str, str] | None:
        """Tensor-parallel plan, put together from what the parts declare; None if none can be sharded."""
        return self.plan("tp_plan") or None

    @property
    def base_model_ep_plan(self) -> dict[str, str] | None:
        """Expert-parallel plan, put together from what the parts declare; None if no experts can be distributed."""
        return self.plan("ep_plan") or None

    def plan(self, name: str, specs: list[dict[str, Any]] | None = None, prefix: str = "layers.*") -> dict[str, str]:
        """Collect one kind of plan (`tp_plan` or `ep_plan`) over all layers, or over blocks of other `specs`.

        Transformers looks layers up as `layers.*` only: where two blocks disagree about a module, nothing is sharded.
        """
        plan: dict[str, str] = {}
        for spec in specs or [self.blocks[block] for block in dict.fromkeys(self.block_pattern)]:
            parts = list(walk(BLOCKS, resolve(BLOCKS, spec), prefix))
            whole = any(issubclass(part, Router) and part.reads_experts for _, part, _ in parts)  # no shard tells all
            for path, part, options in parts:
                for child, style in part.plan(name, **options).items():
                    key = f"{path}.{child}" if child else path
                    if whole and issubclass(part, Experts):
                        plan[key] = "replicate"
                    if plan.setdefault(key, style) != style:
                        plan[key] = "replicate"
        return {key: style for key, style in plan.items() if style != "replicate"}
