"""The model card, README.md, from what a folder knows: its config, its receipt, the log of its training."""

import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .anatomy_facts import Facts, facts_of
from .history import RECEIPT, conversion, read_json, results, source_names, training
from .serving import serving

CARD = "README.md"
PLOT = "expert_load.png"
MARK = "<!-- Written by hf_moe, and again when it is published; delete this line to keep your own text. -->"
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size", "dtype")
ARXIV = re.compile(r"https://arxiv\.org/abs/(\d{4}\.\d{5})")


def model_card(
    folder: str | Path,
    *,
    name: str | None = None,
    repo_id: str | None = None,
    license: str | None = None,
    base_model: Iterable[str] = (),
    datasets: Iterable[str] = (),
    eval_results: Iterable[EvalResult] = (),
    eval_dataset: str | None = None,
) -> ModelCard:
    """Write a card; nothing in it is guessed, and nothing about this machine.

    Args:
        folder: of the model. `conversion.json` (a receipt of `upcycle`), `trainer_state.json` and `eval_results.json`
            (of Trainer) are used where they are there, and `expert_load.png` is shown.
        name: of the model; default: of the repository or the folder.
        repo_id: where it will be, for the examples in code.
        license: default: that of its sources, if they agree.
        base_model: hub ids; default: the sources in the receipt.
        datasets: hub ids of the data that it was trained on.
        eval_results: measured results for the model-index.
        eval_dataset: what the figures in `eval_results.json` were measured on; they are left out without it.

    Raises:
        ValueError: the folder cannot be read as a model.
    """
    folder = Path(folder).expanduser()
    facts, receipt = facts_of(folder), read_json(folder / RECEIPT)
    measured = [*eval_results, *results(folder, eval_dataset)]
    name = name or (repo_id or folder.resolve().name).split("/")[-1]
    data = metadata(facts, receipt, license, list(base_model), list(datasets))
    if measured:
        data.model_name, data.eval_results = name, measured
    paper = paper_of(facts)
    number = ARXIV.fullmatch(paper) if paper else None
    return ModelCard.from_template(
        data,
        template_str=Path(__file__).with_name("card_template.md").read_text(encoding="utf-8"),
        name=name,
        mark=MARK,
        path=repo_id or "path/to/this/folder",
        facts=facts,
        summary=summary(facts, receipt),
        total=f"{facts.total:,}",
        active="not known" if facts.active is None else f"{facts.active:,} ({facts.active / facts.total:.0%})",
        size=f"{facts.bytes / 1e9:.2f} GB, safetensors" if facts.bytes else "none in this folder",
        sizes=[(field, value) for field in SIZES if (value := getattr(facts.config, field, None)) is not None],
        paper=paper,
        bibtex=f"https://arxiv.org/bibtex/{number[1]}" if number else None,
        tokenizer=any(folder.glob("tokenizer*")),
        self_contained=(folder / "modeling_standalone.py").is_file(),
        serving=serving(facts.config.model_type, facts.ours),
        conversion=conversion(receipt) if receipt else None,
        conflict=conflict(receipt) if receipt and license is None else None,
        plot=PLOT if (folder / PLOT).is_file() else None,
        fair=f"1/{receipt['recipe']['num_experts']}" if receipt else "an equal share",
        training=training(folder),
        results=measured,
        limits=limits(facts, receipt, measured),
    )


def write_card(folder: Path, **options: Any) -> Path:
    """Write README.md into a folder; `options` are those of `model_card`."""
    model_card(folder, **options).save(folder / CARD)
    return folder / CARD


def has_own_card(folder: Path) -> bool:
    """Whether there is a README.md that was not written here, or was made somebody's own."""
    path = folder / CARD
    return path.is_file() and MARK not in path.read_text(encoding="utf-8")


def metadata(
    facts: Facts, receipt: dict[str, Any] | None, license: str | None, base_model: list[str], datasets: list[str]
) -> ModelCardData:
    """The YAML at the top, by which the hub finds a model."""
    tags = ["mixture-of-experts", "hf_moe"] if facts.sparse else ["hf_moe"]
    relation = None
    if receipt is not None:
        tags += ["upcycled", receipt["recipe"]["method"]]
        base_model = base_model or [entry["hub_id"] for entry in receipt["sources"] if "hub_id" in entry]
        license = license or agreed_license(receipt)
        relation = "merge" if len(receipt["sources"]) > 1 else "finetune"
    more: dict[str, Any] = {"base_model_relation": relation} if base_model and relation else {}
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=tags,
        base_model=base_model or None,
        datasets=datasets or None,
        license=license,
        **more,
    )


def licenses_of(receipt: dict[str, Any]) -> list[str | None]:
    """What the cards of the sources said, in order."""
    return [entry.get("license") for entry in receipt["sources"]]


def agreed_license(receipt: dict[str, Any]) -> str | None:
    """The licence of all sources, None if they differ or none is stated."""
    found = set(licenses_of(receipt))
    return found.pop() if len(found) == 1 else None


def conflict(receipt: dict[str, Any]) -> str | None:
    """A warning if the sources are under different licences."""
    found = licenses_of(receipt)
    if len(set(found)) < 2:
        return None
    pairs = ", ".join(f"{name}: {each or 'not stated'}" for name, each in zip(source_names(receipt), found))
    return f"The licences of its sources differ ({pairs}); which terms hold for it is not settled here."


def paper_of(facts: Facts) -> str | None:
    """The address in the docstring of the architecture's module; None for native types."""
    document = sys.modules[type(facts.config).__module__].__doc__ or ""
    found = ARXIV.search(document)
    return found[0] if facts.ours and found else None


def summary(facts: Facts, receipt: dict[str, Any] | None) -> str:
    """The first paragraph."""
    kind = facts.config.model_type
    made = f", upcycled from {', '.join(source_names(receipt))}" if receipt else ""
    if not facts.ours:
        return f"A model of Transformers' type `{kind}`{made}."
    first = (type(facts.config).__doc__ or "").strip().split("\n\n")[0].replace("\n    ", " ")
    return f"A model of type `{kind}` from the package hf_moe{made}. {first}"


def limits(facts: Facts, receipt: dict[str, Any] | None, measured: list[EvalResult]) -> list[str]:
    """What a reader must not expect."""
    found = []
    if receipt is not None and receipt["exactness"]["useful_without_training"] is not True:
        found.append("It was put together from other models; see above how far it can be used without training.")
    if not measured:
        found.append("No results on a benchmark are given: nobody stated any.")
    if facts.active is not None and facts.active < facts.total:
        share = facts.active / facts.total
        found.append(f"All {facts.total:,} parameters must be in memory, though a token uses {share:.0%} of them.")
    if facts.ours:
        found.append("Other programs than Transformers do not know its architecture.")
    return [*found, "It may say what is false or offends; test it for your purpose."]
