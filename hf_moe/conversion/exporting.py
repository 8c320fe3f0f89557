"""The same model in another form: as a native type, with other tensor names, or with its code in one file."""

from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..modeling import DecoderConfig
from .native_equals import OTHER_NAMES, native_config
from .output import atomic_directory, check_output, copy_companions
from .sources import Source, floating_dtype, open_source

FORMS = {
    "native": "the native type of Transformers that computes the same, one tensor per expert",
    "per-expert": "one tensor per expert, as vLLM, llama.cpp and mergekit read them",
    "fused": "the experts of a layer in one tensor, as they are in memory",
    "flat": "the same weights, and the whole architecture in one Python file",
}
PROBE = 64  # tokens
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.01}  # of the largest logit


def export(
    source: str | Path | PreTrainedModel,
    output: str | Path,
    form: str,
    *,
    model_type: str | None = None,
    dtype: str | torch.dtype = "auto",
    max_shard_size: str = "5GB",
    overwrite: bool = False,
) -> Path:
    """Write a model in another form; tokenizer and licence files come along. The whole model is held in memory.

    Args:
        source: a folder, a hub id or a model.
        output: the folder; it appears when it is complete.
        form: a name in `FORMS`.
        model_type: for `native`: which type; default: the first that computes the same.
        dtype: of the weights; default: as they are.
        max_shard_size: of one file.
        overwrite: replace a model in the output folder.

    Returns:
        The absolute path of the folder.

    Raises:
        ValueError: unknown form, nothing native computes the same, a native type has no code to write, or the result
            does not say what its source says (then nothing is written).
    """
    opened = plan_export(source, form, model_type)
    kept = [opened.folder] if opened.folder is not None else []
    check_output(output, overwrite, kept)
    model = load(opened, dtype)
    options: dict[str, Any] = {"max_shard_size": max_shard_size, "save_original_format": form != "fused"}
    if form == "native":
        model = as_native(model, model_type)
    elif (
        form == "per-expert"
    ):  # Transformers writes names as they were read; without a record, as the type's files are
        model._weight_conversions = None  # pyright: ignore
    if isinstance(model.config, DecoderConfig):
        options["self_contained"] = form == "flat" or None
    with atomic_directory(output, overwrite) as folder:
        model.save_pretrained(folder, **options)
        if opened.folder is not None:
            copy_companions(opened.folder, folder)
    return Path(output).expanduser().resolve()


def plan_export(source: str | Path | PreTrainedModel, form: str, model_type: str | None = None) -> Source:
    """Check from the config alone whether an export is possible."""
    if form not in FORMS:
        raise ValueError(f"form {form!r} is unknown; choose from {sorted(FORMS)}.")
    if model_type is not None and form != "native":
        raise ValueError(f"model_type={model_type!r} has no effect: {form} keeps the type.")
    opened = open_source(source, 0)
    ours = isinstance(opened.config, DecoderConfig)
    if form == "flat" and not ours:
        raise ValueError(
            f"{opened.label} is a native {opened.config.model_type}: Transformers needs no code file for it."
        )
    if form == "native":
        if not ours:
            raise ValueError(f"{opened.label} is native already: {opened.config.model_type}.")
        native_config(opened.config, model_type)  # pyright: ignore[reportArgumentType]
    return opened


def load(source: Source, dtype: str | torch.dtype) -> PreTrainedModel:
    """The model in a type of our choice."""
    model = source.load()
    if dtype == "auto":
        return model
    return model.to(floating_dtype(dtype))  # pyright: ignore[reportArgumentType]


def as_native(model: PreTrainedModel, model_type: str | None = None) -> PreTrainedModel:
    """A native model around the same tensors, compared with ours on a probe before it is returned."""
    config = native_config(model.config, model_type)  # pyright: ignore[reportArgumentType]
    names = OTHER_NAMES.get(config.model_type, {})
    state = {renamed(name, names): tensor for name, tensor in model.state_dict().items()}
    with init_empty_weights(include_buffers=False):
        native = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    missing, unexpected = native.load_state_dict(state, strict=False, assign=True)
    native.tie_weights()
    absent = [name for name in missing if name != "lm_head.weight" or not config.tie_word_embeddings]
    assert not absent and not unexpected, f"{config.model_type} names its weights otherwise: {absent}, {unexpected}"
    native.generation_config = model.generation_config
    check_same(model.eval(), native.eval())
    return native


def renamed(name: str, names: dict[str, str]) -> str:
    """Our name of a tensor as the native model has it."""
    for ours, theirs in names.items():
        name = name.replace(ours, theirs)
    return name


@torch.no_grad()
def check_same(model: PreTrainedModel, native: PreTrainedModel) -> None:
    """Compare the logits of random tokens.

    Raises:
        ValueError: the mean difference is larger than rounding makes it.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (1, PROBE), generator=generator)
    ours, theirs = (each(input_ids=tokens.to(each.device)).logits.float() for each in (model, native))
    difference, largest = (ours - theirs).abs().mean().item(), ours.abs().max().item()
    if not difference <= TOLERANCES.get(model.dtype, 1e-5) * max(largest, 1):
        raise ValueError(
            f"As {native.config.model_type} the model says something else: its logits differ by {difference:.1e} on "
            f"average, the largest is {largest:.1f}. Nothing was written; please report this as a bug of hf_moe."
        )
