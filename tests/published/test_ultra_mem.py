"""UltraMem, versions 1 and 2, against a float64 loop over tokens, heads and all pairs of keys."""

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hf_moe import FEED_FORWARDS, HfMoeConfig, HfMoeForCausalLM, UltraMemConfig
from hf_moe.modeling.context import ForwardContext
from hf_moe.modeling.ops.tucker_retrieval import leading_directions
from hf_moe.testing import tiny_config

sys.path.insert(0, str(Path(__file__).parent))
import naive

WIDTH, TOKENS, LAYERS, KEYS, VALUE = 10, 6, 3, 4, 6
TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}  # norms compute in fp32
PLAIN = {"num_keys": KEYS, "value_size": VALUE, "intermediate_size": 8, "key_size": 5, "top_k": 3}
VERSION_1 = {**PLAIN, "num_heads": 2, "key_expansion": 2, "separate_projections": True, "norm_power": 0.33}
VERSION_2 = {**PLAIN, "pre_value_size": 4, "share_ratio": 0.5}
CASES = {
    "version 1": VERSION_1,
    "version 1, one core, rank 3": {**VERSION_1, "num_cores": 1, "tucker_rank": 3},
    "version 2": VERSION_2,
    "version 2, all rows, all keys": {**VERSION_2, "share_ratio": 1.0, "top_k": 6},
    "expanded, one projection": {**VERSION_2, "key_expansion": 2, "query_per_rank": True, "pre_activation": "gelu"},
    "three heads": {**PLAIN, "num_heads": 3},
}


def tiny(**options) -> HfMoeConfig:
    block = {"mixer": {"type": "attention"}, "feed_forward": {"type": "ultra_mem", **options}}
    sizes = {"hidden_size": WIDTH, "head_dim": 4, "num_hidden_layers": LAYERS, "initializer_range": 0.5}
    return tiny_config("hf_moe", **sizes, blocks={"b": block})


def build(**options) -> tuple[nn.Module, nn.ModuleDict]:
    """The feed-forward of the last layer and what it shares with the others, in float64."""
    torch.manual_seed(0)
    config = tiny(**options)
    parts = dict(config.block(0)["feed_forward"])
    layer = FEED_FORWARDS[parts.pop("type")](config, LAYERS - 1, **parts)
    whole = nn.ModuleDict({"mlp": layer, "shared": nn.ModuleDict(config.shared_modules())}).double()
    for module in whole.modules():
        if hasattr(module, "init_weights"):
            module.init_weights(0.5)
    for name, parameter in whole.named_parameters():
        if "core" not in name:
            nn.init.normal_(parameter, std=0.7)
    cores, directions = layer.retrieval.tucker_core, layer.retrieval.tucker_directions
    directions.copy_(leading_directions(cores, directions))
    return layer, whole["shared"]


def power_iteration(core: Tensor) -> tuple[Tensor, Tensor]:
    """u and v of the leading singular value, with entries whose sum is positive."""
    v = torch.ones(len(core), dtype=torch.float64)
    for _ in range(2000):
        v = core.T @ (core @ v)
        v = v / v.norm()
    u = core @ v / (core @ v).norm()
    return (u, v) if u.sum() + v.sum() > 0 else (-u, -v)


