"""Every mixer on a GPU: the logits of the CPU, cached and not, and the cache that lives on the CPU in between."""

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

sys.path.insert(0, str(Path(__file__).parent.parent / "contract"))
import specs

X = specs.tokens()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.fixture(params=specs.MIXER_ROWS)
def models(request):
    return specs.build(request.param), specs.build(request.param).cuda()


@torch.no_grad()
def test_equals_the_cpu(models):
    here, there = models
    expected, cache = here(X).logits, DynamicCache(config=here.config)
    specs.close(there(X.cuda(), use_cache=False).logits.cpu(), expected, 2e-3)
    stepped = [there(piece.cuda(), past_key_values=cache).logits for piece in X.split([4, 3, 1, 1, 1], 1)]
    specs.close(torch.cat(stepped, 1).cpu(), expected, 2e-3)


@torch.no_grad()
def test_offloaded_cache(models):
    """Transformers keeps keys and values on the CPU between layers; recurrent states stay where they are."""
    _, there = models
    kwargs = {"max_new_tokens": 6, "do_sample": False}
    offloaded = there.generate(X.cuda(), cache_implementation="offloaded", **kwargs)
    assert torch.equal(offloaded, there.generate(X.cuda(), **kwargs))


def test_gradients_equal_the_cpu(models):
    here, there = models
    here.train()(X, labels=X, use_cache=False).loss.backward()
    there.train()(X.cuda(), labels=X.cuda(), use_cache=False).loss.backward()
    for (name, expected), actual in zip(here.named_parameters(), there.parameters()):
        scale = expected.grad.abs().max().clamp(min=1e-3)
        error = (actual.grad.cpu() - expected.grad).abs().max() / scale
        assert error < 5e-3, f"{name}: {error}"


@torch.no_grad()
@pytest.mark.skipif(find_spec("flash_attn") is None, reason="needs flash-attn")
@pytest.mark.parametrize("packed", [False, True])
def test_flash_attention(models, packed):
    """Against SDPA in the same precision; packed rows are told apart by `position_ids`, as TRL sends them."""
    _, there = models
    there, row = there.bfloat16(), X[:1].cuda()
    inputs = {"position_ids": torch.tensor([[*range(3), *range(7)]]).cuda()} if packed else {}
    expected = there(row, use_cache=False, **inputs).logits.float()
    there.set_attn_implementation("flash_attention_2")
    error = (there(row, use_cache=False, **inputs).logits.float() - expected).norm() / expected.norm()
    assert error < 0.05
