"""`hf-moe quickstart`: its text and splits, its errors, and one complete fast run."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_moe
from hf_moe.cli.quickstart import quickstart
from hf_moe.cli.quickstart.documents import Document, collect, groups, sizes, split, split_docstrings
from hf_moe.cli.quickstart.report import MIXTURES, Report, Row
from hf_moe.cli.quickstart.stages import FAST, dense_seed, mixture, perplexities, soup
from hf_moe.cli.quickstart.tokens import Corpus, build_corpus, sample
from hf_moe.conversion import count_parameters

WORDS = {"law": "court judge appeal contract clause", "maths": "proof lemma theorem field ring"}


def write_domains(folder: Path, files: int = 12, words: int = 1500) -> Path:
    """A data directory of two domains; no two files share a line."""
    for domain, text in WORDS.items():
        (folder / domain).mkdir(parents=True)
        for number in range(files):
            lines = [f"{word} {number} {i} {domain}" for i, word in enumerate(text.split() * (words // 5))]
            (folder / domain / f"{number}.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    return collect(None, limit=200_000)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    data_dir = write_domains(tmp_path_factory.mktemp("data"))
    return build_corpus(collect(data_dir), vocab_size=400, window=32, held_out_windows=20)


# ---- text -----------------------------------------------------------------------------------------------------------


def test_docstrings_leave_the_code():
    source = (
        '"""Module."""\n\ndef f(x):\n    """Doc\n    two lines."""\n    return x  # kept\n\nclass A:\n    "Short."\n'
    )
    code, docstrings = split_docstrings(source)
    assert docstrings == ["Module.", "Doc\ntwo lines.", "Short."]
    assert "return x  # kept" in code
    assert not any(text in code for text in ("Module", "two lines", "Short"))


def test_standard_library_has_both_domains_and_no_tests(documents: list[Document]):
    assert set(sizes(documents)) == {"code", "prose"}
    assert not any("test" in Path(document.origin).parts for document in documents)
    assert any(document.origin.startswith("topic/") for document in documents)


def test_split_is_by_file_and_never_divides_one(documents: list[Document]):
    train, held_out = split(documents)
    assert Counter(train) + Counter(held_out) == Counter(documents)
    assert not {d.origin for d in train} & {d.origin for d in held_out}
    for domain, size in sizes(documents).items():
        assert 0.05 < sizes(held_out)[domain] / size <= 0.1


def test_no_held_out_document_repeats_a_training_document(documents: list[Document]):
    train, held_out = split(documents)
    where = Counter(line for document in documents for line in set(long_lines(document)))
    seen = [set(long_lines(document)) for document in train]
    for document in held_out:
        lines = {line for line in long_lines(document) if where[line] <= 20}
        shared = max((len(lines & other) for other in seen), default=0)
        assert shared < max(2, 0.2 * len(lines)), document.origin


def long_lines(document: Document) -> list[str]:
    return [line for raw in document.text.splitlines() if len(line := raw.strip()) >= 25]


def test_the_same_text_stays_together_across_domains():
    text = "\n".join(f"a line that is long enough to count, number {i}" for i in range(10))
    other = text.replace("long enough", "quite another")
    documents = [
        Document("a", "x", text),
        Document("b", "y", text + "\nand a little more of it"),
        Document("c", "y", other),
    ]
    assert sorted(len(group) for group in groups(documents)) == [1, 2]


def test_few_large_files_still_give_held_out_text():
    documents = [Document(f"{domain}/{i}", domain, f"{domain} {i} " * 100) for domain in "ab" for i in range(2)]
    train, held_out = split(documents)
    assert Counter(d.domain for d in train) == Counter(d.domain for d in held_out) == {"a": 1, "b": 1}


def test_split_does_not_depend_on_the_order_of_the_files(documents: list[Document]):
    assert {d.origin for d in split(documents)[1]} == {d.origin for d in split(documents[::-1])[1]}


# ---- tokens ---------------------------------------------------------------------------------------------------------


def test_tokenizer_round_trip(corpus: Corpus, tmp_path: Path):
    corpus.tokenizer.save_pretrained(tmp_path)
    text = 'def f(x):\n\treturn "ä ☃ 𝄞"  # \x00 anything\r\n'
    for tokenizer in (corpus.tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert isinstance(corpus.tokenizer._tokenizer, Tokenizer)


def test_windows_are_full_and_the_sample_keeps_its_shares(corpus: Corpus):
    assert {len(row) for rows in corpus.train.values() for row in rows["input_ids"][:]} == {32}
    rows = sample(corpus, {"law": 0.75, "maths": 0.25}, 101, seed=3)
    assert len(rows) == 101
    assert (
        rows["input_ids"][:]
        == rows["labels"][:]
        == sample(corpus, {"law": 0.75, "maths": 0.25}, 101, seed=3)["labels"][:]
    )
    law = {tuple(row) for row in corpus.train["law"]["input_ids"][:]}
    assert sum(tuple(row) in law for row in rows["input_ids"][:]) == 76


def test_more_rows_than_there_are_come_again_evenly(corpus: Corpus):
    number = len(corpus.train["law"])
    counts = Counter(tuple(row) for row in sample(corpus, {"law": 1.0}, 2 * number, seed=0)["input_ids"][:])
    assert set(counts) == {tuple(row) for row in corpus.train["law"]["input_ids"][:]}
    assert min(counts.values()) >= 2


# ---- models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_type", ["pre_norm", "parallel"])
def test_mixtures_leave_their_sources_alone(corpus: Corpus, block_type: str):
    recipe = replace(FAST, vocab_size=400, window=32)
    dense = [dense_seed(recipe, block_type, corpus.tokenizer, seed) for seed in range(3)]
    before = [{name: tensor.clone() for name, tensor in model.state_dict().items()} for model in dense]
    for model in [soup(dense), *(mixture(kind, dense, 0) for kind in MIXTURES)]:
        total, active = count_parameters(model)
        assert total >= active >= sum(p.numel() for p in dense[0].parameters())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
    for model, state in zip(dense, before):
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, state[name]), name


def test_perplexity_is_that_of_the_mean_loss_over_all_tokens(corpus: Corpus):
    recipe = replace(FAST, vocab_size=400, window=32)
    model = mixture("bam", [dense_seed(recipe, "pre_norm", corpus.tokenizer, seed) for seed in range(3)], 0)
    measured = perplexities(model, corpus, batch_size=3)  # the last batch is shorter
    for domain, rows in corpus.held_out.items():
        ids = torch.tensor(rows["input_ids"][:])
        with torch.no_grad():
            loss = model(input_ids=ids, labels=ids).loss
        assert measured[domain] == pytest.approx(loss.exp().item(), rel=1e-4)


# ---- report ---------------------------------------------------------------------------------------------------------


def report(**averages: float) -> Report:
    rows = [Row(key, key, {"a": value - 1, "b": value + 1}, 10, 10, 10) for key, value in averages.items()]
    return Report(["a", "b"], rows, {}, {})


def test_the_sentence_follows_the_numbers():
    won = report(soup=30, btx=25, bam=22, bam_shared=23, continued=24)
    assert won.best_mixture.key == "bam" and "bam has the lowest average perplexity: 22.00" in won.sentence
    assert "better than continued (24.00) and soup (30.00)" in won.sentence
    lost = report(soup=30, btx=25, bam=22, bam_shared=23, continued=20)
    assert "but continued (20.00) is better than every mixture" in lost.sentence
    both = report(soup=19, btx=21, bam=22, bam_shared=23, continued=20)
    assert "btx has the lowest" in both.sentence and "continued (20.00) and soup (19.00) are better" in both.sentence


# ---- errors ---------------------------------------------------------------------------------------------------------


def run(output_dir: Path, **options) -> None:
    quickstart(
        **{"output_dir": output_dir, "data_dir": None, "block_type": "pre_norm", "seed": 0, "fast": True, **options}
    )


def test_data_dir_errors_name_what_is_expected(tmp_path: Path):
    expected = "expected one folder per domain, at least two of them"
    cases = {"absent": "is not a folder", "empty": "found: none", "one": "found: law"}
    (tmp_path / "empty").mkdir()
    (tmp_path / "one" / "law").mkdir(parents=True)
    for name, message in cases.items():
        with pytest.raises(ValueError, match=message) as error:
            run(tmp_path / "out", data_dir=tmp_path / name)
        assert expected in str(error.value)
    two = write_domains(tmp_path / "two", files=1)
    with pytest.raises(ValueError, match=r"Domain 'law' .* has 1 \*\.txt files with text"):
        run(tmp_path / "out", data_dir=two)
    assert not (tmp_path / "out").exists()


def test_too_little_text_and_wrong_encoding(tmp_path: Path):
    with pytest.raises(ValueError, match=r"Domain 'law' has too little (training|held-out) text"):
        run(tmp_path / "out", data_dir=write_domains(tmp_path / "small", files=3, words=5))
    same = write_domains(tmp_path / "same")
    for file in (same / "law").iterdir():
        file.write_text("the same law in every file\n" * 500)
    with pytest.raises(ValueError, match="Domain 'law' has too little held-out text"):
        run(tmp_path / "out", data_dir=same)
    data_dir = write_domains(tmp_path / "latin")
    (data_dir / "law" / "x.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(ValueError, match=r"x\.txt is not UTF-8 text"):
        run(tmp_path / "out", data_dir=data_dir)


def test_unknown_block_type_and_a_model_in_the_way(tmp_path: Path):
    with pytest.raises(ValueError, match=r"choose from \['pre_norm', 'parallel'\]"):
        run(tmp_path / "out", block_type="post_norm")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text('{"model_type": "bam"}')
    with pytest.raises(ValueError, match="--overwrite"):
        run(tmp_path / "old")
    assert [file.name for file in (tmp_path / "old").iterdir()] == ["config.json"]


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import hf_moe.cli.quickstart.run as module

    def fail(*args: object) -> None:
        raise RuntimeError("disk full")

    monkeypatch.setattr(module.Report, "save_plot", fail)
    monkeypatch.setattr(module, "train", lambda *args: None)
    recipe = replace(FAST, vocab_size=400, window=32)
    with pytest.raises(RuntimeError, match="disk full"):
        module.run_quickstart(tmp_path / "out", write_domains(tmp_path / "data"), recipe, 0, "parallel", False)
    assert [file.name for file in tmp_path.iterdir()] == ["data"]


# ---- the whole ------------------------------------------------------------------------------------------------------


def test_fast_run(tmp_path: Path, capsys: pytest.CaptureFixture):
    output = tmp_path / "mixture"
    run(output)
    printed = capsys.readouterr()
    results = json.loads((output / "results.json").read_text())
    rows = {row["key"]: row for row in results["rows"]}
    assert list(rows) == ["seed", "specialist_code", "specialist_prose", "soup", *MIXTURES, "continued"]
    merged = ("soup", *MIXTURES)
    assert all((rows[key]["before"] is not None) == (key in merged) for key in rows)
    assert len({rows[key]["tokens"] for key in (*merged, "continued")}) == 1
    for row in rows.values():
        assert set(row["after"]) == {"code", "prose"}
        assert row["average"] == pytest.approx(sum(row["after"].values()) / 2)
        assert 1 < row["average"] < 4096
    assert rows["seed"]["total_parameters"] == rows["soup"]["active_parameters"] < rows["bam"]["active_parameters"]
    assert rows["btx"]["total_parameters"] < rows["bam_shared"]["total_parameters"] < rows["bam"]["total_parameters"]
    best = min(MIXTURES, key=lambda key: rows[key]["average"])
    assert results["best_mixture"] == best

    card = ModelCard.load(output / "README.md")
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "text-generation"
    assert results["sentence"] in card.text and results["sentence"].split(":")[0] in " ".join(printed.out.split())
    for row in rows.values():
        assert f"| {row['label']} |" in card.text and f"{row['average']:.2f}" in card.text
    assert (output / "results.png").read_bytes().startswith(b"\x89PNG")
    assert len(results["generations"]) == 2 and "Perplexity" in printed.err  # progress bars

    model = AutoModelForCausalLM.from_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert isinstance(model, hf_moe.ARCHITECTURES["hf_moe" if best == "btx" else "bam"][2])
    assert len(tokenizer) == model.config.vocab_size and model.config.eos_token_id == tokenizer.eos_token_id
    assert [file.name for file in tmp_path.iterdir()] == ["mixture"]
    with pytest.raises(ValueError, match="--overwrite"):
        run(output)
