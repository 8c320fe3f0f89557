"""What `hf-moe inspect` reads: configs, tokenizers, texts and weights, with one clear error each."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from ..analysis import ModelFacts, RoutingFacts


@dataclass(frozen=True)
class Opened:
    """A model whose weights have not been touched.

    Args:
        given: folder or hub id, as typed; what the weights are loaded from.
        folder: where its small files are.
        config: of the model.
    """

    given: str
    folder: Path
    config: "PreTrainedConfig"


def open_model(given: str) -> Opened:
    """Find a model and read its config."""
    from transformers import AutoConfig

    from ..conversion.sources import first_line, light_folder

    folder = light_folder(given)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{given} is not a model folder: it has no config.json.")
    try:
        return Opened(given, folder, AutoConfig.from_pretrained(folder))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{given}: cannot read its config: {first_line(error)}") from error


def domain_files(data: list[str]) -> dict[str, Path]:
    """Names of domains and their files: `NAME=FILE`, or a file with the name of its own."""
    found: dict[str, Path] = {}
    for given in data:
        name, equals, path = given.partition("=")
        if not equals or Path(given).is_file():
            name, path = Path(given).stem, given
        if not name or not path:
            raise ValueError(f"--data {given!r} must be FILE or NAME=FILE.")
        if name in found:
            raise ValueError(f"--data: two domains are called {name!r}; name them with --data NAME=FILE.")
        found[name] = Path(path).expanduser()
    return found


def measure(
    opened: Opened, facts: "ModelFacts", files: dict[str, Path], device: str | None, max_tokens: int
) -> "RoutingFacts":
    """Run the texts through the model; it is loaded when everything else is known to be right."""
    from tqdm import tqdm

    from ..analysis import expert_statistics

    if not any(row.num_experts for row in facts.layers):
        raise ValueError(f"{opened.given} has no layers with routed experts that --data could be run through.")
    place = find_device(device)
    domains = read_domains(opened, files, max_tokens)
    total = sum(min(max_tokens, sum(map(len, documents))) for documents in domains.values())
    model = load(opened, facts, place)
    # quiet where it goes to a file, and in the first seconds
    with tqdm(total=total, unit=" tokens", desc="routing", delay=2, disable=None, leave=False) as bar:
        return expert_statistics(
            model, domains, max_tokens=max_tokens, max_length=longest_piece(opened.config), progress=bar.update
        )


def find_device(wanted: str | None) -> Any:
    """The device that was asked for, or the accelerator, or the CPU."""
    import torch

    if wanted is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(wanted)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {wanted}: torch cannot use it here: {str(error).splitlines()[0]}") from error
    if device.type == "meta":
        raise ValueError("--device meta holds no weights that could be run.")
    return device


def longest_piece(config: "PreTrainedConfig") -> int:
    """Tokens that are read at once: 512, or what the model can hold."""
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    return min(512, most) if isinstance(most, int) else 512


def read_domains(opened: Opened, files: dict[str, Path], max_tokens: int) -> dict[str, list[list[int]]]:
    """The documents of every domain as token ids, as many as will be read."""
    from transformers import AutoTokenizer

    from ..conversion.sources import first_line
    from ..conversion.texts import check_ids, read_group

    texts = {name: read_group(name, path) for name, path in files.items()}
    try:
        tokenizer = AutoTokenizer.from_pretrained(opened.folder)
    except Exception as error:  # a tokenizer class may raise anything
        raise ValueError(f"{opened.given}: cannot load its tokenizer for --data: {first_line(error)}") from error
    vocab_size = opened.config.get_text_config().vocab_size
    domains: dict[str, list[list[int]]] = {}
    for name, documents in texts.items():
        found, left = [], max_tokens
        for document in documents:
            found.append(tokenizer(document, verbose=False)["input_ids"][:left])
            left -= len(found[-1])
            if left <= 0:
                break
        check_ids(name, found, vocab_size)
        domains[name] = found
    return domains


def load(opened: Opened, facts: "ModelFacts", device: Any) -> "PreTrainedModel":
    """The model with its weights, of which none may be missing."""
    import torch
    from safetensors import SafetensorError

    from ..conversion.sources import first_line
    from ..modeling import kind_of

    options = {"dtype": getattr(torch, facts.dtype), "use_safetensors": True, "device_map": {"": device}}
    try:
        model, about = kind_of(opened.config).from_pretrained(opened.given, **options, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{opened.given}: cannot load its weights: {first_line(error)}") from error
    inside = f"{model.base_model_prefix}."
    missing = sorted(name for name in about["missing_keys"] if name.startswith(inside) or model.base_model is model)
    if missing:
        number = "1 of its weights is" if len(missing) == 1 else f"{len(missing)} of its weights are"
        raise ValueError(f"{opened.given}: {number} missing, such as {missing[0]}: its routing would mean nothing.")
    return model


def disk_bytes(opened: Opened) -> int | None:
    """Size of the safetensors, if they are on this machine."""
    sizes = [file.stat().st_size for file in opened.folder.glob("*.safetensors")]
    return sum(sizes) if sizes else None
