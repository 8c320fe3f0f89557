"""Targets: what each architecture can express, and the config of the mixture in its words."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM

from ..architectures import ARCHITECTURES
from .dense import Dense


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to build, with every default filled in."""

    target: str
    method: str
    num_experts: int
    top_k: int
    router_std: float
    share_key_value: bool

    @property
    def normalize(self) -> bool:
        """Divide the chosen gates by their sum; a lone gate would always be 1 and leave its router no gradient."""
        return self.top_k > 1 or self.method == "copy"


@dataclass(frozen=True)
class Target:
    """An architecture that dense models can become.

    `expresses` lists, per fact of `Dense`, the values that the architecture has room for; `experts` says how its files
    name one expert's tensors.
    """

    config_class: type[PreTrainedConfig]
    model_class: Any
    methods: tuple[str, ...]
    configure: Callable[[Dense, Settings], dict[str, Any]]
    expresses: dict[str, tuple[Any, ...]]
    always_normalizes: bool = False
    moe: str = "mlp"
    experts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")

    def objections(self, dense: Dense) -> list[str]:
        """Why this target cannot express the sources; empty if it can."""
        return [
            f"{fact} is {value!r}, the target has only {' or '.join(map(repr, values))}"
            for fact, values in {"mlp_bias": (False,), **self.expresses}.items()
            if (value := getattr(dense, fact)) not in values
        ]

    def config(self, dense: Dense, settings: Settings, overrides: dict[str, Any]) -> PreTrainedConfig:
        """The mixture's config; `overrides` may set any field that the sources or the arguments do not decide."""
        decided = {**dense.fields, **self.configure(dense, settings)}
        free = [name for name in self.config_class.__dataclass_fields__ if name not in decided]
        if wrong := sorted(overrides.keys() - set(free)):
            kind = "follow from the sources or from arguments" if wrong[0] in decided else "are unknown"
            raise ValueError(
                f"config overrides {wrong} {kind}; {self.config_class.__name__} leaves open {sorted(free)}"
            )
        try:
            return self.config_class(**{**dense.carried, **decided, **overrides})
        except StrictDataclassError as error:  # its text names the validator; the cause says what is wrong
            raise ValueError(str(error.__cause__ or error)) from error


def _mixtral(dense: Dense, settings: Settings) -> dict[str, Any]:
    return {
        "intermediate_size": dense.intermediate_size,
        "sliding_window": dense.sliding_window,
        "num_local_experts": settings.num_experts,
        "num_experts_per_tok": settings.top_k,
    }


def _qwen3_moe(dense: Dense, settings: Settings) -> dict[str, Any]:
    return {
        "attention_bias": dense.attention_bias == "qkvo",
        "use_sliding_window": dense.sliding_window is not None,
        "sliding_window": dense.sliding_window,
        "intermediate_size": dense.intermediate_size,
        "moe_intermediate_size": dense.intermediate_size,
        "num_experts": settings.num_experts,
        "num_experts_per_tok": settings.top_k,
        "norm_topk_prob": settings.normalize,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _rmoe(dense: Dense, settings: Settings) -> dict[str, Any]:
    return {
        "moe_intermediate_size": dense.intermediate_size,
        "num_experts": settings.num_experts,
        "num_experts_per_tok": settings.top_k,
    }


def _bam(dense: Dense, settings: Settings) -> dict[str, Any]:
    return {
        "block_type": dense.block_type,
        "intermediate_size": dense.intermediate_size,
        "num_experts": settings.num_experts,
        "num_experts_per_tok": settings.top_k,
        "num_attention_experts": settings.num_experts,
        "share_key_value": settings.share_key_value,
        "qk_norm": dense.qk_norm,
        "qkv_bias": dense.attention_bias == "qkv",
        "sliding_window": dense.sliding_window,
    }


def _hf_moe(dense: Dense, settings: Settings) -> dict[str, Any]:
    """One block, or one per kind of layer where only some layers slide."""
    feed_forward = {
        "type": "moe",
        "num_experts": settings.num_experts,
        "router": {"type": "top_k", "top_k": settings.top_k, "normalize": settings.normalize},
        "experts": {"type": "swiglu", "intermediate_size": dense.intermediate_size},
    }
    names = {False: "moe", True: "sliding_moe"}
    attention = {
        "type": "attention",
        "qk_norm": dense.qk_norm,
        "qkv_bias": "qkv" in dense.attention_bias,
        "output_bias": dense.attention_bias in ("qkvo", "o"),
        "rotary": dense.rotary,
    }
    blocks = {}
    for sliding in sorted(set(dense.sliding_layers)):
        mixer = {**attention, "sliding": sliding}
        blocks[names[sliding]] = {"type": dense.block_type, "mixer": mixer, "feed_forward": feed_forward}
    pattern = [names[sliding] for sliding in dense.sliding_layers] if len(blocks) > 1 else list(blocks)
    return {"blocks": blocks, "block_pattern": pattern, "sliding_window": dense.sliding_window}


_LLAMA_LIKE = {
    "block_type": ("pre_norm",),
    "qk_norm": (False,),
    "attention_bias": ("none",),
    "rotary": (True,),
    "sliding": ("none", "all"),
}

TARGETS: dict[str, Target] = {
    "bam": Target(
        config_class=ARCHITECTURES["bam"][0],
        model_class=ARCHITECTURES["bam"][2],
        methods=("bam",),
        configure=_bam,
        expresses={"attention_bias": ("none", "qkv"), "rotary": (True,), "sliding": ("none", "all")},
    ),
    "mixtral": Target(
        config_class=MixtralConfig,
        model_class=MixtralForCausalLM,
        methods=("copy", "btx"),
        configure=_mixtral,
        expresses=_LLAMA_LIKE,
        always_normalizes=True,
        moe="block_sparse_moe",
        experts=("w1", "w3", "w2"),
    ),
    "qwen3_moe": Target(
        config_class=Qwen3MoeConfig,
        model_class=Qwen3MoeForCausalLM,
        methods=("copy", "btx"),
        configure=_qwen3_moe,
        expresses={**_LLAMA_LIKE, "qk_norm": (True,), "attention_bias": ("none", "qkvo")},
    ),
    "hf_moe": Target(
        config_class=ARCHITECTURES["hf_moe"][0],
        model_class=ARCHITECTURES["hf_moe"][2],
        methods=("copy", "btx"),
        configure=_hf_moe,
        expresses={},
    ),
    "rmoe": Target(
        config_class=ARCHITECTURES["rmoe"][0],
        model_class=ARCHITECTURES["rmoe"][2],
        methods=("copy", "btx"),
        configure=_rmoe,
        expresses={**_LLAMA_LIKE, "sliding": ("none",)},
        always_normalizes=True,
    ),
}
