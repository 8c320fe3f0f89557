"""What the quickstart found: one row per model, as a table, a sentence, a plot, a file and a model card."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.table import Table

MIXTURES = ("btx", "bam", "bam_shared")


@dataclass(frozen=True)
class Row:
    """One model: held-out perplexity per domain after its training, and before it where it was put together."""

    key: str
    label: str
    after: dict[str, float]
    total_parameters: int
    active_parameters: int
    tokens: int  # read by everything that the model is made of
    before: dict[str, float] | None = None

    @property
    def average(self) -> float:
        """Mean of the domains' perplexities, as in the BAM paper."""
        return sum(self.after.values()) / len(self.after)

    @property
    def average_before(self) -> float | None:
        """The same before the mix training."""
        return None if self.before is None else sum(self.before.values()) / len(self.before)


@dataclass(frozen=True)
class Report:
    """All rows of one run, and what it takes to repeat it."""

    domains: list[str]
    rows: list[Row]
    settings: dict[str, Any]
    versions: dict[str, str]
    generations: list[dict[str, str]] = field(default_factory=list)

    def row(self, key: str) -> Row:
        """The row of one model."""
        return next(row for row in self.rows if row.key == key)

    @property
    def best_mixture(self) -> Row:
        """The mixture of experts with the lowest average."""
        return min((self.row(key) for key in MIXTURES), key=lambda row: row.average)

    @property
    def sentence(self) -> str:
        """Who won, from the measured numbers."""
        best, continued, soup = self.best_mixture, self.row("continued"), self.row("soup")
        others = ", ".join(f"{row.label} {row.average:.2f}" for row in map(self.row, MIXTURES) if row is not best)
        text = f"Of the mixtures, {best.label} has the lowest average perplexity: {best.average:.2f} ({others})"
        rivals = [f"{row.label} ({row.average:.2f})" for row in (continued, soup) if row.average < best.average]
        if rivals:
            verb = "is" if len(rivals) == 1 else "are"
            return f"{text}, but {' and '.join(rivals)} {verb} better than every mixture."
        return (
            f"{text}, better than {continued.label} ({continued.average:.2f}) and {soup.label} ({soup.average:.2f})."
        )

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows of the table."""
        header = ["model", *self.domains, "average", "params", "active", "tokens"]
        lines = []
        for row in self.rows:
            values = [*(row.after[domain] for domain in self.domains), row.average]
            cells = [f"{value:.2f}" for value in values]
            if row.before is not None:
                before = [*(row.before[domain] for domain in self.domains), row.average_before]
                cells = [f"{old:.1f} → {cell}" for old, cell in zip(before, cells)]
            sizes = [f"{n / 1e6:.2f}M" for n in (row.total_parameters, row.active_parameters, row.tokens)]
            lines.append([row.label, *cells, *sizes])
        return header, lines

    def markdown(self) -> str:
        """The table for a model card."""
        header, lines = self.cells()
        rule = ["---"] + ["---:"] * (len(header) - 1)
        return "\n".join("| " + " | ".join(line) + " |" for line in [header, rule, *lines])

    def terminal(self) -> Table:
        """The table for a terminal; the best mixture is bold."""
        header, lines = self.cells()
        table = Table(title="Held-out perplexity, before → after the mix training (lower is better)", box=SIMPLE_HEAD)
        for i, name in enumerate(header):
            table.add_column(name, justify="right" if i else "left", no_wrap=True)
        for row, line in zip(self.rows, lines):
            table.add_row(*line, style="bold" if row is self.best_mixture else None)
        return table

    def save_json(self, path: Path) -> None:
        """Everything measured, for other programs."""
        rows = [asdict(row) | {"average": row.average, "average_before": row.average_before} for row in self.rows]
        content = asdict(self) | {
            "rows": rows,
            "best_mixture": self.best_mixture.key,
            "sentence": self.sentence,
        }
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def save_plot(self, path: Path) -> None:
        """One bar per model: the average after its training; a mark where it stood before."""
        figure = Figure(figsize=(9, 0.45 * len(self.rows) + 1.6), layout="constrained")
        axes = figure.subplots()
        names = [row.label for row in self.rows]
        colors = ["lightblue" if row.key in MIXTURES else "lightgray" for row in self.rows]
        bars = axes.barh(names, [row.average for row in self.rows], color=colors)
        axes.bar_label(bars, fmt="%.1f", label_type="center")
        before = {row.label: row.average_before for row in self.rows if row.average_before is not None}
        axes.plot(list(before.values()), list(before), "k|", markersize=20, label="before the mix training")
        axes.invert_yaxis()
        axes.set_xlabel("held-out perplexity, average over domains (lower is better)")
        figure.legend(loc="outside lower right")
        figure.savefig(path, dpi=150)

    def card(self) -> ModelCard:
        """The model card of the best mixture, table included."""
        best = self.best_mixture
        name = f"hf-moe quickstart: {best.label}"
        scores = [
            EvalResult(
                task_type="text-generation",
                dataset_type=f"hf-moe-quickstart-{domain}",
                dataset_name=f"{domain} (held out)",
                metric_type="perplexity",
                metric_value=round(value, 4),
            )
            for domain, value in best.after.items()
        ]
        data = ModelCardData(
            library_name="transformers",
            pipeline_tag="text-generation",
            tags=["hf_moe", "mixture-of-experts", "upcycling", best.key.split("_")[0]],
            model_name=name,
            eval_results=scores,
        )
        samples = "\n\n".join(f"```text\n{g['prompt']}{g['continuation']}\n```" for g in self.generations)
        text = CARD.format(
            name=name,
            sentence=self.sentence,
            table=self.markdown(),
            samples=samples,
            domains=" and ".join(f"`{domain}`" for domain in self.domains),
            settings=json.dumps(self.settings, indent=2),
            versions=", ".join(f"{package} {version}" for package, version in self.versions.items()),
        )
        return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


CARD = """# {name}

A small mixture of experts, made by `hf-moe quickstart` to show the whole way on the domains {domains}: a
dense seed, one specialist per domain, mixtures of them ([BAM](https://arxiv.org/abs/2408.08274),
[BTX](https://arxiv.org/abs/2403.07816)), further training. It demonstrates the method and is no useful language model.

```python
import hf_moe  # registers the architecture
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```

## Results

Perplexity on held-out files, over the same windows for every model; "before →" is a merged model as it was put
together, before its training. All merged models come from the same dense ones and read the same further text. Active
parameters are those that one token visits; tokens are all that a model is made of (seed, branches, mix), and the
continued seed read exactly the same text.

{table}

{sentence}

![results](results.png)

## Samples

{samples}

## Recipe

```json
{settings}
```

{versions}
"""
