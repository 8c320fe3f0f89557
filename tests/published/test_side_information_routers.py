"""Routers that do not read the token alone: its type, a condition, or the layer before."""

import sys
from pathlib import Path

import pytest
import torch

from hf_moe import HfMoeConfig, HfMoeForCausalLM
from hf_moe.modeling.context import ForwardContext
from hf_moe.modeling.losses import switch_loss

sys.path.insert(0, str(Path(__file__).parent))
import naive
from routed_layers import EXPERTS, compare, layers, relu_expert, tokens

IDS = torch.randint(1, 97, (2, 10), generator=torch.Generator().manual_seed(1))
TYPES = torch.tensor([[0, 0, 1, 1, 1, 0, 0, 1, 1, 0], [1, 1, 1, 0, 0, 0, 0, 0, 1, 1]])
MLP = {"type": "mlp", "intermediate_size": 24}


def sparse(router, **options):
    experts = {"type": "swiglu", "intermediate_size": 16}
    return {"type": "moe", "num_experts": 4, "router": router, "experts": experts, **options}


def config(*feed_forwards, depth=None):
    blocks = {name: {"mixer": {"type": "attention"}, "feed_forward": f} for name, f in zip("abcdef", feed_forwards)}
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    depth = depth or len(feed_forwards)
    return HfMoeConfig(**sizes, num_hidden_layers=depth, blocks=blocks, initializer_range=0.2, pad_token_id=0)


def model(*feed_forwards, depth=None):
    torch.manual_seed(0)
    return HfMoeForCausalLM(config(*feed_forwards, depth=depth)).eval()


# ------------------------------------------------------------------------------------------------------- modality


@pytest.mark.parametrize(("types", "private"), [(2, 1), (2, None), (2, 2), (2, 0), (3, 1)])
def test_modality_pools(types, private):
    """arXiv 2508.09779: a gate per type over its own and the shared experts; balance within each type."""
    modules = layers({"type": "modality", "num_types": types, "num_private_experts": private, "top_k": 2})
    p = EXPERTS // (2 * types) if private is None else private
    ids = torch.tensor([[0, 1, 1, 0, types - 1, 0, 1, 1, 0, 0]])
    real = torch.ones(10, dtype=torch.bool)
    real[3] = False
    context = ForwardContext(losses=True, token_mask=real, inputs={"token_type_ids": ids})

    def reference(w, x):
        rows, all_logits, per_type = [], [], {}
        for t, m, r in zip(x, ids[0].tolist(), real):
            pool = [*range(m * p, (m + 1) * p), *range(types * p, EXPERTS)]
            logits = w["0.gate.weight"][m] @ t
            scores = naive.softmax(logits)
            chosen = naive.best(scores, 2)
            total = sum(scores[i] for i in chosen)
            rows.append(t + sum(scores[i] / total * relu_expert(w, "0", pool[i], t) for i in chosen))
            if r:
                all_logits.append(logits)
                per_type.setdefault(m, []).append((scores, chosen))
        balance = sum(naive.switch(*zip(*routed)) for routed in per_type.values()) / len(per_type)
        return torch.stack(rows), torch.stack([balance, naive.z_loss(all_logits), torch.zeros_like(balance)])

    compare(modules, tokens(10), context, reference)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_modality_family(training, normalize):
    """arXiv 2410.10626: top-k over all; in training the last slot is the family's expert unless it is there."""
    spec = {"type": "modality", "num_types": 3, "candidates": "family", "normalize": normalize}
    modules = layers(spec).train(training)
    ids = torch.tensor([[0, 1, 1, 2, 2, 0, 1, 1, 0, 2]])
    context, replaced = ForwardContext(losses=True, inputs={"token_type_ids": ids}), []

    def reference(w, x):
        rows, all_logits, all_scores, all_chosen = [], [], [], []
        for t, m in zip(x, ids[0].tolist()):
            logits = w["0.gate.weight"] @ t
            scores = naive.softmax(logits)
            chosen = naive.best(scores, 2)
            if training and m not in chosen:
                chosen[-1] = m
                replaced.append(m)
            total = sum(scores[i] for i in chosen) if normalize else 1
            rows.append(t + sum(scores[i] / total * relu_expert(w, "0", i, t) for i in chosen))
            all_logits.append(logits)
            all_scores.append(scores)
            all_chosen.append(chosen)
        balance = naive.switch(all_scores, all_chosen)
        return torch.stack(rows), torch.stack([balance, naive.z_loss(all_logits), torch.zeros_like(balance)])

    compare(modules, tokens(10), context, reference)
    assert (0 < len(replaced) < 10) == training


