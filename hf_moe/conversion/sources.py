"""Where dense sources are: a local folder, the hub or memory. Weights stay there until `load`."""

import copy
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, snapshot_download
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

LIGHT_FILES = ["*.json", "*.model", "*.txt", "*.jinja", "LICENSE*", "NOTICE*", "README.md"]


@dataclass(frozen=True)
class Source:
    """One dense model: a local folder, a hub id or a model in memory."""

    label: str
    config: PreTrainedConfig
    folder: Path | None = None  # config, tokenizer and licence files
    weights: str | Path | None = None  # what from_pretrained takes
    model: PreTrainedModel | None = None
    revision: str | None = None  # of a hub id: a commit, branch or tag; None is the newest

    @property
    def dtype(self) -> torch.dtype | None:
        """The type of the weights, if it is known before they are read."""
        return self.model.dtype if self.model is not None else getattr(self.config, "dtype", None)

    def generation_config(self) -> GenerationConfig | None:
        """How the source generates, if it says."""
        if self.model is not None:
            return copy.deepcopy(self.model.generation_config)
        if self.folder is None or not (self.folder / "generation_config.json").is_file():
            return None
        try:
            return GenerationConfig.from_pretrained(self.folder)
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.label}: cannot read its generation_config.json: {first_line(error)}") from error

    def load(self) -> PreTrainedModel:
        """The whole model with its weights; only safetensors are read."""
        if self.model is not None:
            return self.model
        assert self.weights is not None
        try:
            options = {"dtype": "auto", "use_safetensors": True, "revision": self.revision or "main"}
            return AutoModelForCausalLM.from_pretrained(self.weights, **options)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{self.label}: cannot read its weights: {first_line(error)}") from error


def floating_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A floating-point type, also by its name."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype {dtype!r} is unknown; choose float32, bfloat16 or float16.")
    return found


def first_line(error: Exception) -> str:
    """The gist of an error that Transformers or the hub explains at length."""
    return str(error).strip().split("\n")[0]


def tensors_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """All weights of a model by name; a tied output embedding is left out."""
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    return state


def open_source(given: str | Path | PreTrainedModel, index: int, revision: str | None = None) -> Source:
    """Find a source and read its config; weights stay where they are. `revision` is for hub ids."""
    if isinstance(given, PreTrainedModel):
        return _open_model(given, f"source {index} ({type(given).__name__})")
    if not isinstance(given, str | Path):
        raise ValueError(
            f"source {index} must be a folder, a hub id or a PreTrainedModel, not {type(given).__name__}"
            " (a PEFT model: call merge_and_unload() first)"
        )
    path = Path(given).expanduser()
    return _open_folder(path, str(given)) if path.is_dir() else _open_hub(str(given), revision)


def open_sources(given: Any) -> list[Source]:
    """One source or a list of them."""
    several = list(given) if isinstance(given, list | tuple) else [given]
    if not several:
        raise ValueError("no sources given: pass at least one folder, hub id or model")
    sources = [open_source(one, index) for index, one in enumerate(several)]
    for i, source in enumerate(sources):
        for j in range(i):
            if _same(sources[j], source):
                warnings.warn(f"sources {j} and {i} are one and the same model", UserWarning, stacklevel=4)
                break
    return sources


def license_of(source: Source) -> str | None:
    """What a source's card says; None if it has none or is in memory."""
    path = source.folder / "README.md" if source.folder is not None else None
    if path is None or not path.is_file():
        return None
    try:
        return ModelCard.load(path, ignore_metadata_errors=True).data.get("license")
    except ValueError as error:  # its metadata are no YAML
        raise ValueError(f"{source.label}: cannot read the metadata of its README.md: {first_line(error)}") from error


def _same(a: Source, b: Source) -> bool:
    if a.model is not None or b.model is not None:
        return a.model is b.model
    return a.folder is not None and b.folder is not None and a.folder.resolve() == b.folder.resolve()


def _open_model(model: PreTrainedModel, label: str) -> Source:
    if model.get_output_embeddings() is None:
        raise ValueError(f"{label} has no language-model head: pass the ...ForCausalLM model")
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError(f"{label} is quantised: use a floating-point model")
    return Source(label=label, config=model.config, model=model)


def _open_folder(folder: Path, label: str) -> Source:
    if not (folder / "config.json").is_file():
        adapter = (folder / "adapter_config.json").is_file()
        hint = "a PEFT adapter: merge it into its base model first" if adapter else "no config.json"
        raise ValueError(f"{label} is not a model folder: {hint}")
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"{label} holds no *.safetensors, and no other weight format is read: re-save it first")
    config = _config(folder, label)
    return Source(label=label, config=config, folder=folder, weights=folder)


def light_folder(given: str | Path, revision: str | None = None) -> Path:
    """The folder with a model's config, tokenizer and licence files: local, or fetched from the hub (no weights)."""
    if (path := Path(given).expanduser()).is_dir():
        return path
    try:
        return Path(snapshot_download(str(given), revision=revision, allow_patterns=LIGHT_FILES))
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise ValueError(f"{str(given)!r} is neither a local folder nor a model of the hub: {reason}") from error


def _open_hub(name: str, revision: str | None) -> Source:
    folder = light_folder(name, revision)
    return Source(label=name, config=_config(folder, name), folder=folder, weights=name, revision=revision)


def _config(folder: Path, label: str) -> PreTrainedConfig:
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"{label}: cannot read its config: {first_line(error)}") from error
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{label} is quantised: use a floating-point model")
    return config
