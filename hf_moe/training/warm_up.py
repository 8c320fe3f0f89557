"""Router warm-up: a short run in which the routers of a mixture learn and everything else stays as it is.

Innovator trains its routers so before anything else (https://arxiv.org/abs/2507.18671).
"""

import hashlib
import json
import struct
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.core_model_loading import revert_weight_conversion
from transformers.trainer_callback import PrinterCallback

from ..modeling import moe_layers
from .balancing import BiasBalancing

PROBE = 32  # examples on which the loss before and after is measured
Examples = Sequence[Mapping[str, Any]]


def warm_up_routers(
    model: PreTrainedModel,
    examples: Examples,
    steps: int,
    learning_rate: float = 1e-3,
    batch_size: int = 8,
    seed: int = 0,
) -> dict[str, Any]:
    """Train the routers of a mixture's feed-forwards on the next token, with the balance loss that the model has.

    Everything else keeps every bit. Routers in lower precision learn in float32. Models without a balance loss but
    with selection biases (DeepSeek-V3) have those moved instead. RMoE's cell and the routers of attention experts
    belong to the rest.

    Args:
        model: with MoE layers that `hf_moe.moe_layers` knows; it is trained in place, where Trainer puts it.
        examples: rows with `input_ids`, without padding; `conversion.texts.examples` makes them.
        steps: optimizer steps.
        learning_rate: of AdamW, falling linearly to 0.
        batch_size: examples per step and device.
        seed: of their order.

    Returns:
        `loss_before` and `loss_after`: mean next-token loss on the first examples; `losses`: that of every step, with
        the balance loss.

    Raises:
        ValueError: no routers with parameters, no steps, or examples that hold nothing to predict.
    """
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1")
    rows = [ids for row in examples if len(ids := [int(token) for token in row["input_ids"]]) > 1]
    if not rows:
        raise ValueError("examples hold no sequence of two tokens or more: there is nothing to predict")
    layers = list(moe_layers(model))
    if not any(True for _, gate in gates(model) for _ in gate.parameters()):
        raise ValueError(f"{type(model).__name__} has no routers that could be trained")
    probe = [collate(rows[start : start + batch_size]) for start in range(0, min(len(rows), PROBE), batch_size)]
    before, modes = next_token_loss(model, probe), [(module, module.training) for module in model.modules()]
    log = StepLosses(steps)
    biased = any(layer.selection_bias is not None for layer in layers)
    with tempfile.TemporaryDirectory() as folder, only_routers_train(model), balance_loss_on(model):
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=1,  # native balance losses are too strong with more
            learning_rate=learning_rate,
            weight_decay=0.0,
            seed=seed,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
        )
        trainer = Trainer(
            model,
            arguments,
            train_dataset=rows,  # pyright: ignore[reportArgumentType] - a list is as good as a Dataset
            data_collator=collate,
            callbacks=[log, *([BiasBalancing()] if biased else [])],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    for module, training in modes:
        module.training = training
    return {"loss_before": before, "loss_after": next_token_loss(model, probe), "losses": log.losses}


def collate(rows: Sequence[list[int]]) -> dict[str, torch.Tensor]:
    """Token ids padded on the right, masked, with themselves as labels."""
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
        mask[number, : len(row)] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


@torch.no_grad()
def next_token_loss(model: PreTrainedModel, batches: Sequence[Mapping[str, torch.Tensor]]) -> float:
    """Mean cross-entropy over all predicted tokens of some batches, in nats."""
    modes, total, count = [(module, module.training) for module in model.modules()], 0.0, 0
    model.eval()
    for batch in batches:
        inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
        labels = inputs.pop("labels")[:, 1:]
        logits = model(**inputs, use_cache=False).logits[:, :-1].float()
        total += nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
        count += int((labels != -100).sum())
    for module, training in modes:
        module.training = training
    return total / count


class StepLosses(TrainerCallback):
    """Keeps the loss of every step, and shows how far the run is once it takes longer than five seconds."""

    def __init__(self, steps: int) -> None:
        self.losses: list[float] = []
        self.bar = tqdm(total=steps, desc="Warming up routers", unit="step", delay=5)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))
            self.bar.update()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()


