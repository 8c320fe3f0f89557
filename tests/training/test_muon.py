"""Muon over stacks of experts is torch's Muon over each of their matrices."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import Trainer

from hf_moe import moe_layers
from hf_moe.training import Muon, MuonForMixtures
from hf_moe.training.muon import orthogonalized, pieces

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "conversion")]
import balance
import invariance


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(3, 8, 5), (3, 5, 8), (6, 4)])
def test_each_expert_is_a_matrix_of_torchs_muon(shape, nesterov, adjust):
    torch.manual_seed(0)
    stack = torch.nn.Parameter(torch.randn(shape))
    matrices = [torch.nn.Parameter(m.clone()) for m in (stack.data if len(shape) == 3 else stack.data[None])]
    start = stack.detach().clone()
    group = {"params": [stack], "muon": True, "nesterov": nesterov}
    ours = Muon([group], lr=0.1, weight_decay=0.2, adjust_lr_fn=adjust)
    theirs = torch.optim.Muon(matrices, lr=0.1, weight_decay=0.2, nesterov=nesterov, adjust_lr_fn=adjust)
    for _ in range(4):
        stack.grad = torch.randn(shape)
        for matrix, grad in zip(matrices, stack.grad if len(shape) == 3 else stack.grad[None]):
            matrix.grad = grad.clone()
        ours.step(), theirs.step()
    expected = torch.stack([m.data for m in matrices]).view(shape)
    torch.testing.assert_close(stack.data, expected, atol=1e-6, rtol=1e-6)
    assert (stack.data - start).abs().max() > 0.1


def test_orthogonalized():
    matrices = torch.randn(4, 6, 9, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalized(matrices).float())
    assert values.min() > 0.6 and values.max() < 1.3
    assert not orthogonalized(torch.zeros(2, 3, 3)).any()  # experts that no token chose
    for fused in (("chunk", -2), ("interleave", -1), ("chunk", -1), ("interleave", -2)):
        even = torch.arange(24.0).view(2, 4, 3)
        even = even if fused[1] == -2 else even.mT
        first, second = pieces(even, fused)
        index = [slice(None)] * 3
        index[fused[1]] = slice(0, 2) if fused[0] == "chunk" else slice(0, None, 2)
        assert torch.equal(first, even[tuple(index)]) and second.shape == first.shape


@pytest.mark.parametrize("kind", ["qwen3_moe", "hf_moe", "deepseek_v3"])
def test_in_trainer(kind, tmp_path):
    """Gate and up are orthogonalised apart; routers, embeddings and norms belong to AdamW; resuming is exact."""
    from hf_moe.training import RestoreExperts

    def trainer(folder: Path) -> Trainer:
        args = balance.arguments(1, learning_rate=1e-2)
        args.output_dir, args.max_steps, args.save_strategy, args.save_steps = str(folder), 4, "steps", 2
        factory = (MuonForMixtures, {"lr": 1e-2, "weight_decay": 0.0})
        data, collate = invariance.padded(), balance.default_data_collator
        return Trainer(
            invariance.network(kind),
            args,
            collate,
            train_dataset=data,
            optimizer_cls_and_kwargs=factory,
            callbacks=[RestoreExperts()],
        )

    whole = trainer(tmp_path)
    layer = list(moe_layers(whole.model))[-1]
    before = layer.experts.gate_up_proj.detach().clone()
    whole.train()
    names = {id(p): n for n, p in whole.model.named_parameters()}
    for group in whole.optimizer.param_groups:
        for p in group["params"]:
            named = names[id(p)]
            assert group["muon"] == (p.dim() > 1 and not any(w in named for w in ("embed", "lm_head", "gate.weight")))
    moved = layer.experts.gate_up_proj.detach() - before
    assert moved.isfinite().all() and moved.abs().amax((1, 2)).max() > 0
    resumed = trainer(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for (name, expected), actual in zip(whole.model.state_dict().items(), resumed.model.state_dict().values()):
        assert torch.equal(actual, expected), name


def test_one_step_by_hand():
    """The size of a step: 0.2 sqrt(max(A, B)) times a matrix of singular values near 1."""
    model = invariance.network("qwen3_moe")
    optimizer = MuonForMixtures()(model, lr=0.1, weight_decay=0.0)
    experts = list(moe_layers(model))[-1].experts
    before = experts.gate_up_proj.detach().clone()
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    for half in (experts.gate_up_proj.detach() - before).chunk(2, dim=1):
        values = torch.linalg.svdvals(half) / (0.1 * 0.2 * max(half.shape[1:]) ** 0.5)
        assert values.min() > 0.6 and values.max() < 1.3


class TestErrors:
    def test_arguments(self):
        matrix = torch.nn.Parameter(torch.ones(2, 2))
        with pytest.raises(ValueError, match="adjust_lr_fn='none' is unknown"):
            Muon([matrix], adjust_lr_fn="none")
        with pytest.raises(ValueError, match=r"shape \(3,\) is neither a matrix nor a stack"):
            Muon([{"params": [torch.nn.Parameter(torch.ones(3))], "muon": True}])
