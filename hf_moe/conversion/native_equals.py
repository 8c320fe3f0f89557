"""Which of our compositions a native type of Transformers computes too, and the config that says so."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from ..modeling import BLOCKS, DecoderConfig
from ..modeling.parts import resolve

COMMON = (  # fields of the whole model that both configs call the same
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("hidden_act", "max_position_embeddings", "rms_norm_eps", "initializer_range", "attention_dropout", "use_cache"),
    *("tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id", "output_router_logits"),
    *("router_aux_loss_coef", "dtype"),
)
PLAIN_MIXER = {"type": "attention", "rotary": True, "rope_parameters": None, "logit_softcapping": None}
PLAIN_MOE = {"type": "moe", "num_zero_experts": 0}


class Differs(Exception):
    """Why a native type does not compute the same."""


@dataclass(frozen=True)
class Composition:
    """One mixer and at most one kind of each feed-forward: what every native type below consists of.

    Args:
        mixer: spec of the attention of all layers.
        sparse: spec of the mixture, None for a dense model.
        width: of the dense feed-forwards, None if there are none.
        dense_layers: numbers of the layers with a dense feed-forward.
        depth: number of layers.
        fields: of the whole model.
    """

    mixer: dict[str, Any]
    sparse: dict[str, Any] | None
    width: int | None
    dense_layers: list[int]
    depth: int
    fields: dict[str, Any]

    @property
    def router(self) -> dict[str, Any]:
        """Spec of the router."""
        assert self.sparse is not None
        return self.sparse["router"]

    @property
    def shared_width(self) -> int:
        """Width of all shared experts together."""
        assert self.sparse is not None
        return self.sparse["shared_intermediate_size"] * self.sparse["num_shared_experts"]


def native_config(config: DecoderConfig, model_type: str | None = None) -> PreTrainedConfig:
    """The config of a native model that computes what ours does.

    Args:
        config: ours.
        model_type: the native type; default: the first in `NATIVE_EQUALS` that fits.

    Raises:
        ValueError: no native type computes it; the message says what differs.
    """
    if model_type is not None and model_type not in NATIVE_EQUALS:
        raise ValueError(f"model type {model_type!r} is unknown here; choose from {sorted(NATIVE_EQUALS)}.")
    reasons = []
    try:
        found = composition(config)
        for name in [model_type] if model_type else NATIVE_EQUALS:
            try:
                return CONFIG_MAPPING[name](**{**found.fields, **NATIVE_EQUALS[name](found)})
            except Differs as difference:
                reasons.append(f"{name}: {difference}")
    except Differs as difference:
        reasons.append(str(difference))
    raise ValueError(f"No native type computes what this {config.model_type} does ({'; '.join(reasons)}).")


def composition(config: DecoderConfig) -> Composition:
    """What a config's layers have in common."""
    specs = [resolve(BLOCKS, config.block(number)) for number in range(len(config.block_starts))]
    require(all(spec["type"] == "pre_norm" for spec in specs), "its blocks are not all pre_norm")
    require(config.final_logit_softcapping is None, "its logits are capped")
    require(not getattr(config, "num_nextn_predict_layers", 0), "it has prediction layers, which would be lost")
    mixer = alike([spec["mixer"] for spec in specs], "its token mixers differ from layer to layer")
    mixer = {**mixer, "sliding_window": config.sliding_window if mixer.get("sliding") else None}
    match_options(mixer, PLAIN_MIXER)
    feed_forwards = [spec["feed_forward"] for spec in specs]
    sparse = [each for each in feed_forwards if each["type"] != "mlp"]
    if sparse:
        match_options(alike(sparse, "its mixtures differ from layer to layer"), PLAIN_MOE)
        require(sparse[0]["experts"]["type"] == "swiglu", f"its experts are {sparse[0]['experts']['type']}")
        require(sparse[0]["router"]["type"] == "top_k", f"its router is {sparse[0]['router']['type']}")
        require(not sparse[0]["router"]["bias"], "its router has a bias")
        require(not sparse[0]["router"]["float32"], "its router computes in float32")
    dense = [number for number, each in enumerate(feed_forwards) if each["type"] == "mlp"]
    width = alike([feed_forwards[number]["intermediate_size"] for number in dense], "its dense layers differ in width")
    fields = {name: getattr(config, name) for name in COMMON} | {"rope_parameters": dict(config.rope_parameters or {})}
    return Composition(mixer, sparse[0] if sparse else None, width, dense, len(specs), fields)


