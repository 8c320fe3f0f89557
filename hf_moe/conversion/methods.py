"""Methods: which source tensors each tensor of a mixture is made of.

bam   https://arxiv.org/abs/2408.08274  attention and feed-forward experts one to one, the rest averaged
btx   https://arxiv.org/abs/2403.07816  feed-forward experts one to one, the rest averaged
copy  https://arxiv.org/abs/2212.05055  every expert is the one dense model's feed-forward

Letters: N sources, E experts, D width, d head width, P router state.
"""

from typing import Any

from .dense import Dense
from .recipes import Concat, Mean, Normal, Recipe, Stack, Tensor
from .targets import TARGETS, Settings

METHODS = {
    "bam": "N dense models; attention and feed-forward experts inherited one to one, the rest averaged",
    "btx": "N dense models; feed-forward experts inherited one to one, the rest averaged",
    "copy": "one dense model; its feed-forward copied into every expert",
}
EXACT_METHODS = ("copy",)  # the mixture computes what the source computes, for any router (gates sum to 1)
NUM_CELL_GATES = {"gru": 3, "rnn": 1, "lstm": 4}


def make_recipes(dense: Dense, settings: Settings, config: Any, num_sources: int) -> dict[str, Recipe]:
    """The whole plan: every tensor of the mixture's files, one tensor per expert, with its recipe."""
    plan: dict[str, Recipe] = {"model.embed_tokens.weight": average("model.embed_tokens.weight", num_sources)}
    for layer in range(dense.fields["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        plan[f"{prefix}.input_layernorm.weight"] = average(f"{prefix}.input_layernorm.weight", num_sources)
        if dense.block_type == "pre_norm":
            name = f"{prefix}.post_attention_layernorm.weight"
            plan[name] = average(name, num_sources)
        if settings.method == "bam":
            plan |= attention_experts(f"{prefix}.self_attn", dense, settings)
        else:
            names = [f"{prefix}.self_attn.{name}" for name in attention_names(dense)]
            plan |= {name: average(name, num_sources) for name in names}
        plan |= feed_forward_experts(prefix, settings)
        plan |= router(prefix, dense, settings, config)
    plan["model.norm.weight"] = average("model.norm.weight", num_sources)
    if not dense.fields["tie_word_embeddings"]:
        plan["lm_head.weight"] = average("lm_head.weight", num_sources)
    return plan | shared_router(settings, config)


def average(name: str, num_sources: int) -> Mean:
    """Uniform average of one tensor over the sources."""
    return Mean(tuple(Tensor(source, name) for source in range(num_sources)))


def attention_names(dense: Dense) -> list[str]:
    """The tensors of one dense attention layer, without prefix."""
    biased = "" if dense.attention_bias == "none" else dense.attention_bias
    biases = [f"{letter}_proj.bias" for letter in biased]
    norms = ["q_norm.weight", "k_norm.weight"] if dense.qk_norm else []
    return [f"{letter}_proj.weight" for letter in "qkvo"] + biases + norms


def attention_experts(prefix: str, dense: Dense, settings: Settings) -> dict[str, Recipe]:
    """BAM's attention: experts one after the other on the head axis, or one averaged set of keys and values."""
    count, head_dim = settings.num_experts, dense.fields["head_dim"]
    plan: dict[str, Recipe] = {
        f"{prefix}.gate.weight": Normal((count, dense.fields["hidden_size"]), settings.router_std)
    }
    for name in attention_names(dense):
        full = f"{prefix}.{name}"
        parts = tuple(Tensor(source, full) for source in range(count))
        if settings.share_key_value and name[0] in "kv":
            plan[full] = Mean(parts)
        elif "norm" in name:
            plan[full] = Stack(parts, (count, 1, head_dim))
        else:
            plan[full] = Concat(parts, dim=1 if name == "o_proj.weight" else 0)
    return plan


def feed_forward_experts(prefix: str, settings: Settings) -> dict[str, Recipe]:
    """Expert e is the feed-forward of source e, or of the only source."""
    target = TARGETS[settings.target]
    plan: dict[str, Recipe] = {}
    for expert in range(settings.num_experts):
        source = 0 if settings.method == "copy" else expert
        for theirs, ours in zip(("gate_proj", "up_proj", "down_proj"), target.experts, strict=True):
            name = f"{prefix}.{target.moe}.experts.{expert}.{ours}.weight"
            plan[name] = Tensor(source, f"{prefix}.mlp.{theirs}.weight")
    return plan


def router(prefix: str, dense: Dense, settings: Settings, config: Any) -> dict[str, Recipe]:
    """Fresh router weights of one layer; in a recurrent router `router_std` is that of the last projection."""
    gate, std = f"{prefix}.{TARGETS[settings.target].moe}.gate", settings.router_std
    width, count = dense.fields["hidden_size"], settings.num_experts
    if settings.target != "rmoe":
        return {f"{gate}.weight": Normal((count, width), std)}
    size = config.router_state_size
    return {
        f"{gate}.in_proj.weight": Normal((size, width), config.initializer_range),
        f"{gate}.out_proj.weight": Normal((count, size), std),
    }


def shared_router(settings: Settings, config: Any) -> dict[str, Recipe]:
    """RMoE's one cell for all layers."""
    if settings.target != "rmoe":
        return {}
    cell, size = "model.shared.router_cell", config.router_state_size
    rows = NUM_CELL_GATES[config.router_cell] * size
    plan: dict[str, Recipe] = {}
    for kind in ("ih", "hh"):
        plan[f"{cell}.weight_{kind}"] = Normal((rows, size), config.initializer_range)
        plan[f"{cell}.bias_{kind}"] = Normal((rows,), 0.0)
    return plan