def test_modality_balance_at_perfect_balance_and_at_collapse():
    (layer,) = layers({"type": "modality", "top_k": 1})
    gate, ids = layer.gate, torch.tensor([[0, 1] * 6])
    context = ForwardContext(losses=True, inputs={"token_type_ids": ids})
    with torch.no_grad():
        gate.weight.zero_()
    x = tokens(12)
    routing = gate(x, None, context)
    cycle = torch.tensor([[0, 2, 3], [1, 2, 3]])  # each type over its three candidates
    balanced = routing._replace(indices=torch.stack([cycle[n % 2][n // 2 % 3] for n in range(12)])[:, None])
    assert gate.losses(balanced, context)[0].item() == pytest.approx(1)
    logits = torch.full((12, 4), -100.0)
    logits[:, 2] = 100
    collapsed = routing._replace(logits=logits, indices=torch.full((12, 1), 2))
    assert gate.losses(collapsed, context)[0].item() == pytest.approx(3)  # of C = 3 candidates
    assert switch_loss(logits.softmax(-1), collapsed.indices, collapsed.weights).item() == pytest.approx(4)


def test_modality_types_matter_and_stay_in_their_pools():
    lm = model(sparse({"type": "modality"}), depth=2)
    outputs = lm(IDS, token_type_ids=TYPES, output_router_logits=True)
    for logits in outputs.router_logits:
        chosen = logits.softmax(-1) > 0
        assert (chosen[TYPES.flatten() == 0] == torch.tensor([True, False, True, True])).all()
        assert (chosen[TYPES.flatten() == 1] == torch.tensor([False, True, True, True])).all()
    assert not torch.allclose(outputs.logits, lm(IDS).logits, atol=1e-3)
    assert torch.equal(lm(IDS).logits, lm(IDS, token_type_ids=torch.zeros_like(TYPES)).logits)
    changed = TYPES.clone()
    changed[:, 6:] = 1 - changed[:, 6:]
    after = lm(IDS, token_type_ids=changed).logits
    torch.testing.assert_close(after[:, :6], outputs.logits[:, :6])  # causal in the types too
    assert not torch.allclose(after[:, 6:], outputs.logits[:, 6:], atol=1e-3)


GENERATE = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}


@torch.no_grad()
@pytest.mark.parametrize("how", [{}, {"num_beams": 2}, {"cache_implementation": "static"}], ids=str)
def test_modality_generates(how):
    """Transformers gives new tokens the type of the last one, and hands over the new ones only beside a cache."""
    lm = model(sparse({"type": "modality"}), depth=2)
    mask = torch.ones_like(IDS)
    mask[1, :3] = 0
    inputs = {"attention_mask": mask, "token_type_ids": TYPES, **GENERATE, **how}
    cached = lm.generate(IDS, **inputs)
    if how:
        uncached = lm.generate(IDS, **{**inputs, **how, "cache_implementation": None}, use_cache=False)
        assert torch.equal(cached.sequences, uncached.sequences)
        return
    ids, types = cached.sequences, torch.cat([TYPES, TYPES[:, -1:].expand(-1, 5)], 1)
    full_mask = torch.cat([mask, torch.ones(2, 5, dtype=torch.long)], 1)
    logits = lm(ids, attention_mask=full_mask, token_type_ids=types).logits[:, 9:-1]
    torch.testing.assert_close(torch.stack(cached.logits, 1), logits, atol=1e-4, rtol=1e-4)


def test_modality_refuses_what_it_does_not_know():
    lm = model(MLP, sparse({"type": "modality"}), sparse({"type": "modality"}))
    for bad in (TYPES + 1, TYPES - 1):
        with pytest.raises(ValueError, match=r"values from -?\d to \d; this router knows 0 to 1 \(num_types=2\)"):
            lm(IDS, token_type_ids=bad)
    with pytest.raises(ValueError, match=r"shape \(2, 9\); it needs one id for each token"):
        lm(IDS, token_type_ids=TYPES[:, :9])
    with pytest.raises(ValueError, match="not used by the model"):
        model(MLP).generate(IDS, token_type_ids=TYPES, max_new_tokens=1)  # nobody there reads them


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"num_private_experts": 3},
            r"num_private_experts=3 for each of 2 types; with num_experts=4 it must be 0 to 2",
        ),
        ({"num_types": 5, "num_private_experts": 1}, "it must be 0 to 0"),
        ({"top_k": 4}, r"a token has 3 candidates \(1 of its type, 2 shared\): use 1 to 3"),
        ({"top_k": 3, "num_private_experts": 2}, "use 1 to 2"),
        ({"top_k": 5}, "it must be 1 to 4"),
        ({"candidates": "experts"}, r"choose from \['pools', 'family'\]"),
        ({"num_types": 0}, "num_types=0 must be at least 1"),
        ({"candidates": "family", "num_types": 5}, "num_types=5 families need an expert each; there are 4"),
    ],
)
def test_modality_options(options, message):
    with pytest.raises(ValueError, match=message):
        config(sparse({"type": "modality", **options}))


