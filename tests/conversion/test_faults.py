"""What goes wrong on the way: killed runs, full disks, damaged sources, two runs on one output. Nothing is lost."""

import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import time

import pytest
import torch
from dense_models import dense_model, dense_models
from filelock import FileLock
from safetensors.torch import load_file, save_file

from hf_moe.conversion import Options, convert, make_options, plan_upcycling
from hf_moe.conversion import engine as engine_module
from hf_moe.conversion.tensor_files import ShardWriter, sha256_of
from hf_moe.conversion.workplace import LOCK

INDEX = "model.safetensors.index.json"


def upcycle(sources, target, output, max_shard_size="5GB", overwrite=False, resume=False, **options):
    """The engine alone, without a receipt."""
    plan = plan_upcycling(sources, make_options(target=target, more={}, **options))
    convert(plan, output, max_shard_size=max_shard_size, overwrite=overwrite, resume=resume)


@pytest.fixture
def source(tmp_path):
    """A dense model in several files."""
    folder = tmp_path / "source"
    dense_model("llama").save_pretrained(folder, max_shard_size="20KB")
    return folder


def digests(folder):
    return {file.name: sha256_of(file) for file in sorted(folder.iterdir())}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def convert_slowly(plan, output):
    """In a forked process: every tensor takes a moment, so that a kill falls somewhere in between."""
    add = ShardWriter.add

    def slow_add(self, name, tensor):
        time.sleep(0.001)
        add(self, name, tensor)

    ShardWriter.add = slow_add
    convert(plan, output, max_shard_size="30KB")


def test_killed_at_twenty_moments(source, tmp_path):
    """Either there is no output, or a complete one; a resumed run gives the same bits as one that was never killed."""
    before, plan = digests(source), plan_upcycling(source, Options(target="mixtral"))
    convert(plan, tmp_path / "whole", max_shard_size="30KB")
    whole = digests(tmp_path / "whole")
    context, dice, kept = multiprocessing.get_context("fork"), random.Random(0), 0
    for number in range(20):
        output = tmp_path / str(number) / "out"
        child = context.Process(target=convert_slowly, args=(plan, output))
        child.start()
        time.sleep(dice.uniform(0.01, 0.2))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        assert digests(source) == before
        if output.exists():
            assert digests(output) == whole
            continue
        kept += any(output.parent.glob(".out.partial/model/*.safetensors"))
        convert(plan, output, max_shard_size="30KB", resume=True)
        assert digests(output) == whole and names(output.parent) == ["out"]
    assert kept > 5


def killed(source, output, monkeypatch, after):
    """Leave what a kill during file number `after` leaves."""
    count, enter = [0], ShardWriter.__enter__

    def killed_enter(self):
        count[0] += 1
        if count[0] > after:
            raise KeyboardInterrupt
        return enter(self)

    monkeypatch.setattr(ShardWriter, "__enter__", killed_enter)
    with pytest.raises(KeyboardInterrupt):
        upcycle(source, "mixtral", output=output, max_shard_size="30KB")
    monkeypatch.undo()


def test_finished_files_are_kept_and_not_written_again(source, tmp_path, monkeypatch):
    output = tmp_path / "out"
    killed(source, output, monkeypatch, after=3)
    partial = tmp_path / ".out.partial" / "model"
    kept = {file: file.stat().st_mtime_ns for file in partial.glob("*.safetensors")}
    assert len(kept) == 3 and not output.exists()
    with pytest.raises(ValueError, match=r"left 3 finished files.*--resume to go on, or --overwrite to start again"):
        upcycle(source, "mixtral", output=output, max_shard_size="30KB")
    for other in ({"max_shard_size": "40KB"}, {"max_shard_size": "30KB", "seed": 1}):
        with pytest.raises(ValueError, match=r"another one \(other sources, options or shard size\)"):
            upcycle(source, "mixtral", output=output, resume=True, **other)
    assert {file: file.stat().st_mtime_ns for file in partial.glob("*.safetensors")} == kept
    upcycle(source, "mixtral", output=output, max_shard_size="30KB", resume=True)
    after = {file.name: (output / file.name).stat().st_mtime_ns for file in kept}
    assert after == {file.name: stamp for file, stamp in kept.items()} and names(tmp_path) == ["out", "source"]


def test_overwrite_starts_again(source, tmp_path, monkeypatch):
    output = tmp_path / "out"
    killed(source, output, monkeypatch, after=2)
    upcycle(source, "mixtral", output=output, seed=5, overwrite=True)
    assert names(tmp_path) == ["out", "source"]


