"""What dense sources compute, read from their configs, and whether several of them fit together."""

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from .sources import Source, first_line

# Facts that every source must share, because the target states them once.
SHARED_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "rope_parameters",
    "rms_norm_eps",
    "tie_word_embeddings",
)
# Facts that the target takes from the first source; a difference is worth a warning, not a refusal.
CARRIED_FIELDS = (
    "max_position_embeddings",
    "attention_dropout",
    "initializer_range",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


@dataclass(frozen=True)
class Dense:
    """What a dense decoder computes.

    `fields` are the flat config fields in which all sources agree, `carried` those that the first source decides.
    """

    fields: dict[str, Any]
    carried: dict[str, Any]
    intermediate_size: int
    block_type: str = "pre_norm"
    qk_norm: bool = False
    attention_bias: str = "none"  # or "qkv", "qkvo", "o"
    mlp_bias: bool = False
    rotary: bool = True
    sliding_layers: tuple[bool, ...] = ()
    sliding_window: int | None = None

    @property
    def sliding(self) -> str:
        """Which layers slide: "none", "all" or "some"."""
        return "all" if all(self.sliding_layers) else "some" if any(self.sliding_layers) else "none"

    def facts(self) -> dict[str, Any]:
        """Everything that must be equal in all sources, for comparison."""
        names = ("block_type", "intermediate_size", "qk_norm", "attention_bias", "mlp_bias", "rotary")
        own = {name: getattr(self, name) for name in (*names, "sliding_layers", "sliding_window")}
        return {**self.fields, **own}


def _llama(config: Any) -> dict[str, Any]:
    return {"attention_bias": "qkvo" if config.attention_bias else "none", "mlp_bias": config.mlp_bias}


def _mistral(config: Any) -> dict[str, Any]:
    return {"sliding_layers": (config.sliding_window is not None,) * config.num_hidden_layers}


def _qwen2(config: Any) -> dict[str, Any]:
    return {"attention_bias": "qkv", "sliding_layers": _sliding_layers(config)}


def _qwen3(config: Any) -> dict[str, Any]:
    bias = "qkvo" if config.attention_bias else "none"
    return {"qk_norm": True, "attention_bias": bias, "sliding_layers": _sliding_layers(config)}


def _sliding_layers(config: Any) -> tuple[bool, ...]:
    return tuple(kind == "sliding_attention" for kind in config.layer_types)


def _hf_moe(config: Any) -> dict[str, Any]:
    """Our own composition, if it is one dense block repeated."""
    names = set(config.block_pattern)
    block = config.blocks[config.block_pattern[0]]
    mixer, feed_forward = block["mixer"], block["feed_forward"]
    if len(names) != 1 or mixer["type"] != "attention" or feed_forward["type"] != "mlp":
        raise ValueError("an hf_moe source must be one block of `attention` and `mlp`, repeated")
    if mixer["partial_rotary_factor"] != 1:
        raise ValueError(f"partial_rotary_factor is {mixer['partial_rotary_factor']}, all targets rotate whole heads")
    biases = {(False, False): "none", (True, False): "qkv", (True, True): "qkvo", (False, True): "o"}
    return {
        "block_type": block["type"],
        "intermediate_size": feed_forward["intermediate_size"],
        "qk_norm": mixer["qk_norm"],
        "attention_bias": biases[mixer["qkv_bias"], mixer["output_bias"]],
        "rotary": mixer["rotary"],
        "sliding_layers": (mixer["sliding"],) * config.num_hidden_layers,
    }


FAMILIES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "hf_moe": _hf_moe,
}


def describe(source: Source) -> Dense:
    """The facts of one source, from its config alone."""
    config: Any = source.config
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"{source.label}: cannot upcycle a model of type {config.model_type!r}; dense ones are {list(FAMILIES)}"
        )
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads % kv_heads:
        raise ValueError(
            f"{source.label}: num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}"
        )
    fields = {name: copy.deepcopy(getattr(config, name)) for name in SHARED_FIELDS}
    fields["head_dim"] = getattr(config, "head_dim", None) or config.hidden_size // heads
    try:
        own = FAMILIES[config.model_type](config)
    except ValueError as error:
        raise ValueError(f"{source.label}: {error}") from error
    own.setdefault("sliding_layers", (False,) * config.num_hidden_layers)
    own.setdefault("intermediate_size", getattr(config, "intermediate_size", None))
    window = config.sliding_window if any(own["sliding_layers"]) else None
    carried = {name: getattr(config, name) for name in CARRIED_FIELDS}
    return Dense(fields=fields, carried=carried, sliding_window=window, **own)


def check_alike(sources: list[Source]) -> Dense:
    """Refuse sources that differ in architecture, shape, vocabulary or tokenizer; returns the first one's facts."""
    described = [describe(source) for source in sources]
    first = described[0]
    for source, other in zip(sources[1:], described[1:], strict=True):
        pairs = zip(first.facts().items(), other.facts().values(), strict=True)
        if unlike := [f"{name} is {mine!r} and {theirs!r}" for (name, mine), theirs in pairs if mine != theirs]:
            raise ValueError(f"{sources[0].label} and {source.label} do not fit together: {'; '.join(unlike)}")
        soft = [name for name in CARRIED_FIELDS if first.carried[name] != other.carried[name]]
        if soft:
            message = (
                f"{source.label} differs from {sources[0].label} in {', '.join(soft)}; the first one's values are kept"
            )
            warnings.warn(message, UserWarning, stacklevel=4)
    check_tokenizers(sources)
    return first


def check_tokenizers(sources: list[Source]) -> None:
    """Equal vocabularies wherever the sources' folders hold tokenizers that load."""
    files = {source.label: file for source in sources if (file := tokenizer_file(source))}
    if len({file.read_bytes() for file in files.values()}) < 2:
        return
    found = [(label, vocabulary) for label, file in files.items() if (vocabulary := vocabulary_of(label, file.parent))]
    for label, theirs in found[1:]:
        first, mine = found[0]
        if theirs != mine:
            token = min(theirs.items() ^ mine.items(), key=lambda item: (item[1], item[0]))[0]
            places = f"{token!r} is {mine.get(token)} and {theirs.get(token)}"
            raise ValueError(f"the tokenizers of {first} and {label} differ: {places}")


def tokenizer_file(source: Source) -> Path | None:
    """The file that holds a source's vocabulary, if it has one."""
    files = [source.folder / name for name in TOKENIZER_FILES] if source.folder else []
    return next((file for file in files if file.is_file()), None)


def vocabulary_of(label: str, folder: Path) -> dict[str, int] | None:
    """Token -> number; None, with a warning, if the tokenizer needs something that is not here."""
    try:
        return AutoTokenizer.from_pretrained(folder).get_vocab()
    except Exception as error:  # a tokenizer class may raise anything
        reason = f"{type(error).__name__}: {first_line(error)}"
        message = f"the tokenizer of {label} does not load and is not compared ({reason})"
        warnings.warn(message, UserWarning, stacklevel=6)
        return None