def require(holds: bool, reason: str) -> None:
    """Say why not."""
    if not holds:
        raise Differs(reason)


def alike(values: list[Any], reason: str) -> Any:
    """The one value, None if there are none."""
    require(all(value == values[0] for value in values), reason)
    return values[0] if values else None


def match_options(spec: dict[str, Any], wanted: dict[str, Any]) -> None:
    """A part with other options than native ones have."""
    for name, value in wanted.items():
        require(spec.get(name) == value, f"its {name} is {spec.get(name)!r}, not {value!r}")


def attention(model: Composition, qk_norm: Any, biases: str, sliding: bool = False) -> bool:
    """Whether the projections have biases, after a look at everything else; `biases` is `none`, `qkv` or `qkvo`."""
    mixer = model.mixer
    require(mixer["qk_norm"] == qk_norm, f"its qk_norm is {mixer['qk_norm']!r}, not {qk_norm!r}")
    require(mixer["partial_rotary_factor"] == 1, "it rotates parts of the heads")
    require(sliding or not mixer["sliding"], "it has a sliding window")
    require(mixer["output_bias"] == (mixer["qkv_bias"] and biases == "qkvo"), "it has a bias where that has none")
    require(not mixer["qkv_bias"] or biases != "none", "it has biases in the attention")
    return mixer["qkv_bias"]


def softmax_router(model: Composition, always_normalizes: bool = False) -> dict[str, Any]:
    """Fields of a softmax over all experts, whose chosen weights may be divided by their sum."""
    require(model.sparse is not None, "it is dense")
    router = model.router
    require(router["scoring"] in ("softmax", "softmax_selected"), f"its scores are {router['scoring']}")
    match_options(router, {"selection_bias": False, "scale": 1.0, "num_groups": 1})
    normalizes = router["normalize"] or router["scoring"] == "softmax_selected"  # the same numbers
    require(normalizes or not always_normalizes, "it does not divide the chosen weights by their sum")
    return {"num_experts_per_tok": router["top_k"], **({} if always_normalizes else {"norm_topk_prob": normalizes})}


def no_shared_experts(model: Composition) -> None:
    """Refuse shared experts."""
    require(not model.shared_width, "it has shared experts")


def mixtral(model: Composition) -> dict[str, Any]:
    """Mixtral's fields."""
    attention(model, False, "none", sliding=True)
    fields = softmax_router(model, always_normalizes=True)
    no_shared_experts(model)
    require(not model.dense_layers, "some of its layers are dense")
    assert model.sparse is not None
    own = {"num_local_experts": model.sparse["num_experts"], "sliding_window": model.mixer["sliding_window"]}
    return {**fields, **own, "intermediate_size": model.sparse["experts"]["intermediate_size"]}


def qwen_moe(model: Composition) -> dict[str, Any]:
    """What Qwen2-MoE and Qwen3-MoE have in common."""
    fields = softmax_router(model)
    assert model.sparse is not None
    return {
        **fields,
        "num_experts": model.sparse["num_experts"],
        "moe_intermediate_size": model.sparse["experts"]["intermediate_size"],
        "intermediate_size": model.width or model.sparse["experts"]["intermediate_size"],
        "decoder_sparse_step": 1,
        "mlp_only_layers": model.dense_layers,
        "use_sliding_window": False,
    }


def qwen3_moe(model: Composition) -> dict[str, Any]:
    """Qwen3-MoE's fields."""
    biased = attention(model, True, "qkvo")
    fields = qwen_moe(model)
    no_shared_experts(model)
    return {**fields, "attention_bias": biased}