def test_a_run_that_fails_before_its_first_file_leaves_nothing(source, tmp_path, monkeypatch):
    killed(source, tmp_path / "deep" / "out", monkeypatch, after=0)
    assert names(tmp_path) == ["source"]


def test_a_file_that_changed_since_is_written_again(source, tmp_path, monkeypatch):
    upcycle(source, "mixtral", output=tmp_path / "whole", max_shard_size="30KB")
    output, folder = tmp_path / "out", tmp_path / ".out.partial" / "model"
    killed(source, output, monkeypatch, after=3)
    first, second, _ = sorted(folder.glob("*.safetensors"))
    first.write_bytes(first.read_bytes()[:-10])
    second.unlink()
    upcycle(source, "mixtral", output=output, max_shard_size="30KB", resume=True)
    assert digests(output) == digests(tmp_path / "whole")


def test_another_model_in_memory_is_another_run(tmp_path, monkeypatch):
    """Their weights cannot be told apart by name, size and time, as files can."""
    model, output = dense_model("llama"), tmp_path / "out"
    killed(model, output, monkeypatch, after=2)
    with torch.no_grad():
        model.model.norm.weight[3] += 1
    with pytest.raises(ValueError, match="another one"):
        upcycle(model, "mixtral", output=output, max_shard_size="30KB", resume=True)
    with torch.no_grad():
        model.model.norm.weight[3] -= 1
    model.load_state_dict(dense_model("llama").state_dict())
    upcycle(model, "mixtral", output=output, max_shard_size="30KB", resume=True)


def test_a_failing_finish_loses_no_work(source, tmp_path, monkeypatch):
    plan, output = plan_upcycling(source, Options(target="mixtral")), tmp_path / "out"

    def fail(folder, written):
        assert written.shards == {file.name: sha256_of(file) for file in folder.glob("*.safetensors")}
        raise RuntimeError("the logits differ")

    with pytest.raises(RuntimeError, match="the logits differ"):
        convert(plan, output, max_shard_size="30KB", finish=fail)
    assert names(tmp_path) == [".out.partial", "source"]
    monkeypatch.setattr(ShardWriter, "add", None)  # nothing is left to be written
    convert(plan, output, max_shard_size="30KB", resume=True)
    assert names(tmp_path) == ["out", "source"]


def test_two_runs_on_one_output(source, tmp_path):
    place = tmp_path / ".out.partial"
    (place / "model").mkdir(parents=True)
    (place / "model" / "theirs.new").write_text("work")
    with FileLock(place / LOCK), pytest.raises(ValueError, match="out is being written by another run: wait for it"):
        upcycle(source, "mixtral", output=tmp_path / "out")
    assert (place / "model" / "theirs.new").read_text() == "work"
    upcycle(source, "mixtral", output=tmp_path / "out")  # that run has died: its lock does not count
    assert names(tmp_path) == ["out", "source"]


@pytest.mark.parametrize("moment", ["before", "after"])
def test_killed_while_an_old_model_is_replaced(source, tmp_path, moment):
    """Between the two renames, or before the old model is deleted."""
    output, place = tmp_path / "out", tmp_path / ".out.partial"
    upcycle(source, "mixtral", output=output)
    before = digests(output)
    place.mkdir()
    if moment == "before":
        output.rename(place / "model.replaced")
        (place / "model").mkdir()
    else:
        shutil.copytree(output, place / "model.replaced")
    if moment == "before":
        with pytest.raises(ValueError, match="already holds a model; pass --overwrite"):
            upcycle(source, "mixtral", seed=1, output=output)
        assert digests(output) == before  # back in its place
    upcycle(source, "mixtral", seed=1, output=output, overwrite=True)
    assert digests(output) != before and names(tmp_path) == ["out", "source"]