# ------------------------------------------------------------------------------------------------------ condition


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("given", ["sequence", "token", "nothing"])
def test_condition(gated, given):
    """arXiv 2412.12953: two linear maps on the condition choose; the token has no say."""
    activation = {"activation": "silu" if gated else "relu", "gated": gated}
    modules = layers({"type": "condition", "condition_size": 3, "sample": False, "expansion": 4, **activation})
    for name, parameter in modules.named_parameters():
        if ".gate." in name:
            torch.nn.init.normal_(parameter)
    conditions = torch.randn(2, 1, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if given == "token":
        conditions = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    handed = {"sequence": conditions[:, 0], "token": conditions, "nothing": None}[given]
    context = ForwardContext(losses=True, shape=(2, 5), inputs={"router_condition": handed})

    def reference(w, x):
        rows, all_logits, all_scores, all_chosen = [], [], [], []
        for number, t in enumerate(x):
            c = conditions[number // 5, number % 5 if given == "token" else 0]
            c = w["0.gate.null_condition"] if given == "nothing" else c
            hidden = w["0.gate.in_proj.weight"] @ c + w["0.gate.in_proj.bias"]
            hidden = naive.silu(hidden[:12]) * hidden[12:] if gated else hidden * (hidden > 0)
            logits = w["0.gate.out_proj.weight"] @ hidden + w["0.gate.out_proj.bias"]
            scores = naive.softmax(logits)
            chosen = naive.best(scores, 2)
            total = sum(scores[i] for i in chosen)
            rows.append(t + sum(scores[i] / total * relu_expert(w, "0", i, t) for i in chosen))
            all_logits.append(logits)
            all_scores.append(scores)
            all_chosen.append(chosen)
        balance = naive.switch(all_scores, all_chosen)
        return torch.stack(rows), torch.stack([balance, naive.z_loss(all_logits), torch.zeros_like(balance)])

    compare(modules, tokens(10), context, reference)


def test_condition_samples_without_replacement_in_training():
    """By the probabilities: the first of two draws has them as its frequencies, and no expert comes twice."""
    (layer,) = layers({"type": "condition", "condition_size": 3, "top_k": 2})
    torch.nn.init.normal_(layer.gate.out_proj.bias)
    x = tokens(20000)
    torch.manual_seed(0)
    routing = layer.gate(x)
    probabilities = routing.logits[0].softmax(-1)
    first = routing.indices[:, 0].bincount(minlength=4) / len(x)
    torch.testing.assert_close(first, probabilities.float(), atol=0.015, rtol=0)
    assert (routing.indices[:, 0] != routing.indices[:, 1]).all()
    pairs = probabilities[0] * probabilities[1] * (1 / (1 - probabilities[0]) + 1 / (1 - probabilities[1]))
    both = ((routing.indices < 2).sum(-1) == 2).double().mean()
    assert abs(both - pairs) < 0.015
    assert len(layer.gate.eval()(x).indices.unique(dim=0)) == 1  # the k best


@torch.no_grad()
@pytest.mark.parametrize("router", [{"type": "modality"}, {"type": "condition", "condition_size": 6}], ids=str)
def test_inputs_reach_a_compiled_graph(router):
    lm = model(sparse(router), depth=2)
    inputs = {"token_type_ids": TYPES} if router["type"] == "modality" else {"router_condition": torch.randn(2, 6)}
    torch._dynamo.reset()
    compiled = torch.compile(lm, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(IDS, **inputs).logits, lm(IDS, **inputs).logits)


@torch.no_grad()
def test_condition_in_a_model():
    lm = model(sparse({"type": "condition", "condition_size": 6}), depth=2)
    for layer in lm.model.layers:
        torch.nn.init.normal_(layer.mlp.gate.out_proj.weight)
    torch.manual_seed(0)
    condition = torch.randn(2, 6)
    outputs = lm(IDS, router_condition=condition, output_router_logits=True)
    for logits in outputs.router_logits:  # all tokens of a row alike, the rows differ
        rows = logits.view(2, 10, 4)
        assert torch.equal(rows, rows[:, :1].expand_as(rows)) and not torch.equal(rows[0], rows[1])
    assert not torch.allclose(outputs.logits, lm(IDS).logits, atol=1e-3)
    again = lm(IDS, router_condition=condition[:, None].expand(-1, 10, -1)).logits
    torch.testing.assert_close(again, outputs.logits)
    cached = lm.generate(IDS, router_condition=condition, **GENERATE)
    logits = lm(cached.sequences, router_condition=condition).logits[:, 9:-1]
    torch.testing.assert_close(torch.stack(cached.logits, 1), logits, atol=1e-4, rtol=1e-4)
    beams = {"router_condition": condition, "num_beams": 2, "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(lm.generate(IDS, **beams), lm.generate(IDS, **beams, use_cache=False))
    with pytest.raises(ValueError, match=r"shape \(2, 5\); it must be \(2, 6\), or \(2, 10, 6\)"):
        lm(IDS, router_condition=condition[:, :5])
    with pytest.raises(ValueError, match="not used by the model"):
        lm.generate(IDS, routing_condition=condition, max_new_tokens=1)  # a typing error is still found


@pytest.mark.parametrize(
    ("options", "message"),
    [({"condition_size": 0}, "must be at least 1"), ({"activation": "swoosh"}, "choose from"), ({}, "needs")],
)
def test_condition_options(options, message):
    spec = {"type": "condition", **({"condition_size": 3} if "activation" in options else {}), **options}
    with pytest.raises(ValueError, match=message):
        config(sparse(spec))


# ------------------------------------------------------------------------------------------------------ pre_gated


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_pre_gated(depth, normalize):
    """arXiv 2308.12066: W_own for the first layer, then every layer reads what the one before decided."""
    modules = layers({"type": "pre_gated", "top_k": 2, "normalize": normalize}, depth=depth)
    names = [name for name, _ in modules.named_parameters() if ".gate." in name]
    assert names == ["0.gate.weight"] + [f"{layer}.gate.next_weight" for layer in range(depth - 1)]

    def reference(w, x):
        decided, losses = [w["0.gate.weight"] @ t for t in x], []
        rows = list(x)
        for layer in range(depth):
            scores = [naive.softmax(logits) for logits in decided]
            chosen = [naive.best(s, 2) for s in scores]
            losses.append(torch.stack([naive.switch(scores, chosen), naive.z_loss(decided)]))
            if layer < depth - 1:
                decided = [w[f"{layer}.gate.next_weight"] @ t for t in rows]
            new = []
            for t, s, c in zip(rows, scores, chosen):
                total = sum(s[i] for i in c) if normalize else 1
                new.append(t + sum(s[i] / total * relu_expert(w, str(layer), i, t) for i in c))
            rows = new
        return torch.stack(rows), torch.cat([sum(losses), torch.zeros(1, dtype=torch.float64)])

    compare(modules, tokens(9), ForwardContext(losses=True), reference)


def test_pre_gated_reaches_over_layers_that_do_not_read_it():
    """Dense and otherwise routed layers in between; layers of different numbers of experts, zero experts too."""
    larger = {**sparse({"type": "pre_gated"}, num_zero_experts=1), "num_experts": 6}
    lm = model(
        MLP, sparse({"type": "pre_gated"}), MLP, sparse({"type": "top_k"}), larger, sparse({"type": "pre_gated"})
    )
    gates = [getattr(layer.mlp, "gate", None) for layer in lm.model.layers]
    shapes = [
        gate and [None if weight is None else len(weight) for weight in (gate.weight, getattr(gate, "next_weight", 0))]
        for number, gate in enumerate(gates)
        if number != 3
    ]
    assert shapes == [None, [4, 7], None, [None, 4], [None, None]]
    seen = []
    for gate in gates:
        if gate is not None:
            gate.register_forward_hook(lambda module, inputs, routing: seen.append((inputs[0], routing)))
    loss = lm.train()(IDS, labels=IDS).loss
    tokens_in, _ = seen[0]
    decided = tokens_in @ gates[1].next_weight.T
    torch.testing.assert_close(seen[2][1].logits, decided)  # seen[1] is the top-k layer
    loss.backward()
    for gate in (gates[1], gates[4]):
        assert gate.next_weight.grad.any()
    assert gates[1].weight.grad.any()


def test_pre_gated_decides_once_per_layer():
    chain = {**sparse({"type": "pre_gated"}), "type": "chain_of_experts"}
    with pytest.raises(ValueError, match="block 'a' needs the feed-forward 'moe', not 'chain_of_experts'"):
        config(chain)
    widenet = {"type": "widenet", "mixer": {"type": "attention"}, "feed_forward": sparse({"type": "pre_gated"})}
    with pytest.raises(ValueError, match="depend on the layer"):
        HfMoeConfig(blocks={"b": widenet})
    recurrent = sparse({"type": "recurrent", "state_size": 4})
    with pytest.raises(ValueError, match="a model can have one of them"):
        config(sparse({"type": "pre_gated"}), recurrent)
