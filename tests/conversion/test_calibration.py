"""Router rows from texts: of the vector that the router really reads, against float64 references."""

import json

import pytest
import torch
from dense_models import SIZES, dense_model, dense_models, logits, save_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import hf_moe
from hf_moe.conversion import Options, plan_upcycling, upcycle
from hf_moe.conversion.calibration import find
from hf_moe.conversion.engine import convert
from hf_moe.conversion.hearing import listen
from hf_moe.conversion.kmeans import k_means
from hf_moe.conversion.router_init import contrast, router_finding, scaled_to
from hf_moe.conversion.sources import open_source
from hf_moe.conversion.texts import Batch, examples, make_batches, read_data
from hf_moe.training.warm_up import warm_up_folder

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "olmo2", "gemma2", "gemma3_text", "hf_moe", "parallel"]


def documents(low, high, count=6, seed=0):
    """Documents of unequal lengths with words of their own."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 14, (count,), generator=generator).tolist()
    return [torch.randint(low, high, (length,), generator=generator).tolist() for length in lengths]


def groups(seed=0, count=6):
    return [documents(3, 22, count, seed), documents(22, 42, count, seed), documents(42, 61, count, seed)]


def gate_inputs(mixture, ids):
    """layer -> (tokens, width) that the routers of a mixture read on one document, in float64."""
    read, handles = {}, []
    for layer in hf_moe.moe_layers(mixture):

        def note(gate, args, name=layer.name):
            read[int(name.split(".")[2])] = args[0].detach().reshape(-1, args[0].shape[-1]).double()

        handles.append(layer.gate.register_forward_pre_hook(note))
    with torch.no_grad():
        mixture(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return read


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_heard_is_what_the_router_reads(family):
    """Each document by itself through the mixture, no padding; mergekit's layer input is another vector."""
    model = dense_model(family).train()
    modes = [module.training for module in model.modules()]
    mixture = upcycle(model, "hf_moe", num_experts=3, router_std=0.5).eval()
    heard = listen([open_source(model, 0)], make_batches(open_source(model, 0), groups(), batch_size=4), [0, 1], 3)
    layer_inputs = {}
    for number, layer in enumerate(mixture.model.layers):
        layer.register_forward_pre_hook(lambda module, args, n=number: layer_inputs.update({n: args[0][0].double()}))
    for group, texts in enumerate(groups()):
        read = [(gate_inputs(mixture, ids), dict(layer_inputs)) for ids in texts]
        for layer in (0, 1):
            mean = torch.cat([gates[layer] for gates, _ in read]).mean(0)
            torch.testing.assert_close(heard.means(layer)[group], mean, atol=1e-5, rtol=1e-5)
            other = torch.cat([inputs[layer] for _, inputs in read]).mean(0)
            # a parallel block's own norm is all that lies between
            assert torch.cosine_similarity(mean, other, 0) < (0.99 if family == "parallel" else 0.95)
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_several_sources_are_averaged_token_by_token():
    models = dense_models("llama", 2)
    data = groups()
    sources = [open_source(model, 0) for model in models]
    batches = make_batches(sources[0], data)
    together, apart = listen(sources, batches, [1], 3), [listen([source], batches, [1], 3) for source in sources]
    torch.testing.assert_close(together.means(1), sum(heard.means(1) for heard in apart) / 2)
    torch.testing.assert_close(together.tokens[1], sum(heard.tokens[1] for heard in apart) / 2)
    torch.testing.assert_close(together.embeddings(), sum(heard.embeddings() for heard in apart) / 2)


def test_some_tokens_are_kept_if_there_are_many(monkeypatch):
    source = open_source(dense_model("llama"), 0)
    batches = make_batches(source, groups(), batch_size=4)
    every = listen([source], batches, [0], 3)
    total = sum(int(batch.attention_mask.sum()) for batch in batches)
    assert every.tokens[0].shape == (total, 32)
    monkeypatch.setattr("hf_moe.conversion.hearing.MOST_KEPT", 32)
    monkeypatch.setattr("hf_moe.conversion.hearing.TOKENS_PER_ROW", 10)
    some = listen([source], batches, [0], 3)
    assert some.tokens[0].shape == (30, 32)
    torch.testing.assert_close(some.tokens[0], every.tokens[0][some.chosen])


def test_domain_embeddings_are_means_of_documents():
    model = dense_model("qwen2")
    heard = listen([open_source(model, 0)], make_batches(open_source(model, 0), groups()), [0], 3)
    for group, texts in enumerate(groups()):
        with torch.no_grad():
            means = [model.model(torch.tensor([ids])).last_hidden_state[0].double().mean(0) for ids in texts]
        torch.testing.assert_close(heard.embeddings()[group], torch.stack(means).mean(0), atol=1e-5, rtol=1e-5)


