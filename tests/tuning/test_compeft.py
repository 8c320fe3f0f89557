"""ComPEFT's files: exact decoding of anything, near the entropy; the function is the formula's."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file

from hf_moe.tuning import compress_adapter, decompress_adapter
from hf_moe.tuning.compeft import FILE, largest, read, ternary
from hf_moe.tuning.golomb import decode, encode

sys.path.insert(0, str(Path(__file__).parent))
import adapters


@settings(max_examples=100, deadline=None)
@given(st.sets(st.integers(0, 5000), max_size=60) | st.sets(st.integers(0, 2**40), max_size=5))
def test_golomb_is_exact(positions):
    wanted = np.array(sorted(positions), dtype=np.int64)
    unary, low, shift = encode(wanted)
    assert (decode(unary, low, shift, len(wanted)) == wanted).all()
    by_hand = sum((gap >> shift) + 1 + shift for gap in np.diff(wanted, prepend=-1) - 1)
    assert 8 * (len(unary) + len(low)) < by_hand + 16


@pytest.mark.parametrize("density", [0.01, 0.05, 0.2, 0.5])
def test_near_the_entropy(density):
    chosen = np.flatnonzero(np.random.default_rng(0).random(400_000) < density)
    unary, low, _ = encode(chosen)
    k = len(chosen) / 400_000
    entropy = -(k * np.log2(k) + (1 - k) * np.log2(1 - k)) * 400_000
    assert entropy < 8 * (len(unary) + len(low)) < 1.05 * entropy + 16


def folder(path: Path, seed: int = 1, kind: str = "lora_subset") -> Path:
    model = adapters.adapted(kind, adapters.base(), seed=None)
    if seed:
        adapters.disturb(model, seed)
    model.save_pretrained(path)
    return path


@pytest.mark.parametrize("with_initial", [False, True])
def test_formula(with_initial, tmp_path):
    """Against a naive computation in float64, tensor by tensor; exactly int(k d) numbers are kept."""
    trained, initial = folder(tmp_path / "a"), folder(tmp_path / "b", seed=0) if with_initial else None
    report = compress_adapter(trained, tmp_path / "c", 0.1, 2.0, initial)
    out = decompress_adapter(tmp_path / "c", tmp_path / "d", initial)
    tensors, start = (load_file(f / "adapter_model.safetensors") if f else None for f in (trained, initial))
    names = sorted(tensors)
    zero = {n: torch.zeros_like(t) for n, t in tensors.items()}
    change = torch.cat([(tensors[n] - (start or zero)[n]).flatten() for n in names]).double()
    kept = int(0.1 * len(change))
    order = torch.sort(change.abs(), descending=True, stable=True).indices[:kept]
    expected = torch.zeros_like(change)
    expected[order] = 2.0 * change.std() * change[order].sign()
    decoded = load_file(out / "adapter_model.safetensors")
    actual = torch.cat([(decoded[n] - (start or zero)[n]).flatten() for n in names]).double()
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-5)
    assert report.kept == kept == int((expected != 0).sum()) and report.numbers == len(change)
    model = PeftModel.from_pretrained(adapters.base(), out)
    assert adapters.logits(model).isfinite().all()


def test_size(tmp_path):
    initial = folder(tmp_path / "i", seed=0, kind="esft")
    report = compress_adapter(folder(tmp_path / "a", kind="esft"), tmp_path / "b", 0.05, initial=initial)
    sizes = {f.name: f.stat().st_size for f in (tmp_path / "b").iterdir()}
    assert report.compressed_bytes == sizes[FILE] and report.ratio > 15
    header = sizes[FILE] - sum(part.nbytes for part in read(tmp_path / "b" / FILE)[1].values())
    assert report.entropy_bytes < report.compressed_bytes - header + 16 < 1.06 * report.entropy_bytes + 48


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=40), st.data())
def test_ties_go_to_the_first(values, data):
    sizes = np.abs(np.array(values, dtype=np.float32))
    number = data.draw(st.integers(1, len(values)))
    assert (largest(sizes, number) == np.sort(np.argsort(-sizes, kind="stable")[:number])).all()


def test_errors(tmp_path):
    trained, other = folder(tmp_path / "a"), folder(tmp_path / "b", seed=2)
    compress_adapter(trained, tmp_path / "c", initial=other)
    with pytest.raises(ValueError, match="wants the initial adapter it was compressed with"):
        decompress_adapter(tmp_path / "c", tmp_path / "d")
    with pytest.raises(ValueError, match=r"density=0.0 must be above 0"):
        compress_adapter(trained, tmp_path / "d", density=0.0)
    with pytest.raises(ValueError, match="exists already"):
        compress_adapter(trained, tmp_path / "c")
    with pytest.raises(ValueError, match="there is no compressed adapter here"):
        decompress_adapter(trained, tmp_path / "d")
    facts, parts = read(tmp_path / "c" / FILE)
    with pytest.raises(ValueError, match="the file is damaged"):
        ternary(facts, parts | {"unary": parts["unary"][: len(parts["unary"]) // 2]})
    save_file({"x": torch.ones(2)}, tmp_path / "b" / FILE)
    with pytest.raises(ValueError, match="is None, not 'hf_moe compeft 1'"):
        decompress_adapter(tmp_path / "b", tmp_path / "d")
    with pytest.raises(ValueError, match="ESFT with modules_to_save=None is no change from zero"):
        compress_adapter(folder(tmp_path / "esft", kind="esft"), tmp_path / "d")
    with pytest.raises(ValueError, match="PST with modules_to_save=None is no change from zero"):
        compress_adapter(folder(tmp_path / "pst", kind="pst"), tmp_path / "d")
    tensors = load_file(trained / "adapter_model.safetensors")
    next(iter(tensors.values()))[0] = float("nan")
    save_file(tensors, trained / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="holds NaN or infinite values"):
        compress_adapter(trained, tmp_path / "d")
    assert not (tmp_path / "d").exists()
