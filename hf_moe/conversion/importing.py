"""Public checkpoints whose published type belongs to another architecture, rewritten under a type of ours.

`AutoModelForCausalLM` would build the other architecture from such a repository and lose weights. An importer says,
from config.json alone, which config of ours computes the same, and what each of its tensors is.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from .checkpoints import Checkpoint, expected_shapes, read_headers, weights_folder
from .engine import plan_files, write_index
from .importers import IMPORTERS, Imported
from .output import atomic_directory, check_output, copy_companions
from .sources import Source, floating_dtype, light_folder
from .tensor_files import Shapes, ShardWriter


@dataclass(frozen=True)
class Import:
    """What will be written.

    Args:
        family: a name in `IMPORTERS`.
        source: where it comes from, with our config.
        imported: how its tensors are made.
    """

    family: str
    source: Source
    imported: Imported


def plan_import(source: str | Path, family: str | None = None, revision: str | None = None) -> Import:
    """Find the importer of a checkpoint, from its config.json alone.

    Args:
        source: a folder or a hub id.
        family: a name in `IMPORTERS`; default: the one that recognises the config.json.
        revision: of a hub id.

    Raises:
        ValueError: nobody recognises it, or something in it cannot be computed by ours.
    """
    if family is not None and family not in IMPORTERS:
        raise ValueError(f"family {family!r} is unknown; choose from {list(IMPORTERS)}.")
    folder, label = light_folder(source, revision), str(source)
    raw = raw_config(folder, label)
    found = [name for name, importer in IMPORTERS.items() if importer.recognises(raw)]
    if family is None and not found:
        raise ValueError(
            f"{label}: a {raw.get('model_type')!r} needs no import or has no importer ({', '.join(IMPORTERS)} have); "
            "try AutoModelForCausalLM.from_pretrained with hf_moe imported, and `hf_moe.enable` for ambiguous types."
        )
    name = family or found[0]
    try:
        imported = IMPORTERS[name].read(raw)
    except KeyError as error:
        raise ValueError(f"{label}: its config.json lacks {error.args[0]!r}, which {name} models have.") from error
    weights = folder if Path(source).expanduser().is_dir() else label
    return Import(name, Source(label, imported.config, folder, weights, revision=revision), imported)


def raw_config(folder: Path, label: str) -> dict[str, Any]:
    """config.json as it is, without the classes that its type belongs to."""
    try:
        raw = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{label} is not a model folder: cannot read its config.json: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{label} is not a model folder: its config.json is no object")
    return raw


def import_checkpoint(
    source: str | Path,
    output: str | Path,
    *,
    family: str | None = None,
    revision: str | None = None,
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> Path:
    """Rewrite a public checkpoint under a type of ours, one tensor at a time.

    Tokenizer and licence files come along. Every tensor of the source is used, and every one of ours is made; both is
    checked before anything is written.

    Args:
        source: a folder or a hub id.
        output: the folder; it appears when it is complete.
        family: a name in `IMPORTERS`; default: the one that recognises the config.json.
        revision: of a hub id.
        dtype: `float32`, `bfloat16` or `float16`; default: as they are. Factors that are folded into weights are
            rounded to it.
        max_shard_size: of one file.
        overwrite: replace a model in the output folder.

    Returns:
        The absolute path of the folder.

    Raises:
        ValueError: no importer, an unsupported setting, tensors that are missing, unknown or of another shape.
    """
    plan = plan_import(source, family, revision)
    assert plan.source.folder is not None
    check_output(output, overwrite, [plan.source.folder])
    wanted = None if dtype is None else floating_dtype(dtype)
    folder = weights_folder(plan.source)
    checkpoint = Checkpoint(plan.source.label, read_headers(folder, plan.source.label), folder)
    shapes = shapes_of(plan, checkpoint, wanted)
    files = plan_files(shapes, max_shard_size)
    with atomic_directory(output, overwrite) as place:
        write_tensors(plan, checkpoint, shapes, files, place)
        write_companions(plan, shapes, files, place)
    return Path(output).expanduser().resolve()


def shapes_of(plan: Import, checkpoint: Checkpoint, dtype: torch.dtype | None) -> Shapes:
    """Shape and type of everything that will be written; each of their tensors must be used."""
    label, expected = checkpoint.label, expected_shapes(plan.imported.config)
    made = {name: plan.imported.tensor(name) for name in expected}
    if missing := sorted({made[name].name for name in expected} - checkpoint.facts.keys()):
        raise ValueError(f"{label}: the checkpoint lacks {len(missing)} tensors, the first is {missing[0]!r}")
    unused = sorted(checkpoint.facts.keys() - {each.name for each in made.values()} - {"lm_head.weight"})
    if unused:
        raise ValueError(f"{label}: {len(unused)} tensors are unknown to {plan.family}, the first is {unused[0]!r}")
    shapes = {}
    for name, shape in expected.items():
        facts = checkpoint.facts[made[name].name]
        try:
            found = tuple(made[name](torch.empty(facts.shape, device="meta")).shape)
        except RuntimeError:  # another number of entries
            found = facts.shape
        if found != shape:
            raise ValueError(f"{label}: {made[name].name!r} has shape {facts.shape}, its config asks for {shape}")
        shapes[name] = (shape, dtype or facts.dtype)
    return shapes


def write_tensors(
    plan: Import, checkpoint: Checkpoint, shapes: Shapes, files: dict[str, list[str]], place: Path
) -> None:
    """All files, tensor by tensor."""
    total = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in shapes.values())
    with tqdm(total=total, desc="Importing", unit="B", unit_scale=True, delay=5) as bar:
        for file, names in files.items():
            with ShardWriter(place / file, {name: shapes[name] for name in names}) as shard:
                for name in names:
                    made, dtype = plan.imported.tensor(name), shapes[name][1]
                    theirs = checkpoint.read(made.name)
                    # factors meet the wider type, so that there is one rounding
                    tensor = made(theirs.to(torch.promote_types(dtype, theirs.dtype)))
                    shard.add(name, tensor.to(dtype).contiguous())
                    bar.update(tensor.nbytes)
            shard.close()


def write_companions(plan: Import, shapes: Shapes, files: dict[str, list[str]], place: Path) -> None:
    """Config, generation config, index, tokenizer and licence files."""
    config, source = plan.imported.config, plan.source
    with torch.device("meta"):
        config.architectures = [type(AutoModelForCausalLM.from_config(config)).__name__]
    dtypes = {dtype for _, dtype in shapes.values()}
    config.dtype = max(dtypes, key=lambda dtype: dtype.itemsize)
    config.save_pretrained(place)
    if (generation_config := source.generation_config()) is not None:
        generation_config.save_pretrained(place)
    write_index(place, files, shapes)
    assert source.folder is not None
    copy_companions(source.folder, place)