def qwen2_moe(model: Composition) -> dict[str, Any]:
    """Qwen2-MoE's fields; its one shared expert has a gate."""
    biased = attention(model, False, "qkv")
    fields = qwen_moe(model)
    assert model.sparse is not None
    require(bool(model.shared_width) and model.sparse["num_shared_experts"] == 1, "it has not one shared expert")
    require(model.sparse["shared_gate"], "its shared expert has no gate")
    depth = range(model.depth)
    own = {"qkv_bias": biased, "layer_types": ["full_attention" for _ in depth]}
    return {**fields, **own, "shared_expert_intermediate_size": model.shared_width}


def olmoe(model: Composition) -> dict[str, Any]:
    """OLMoE's fields."""
    biased = attention(model, "full", "qkvo")
    fields = softmax_router(model)
    no_shared_experts(model)
    require(not model.dense_layers, "some of its layers are dense")
    assert model.sparse is not None
    own = {"num_experts": model.sparse["num_experts"], "attention_bias": biased, "clip_qkv": None}
    return {**fields, **own, "intermediate_size": model.sparse["experts"]["intermediate_size"]}


def glm4_moe(model: Composition) -> dict[str, Any]:
    """GLM-4.5's fields: sigmoid scores, selection bias, groups, shared experts, partial rotation, as Ling 2.0 has."""
    require(model.sparse is not None, "it is dense")
    assert model.sparse is not None
    mixer, router, width = model.mixer, model.router, model.sparse["experts"]["intermediate_size"]
    require(mixer["qk_norm"] in (True, False), "it normalises whole queries and keys")
    require(not mixer["sliding"] and not mixer["output_bias"], "its window or its output bias is not there")
    match_options(router, {"scoring": "sigmoid", "selection_bias": True})
    require(router["num_groups"] == 1 or router["group_score"] == "top2_sum", "it scores groups in another way")
    require(model.shared_width > 0 and model.shared_width % width == 0, "its shared experts are no multiple in width")
    require(not model.sparse["shared_gate"], "its shared experts have gates")
    dense = len(model.dense_layers)
    require(model.dense_layers == list(range(dense)), "its dense layers are not the first ones")
    return {
        "attention_bias": mixer["qkv_bias"],
        "use_qk_norm": mixer["qk_norm"],
        "rope_parameters": {
            **model.fields["rope_parameters"],
            "partial_rotary_factor": mixer["partial_rotary_factor"],
        },
        "n_routed_experts": model.sparse["num_experts"],
        "num_experts_per_tok": router["top_k"],
        "n_shared_experts": model.shared_width // width,
        "moe_intermediate_size": width,
        "intermediate_size": model.width or width,
        "first_k_dense_replace": dense,
        "norm_topk_prob": router["normalize"],
        "routed_scaling_factor": router["scale"],
        "n_group": router["num_groups"],
        "topk_group": router["groups_per_token"],
        "num_mtp_layers": 0,
    }


def dense(model: Composition, qk_norm: bool, biases: str) -> tuple[bool, dict[str, Any]]:
    """Whether a dense model's attention has biases, and the width of its feed-forwards."""
    require(model.sparse is None, "it is sparse")
    return attention(model, qk_norm, biases), {"intermediate_size": model.width}


def llama(model: Composition) -> dict[str, Any]:
    """Llama's fields."""
    biased, fields = dense(model, False, "qkvo")
    return {**fields, "attention_bias": biased, "mlp_bias": False}


def qwen2(model: Composition) -> dict[str, Any]:
    """Qwen2's fields: always biases on queries, keys and values."""
    biased, fields = dense(model, False, "qkv")
    require(biased, "it has no biases")
    return {**fields, "use_sliding_window": False}


def qwen3(model: Composition) -> dict[str, Any]:
    """Qwen3's fields."""
    biased, fields = dense(model, True, "qkvo")
    return {**fields, "attention_bias": biased, "use_sliding_window": False}


NATIVE_EQUALS: dict[str, Callable[[Composition], dict[str, Any]]] = {
    "mixtral": mixtral,
    "qwen3_moe": qwen3_moe,
    "qwen2_moe": qwen2_moe,
    "olmoe": olmoe,
    "glm4_moe": glm4_moe,
    "llama": llama,
    "qwen2": qwen2,
    "qwen3": qwen3,
}
OTHER_NAMES = {"glm4_moe": {".mlp.shared_expert.": ".mlp.shared_experts."}}  # ours -> theirs, where they differ
