"""An output folder is complete or absent, and nothing that was there is lost."""

import os
import signal
import time

import pytest

from hf_moe.conversion import atomic_directory, check_output


def model_folder(path, text="old"):
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "llama"}')
    (path / "model.safetensors").write_text(text)
    return path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_success_moves_everything_into_place(tmp_path):
    with atomic_directory(tmp_path / "a" / "out") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("text")
        assert not (tmp_path / "a" / "out").exists() and folder.parent == tmp_path / "a"
    assert names(tmp_path / "a") == ["out"]
    assert (tmp_path / "a" / "out" / "sub" / "file").read_text() == "text"
    assert (tmp_path / "a" / "out").stat().st_mode == tmp_path.stat().st_mode | 0o755


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "out").mkdir()
    with atomic_directory(tmp_path / "out") as folder:
        (folder / "file").touch()
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["file"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_nothing(tmp_path, error):
    with pytest.raises(error), atomic_directory(tmp_path / "a" / "b" / "out") as folder:
        (folder / "half").touch()
        raise error
    assert names(tmp_path) == []


def test_overwrite_keeps_the_old_folder_until_the_new_one_is_complete(tmp_path):
    output = model_folder(tmp_path / "out")
    with pytest.raises(RuntimeError), atomic_directory(output, overwrite=True) as folder:
        (folder / "half").touch()
        raise RuntimeError
    assert names(tmp_path) == ["out"] and (output / "model.safetensors").read_text() == "old"
    with atomic_directory(output, overwrite=True) as folder:
        (folder / "model.safetensors").write_text("new")
        assert (output / "model.safetensors").read_text() == "old"
    assert names(tmp_path) == ["out"] and names(output) == ["model.safetensors"]
    assert (output / "model.safetensors").read_text() == "new"


def test_a_failed_swap_puts_the_old_folder_back(tmp_path, monkeypatch):
    output, rename = model_folder(tmp_path / "out"), os.rename

    def fail_once(source, target):
        if str(source).endswith(".partial"):
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_once)
    with pytest.raises(OSError, match="no"), atomic_directory(output, overwrite=True) as folder:
        (folder / "model.safetensors").write_text("new")
    assert names(tmp_path) == ["out"] and (output / "model.safetensors").read_text() == "old"


def test_an_output_that_appears_meanwhile_is_not_replaced(tmp_path):
    output = tmp_path / "out"
    with pytest.raises(ValueError, match="--overwrite"), atomic_directory(output) as folder:
        (folder / "file").touch()
        model_folder(output, "theirs")
    assert names(tmp_path) == ["out"] and (output / "model.safetensors").read_text() == "theirs"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "adapter_model.safetensors"])
def test_a_model_needs_overwrite(tmp_path, name):
    (tmp_path / name).write_text('{"architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(ValueError, match="already holds a model; pass --overwrite"):
        check_output(tmp_path)
    assert check_output(tmp_path, overwrite=True) == tmp_path


@pytest.mark.parametrize("text", ['{"port": 80}', "[]", "not json"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_other_files_are_never_replaced(tmp_path, overwrite, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="is not empty and holds no model: nothing there is touched"):
        check_output(tmp_path, overwrite)


def test_places_that_must_not_be_replaced(tmp_path, monkeypatch):
    output = model_folder(tmp_path / "out")
    (output / "inner").mkdir()
    for source in (output, output / "inner"):
        with pytest.raises(ValueError, match="cannot be replaced"):
            check_output(output, True, sources=[source, "some/hub-id"])
    monkeypatch.chdir(output / "inner")
    with pytest.raises(ValueError, match="cannot be replaced"):
        check_output(output, True)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"):
        check_output(tmp_path / "file")
    with pytest.raises(ValueError, match="/ is where a disk is mounted; choose a folder inside it"):
        check_output("/")


def test_a_link_is_followed(tmp_path):
    output = model_folder(tmp_path / "disk")
    (tmp_path / "link").symlink_to(output)
    with atomic_directory(tmp_path / "link", overwrite=True) as folder:
        (folder / "model.safetensors").write_text("new")
    assert (tmp_path / "link").is_symlink() and (output / "model.safetensors").read_text() == "new"


def test_kill_9_leaves_no_output(tmp_path):
    """A child process is killed between two files."""
    output, (read_end, write_end) = tmp_path / "out", os.pipe()
    child = os.fork()
    if child == 0:
        with atomic_directory(output) as folder:
            (folder / "model-1.safetensors").write_text("half")
            os.write(write_end, b"w")
            time.sleep(60)
        os._exit(1)
    assert os.read(read_end, 1) == b"w"
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    os.close(read_end)
    os.close(write_end)
    assert not output.exists()
    with pytest.warns(UserWarning, match="left by a killed one"), atomic_directory(output) as folder:
        (folder / "model.safetensors").write_text("whole")
    assert names(output) == ["model.safetensors"]
