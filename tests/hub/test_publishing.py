"""Publishing to a real server on loopback: what arrives, what is refused, what happens when the hub says no."""

import json
import shutil
import traceback
from pathlib import Path

import pytest
import torch
from fake_hub import TOKEN, FakeHub
from hub_cases import tiny_model
from huggingface_hub import ModelCard, constants
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from hf_moe.cli.main import app
from hf_moe.hub import model_card, publish

pytestmark = pytest.mark.filterwarnings("ignore:Use .content=:DeprecationWarning")  # huggingface_hub to httpx2
CARDS = "/api/validate-yaml"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as Trainer leaves it."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model("bam").save_pretrained(folder, max_shard_size="50KB")
    torch.save({"lr": 1}, folder / "training_args.bin")
    (folder / "checkpoint-5").mkdir()
    torch.save({}, folder / "checkpoint-5" / "optimizer.pt")
    (folder / "eval_results.json").write_text('{"eval_loss": 2.5, "eval_runtime": 3.0, "epoch": 1.0}')
    log = [{"loss": 3.0, "step": 1}, {"loss": 2.75, "step": 5}, {"eval_loss": 2.5, "step": 5}]
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 5, "epoch": 1.0, "log_history": log}))
    return folder


@pytest.fixture
def here(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    """This process talks to the fake hub, and does not wait long between its attempts."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    for held in (hub.repos, hub.private, hub.branches, hub.blobs):
        held.clear()
    hub.commits.clear()
    hub.faults.clear()
    hub.requests.clear()
    return hub


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_file() and path.name != "training_args.bin"}


def test_what_arrives(here: FakeHub, trained: Path):
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    done = publish(trained, "me/tiny", private=True)
    assert done.repo_id == "me/tiny" and done.url.endswith("/me/tiny") and done.pull_request is None
    pushed = here.repos["me/tiny"]
    assert pushed.keys() == names(trained) | {"README.md"}
    assert all(pushed[path.name] == content for path, content in before.items() if path.name in pushed)
    assert done.left_out["training_args.bin"] == "pickled state of the training"
    assert done.left_out["checkpoint-5/optimizer.pt"] == "a checkpoint of the training"
    assert here.private == {"me/tiny": True} and here.commits == [("me/tiny", "main", False)]
    assert ("POST", CARDS) in here.requests and not (trained / "README.md").exists()
    assert 'from_pretrained("me/tiny")' in pushed["README.md"].decode()
    assert not [name for name, content in pushed.items() if TOKEN.encode() in content]


def test_branch_and_pull_request(here: FakeHub, trained: Path):
    publish(trained, "me/tiny", revision="v2")
    done = publish(trained, "me/tiny", create_pr=True)
    assert here.branches == {"me/tiny": {"v2"}}
    assert here.commits == [("me/tiny", "v2", False), ("me/tiny", "main", True)]
    assert done.pull_request is not None and done.pull_request.endswith("/discussions/1")


def test_a_public_repository_is_not_taken_for_a_private_one(here: FakeHub, trained: Path):
    publish(trained, "me/tiny")
    here.commits.clear()
    with pytest.raises(ValueError, match="me/tiny exists and is public"):
        publish(trained, "me/tiny", private=True)
    assert here.commits == []


def test_a_dropped_connection_loses_nothing(here: FakeHub, trained: Path):
    """The first file arrives, the others do not; the second attempt sends only those."""
    here.faults += [("/_lfs/upload/.*", 200)]  # swallowed: answered, not stored
    here.faults += [(r"/api/models/me/tiny/commit/main", 0)] * 8
    with pytest.raises(ValueError, match=r"Cannot publish to me/tiny: .*the same command again later\. Nothing is"):
        publish(trained, "me/tiny")
    sent = len(here.blobs)
    assert sent == len(list(trained.glob("*.safetensors"))) - 1 and here.commits == []
    here.faults.clear()
    here.requests.clear()
    publish(trained, "me/tiny")
    uploads = [path for method, path in here.requests if method == "PUT"]
    assert len(uploads) == 1 and here.commits == [("me/tiny", "main", False)]


@pytest.mark.parametrize(
    ("status", "path", "says"),
    [
        (401, "/api/repos/create", "run `hf auth login`"),
        (403, "/api/models/me/tiny/commit/main", "use one with write access to me/tiny"),
        (409, "/api/models/me/tiny/commit/main", "somebody changed me/tiny at the same time"),
        (500, "/api/models/me/tiny/preupload/main", "not available now: run the same command again later"),
        (503, "/api/repos/create", "not available now: run the same command again later"),
    ],
)
def test_the_hub_says_no(status: int, path: str, says: str, here: FakeHub, trained: Path):
    before = {file: file.read_bytes() for file in trained.rglob("*") if file.is_file()}
    here.faults += [(path, status)] * 8
    with pytest.raises(ValueError, match=says) as caught:
        publish(trained, "me/tiny")
    assert f"status {status} (fault {status})" in str(caught.value) and "Nothing is lost" in str(caught.value)
    assert TOKEN not in "".join(traceback.format_exception(caught.value))
    assert here.commits == []
    assert {file: file.read_bytes() for file in trained.rglob("*") if file.is_file()} == before


def test_a_name_that_cannot_be(here: FakeHub, trained: Path):
    with pytest.raises(ValueError, match=r"'bad name/!' is no name for a repository"):
        publish(trained, "bad name/!")
    assert here.requests == []


def test_metadata_that_the_hub_refuses(here: FakeHub, trained: Path):
    here.faults += [(CARDS, 400)]
    with pytest.raises(ValueError, match=r"The hub does not accept the metadata of README.md: .*fault 400"):
        publish(trained, "me/tiny")
    assert here.repos == {}


def test_without_a_token(here: FakeHub, trained: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    here.faults += [("/api/repos/create", 401)]
    with pytest.raises(ValueError, match="run `hf auth login`, or set HF_TOKEN"):
        publish(trained, "me/tiny")


def change(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def test_pickled_weights_are_refused(here: FakeHub, trained: Path, tmp_path: Path):
    folder = change(trained, tmp_path)
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin is not safetensors: loading such a file can run"):
        publish(folder, "me/tiny")
    assert here.requests == []


def test_incomplete_or_damaged_weights_are_refused(here: FakeHub, trained: Path, tmp_path: Path):
    folder = change(trained, tmp_path)
    first, second, *_ = sorted(folder.glob("*.safetensors"))
    first.write_bytes(first.read_bytes()[:-10])
    with pytest.raises(ValueError, match=f"{first.name} is damaged"):
        publish(folder, "me/tiny")
    shutil.copy(trained / first.name, first)
    second.unlink()
    with pytest.raises(ValueError, match=rf"model.safetensors.index.json names \['{second.name}'\]"):
        publish(folder, "me/tiny")
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    with pytest.raises(ValueError, match="there are no weights to publish"):
        publish(folder, "me/tiny")
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="holds no model"):
        publish(folder, "me/tiny")
    assert here.requests == []


def test_a_token_in_a_file_is_refused_and_not_shown(here: FakeHub, trained: Path, tmp_path: Path):
    folder = change(trained, tmp_path)
    (folder / "notes.md").write_text(f"a\nlogin {TOKEN}\n")
    with pytest.raises(ValueError, match=r"notes.md, line 2, holds what looks like an access token") as caught:
        publish(folder, "me/tiny")
    assert TOKEN not in str(caught.value) and here.requests == []


def test_own_card_is_kept_and_a_written_one_renewed(here: FakeHub, trained: Path, tmp_path: Path):
    folder = change(trained, tmp_path)
    ModelCard("---\nlicense: mit\n---\nMine.\n").save(folder / "README.md")
    publish(folder, "me/own")
    assert here.repos["me/own"]["README.md"].decode().endswith("Mine.\n")
    model_card(folder).save(folder / "README.md")
    publish(folder, "me/own")
    assert 'from_pretrained("me/own")' in here.repos["me/own"]["README.md"].decode()


def test_the_card_says_what_the_folder_knows(trained: Path):
    card = model_card(trained, name="Tiny", license="mit", datasets=["me/text"], eval_dataset="me/text")
    assert card.data.to_dict()["model-index"][0]["results"][0]["metrics"] == [{"type": "loss", "value": 2.5}]
    assert card.data.datasets == ["me/text"] and card.data.license == "mit"
    assert "training loss 3.0000 at the first log, 2.7500 at the last" in card.text
    assert "evaluation loss 2.5000 at the end" in card.text
    assert "| me/text | loss | 2.5 |" in card.text and "https://arxiv.org/bibtex/2408.08274" in card.text
    assert (
        "mixer: soft_mixture_of_attention (num_experts: " in card.text and "do not know this architecture" in card.text
    )
    total = sum(tensor.numel() for file in trained.glob("*.safetensors") for tensor in load_file(file).values())
    assert f"| parameters | {total:,} |" in card.text
    assert "No results on a benchmark" in model_card(trained).text  # nobody said what they were measured on


def test_the_command(here: FakeHub, trained: Path, tmp_path: Path):
    folder = change(trained, tmp_path)
    dry = CliRunner().invoke(app, ["push", str(folder), "me/tiny", "--dry-run"])
    assert dry.exit_code == 0 and "model.safetensors.index.json" in dry.stdout and here.requests == []
    assert "Not uploaded: training_args.bin (pickled state of the training)" in dry.output
    done = CliRunner().invoke(app, ["push", str(folder), "me/tiny", "--private", "--license", "mit"])
    assert done.exit_code == 0 and "Published " in done.output and here.private == {"me/tiny": True}
    assert ModelCard(here.repos["me/tiny"]["README.md"].decode()).data.license == "mit"
    shown = CliRunner().invoke(app, ["card", str(folder), "--license", "mit", "--repo-id", "me/tiny"])
    assert shown.stdout.strip() == here.repos["me/tiny"]["README.md"].decode().strip()
    assert not (folder / "README.md").exists()
    written = CliRunner().invoke(app, ["card", str(folder), "--write", "--validate"])
    assert written.exit_code == 0 and (folder / "README.md").is_file()
    (folder / "README.md").write_text("Mine.")
    refused = CliRunner().invoke(app, ["push", str(folder), "me/tiny", "--license", "mit"])
    assert "--license would have no effect" in str(refused.exception)
    assert TOKEN not in dry.output + done.output + shown.output + written.output


def test_a_conversion_and_an_export_are_published_at_once(here: FakeHub, tmp_path: Path):
    sizes = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(tmp_path / "dense")
    make = [
        "upcycle",
        str(tmp_path / "dense"),
        "--to",
        "mixtral",
        "--num-experts",
        "2",
        "--output",
        str(tmp_path / "moe"),
    ]
    done = CliRunner().invoke(app, [*make, "--push-to-hub", "me/moe", "--private"])
    assert done.exit_code == 0 and here.private == {"me/moe": True}, done.output
    card = ModelCard(here.repos["me/moe"]["README.md"].decode())
    assert (
        "upcycled" in card.data.tags and 'from_pretrained("me/moe")' in card.text and "AutoTokenizer" not in card.text
    )
    assert not [path for path in here.repos["me/moe"] if path.endswith(".py")]  # a native target needs no code
    again = ["export", str(tmp_path / "moe"), "--to", "fused", "--output", str(tmp_path / "fused")]
    done = CliRunner().invoke(app, [*again, "--push-to-hub", "me/fused"])
    assert done.exit_code == 0 and "me/fused" in here.repos, done.output


def test_sources_under_different_licences(here: FakeHub, trained: Path, tmp_path: Path):
    folder = change(trained, tmp_path)
    receipt = {"recipe": {"method": "btx", "num_experts": 2, "top_k": 1}, "versions": {}}
    receipt["sources"] = [{"folder": name, "license": name, "shards": {}} for name in ("mit", "apache-2.0")]
    receipt["exactness"] = {"level": "approximate", "promised": "approximate", "reason": "x", "measured": []}
    receipt["exactness"]["useful_without_training"] = None
    (folder / "conversion.json").write_text(json.dumps(receipt))
    with pytest.raises(
        ValueError, match=r"licences of its sources differ \(mit: mit, apache-2.0: apache-2.0\).*--license"
    ):
        publish(folder, "me/tiny")
    assert here.requests == []
    publish(folder, "me/tiny", card=model_card(folder, license="apache-2.0"))
    assert here.commits == [("me/tiny", "main", False)]
