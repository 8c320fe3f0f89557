"""The norm with an output gate: its hand-written gradients against autograd's, and what it keeps."""

import pytest
import torch
import torch.nn.functional as F

from hf_moe.modeling.ops.gated_norm import ROWS_AT_ONCE, GatedRMSNorm


def make(swish, dtype=torch.float64):
    """A norm, values and gate; more rows than are computed at once, and not a multiple of them."""
    torch.manual_seed(0)
    norm = GatedRMSNorm(3, 1e-6, swish)
    norm.weight.data.normal_()
    values, gate = (torch.randn(2, ROWS_AT_ONCE - 5, 3, dtype=dtype, requires_grad=True) for _ in range(2))
    return norm.to(dtype), values, gate


def formula(norm, values, gate):
    active = F.silu(gate) if norm.swish else gate.sigmoid()
    return values / (values.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight * active


def train(work, norm, values, gate):
    output = work(norm, values, gate)
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    return output.detach(), *torch.autograd.grad((output * weights).sum(), [values, gate, norm.weight])


@pytest.mark.parametrize("swish", [True, False])
def test_equals_the_formula(swish):
    inputs = make(swish)
    torch.testing.assert_close(train(lambda norm, *x: norm(*x), *inputs), train(formula, *inputs))


def test_half_precision():
    norm, *inputs = make(True, torch.bfloat16)
    actual = train(lambda norm, *x: norm(*x), norm, *inputs)
    assert all(x.dtype == torch.bfloat16 for x in actual)
    torch.testing.assert_close(actual[0], formula(norm.float(), *(x.float() for x in inputs)).bfloat16())


def test_compiles_and_keeps_only_its_inputs():
    norm, *inputs = make(True)
    compiled = torch.compile(norm, fullgraph=True, backend="eager")
    expected = train(lambda norm, *x: norm(*x), norm, *inputs)
    torch.testing.assert_close(train(lambda _, *x: compiled(*x), norm, *inputs), expected)
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.setdefault(x.data_ptr(), x), lambda x: x):
        norm(*inputs)
    assert saved.keys() == {x.data_ptr() for x in (*inputs, norm.weight)}