def test_contrast_leaves_the_choice_and_drops_what_all_share():
    generator = torch.Generator().manual_seed(0)
    vectors = 5 + torch.randn(4, 16, generator=generator, dtype=torch.float64)
    rows = contrast(vectors)
    mean = vectors.mean(0)
    torch.testing.assert_close(rows.sum(0), torch.zeros(16).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(rows @ mean, torch.zeros(4).double(), atol=1e-12, rtol=0)
    token = torch.randn(16, generator=generator, dtype=torch.float64)
    token -= (token @ mean) / (mean @ mean) * mean  # beside the mean, probabilities are those of the plain vectors
    torch.testing.assert_close((rows @ token).softmax(0), (vectors @ token).softmax(0))


def test_rows_begin_as_decided_as_random_ones():
    generator = torch.Generator().manual_seed(0)
    tokens = 3 * torch.randn(500, 64, generator=generator)

    def spread(rows):
        return (tokens.double() @ rows.double().T).std(-1).square().mean().sqrt().item()

    random = torch.stack([0.02 * torch.randn(8, 64, generator=generator) for _ in range(50)])
    typical = sum(map(spread, random)) / 50
    assert spread(scaled_to(0.02, torch.randn(8, 64, generator=generator), tokens)) == pytest.approx(typical, rel=0.05)
    free = scaled_to(0.02, 7 * torch.randn(8, 64, generator=generator), None)
    assert free.norm(dim=-1).square().mean().sqrt().item() == pytest.approx(0.02 * 64**0.5)


def test_k_means_finds_a_local_optimum():
    generator = torch.Generator().manual_seed(0)
    middles = 100 + 3 * torch.randn(5, 4, generator=generator)
    points = torch.cat([middle + 0.1 * torch.randn(20, 4, generator=generator) for middle in middles])
    centres = k_means(points, 5, torch.Generator().manual_seed(0)).double()
    labels = torch.tensor([int((centres - point).square().sum(-1).argmin()) for point in points.double()])
    for number, centre in enumerate(centres):  # every centre is the mean of the points nearest to it
        torch.testing.assert_close(centre, points[labels == number].double().mean(0), atol=1e-4, rtol=1e-6)
    assert sorted(labels.bincount().tolist()) == [20] * 5
    again = k_means(points, 5, torch.Generator().manual_seed(0))
    assert torch.equal(again.double(), centres)
    each = k_means(points[:7], 7, generator)
    assert torch.equal(each.sort(0).values, points[:7].sort(0).values) or torch.allclose(
        each.sort(0).values, points[:7].sort(0).values, atol=1e-4
    )
    equal = k_means(torch.ones(6, 2), 3, generator)
    assert torch.equal(equal, torch.ones(3, 2))


@pytest.mark.parametrize("init", ["hidden", "kmeans", "domain"])
def test_separable_texts_go_to_different_experts(init):
    """More often than chance and random rows, on texts that calibration has not seen; words of a group are alike."""
    model = dense_model("llama")
    for group, (low, high) in enumerate([(3, 22), (22, 42), (42, 61)]):
        model.model.embed_tokens.weight.data[low:high, 8 * group : 8 * group + 8] += 1.5

    def purity(router_init):
        """How far the best assignment of experts to groups explains the first choices; 1/3 is chance."""
        mixture = upcycle(model, "mixtral", num_experts=3, router_init=router_init, data=groups(count=20), seed=1)
        table = torch.zeros(2, 3, 3)
        for group, texts in enumerate(groups(seed=5, count=20)):
            for ids in texts:
                for layer, read in gate_inputs(mixture, ids).items():
                    weight = mixture.model.layers[layer].mlp.gate.weight.double()
                    table[layer, group] += torch.bincount((read @ weight.T).argmax(-1), minlength=3)
        table /= table.sum(-1, keepdim=True)
        orders = torch.tensor([[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]])
        orders = orders[:1] if router_init in ("hidden", "domain") else orders  # expert e for group e
        return torch.stack([table[:, torch.arange(3), order].mean(-1) for order in orders]).max(0).values.mean().item()

    assert purity(init) > max(0.8, purity("random") + 0.1)


@pytest.mark.parametrize("init", ["hidden", "kmeans", "domain"])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_copies_stay_exact(init, dtype):
    model = dense_model("llama")
    mixture = upcycle(model, "mixtral", num_experts=3, router_init=init, data=groups(), dtype=dtype)
    gate = mixture.model.layers[0].mlp.gate.weight
    assert gate.dtype == (torch.bfloat16 if dtype else torch.float32) and gate.abs().sum() > 0
    if dtype is None:
        torch.testing.assert_close(logits(mixture), logits(model), atol=1e-5, rtol=0)


def test_findings_are_deterministic_and_only_made_on_demand():
    model = dense_model("llama")
    assert find(plan_upcycling(model, Options(target="mixtral", num_experts=3))) == {}
    plans = [plan_upcycling(model, Options(target="mixtral", router_init="kmeans", data=groups())) for _ in "ab"]
    found = [find(plan) for plan in plans]
    assert found[0].keys() == {router_finding(0), router_finding(1)}
    for key, rows in found[0].items():
        assert rows.shape == (8, 32) and torch.equal(rows, found[1][key])


def test_embeddings_may_come_from_a_file(tmp_path):
    vectors = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    save_file({"domains": vectors}, tmp_path / "domains.safetensors")
    options = {"target": "mixtral", "num_experts": 3, "router_init": "domain"}
    found = find(plan_upcycling(dense_model("llama"), Options(**options, data=tmp_path / "domains.safetensors")))
    expected = contrast(vectors)
    expected *= 0.02 / expected.square().mean().sqrt()
    torch.testing.assert_close(found[router_finding(1)], expected.float())
    save_file({"domains": vectors[:2].contiguous()}, tmp_path / "two.safetensors")
    with pytest.raises(ValueError, match=r"must hold one tensor of shape \[3, 32\], has .*\[2, 32\]"):
        plan_upcycling(dense_model("llama"), Options(**options, data=tmp_path / "two.safetensors"))


def test_tokens_come_from_the_sources_tokenizer(tmp_path):
    dense_model("llama").save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model", [f"w{number}" for number in range(60)])  # it has no pad token
    source = open_source(tmp_path / "model", 0)
    (tmp_path / "one.txt").write_text("w3 w4\nw5\n\n\nw6\n  \nw7 w8", encoding="utf-8")
    lines = [json.dumps({"text": " ".join(f"w{n}" for n in range(10, 19)), "id": 1}), "", json.dumps({"text": "w1"})]
    (tmp_path / "two.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (common,) = make_batches(source, tmp_path / "one.txt")
    assert common.group is None
    assert examples([common]) == [{"input_ids": [7]}, {"input_ids": [8, 9]}, {"input_ids": [4, 5, 6]}]
    assert common.input_ids.shape == common.attention_mask.shape == (3, 3)
    batches = make_batches(
        source, [str(tmp_path / "one.txt"), str(tmp_path / "two.jsonl")], max_length=4, batch_size=2
    )
    assert [batch.group for batch in batches] == [0, 0, 1, 1]
    pieces = [row["input_ids"] for row in examples(batches[2:])]  # cut, not dropped
    assert sorted(pieces) == [[2], [11, 12, 13, 14], [15, 16, 17, 18], [19]]
    assert examples(make_batches(source, {"a": ["w1"], "b": [{"text": "w2"}]})) == [
        {"input_ids": [2]},
        {"input_ids": [3]},
    ]
    rows = find(
        plan_upcycling(
            tmp_path / "model",
            Options(target="mixtral", router_init="kmeans", data=tmp_path / "one.txt", num_experts=4),
        )
    )
    assert rows[router_finding(0)].shape == (4, 32)


def test_ids_may_be_tensors():
    ids = torch.arange(3, 15).view(2, 6)
    assert read_data(ids).common and read_data(ids).groups == (tuple(ids.tolist()),)
    assert not read_data(ids[None]).common and read_data([ids, ids]).groups[1] == tuple(ids.tolist())
    (batch,) = make_batches(open_source(dense_model("llama"), 0), ids)
    assert isinstance(batch, Batch) and torch.equal(batch.input_ids, ids)


BAD_DATA = {
    "empty": ([], "data is empty"),
    "empty group": ([["w1"], []], "group 1 is empty"),
    "mixture": (["w1", ["w2"]], "data mixes documents with groups"),
    "number": (3, "data=3 cannot be read"),
    "missing": ("no/where.txt", "there is no file no/where.txt"),
    "kind": ("texts.csv", r"texts.csv must be one of \['.txt', '.jsonl'\]"),
    "numbers": ([[[1, 2]], [[1.5]]], "group 1 cannot be read"),
}
BAD_FILES = {
    "empty.txt": (" \n\n", "holds no text"),
    "broken.jsonl": ('{"text": "a"}\n{"text": ', "line 2: no JSON"),
    "key.jsonl": ('{"content": "a"}', r"""line 1: needs a string "text", has the keys \['content'\]"""),
    "list.jsonl": ("[1]", "line 1: needs a string .text., has a list"),
}


@pytest.mark.parametrize("case", [*BAD_DATA, *BAD_FILES])
def test_bad_data_is_refused(case, tmp_path):
    if case in BAD_DATA:
        data, message = BAD_DATA[case]
    else:
        data, (content, message) = tmp_path / case, BAD_FILES[case]
        data.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_data(data)


def test_tokens_that_do_not_fit_are_refused():
    source = open_source(dense_model("llama"), 0)
    with pytest.raises(ValueError, match="has no tokenizer: give data as lists of token ids"):
        make_batches(source, ["some text"])
    with pytest.raises(ValueError, match=rf"token {SIZES['vocab_size']}, the model's vocabulary has"):
        make_batches(source, [[3, SIZES["vocab_size"]]])


MIXTRAL = {"target": "mixtral", "num_experts": 3}
BAD_OPTIONS = {
    "no data": ({**MIXTRAL, "router_init": "hidden"}, "router_init='hidden' is found from texts: pass data"),
    "common": (
        {**MIXTRAL, "router_init": "hidden", "data": [[3, 4]]},
        "needs 3 groups of texts, one per expert; data holds common texts",
    ),
    "too few groups": (
        {**MIXTRAL, "router_init": "domain", "data": groups()[:2]},
        "needs 3 groups of texts, one per expert; data holds 2 groups",
    ),
    "rmoe": (
        {"target": "rmoe", "router_init": "kmeans", "data": groups()},
        "the routers of 'rmoe' read a state of their own",
    ),
    "one row": ({"target": "mixtral", "num_experts": 1, "router_init": "kmeans", "data": groups()}, "at least 2"),
    "embeddings": ({**MIXTRAL, "router_init": "kmeans", "data": "a.safetensors"}, "embeddings in a file are for"),
    "no embeddings": ({**MIXTRAL, "router_init": "domain", "data": "a.safetensors"}, "cannot read embeddings"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_options_that_contradict_the_data_are_refused(case, monkeypatch):
    """Before any weight is read."""
    model = dense_model("llama")
    options, message = BAD_OPTIONS[case]
    monkeypatch.setattr(type(model), "forward", lambda *args, **kwargs: pytest.fail("work was done"))
    with pytest.raises(ValueError, match=message):
        plan_upcycling(model, Options(**options))


def test_texts_that_tell_nothing_are_refused():
    same = [documents(3, 22)] * 3
    with pytest.raises(ValueError, match=r"layer 0: all router rows would be equal; the texts in data must differ"):
        upcycle(dense_model("llama"), **MIXTRAL, router_init="hidden", data=same)
    with pytest.raises(ValueError, match="needs 3 tokens, one per cluster; data has 2"):
        upcycle(dense_model("llama"), **MIXTRAL, router_init="kmeans", data=[[3, 4]])


def test_from_texts_to_warmed_up_routers_on_disk(tmp_path):
    """The whole way: calibrated rows in the files, then trained in place before the folder gets its name."""
    dense_model("llama").save_pretrained(tmp_path / "model")
    options = Options(target="mixtral", num_experts=3, router_init="hidden", data=groups())
    plan = plan_upcycling(tmp_path / "model", options)
    findings = find(plan)
    written = upcycle(tmp_path / "model", **MIXTRAL, router_init="hidden", data=groups(), output=tmp_path / "plain")
    name = "model.layers.1.block_sparse_moe.gate.weight"
    torch.testing.assert_close(load_file(written.folder / "model.safetensors")[name], findings[router_finding(1)])
    rows, results = examples(make_batches(plan.sources[0], options.data)), []

    def finish(partial, written):
        results.append(warm_up_folder(partial, rows, steps=2, learning_rate=1e-2))

    warm = convert(plan, tmp_path / "warm", findings=findings, finish=finish)
    old, new = (load_file(tmp_path / folder / "model.safetensors") for folder in ("plain", "warm"))
    assert {key for key in old if not torch.equal(old[key], new[key])} == {key for key in old if ".gate." in key}
    assert warm.shards == results[0]["shards"] != written.shards
    mixture = AutoModelForCausalLM.from_pretrained(warm.folder)
    torch.testing.assert_close(logits(mixture), logits(dense_model("llama")), atol=1e-5, rtol=0)