def retrieve(x: Tensor, w: naive.Weights, options: dict) -> list[tuple[int, Tensor]]:
    """(pair i n + j, score under each core) of what every head chooses."""
    size, top_k, heads = options["key_size"], options["top_k"], options.get("num_heads", 1)
    keys, cores = w["retrieval.keys"], w["retrieval.tucker_core"]
    n, rank = keys.shape[2], keys.shape[3]
    ranks = rank if options.get("query_per_rank") else 1
    query = (w["retrieval.query_proj.weight"] @ x).view(-1, 2, ranks, size)
    found = []
    for h in range(heads):
        half = []  # n x r scores of either half
        for side in range(2):
            rows = []
            for i in range(n):
                entries = []
                for r in range(rank):
                    q = naive.rms_norm(query[h // 2, side, r % ranks], w["retrieval.query_norm.weight"])
                    key = naive.rms_norm(keys[h, side, i, r], w["retrieval.keys_norm.weight"])
                    entries.append(q @ key)
                rows.append(torch.stack(entries))
            half.append(rows)
        total = sum(cores[c, h] for c in range(len(cores)))
        u, v = power_iteration(total.detach())
        first = naive.best(torch.stack([row @ u for row in half[0]]), top_k)
        second = naive.best(torch.stack([row @ v for row in half[1]]), top_k)
        pairs = [(i, j) for i in range(n) for j in range(n) if i in first and j in second]  # of all n^2
        for best in naive.best(torch.stack([half[0][i] @ total @ half[1][j] for i, j in pairs]), top_k):
            i, j = pairs[best]
            found.append((i * n + j, torch.stack([half[0][i] @ core[h] @ half[1][j] for core in cores])))
    return found


def reference(x: Tensor, w: naive.Weights, table: naive.Weights, options: dict) -> Tensor:
    """y = FFN(x) + W_o sum_k s_k (act(W_p x . P[i_k])) V[i_k], the sums of every virtual table by themselves."""
    all_rows, offset, read = KEYS**2, 0, KEYS**2
    if options.get("share_ratio"):
        all_rows, offset = LAYERS * KEYS**2, (LAYERS - 1) * KEYS**2
        read = math.floor(math.sqrt(all_rows * options["share_ratio"])) ** 2
    groups = options.get("key_expansion", 1) ** 2
    sums = [torch.zeros(VALUE, dtype=torch.float64) for _ in range(groups)]
    for pair, scores in retrieve(x, w, options):
        virtual = int(w["shuffle"][pair])
        row = (virtual % read + offset) % all_rows
        value = table["values"][row]
        if "pre_values" in table:
            factor = (w["pre_values_proj.weight"] @ x) @ table["pre_values"][row]
            if options.get("pre_activation") == "gelu":
                factor = factor * (1 + torch.erf(factor / 2**0.5)) / 2
            value = value * factor
        pieces = value.chunk(len(scores))
        sums[virtual // read] = sums[virtual // read] + torch.cat([s * p for s, p in zip(scores, pieces)])
    read_out = torch.cat(sums) if options.get("separate_projections") else sum(sums)
    dense = naive.swiglu(x, *(w[f"dense.{name}_proj.weight"] for name in ("gate", "up", "down")))
    return dense + w["values_proj.weight"] @ read_out


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_ultra_mem_searches_all_pairs(case, training):
    options = CASES[case]
    layer, shared = build(**options)
    layer.train(training)
    if training:  # which takes the directions from the cores as they are
        with torch.no_grad():
            layer.retrieval.tucker_core.add_(torch.rand_like(layer.retrieval.tucker_core))
    weights = naive.double(layer)
    shared_weights = naive.double(shared["memory"]) if options.get("share_ratio") else None
    table = shared_weights or {n.removeprefix("memory."): t for n, t in weights.items() if n.startswith("memory.")}
    x = torch.randn(1, TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    output, state, losses = layer(x, torch.ones(1), ForwardContext(shared=shared))
    expected = torch.stack([reference(row, weights, table, options) for row in y[0]])[None]
    assert torch.equal(state, torch.ones(1)) and losses is None
    direction = torch.randn_like(output)
    (output * direction).sum().backward()
    (expected * direction).sum().backward()
    torch.testing.assert_close(output, expected, **TOLERANCE)
    torch.testing.assert_close(x.grad, y.grad, **TOLERANCE)
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad, weights[name].grad, **TOLERANCE, msg=name)
    for name, parameter in shared.named_parameters():
        reached = shared_weights[name.removeprefix("memory.")].grad
        torch.testing.assert_close(parameter.grad, reached, **TOLERANCE, msg=name)


def test_the_share_of_a_layer_wraps_around():
    layer, _ = build(**VERSION_2)
    side = math.floor(math.sqrt(LAYERS * KEYS**2 * 0.5))
    assert layer.retrieval.num_keys == side and layer.num_rows == side**2 == 16
    assert layer.first_row == (LAYERS - 1) * KEYS**2 and layer.total_rows == LAYERS * KEYS**2
    assert sorted(layer.shuffle.tolist()) == list(range(side**2))  # a permutation


def test_delayed_memory_is_added_by_the_receiver():
    """A sender, a layer between and a receiver give what the sums by hand give."""
    torch.manual_seed(0)
    blocks = {
        "send": {"type": "ultra_mem", **VERSION_1, "delayed": True},
        "between": {"type": "mlp", "intermediate_size": 8},
        "receive": {"type": "memory_receiver", "intermediate_size": 8},
    }
    blocks = {name: {"mixer": {"type": "attention"}, "feed_forward": spec} for name, spec in blocks.items()}
    sizes = {"hidden_size": WIDTH, "head_dim": 4, "num_hidden_layers": 3, "initializer_range": 0.3}
    model = HfMoeForCausalLM(tiny_config("hf_moe", **sizes, blocks=blocks)).eval()
    read = {}
    sender, receiver = model.model.layers[0].mlp, model.model.layers[2].mlp
    receiver.register_forward_hook(lambda module, args, output: read.update(input=args[0], output=output))
    sender.register_forward_hook(lambda module, args, output: read.update(sent=args[0], state=output[1]))
    model(torch.arange(1, 9)[None])
    remembered, _ = sender.remember(read["sent"].flatten(0, 1), ForwardContext())
    assert remembered.abs().mean() > 1e-3
    torch.testing.assert_close(read["output"][0], receiver.dense(read["input"])[0] + remembered[None])
    assert read["output"][1] is None  # it is used up


def test_directions_keep_their_sign():
    cores = torch.rand(2, 3, 4, 4)
    ones = torch.ones(2, 3, 4)
    start = leading_directions(cores, ones)
    assert (start.sum((0, 2)) > 0).all()
    torch.testing.assert_close(leading_directions(cores, -ones), -start)
    torch.testing.assert_close(leading_directions(cores + 1e-3, -start), -start, atol=1e-2, rtol=0)
    u, v = start
    largest = torch.linalg.svdvals(cores.sum(0))[:, 0]
    torch.testing.assert_close(torch.einsum("hr,hrs,hs->h", u, cores.sum(0), v), largest)


def test_losses_under_checkpointing():
    """Both losses reach the total, weighted, and checkpointing repeats neither them nor the step of the directions."""
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = HfMoeForCausalLM(tiny(**VERSION_2, tucker_loss_coef=0.5, key_balance_loss_coef=0.25)).train()
        for layer in model.model.layers:
            nn.init.normal_(layer.mlp.retrieval.tucker_core)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        ids = torch.arange(1, 9)[None]
        plain = model.eval()(ids, labels=ids).loss
        outputs = model.train()(ids, labels=ids, use_cache=False)
        outputs.loss.backward()
        own = outputs.aux_loss * model.config.router_aux_loss_coef
        tucker = 0
        for layer in model.model.layers:
            excess = (torch.linalg.svdvals(layer.mlp.retrieval.tucker_core.sum(0))[:, 1:] - 0.15).clamp(min=0)
            tucker = tucker + 0.5 * excess.square().mean()
        balance = (own - tucker).item() / LAYERS / 0.25
        assert 1 < balance < 4 and plain.isfinite()
        results.append([outputs.loss.detach(), *(p.grad for p in model.parameters())])
    for plain, checkpointed in zip(*results):
        torch.testing.assert_close(checkpointed, plain)


def test_key_balance_loss_at_perfect_balance_and_collapse():
    layer, _ = build(**{**PLAIN, "top_k": 2, "key_balance_loss_coef": 1.0})
    n = layer.retrieval.num_keys
    even = torch.zeros(2, 6, 1, n, dtype=torch.float64)
    kept = torch.arange(2 * 6 * 2).remainder(n).view(2, 6, 1, 2)
    assert layer.retrieval.losses(even, kept, ForwardContext(losses=True)).item() == pytest.approx(2)
    collapsed = torch.where(torch.arange(n) < 2, 50.0, -50.0).double().expand(2, 6, 1, n)
    context = ForwardContext(losses=True, token_mask=torch.tensor([True, True, True, True, True, False]))
    kept = torch.tensor([0, 1]).expand(2, 6, 1, 2)
    assert layer.retrieval.losses(collapsed, kept, context).item() == pytest.approx(2 * n / 2)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"top_k": 5}, "top_k=5 must be 1 to 4, the keys of one half"),
        ({"num_cores": 4}, r"num_cores=4 must divide value_size=6: use one of \[1, 2, 3, 6\]"),
        ({"share_ratio": 0.0}, "share_ratio=0.0 must leave 1 to 48 rows"),
        ({"share_ratio": 1.5}, "share_ratio=1.5 must leave 1 to 48 rows"),
        ({"key_size": 0}, r"\['key_size'\] must be at least 1"),
        ({"pre_activation": "gelu"}, "pre_activation has no effect without pre-values"),
        ({"pre_value_size": 3, "pre_activation": "gelo"}, "Unknown pre_activation 'gelo'; choose from"),
        ({"delayed": True}, "Layer 0 is an ultra_mem with delayed=True, but no memory_receiver follows it"),
        ({"tucker_rank": 1, "tucker_loss_coef": 0.1}, "tucker_loss_coef has no effect with tucker_rank=1"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tiny(**{**PLAIN, **options})


def test_a_receiver_needs_a_sender():
    block = {"mixer": {"type": "attention"}, "feed_forward": {"type": "memory_receiver", "intermediate_size": 8}}
    with pytest.raises(ValueError, match="Layer 0 is a memory_receiver, but no ultra_mem with delayed=True"):
        tiny_config("hf_moe", blocks={"b": block})


def test_where_the_memories_of_version_1_stand():
    config = UltraMemConfig.version_1_227m()
    assert [i for i, name in enumerate(config.block_pattern) if name == "delayed_memory"] == [2, 6, 10, 14]
    assert [i for i, name in enumerate(config.block_pattern) if name == "receiver"] == [5, 9, 13, 17]
    assert set(UltraMemConfig.paper_227m().block_pattern) == {"memory"}


@pytest.mark.parametrize(
    "fields,message",
    [
        (
            {"memory_layers": [2, 1]},
            r"Memories that read and add at \[\(2, 2\)\]: memory_layers must ascend from 0 to 19",
        ),
        ({"memory_layers": [25]}, r"Memories that read and add at \[\(25, 25\)\]"),
        ({"memory_layers": [2, 6], "memory_output_layers": [7, 9]}, r"add at \[\(2, 7\)\].* below the next"),
        ({"memory_layers": [2], "memory_output_layers": [2, 3]}, r"must have one layer for each of \[2\]"),
    ],
)
def test_layers_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        UltraMemConfig(**fields)