class AsType(nn.Module):
    """Shows a float32 parameter in the type that the model computes in."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.to(self.dtype)


def gates(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """The routers of a model, with their names."""
    names = {module: name for name, module in model.named_modules()}
    for layer in moe_layers(model):
        for gate in (layer.gate, *layer.later_gates):
            yield names[gate], gate


@contextmanager
def only_routers_train(model: PreTrainedModel) -> Iterator[None]:
    """Freeze all but the routers, which get a float32 copy to learn in if the model's type is narrower."""
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    for parameter in wanted:
        parameter.requires_grad_(False)
    owners = {owner for _, gate in gates(model) for owner in gate.modules()}
    own = [(owner, name, tensor) for owner in owners for name, tensor in owner.named_parameters(recurse=False)]
    narrow = []
    for owner, name, parameter in own:
        parameter.requires_grad_(True)
        if (dtype := parameter.dtype) != torch.float32:
            parameter.data = parameter.data.float()
            # unsafe: the types differ on purpose
            parametrize.register_parametrization(owner, name, AsType(dtype), unsafe=True)
            narrow.append((owner, name, parameter, dtype))
    try:
        yield
    finally:
        for owner, name, parameter, dtype in narrow:
            parametrize.remove_parametrizations(owner, name, leave_parametrized=False)
            parameter.data = parameter.data.to(dtype)
        for parameter, flag in wanted.items():
            parameter.requires_grad_(flag)


@contextmanager
def balance_loss_on(model: PreTrainedModel) -> Iterator[None]:
    """Native models add their balance loss only where they return router logits; ours always do in training."""
    config: Any = model.config
    old = getattr(config, "output_router_logits", None)
    if old is not None:
        config.output_router_logits = True
    try:
        yield
    finally:
        if old is not None:
            config.output_router_logits = old


def warm_up_folder(folder: str | Path, examples: Examples, steps: int, **options: Any) -> dict[str, Any]:
    """`warm_up_routers` for a model on disk, whose files are changed in place.

    It is meant for a folder that has not got its final name yet, as `finish` of `conversion.convert` sees it: a run
    that is killed while it writes leaves some routers trained and some not. Give a finished folder as a copy.

    Args:
        folder: of the model; it must fit into memory.
        examples, steps, options: as in `warm_up_routers`.

    Returns:
        Its result, and `shards`: file -> SHA-256 of the files that changed.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", use_safetensors=True)
    return {**warm_up_routers(model, examples, steps, **options), "shards": write_routers(model, folder)}


def write_routers(model: PreTrainedModel, folder: str | Path) -> dict[str, str]:
    """Write the routers of a model over those in the safetensors files it was loaded from.

    Args:
        model: with the names, shapes and types of the files.
        folder: of the files, which keep their size and everything else; not safe against being killed.

    Returns:
        File -> SHA-256 of the files that hold routers.

    Raises:
        ValueError: a router is in no file, or there with another shape or type; nothing has been written then.
    """
    prefixes = tuple(f"{name}." for name, _ in gates(model))
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items() if name.startswith(prefixes)}
    places = tensor_places(Path(folder))
    writes: dict[Path, list[tuple[int, bytes]]] = {}
    for name, tensor in revert_weight_conversion(model, state).items():
        if name not in places:
            raise ValueError(f"{folder}: no file holds the router {name!r}")
        path, start, facts = places[name]
        content = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        kind = DTYPES[tensor.dtype]
        if facts["shape"] != list(tensor.shape) or facts["dtype"] != kind:
            found = f"{facts['shape']} {facts['dtype']}"
            raise ValueError(f"{path}: {name!r} is {found}, the trained router is {list(tensor.shape)} {kind}")
        writes.setdefault(path, []).append((start, content))
    for path, pieces in writes.items():
        with path.open("r+b") as file:
            for start, content in pieces:
                file.seek(start)
                file.write(content)
    return {path.name: digest(path) for path in sorted(writes)}


DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}


def tensor_places(folder: Path) -> dict[str, tuple[Path, int, dict[str, Any]]]:
    """Name -> file, first byte and facts of every tensor in a folder's safetensors files."""
    places = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, facts in header.items():
            places[name] = (path, 8 + length + facts["data_offsets"][0], facts)
    return places


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
