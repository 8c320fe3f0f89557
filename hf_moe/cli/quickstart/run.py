"""The order of the quickstart's stages, from text to a saved, reloaded and tried mixture."""

from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
from datasets import Dataset
from rich.console import Console
from rich.markup import escape
from transformers import AutoModelForCausalLM, PreTrainedModel, set_seed

from ...conversion import atomic_directory, count_parameters
from .documents import collect
from .report import MIXTURES, Report, Row
from .stages import (
    Recipe,
    dense_seed,
    even_rows,
    join,
    mixture,
    perplexities,
    soup,
    specialist_rows,
    train,
)
from .tokens import Corpus, build_corpus

LABELS = {
    "seed": "seed",
    "soup": "soup",
    "btx": "BTX",
    "bam": "BAM, KV experts",
    "bam_shared": "BAM, shared KV",
    "continued": "seed continued",
}
PACKAGES = ("hf_moe", "torch", "transformers", "datasets", "tokenizers", "accelerate")


class Quickstart:
    """One run. The stages fill `rows`; beside the dense models only the best mixture so far is kept."""

    def __init__(self, recipe: Recipe, seed: int, block_type: str, corpus: Corpus, console: Console) -> None:
        self.recipe, self.seed, self.block_type = recipe, seed, block_type
        self.corpus, self.console = corpus, console
        self.rows: list[Row] = []
        self.best: PreTrainedModel | None = None

    def run(self) -> None:
        """Seed, branch, mix, and the seed continued on all that the branches and the mix have read."""
        recipe, corpus = self.recipe, self.corpus
        seed = dense_seed(recipe, self.block_type, corpus.tokenizer, self.seed)
        rows = even_rows(corpus, recipe.seed_steps, recipe, seed=1000 * self.seed)
        self.stage("seed", LABELS["seed"], seed, rows, recipe.seed_steps, recipe.seed_final_lr)
        branch_rows = {domain: specialist_rows(corpus, domain, recipe, self.seed) for domain in corpus.domains}
        specialists = [self.branch(seed, domain, rows) for domain, rows in branch_rows.items()]
        mix_rows = even_rows(corpus, recipe.mix_steps, recipe, seed=1000 * self.seed + 500)
        steps = recipe.seed_steps + recipe.branch_steps * len(corpus.domains) + recipe.mix_steps
        self.mix([seed, *specialists], mix_rows, steps)
        same = join([*branch_rows.values(), mix_rows], seed=self.seed)
        self.stage("continued", LABELS["continued"], seed, same, steps)

    def branch(self, seed: PreTrainedModel, domain: str, rows: Dataset) -> PreTrainedModel:
        """A copy of the seed, trained on one domain."""
        model = soup([seed])
        steps = self.recipe.seed_steps + self.recipe.branch_steps
        self.stage(f"specialist_{domain}", f"specialist, {domain}", model, rows, steps)
        return model

    def mix(self, dense: list[PreTrainedModel], rows: Dataset, steps: int) -> None:
        """Every way to merge the dense models, each trained on the same rows in the same order."""
        for key in ("soup", *MIXTURES):
            model = soup(dense) if key == "soup" else mixture(key, dense, self.seed)
            before = perplexities(model, self.corpus)
            self.stage(key, LABELS[key], model, rows, steps, before=before)
            averages = [row.average for row in self.rows if row.key in MIXTURES]
            if key in MIXTURES and averages[-1] == min(averages):
                self.best = model

    def stage(
        self,
        key: str,
        label: str,
        model: PreTrainedModel,
        rows: Dataset,
        steps: int,
        final_lr: float | None = None,
        before: dict[str, float] | None = None,
    ) -> None:
        """Train and measure; `steps` counts those of everything that the model is made of."""
        number, stages = len(self.rows) + 1, 6 + len(self.corpus.domains)
        tokens = self.recipe.tokens(len(rows) // self.recipe.batch_size)
        self.console.rule(rf"\[{number}/{stages}] {escape(label)}: {tokens:,} tokens")
        train(model, rows, self.recipe, self.seed, self.recipe.final_lr if final_lr is None else final_lr)
        after = perplexities(model, self.corpus)
        self.rows.append(Row(key, label, after, *count_parameters(model), self.recipe.tokens(steps), before))
        self.console.print("perplexity: " + ", ".join(f"{name} {value:.2f}" for name, value in after.items()))


def run_quickstart(
    output_dir: Path, data_dir: Path | None, recipe: Recipe, seed: int, block_type: str, overwrite: bool
) -> Report:
    """Everything: text, stages, table, and the best mixture saved to `output_dir`."""
    console = Console()
    documents = collect(data_dir, recipe.characters)
    corpus = build_corpus(documents, recipe.vocab_size, recipe.window, recipe.held_out_windows)
    job = Quickstart(recipe, seed, block_type, corpus, console)
    job.run()
    assert job.best is not None
    settings = {"seed": seed, "block_type": block_type, **asdict(recipe)}
    versions = {package: version(package) for package in PACKAGES}
    with atomic_directory(output_dir, overwrite) as folder:
        corpus.tokenizer.save_pretrained(folder)
        job.best.cpu().save_pretrained(folder)
        model = reload(folder, job.best, corpus)
        report = Report(corpus.domains, job.rows, settings, versions, generate(model, corpus, seed))
        report.save_json(folder / "results.json")
        report.save_plot(folder / "results.png")
        report.card().save(folder / "README.md")
    show(report, output_dir, console)
    return report


def show(report: Report, output_dir: Path, console: Console) -> None:
    """The results, on the terminal."""
    console.width = max(console.width, 64 + 18 * len(report.domains))  # a table with holes is worse than a wide one
    console.rule("Results")
    console.print(report.terminal())
    for text in report.generations:
        console.rule(f"The reloaded model continues: {text['domain']}", align="left")
        console.print(text["prompt"], style="bold", end="", markup=False, highlight=False)
        console.print(text["continuation"], markup=False, highlight=False)
    console.rule()
    console.print(report.sentence, style="bold", markup=False)
    console.print(f"Saved to {output_dir}: model, tokenizer, README.md, results.json, results.png", markup=False)


def reload(folder: Path, saved: PreTrainedModel, corpus: Corpus) -> PreTrainedModel:
    """Load what was saved as any user would, and make sure that it computes the same."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor([rows[0]["input_ids"] for rows in corpus.held_out.values()])
    with torch.no_grad():
        if not torch.equal(model(ids).logits, saved.eval()(ids).logits):
            raise RuntimeError("The reloaded model computes other logits than the saved one.")
    return model


def generate(model: PreTrainedModel, corpus: Corpus, seed: int, new_tokens: int = 60) -> list[dict[str, str]]:
    """Two continuations of held-out text, sampled, one for each of the first two domains."""
    results = []
    set_seed(seed)
    for domain in corpus.domains[:2]:
        ids = torch.tensor([corpus.held_out[domain][0]["input_ids"][:24]])
        output = model.generate(  # pyright: ignore
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=0.8, top_k=40,
            max_new_tokens=new_tokens,
        )  # fmt: skip
        text = corpus.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        results.append({"domain": domain, "prompt": corpus.tokenizer.decode(ids[0]), "continuation": text})
    return results
