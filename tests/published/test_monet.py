"""Monet against a float64 loop over tokens, heads and all n^2 experts; the public checkpoints' names and configs."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from hf_moe import FEED_FORWARDS, HfMoeConfig, HfMoeForCausalLM, MonetConfig, MonetForCausalLM
from hf_moe.modeling.context import ForwardContext
from hf_moe.modeling.feed_forwards.monet import Monet
from hf_moe.modeling.ops.head_batch_norm import HeadBatchNorm
from hf_moe.modeling.routers.monet_router import MonetRouter, ambiguity_loss, uniformity_loss
from hf_moe.testing import tiny_config

sys.path.insert(0, str(Path(__file__).parent))
import naive

WIDTH, HEADS, KEYS, SIZE, TOP_K, TIME = 8, 2, 5, 4, 2, 6
IDS = torch.randint(3, 97, (TIME,), generator=torch.Generator().manual_seed(3))
# what `config.json` of a public checkpoint holds, at a tiny size (fields: the public code's MonetConfig, on Llama's)
PUBLIC = {
    "architectures": ["MonetForCausalLM"],
    "auto_map": {name: f"modeling_monet.{name.replace('Auto', 'Monet')}" for name in ("AutoConfig", "AutoModel")},
    "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "relu2",
    "hidden_size": WIDTH, "initializer_range": 0.02, "intermediate_size": None, "max_position_embeddings": 2048,
    "mlp_bias": None, "model_type": "monet", "moe_decompose": "vertical", "moe_dim": SIZE, "moe_experts": KEYS,
    "moe_groups": 2, "moe_heads": HEADS, "moe_topk": TOP_K, "num_attention_heads": 2, "num_hidden_layers": 3,
    "num_key_value_heads": 2, "output_router_probs": False, "pretraining_tp": 1, "rms_norm_eps": 1e-6,
    "rope_scaling": None, "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "float32",
    "transformers_version": "4.45.0", "use_cache": True, "vocab_size": 97,
}  # fmt: skip


def public_state(decompose: str, layers: int = 3, groups: int = 2) -> dict[str, Tensor]:
    """Random weights under the names and in the shapes of the public code, norms' statistics away from their start."""
    inner, half = KEYS * SIZE, WIDTH // 2
    if decompose == "vertical":
        moe = {f"u{i}.weight": (inner // 2, WIDTH) for i in (1, 2)} | {f"u{i}.bias": (inner // 2,) for i in (1, 2)}
        moe |= {f"v{i}{j}.weight": (half, inner // 2) for i in (1, 2) for j in (1, 2)}
        moe |= {f"b{i}": (KEYS, half) for i in (1, 2)}
    else:
        moe = {"u.weight": (inner, WIDTH), "u.bias": (inner,), "v.weight": (WIDTH, inner), "b": (KEYS, WIDTH)}
    router = {f"w{i}.weight": (HEADS * KEYS, WIDTH) for i in (1, 2)}
    router |= {f"norm{i}.{name}": (HEADS,) for i in (1, 2) for name in ("running_mean", "running_var")}
    router |= {f"norm{i}.num_batches_tracked": () for i in (1, 2)}
    shapes: dict[str, tuple] = {"model.embed_tokens.weight": (97, WIDTH), "lm_head.weight": (97, WIDTH)}
    shapes |= {"model.norm.weight": (WIDTH,)}
    for layer in range(layers):
        path = f"model.layers.{layer}"
        shapes |= {f"{path}.{norm}_layernorm.weight": (WIDTH,) for norm in ("input", "post_attention")}
        shapes |= {f"{path}.self_attn.{name}_proj.weight": (WIDTH, WIDTH) for name in "qkvo"}
        shapes |= {f"{path}.moe.{name}": shape for name, shape in moe.items()}
        shapes |= {f"{path}.router.{name}": shape for name, shape in router.items() if layer % groups == 0}
    generator = torch.Generator().manual_seed(5)
    state = {name: 0.6 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for name, tensor in state.items():
        if name.endswith("running_var"):
            state[name] = 0.5 + tensor.abs()
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(7)
    return state


def public_folder(folder: Path, decompose: str) -> Path:
    """A repository as the authors publish it, without their code."""
    folder.mkdir(exist_ok=True)
    save_file(public_state(decompose), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**PUBLIC, "moe_decompose": decompose}))
    return folder


def quantile(share: float) -> float:
    """Phi^-1 by bisection."""
    low, high = -10.0, 10.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if 0.5 * (1 + math.erf(middle / math.sqrt(2))) < share else (low, middle)
    return low


def route(xs: list[Tensor], w: naive.Weights, path: str, training: bool) -> list[list[list[Tensor]]]:
    """g[side][token][head] (n,): softmax over the keys whose normalised logit reaches min(own maximum, threshold)."""
    threshold, sides = quantile(1 - TOP_K / KEYS), []
    for side in ("1", "2"):
        matrix = w[f"{path}w{side}.weight"]
        z = [[matrix[h * KEYS : (h + 1) * KEYS] @ x for h in range(HEADS)] for x in xs]
        probabilities = [[torch.zeros(KEYS)] * HEADS for _ in xs]
        for h in range(HEADS):
            values = [z[t][h][i].item() for t in range(len(xs)) for i in range(KEYS)]
            mean, variance = w[f"{path}norm{side}.running_mean"][h], w[f"{path}norm{side}.running_var"][h]
            if training:
                mean = torch.tensor(sum(values) / len(values), dtype=torch.float64)
                variance = sum((value - mean) ** 2 for value in values) / len(values)
            for t in range(len(xs)):
                normed = [((z[t][h][i] - mean) / (variance + 1e-5) ** 0.5).item() for i in range(KEYS)]
                kept = [i for i in range(KEYS) if normed[i] >= min(max(normed), threshold)]
                share = naive.softmax(torch.stack([z[t][h][i] for i in kept]))
                none = share.new_zeros(())
                probabilities[t][h] = torch.stack([share[kept.index(i)] if i in kept else none for i in range(KEYS)])
        sides.append(probabilities)
    return sides


def squared_relu(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0 * x) ** 2


def expert(x: Tensor, w: naive.Weights, path: str, i: int, j: int) -> Tensor:
    """E_ij(x), composed from its halves."""
    if f"{path}u.weight" in w:
        mine, other = slice(i * SIZE, (i + 1) * SIZE), slice(j * SIZE, (j + 1) * SIZE)
        hidden = squared_relu(w[f"{path}u.weight"][mine] @ x + w[f"{path}u.bias"][mine])
        return w[f"{path}v.weight"][:, other] @ hidden + w[f"{path}b"][j]
    half = SIZE // 2
    mine, other = slice(i * half, (i + 1) * half), slice(j * half, (j + 1) * half)
    first = torch.cat([w[f"{path}u1.weight"][mine], w[f"{path}u2.weight"][other]])
    first_bias = torch.cat([w[f"{path}u1.bias"][mine], w[f"{path}u2.bias"][other]])
    top = torch.cat([w[f"{path}v11.weight"][:, mine], w[f"{path}v12.weight"][:, mine]], 1)
    bottom = torch.cat([w[f"{path}v21.weight"][:, other], w[f"{path}v22.weight"][:, other]], 1)
    last_bias = torch.cat([w[f"{path}b1"][i], w[f"{path}b2"][j]])
    return torch.cat([top, bottom]) @ squared_relu(first @ x + first_bias) + last_bias


def mixture(xs: list[Tensor], w: naive.Weights, path: str, sides: list) -> list[Tensor]:
    """y_t = sum_h sum_i sum_j g1_hi g2_hj E_ij(x_t) over every one of the n^2 experts."""
    outputs = []
    for t, x in enumerate(xs):
        y = torch.zeros_like(x)
        for i in range(KEYS):
            for j in range(KEYS):
                weight = sum(sides[0][t][h][i] * sides[1][t][h][j] for h in range(HEADS))
                y = y + weight * expert(x, w, path, i, j)
        outputs.append(y)
    return outputs


def paper_losses(sides: list) -> tuple[Tensor, Tensor]:
    """Uniformity (eq. 16, over means) and ambiguity (eq. 17)."""
    uniformity, ambiguity = torch.zeros(()).double(), torch.zeros(()).double()
    for side in sides:
        for h in range(HEADS):
            for i in range(KEYS):
                mean = sum(token[h][i] for token in side) / len(side)
                uniformity = uniformity - torch.log(mean) / (2 * HEADS * KEYS)
            ambiguity = ambiguity + sum(1 - token[h].max() for token in side) / len(side) / (2 * HEADS)
    return uniformity, ambiguity


def spec(decomposition: str = "vertical", **options) -> dict:
    sizes = {"num_keys": KEYS, "num_heads": HEADS, "expert_size": SIZE, "top_k": TOP_K}
    return {"type": "monet", **sizes, "decomposition": decomposition, **options}


def free(*feed_forwards: dict, **sizes) -> HfMoeConfig:
    blocks = {f"{i}": {"mixer": {"type": "attention"}, "feed_forward": f} for i, f in enumerate(feed_forwards)}
    return tiny_config("hf_moe", **{"hidden_size": WIDTH, "blocks": blocks, **sizes})


def build(decomposition: str, **options) -> Monet:
    """The feed-forward alone, in float64."""
    config = free(spec(decomposition, **options))
    torch.manual_seed(0)
    parts = dict(config.block(0)["feed_forward"])
    layer = FEED_FORWARDS[parts.pop("type")](config, 0, **parts)
    assert isinstance(layer, Monet)
    for name, tensor in layer.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and "running" not in name:
            torch.nn.init.normal_(tensor, std=0.5)
    return layer.double()


def inputs(tokens: int = 12) -> Tensor:
    return torch.randn(1, tokens, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def published(weights: naive.Weights) -> naive.Weights:
    """Our names of a feed-forward's weights -> the reference's."""
    return {name.replace("expert_grid.", "moe.").replace("gate.", "router."): w for name, w in weights.items()}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("decomposition", ["horizontal", "vertical"])
def test_equals_the_loop_over_all_experts(decomposition, training):
    """Output, losses and all gradients, with the statistics of the batch and with running ones."""
    layer, x = build(decomposition, uniformity_loss_coef=0.3, ambiguity_loss_coef=0.7), inputs().requires_grad_()
    if not training:
        layer(inputs(40) + 0.3)  # moves the running statistics
        layer.eval()
    w, ours = naive.double(layer), x.detach().clone().requires_grad_()
    reference = published(w)
    output, state, losses = layer(ours, None, ForwardContext(losses=True))
    sides = route(list(x[0]), reference, "router.", training)
    expected = torch.stack(mixture(list(x[0]), reference, "moe.", sides))
    uniformity, ambiguity = paper_losses(sides)
    torch.testing.assert_close(output[0], expected, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(state.view(12, 2, HEADS, KEYS)[3, 1], torch.stack(sides[1][3]))
    torch.testing.assert_close(
        losses, torch.stack([0 * uniformity, 0 * uniformity, 0.3 * uniformity + 0.7 * ambiguity])
    )
    direction = inputs().roll(3, 1)
    ((output * direction).sum() + losses[2]).backward()
    ((expected * direction[0]).sum() + 0.3 * uniformity + 0.7 * ambiguity).backward()
    torch.testing.assert_close(ours.grad, x.grad, atol=1e-9, rtol=1e-9)
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(
            parameter.grad, w[name].grad, atol=1e-9, rtol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )
        assert parameter.grad.abs().max() > 1e-4, name


@pytest.mark.parametrize("decompose", ["horizontal", "vertical"])
def test_public_checkpoints_load_and_are_saved_as_such(decompose, tmp_path):
    """No code of theirs, no missing or unexpected name, their logits, and the same file again."""
    model, info = AutoModelForCausalLM.from_pretrained(
        public_folder(tmp_path / "theirs", decompose), output_loading_info=True
    )
    assert type(model) is MonetForCausalLM and not any(info.values()), info
    assert [hasattr(layer.mlp, "gate") for layer in model.model.layers] == [True, False, True]
    theirs = public_state(decompose)
    w = {name: tensor.double() for name, tensor in theirs.items()}
    xs, sides = [w["model.embed_tokens.weight"][i] for i in IDS], []
    for layer in range(3):
        path = f"model.layers.{layer}."
        normed = [naive.rms_norm(x, w[f"{path}input_layernorm.weight"]) for x in xs]
        q, k, v, o = (w[f"{path}self_attn.{name}_proj.weight"] for name in "qkvo")
        xs = [x + o @ a for x, a in zip(xs, naive.attention(normed, q, k, v, 2, 2))]
        normed = [naive.rms_norm(x, w[f"{path}post_attention_layernorm.weight"]) for x in xs]
        if f"{path}router.w1.weight" in w:
            sides = route(normed, w, f"{path}router.", training=False)
        xs = [x + y for x, y in zip(xs, mixture(normed, w, f"{path}moe.", sides))]
    expected = torch.stack([w["lm_head.weight"] @ naive.rms_norm(x, w["model.norm.weight"]) for x in xs])
    with torch.no_grad():
        outputs = model.double()(IDS[None], output_router_logits=True)
    torch.testing.assert_close(outputs.logits[0], expected, atol=1e-5, rtol=1e-5)
    assert len(outputs.router_logits) == 2  # as the docstring says, `router_probs` of the public code
    probabilities = outputs.router_logits[1].unflatten(-1, (2, HEADS, KEYS)).softmax(-1)
    torch.testing.assert_close(probabilities[4, 0], torch.stack(sides[0][4]), atol=1e-5, rtol=1e-5)

    model.float().save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == theirs.keys()
    assert all(torch.equal(again[name], theirs[name]) and again[name].dtype == theirs[name].dtype for name in theirs)
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    same = PUBLIC.keys() - {"transformers_version", "torch_dtype", "rope_scaling", "rope_theta", "moe_decompose"}
    for name in same - {"auto_map", "initializer_range"}:  # their code is not in our folder
        assert written.get(name) == PUBLIC[name], name
    assert written["rope_parameters"] == {"rope_theta": 10000.0, "rope_type": "default"}
    assert written["dtype"] == "float32"


@torch.no_grad()
def test_public_checkpoints_load_in_bf16_and_by_plain_state_dict(tmp_path):
    """The running statistics stay in fp32; and Trainer resumes with `load_state_dict`, under either names."""
    folder = public_folder(tmp_path / "theirs", "vertical")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    router = model.model.layers[2].mlp.gate
    assert router.w1.weight.dtype == torch.bfloat16 and router.norm1.running_mean.dtype == torch.float32
    theirs = public_state("vertical")
    assert torch.equal(router.norm1.running_var, theirs["model.layers.2.router.norm1.running_var"])
    whole = AutoModelForCausalLM.from_pretrained(folder)
    for state in (theirs, whole.state_dict()):
        empty = AutoModelForCausalLM.from_config(whole.config)
        empty.load_state_dict(dict(state))
        assert all(torch.equal(a, b) for a, b in zip(empty.state_dict().values(), whole.state_dict().values()))
    whole.save_pretrained(tmp_path / "ours", save_original_format=False)
    names = load_file(tmp_path / "ours" / "model.safetensors").keys()
    assert "model.layers.0.mlp.gate.w1.weight" in names and "model.layers.0.mlp.expert_grid.b1" in names
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert torch.equal(ours(IDS[None]).logits, whole(IDS[None]).logits)


def test_published_config_fields():
    """`output_router_probs` is the public code's name for our `output_router_logits`; other fields survive."""
    config = MonetConfig.from_dict({**PUBLIC, "output_router_probs": True})
    assert config.output_router_logits and config.to_dict()["pretraining_tp"] == 1
    assert config.block_pattern == ["routes", "reuses"]
    assert type(AutoConfig.for_model("monet")) is MonetConfig


@pytest.mark.parametrize("decompose", ["horizontal", "vertical"])
@pytest.mark.parametrize(
    "build_config,total",
    [
        (MonetConfig.monet_850m, 853_501_440),
        (MonetConfig.monet_1b4, 1_465_157_632),
        (MonetConfig.monet_4b1, 4_173_401_088),
    ],
    ids=["850M", "1.4B", "4.1B"],
)
def test_parameter_counts(build_config, total, decompose):
    """Table 6 rounds down (850M, 1.4B, 4.1B); Table 8 has 1.465B for 1.4B, and 1.767B with a router in every layer."""
    with torch.device("meta"):
        model = MonetForCausalLM(build_config(moe_decompose=decompose))
    config = model.config
    width, layers, inner = config.hidden_size, config.num_hidden_layers, config.moe_experts * config.moe_dim
    experts = 2 * inner * width + inner + config.moe_experts * width
    attention, norms = 4 * width * width, 2 * width
    routers = layers // 4 * 2 * width * config.moe_heads * config.moe_experts
    by_hand = layers * (experts + attention + norms) + routers + 2 * config.vocab_size * width + width
    assert sum(p.numel() for p in model.parameters()) == by_hand == total
    if total == 1_465_157_632:
        assert total == pytest.approx(1.465e9, rel=1e-3)
        each = total + 3 * routers  # "group size 1"
        assert each == pytest.approx(1.767e9, rel=1e-3)


@pytest.mark.parametrize("padded", [False, True])
def test_running_statistics_are_torchs(padded):
    """Two training steps of `BatchNorm1d(H, affine=False)` over (token, key) pairs, padding left out."""
    ours, theirs = HeadBatchNorm(HEADS, 0.1), torch.nn.BatchNorm1d(HEADS, affine=False)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        logits = 2 * torch.randn(7, HEADS, KEYS, generator=generator) + 1
        mask = torch.tensor([False, False, True, True, True, True, True]) if padded else None
        real = logits if mask is None else logits[mask]
        normed = ours(logits, mask)
        expected = theirs(real.transpose(1, 2).reshape(-1, HEADS)).view(-1, KEYS, HEADS).transpose(1, 2)
        torch.testing.assert_close(normed if mask is None else normed[mask], expected)
    for name, buffer in theirs.named_buffers():
        torch.testing.assert_close(dict(ours.named_buffers())[name], buffer)
    torch.testing.assert_close(ours.eval()(logits, mask), logits.sub(ours.running_mean[:, None]).div(
        (ours.running_var[:, None] + 1e-5).sqrt()
    ))  # fmt: skip


def test_statistics_are_those_of_all_processes(monkeypatch):
    """Two processes, the other one with twice our logits: the sums that it would add are added by hand."""
    mine = torch.randn(6, HEADS, KEYS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    alone, together, other = HeadBatchNorm(HEADS, 0.1).double(), HeadBatchNorm(HEADS, 0.1).double(), 2 * mine
    both = torch.cat([mine, other])
    expected = alone(both)
    mean = both.mean((0, 2))
    adds = iter([other[:, 0].numel(), other.sum((0, 2)), (other - mean[:, None]).square().sum((0, 2))])
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: tensor.add_(next(adds)))
    torch.testing.assert_close(together(mine), expected[:6])
    torch.testing.assert_close(together.running_mean, alone.running_mean)
    torch.testing.assert_close(together.running_var, alone.running_var)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_counts_a_batch_once(use_reentrant):
    """The forward pass that backward repeats decides as the first did, and moves no running statistic."""
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = MonetForCausalLM(tiny_config("monet", initializer_range=0.3)).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        model(IDS[None], labels=IDS[None], use_cache=False).loss.backward()
        buffers = {name: b for name, b in model.named_buffers() if "norm" in name}
        results.append(buffers | {name: p.grad for name, p in model.named_parameters()})
    assert results[0]["model.layers.0.mlp.gate.norm1.num_batches_tracked"] == 1
    assert not torch.equal(results[0]["model.layers.0.mlp.gate.norm1.running_mean"], torch.zeros(2))
    for name, expected in results[0].items():
        torch.testing.assert_close(results[1][name], expected, msg=lambda m, n=name: f"{n}: {m}")


def test_losses_of_balance_and_collapse():
    """Both at their extremes, and without padding."""
    n, one_hot = 512, torch.eye(512)
    balanced = torch.stack([one_hot, one_hot.roll(1, 0)], 1)[:, :, None]  # (512 tokens, 2, 1, 512), one key each
    collapsed = one_hot[:1].expand(512, 2, 1, 512)
    spread = torch.full((3, 2, 1, n), 1 / n)
    assert uniformity_loss(balanced) == pytest.approx(math.log(n)) == pytest.approx(6.238, abs=1e-3)
    assert uniformity_loss(spread) == pytest.approx(math.log(n))
    assert uniformity_loss(collapsed) == pytest.approx(-(n - 1) / n * math.log(torch.finfo(torch.float32).eps))
    assert ambiguity_loss(balanced) == ambiguity_loss(collapsed) == pytest.approx(0, abs=1e-6)
    assert ambiguity_loss(spread) == pytest.approx(1 - 1 / n)
    padded, mask = torch.cat([balanced, collapsed]), torch.arange(1024) < 512
    assert uniformity_loss(padded, mask) == pytest.approx(uniformity_loss(balanced).item())
    half_spread = torch.cat([balanced[:3], spread])
    assert ambiguity_loss(half_spread, torch.arange(6) < 3) == pytest.approx(0, abs=1e-6)


def test_losses_enter_the_training_loss():
    """Each router's once, by its own coefficients, where asked for; balance and z-loss have nothing to weigh."""
    torch.manual_seed(0)
    options = {
        "num_hidden_layers": 4,
        "initializer_range": 0.3,
        "router_aux_loss_coef": 5.0,
        "router_z_loss_coef": 5.0,
    }
    config = tiny_config("monet", uniformity_loss_coef=0.2, ambiguity_loss_coef=0.4, **options)
    model = MonetForCausalLM(config).train()
    seen = []
    for module in model.modules():
        if isinstance(module, MonetRouter):
            module.register_forward_hook(lambda m, i, o: seen.append(m.scores(o.logits).view(-1, 2, 2, 5)))
    outputs = model(IDS[None], labels=IDS[None], use_cache=False)
    assert len(seen) == 2
    expected = sum(0.2 * uniformity_loss(g) + 0.4 * ambiguity_loss(g) for g in seen)
    plain = torch.nn.functional.cross_entropy(outputs.logits[0, :-1], IDS[1:])
    torch.testing.assert_close(outputs.loss, plain + expected)
    torch.testing.assert_close(5.0 * outputs.aux_loss, expected)
    assert model.eval()(IDS[None]).aux_loss is None


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("decomposition", ["horizontal", "vertical"])
def test_never_makes_anything_of_the_number_of_experts(decomposition):
    """262,144 experts: in forward and backward nothing is larger than what the 2 n halves and the tokens need."""
    config = free(spec(decomposition, num_keys=512, top_k=32, expert_size=2))
    layer = Monet(config, 0, num_keys=512, num_heads=HEADS, expert_size=2, top_k=32, decomposition=decomposition)
    layer.train().apply(lambda module: module.init_weights(0.1) if hasattr(module, "init_weights") else None)
    x = torch.randn(1, 4, WIDTH, requires_grad=True)
    with Largest() as largest:
        output, _, losses = layer(x, None, ForwardContext(losses=True))
        (output.sum() + losses.sum()).backward()
    weights, routing = max(p.numel() for p in layer.parameters()), 4 * 2 * HEADS * 512
    assert largest.elements <= max(weights, routing) == 8192 < 512**2 // 30


def test_keeps_about_top_k_keys():
    """On normal logits in eval mode, and one key where none reaches the threshold."""
    config = free(spec(num_keys=512, top_k=32))
    router = MonetRouter(config, 0, 512, HEADS, 32, 0.1, 0.0, 0.0).eval()
    torch.nn.init.normal_(router.w1.weight, std=WIDTH**-0.5)
    torch.nn.init.constant_(router.w2.weight, 0.001)
    x = torch.nn.functional.normalize(torch.randn(200, WIDTH, generator=torch.Generator().manual_seed(0)), dim=-1)
    router.w2.weight.data[3] = 0.002
    kept = (router(x * WIDTH**0.5).weights != 0).view(200, 2, HEADS, 512).sum(-1).float()
    assert 26 < kept[:, 0].mean() < 38
    assert kept[:, 1, 0].unique().tolist() == [1, 511] and router.varies  # the largest, or all others where they tie
    dense = MonetRouter(config, 0, 512, HEADS, 512, 0.1, 0.0, 0.0).eval()
    torch.nn.init.normal_(dense.w1.weight), torch.nn.init.normal_(dense.w2.weight)
    assert (dense(0.1 * x).weights != 0).all()  # top_k = n keeps everything


@pytest.mark.parametrize(
    "feed_forwards,message",
    [
        ([spec(top_k=6)], "top_k=6; with num_keys=5 it must be 1 to 5"),
        ([spec(top_k=0)], "top_k=0; with num_keys=5 it must be 1 to 5"),
        ([spec("diagonal")], r"decomposition='diagonal' is unknown; choose from \['horizontal', 'vertical'\]"),
        ([spec(activation="relu3")], r"Unknown activation 'relu3'; choose from \['gelu'"),
        ([spec(expert_size=3)], "expert_size=3 and hidden_size=8 must be even"),
        ([spec(num_heads=0)], "num_heads and expert_size must be at least 1"),
        ([spec(own_router=False)], "no routing to reuse: set its own_router=True"),
        ([spec(own_router=False), spec()], "no routing to reuse: set its own_router=True"),
        ([spec(), spec(num_heads=3, own_router=False)], r"their \(num_keys, num_heads\) are \[\(5, 2\), \(5, 3\)\]"),
    ],
)
def test_bad_input(feed_forwards, message):
    with pytest.raises(ValueError, match=message):
        free(*feed_forwards)


def test_bad_named_input():
    with pytest.raises(ValueError, match="moe_groups=0; it must be at least 1"):
        MonetConfig(moe_groups=0)
    with pytest.raises(ValueError, match=r"choose from \['horizontal', 'vertical'\]"):
        MonetConfig(moe_decompose="HD")
    recurrent = {"type": "recurrent", "top_k": 2, "state_size": 8}
    experts = {"type": "swiglu", "intermediate_size": 8}
    moe = {"type": "moe", "num_experts": 4, "router": recurrent, "experts": experts}
    with pytest.raises(ValueError, match=r"\['Monet', 'Recurrent'\] each send a state of their own"):
        free(spec(), moe)


def test_routing_passes_through_what_lies_between():
    """A layer reuses the routing of the last one that routed, whatever stands between them."""
    dense = {"type": "mlp", "intermediate_size": 8}
    config = free(spec(), dense, spec(own_router=False), num_hidden_layers=3, initializer_range=0.3)
    torch.manual_seed(0)
    model, states = HfMoeForCausalLM(config).eval(), []
    for layer in (model.model.layers[0].mlp, model.model.layers[2].mlp):
        layer.expert_grid.register_forward_pre_hook(lambda module, args: states.append(torch.stack(args[1:])))
    model(IDS[None])
    assert torch.equal(*states)