def test_a_disk_without_room_is_refused_before_any_work(source, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(engine_module.shutil, "disk_usage", lambda place: usage)
    with pytest.raises(ValueError, match=r"has 0\.0 GB free, the result needs 0\.0 GB"):
        upcycle(source, "mixtral", output=tmp_path / "out")
    assert names(tmp_path) == ["source"]


def fill_disk(source, output, most, results):
    """In a forked process that may write no larger file: the kernel refuses, as it does on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    try:
        upcycle(source, "mixtral", output=output, max_shard_size="60KB")
    except ValueError as error:
        os.write(results, str(error).encode())


@pytest.mark.parametrize(("most", "left"), [(45_000, ["source"]), (59_000, [".out.partial", "source"])])
def test_a_disk_that_fills_up(source, tmp_path, most, left):
    """In the first file, or in a later one: what is finished then stays."""
    read, write = os.pipe()
    arguments = (source, tmp_path / "out", most, write)
    child = multiprocessing.get_context("fork").Process(target=fill_disk, args=arguments)
    child.start()
    child.join()
    message = os.read(read, 10_000).decode()
    assert "the disk is full" in message and "while writing 'model." in message and ".safetensors" in message, message
    assert ("pass --resume" in message) == (len(left) == 2) and "\n" not in message and names(tmp_path) == left
    upcycle(source, "mixtral", output=tmp_path / "out", max_shard_size="60KB", resume=True)
    assert names(tmp_path) == ["out", "source"]


def test_a_file_system_that_fills_up(source, tmp_path, monkeypatch):
    """A real one, of 200 KB, for whoever may mount it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200K", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    monkeypatch.setattr(engine_module, "check_space", lambda plan, work: None)
    try:
        with pytest.raises(ValueError, match=r"the disk is full: .*while writing 'model.*make room and pass --resume"):
            upcycle(source, "mixtral", output=disk / "out", max_shard_size="60KB")
        assert names(disk) == [".out.partial"]
        subprocess.run(["mount", "-o", "remount,size=4M", disk], check=True)
        upcycle(source, "mixtral", output=disk / "out", max_shard_size="60KB", resume=True)
        assert names(disk) == ["out"]
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_truncated_file(source, tmp_path):
    file = sorted(source.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-100])
    message = rf"source: cannot read its weights: {file.name}: .*; the file ends in 'model\..*': fetch it again$"
    with pytest.raises(ValueError, match=message):
        upcycle(source, "mixtral", output=tmp_path / "out")
    file.write_bytes(b"\xff" * 5000)
    with pytest.raises(ValueError, match=rf"source: cannot read its weights: {file.name}: "):
        upcycle(source, "mixtral", output=tmp_path / "out")
    assert names(tmp_path) == ["source"]


def test_weights_that_are_no_floats(source, tmp_path):
    file = sorted(source.glob("*.safetensors"))[0]
    tensors = load_file(file)
    name = next(iter(tensors))
    tensors[name] = tensors[name].to(torch.int8)
    save_file(tensors, file)
    with pytest.raises(ValueError, match=rf"'{name}' in {file.name} is of type I8; only \['F64'"):
        upcycle(source, "mixtral", output=tmp_path / "out")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(source, tmp_path, value):
    file = sorted(source.glob("*.safetensors"))[0]
    tensors = load_file(file)
    name = next(iter(tensors))
    tensors[name].view(-1)[3:5] = value
    save_file(tensors, file)
    with pytest.raises(ValueError, match=rf"'{name}' in {file.name} has 2 NaN or infinite entries of"):
        upcycle(source, "mixtral", output=tmp_path / "out")
    assert names(tmp_path) == ["source"]


def test_a_lost_index_is_made_good_only_if_nothing_is_missing(source, tmp_path):
    (source / INDEX).unlink()
    upcycle(source, "mixtral", output=tmp_path / "out")
    sorted(source.glob("*.safetensors"))[0].unlink()
    with pytest.raises(ValueError, match=rf"are no complete checkpoint and there is no {INDEX}"):
        upcycle(source, "mixtral", output=tmp_path / "again")


def test_an_index_that_lies(source, tmp_path):
    file = sorted(source.glob("*.safetensors"))[0]
    tensors = load_file(file)
    name, _ = tensors.popitem()
    save_file(tensors, file)
    with pytest.raises(ValueError, match=rf"'{name}' is not in {file.name}, where {INDEX} says it is"):
        upcycle(source, "mixtral", output=tmp_path / "out")
    file.unlink()
    with pytest.raises(ValueError, match=f"{INDEX} names {file.name}, which is missing"):
        upcycle(source, "mixtral", output=tmp_path / "out")


def test_a_source_that_is_given_twice(source, tmp_path):
    with pytest.warns(UserWarning, match="sources 0 and 1 are one and the same model"):
        upcycle([source, source], "mixtral", output=tmp_path / "out")


def test_sources_survive(tmp_path):
    for number, model in enumerate(dense_models("llama", 2)):
        model.save_pretrained(tmp_path / str(number))
    before = [digests(tmp_path / str(number)) for number in range(2)]
    with pytest.raises(ValueError, match="cannot be replaced"):
        upcycle([tmp_path / "0", tmp_path / "1"], "bam", output=tmp_path / "1", overwrite=True)
    upcycle([tmp_path / "0", tmp_path / "1"], "bam", output=tmp_path / "out")
    assert [digests(tmp_path / str(number)) for number in range(2)] == before
