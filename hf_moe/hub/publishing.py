"""Put a model folder on the hub: its files checked, a card beside them, one commit, errors that say what to do."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage] - of whichever HTTP library the hub's client uses
    LocalTokenNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from .card import CARD, conflict, has_own_card, model_card
from .files import model_files
from .history import RECEIPT, read_json

ADVICE = {  # HTTP status -> what to do
    400: "the hub does not accept the request; see what it says",
    401: "nobody is logged in, or the token is not valid: run `hf auth login`, or set HF_TOKEN",
    403: "this token may not do that: use one with write access to {repo_id} (https://huggingface.co/settings/tokens)",
    404: "there is no repository or branch, or this token may not see it: check the name, and `hf auth whoami`",
    409: "somebody changed {repo_id} at the same time: run the same command again",
    412: "somebody changed {repo_id} at the same time: run the same command again",
    413: "a file is too large for the hub: save the model with a smaller max_shard_size",
    429: "too many requests: wait a few minutes and run the same command again",
}
LATER = "the hub is not available now: run the same command again later"
SAFE = "Nothing is lost: your files are as they were, and what was uploaded already is not sent again."


@dataclass(frozen=True)
class Published:
    """What came of it.

    Args:
        repo_id: the repository, with its owner.
        url: of the repository.
        commit: of the commit.
        pull_request: of the pull request, if one was opened.
        left_out: file -> why it stayed here.
    """

    repo_id: str
    url: str
    commit: str
    pull_request: str | None
    left_out: dict[str, str]


def publish(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload model",
    card: ModelCard | None = None,
) -> Published:
    """Upload a model folder in one commit. The token is found by huggingface_hub (`hf auth login`, `HF_TOKEN`).

    Args:
        folder: with config.json and safetensors. A README.md of your own is published as it is; without one, a card
            is written from what the folder knows (`model_card`).
        repo_id: `OWNER/NAME`, or a name for the owner of the token; made if it does not exist.
        private: who may see a new repository; None: as the owner's default.
        revision: the branch, made if it does not exist; main by default.
        create_pr: propose the files as a pull request.
        commit_message: title of the commit.
        card: instead of the folder's README.md.

    Raises:
        ValueError: the folder cannot be published (before anything is sent), or the hub refused.
    """
    folder = Path(folder).expanduser()
    files = model_files(folder)
    with explained(repo_id):
        validate_repo_id(repo_id)
    card = card or (ModelCard.load(folder / CARD) if has_own_card(folder) else model_card(folder, repo_id=repo_id))
    check_license(folder, card)
    operations = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in files.publish if name != CARD
    ]
    operations.append(CommitOperationAdd(path_in_repo=CARD, path_or_fileobj=str(card).encode()))
    api = HfApi()
    with explained(repo_id):
        check_metadata(card)
        created = api.create_repo(repo_id, private=private, exist_ok=True)
        if private and not api.model_info(created.repo_id).private:
            raise ValueError(f"{created.repo_id} exists and is public; make it private first, or choose another name.")
        if revision is not None:
            api.create_branch(created.repo_id, branch=revision, exist_ok=True)
        done = api.create_commit(
            created.repo_id, operations, commit_message=commit_message, revision=revision, create_pr=create_pr
        )
    return Published(created.repo_id, str(created), done.commit_url, done.pr_url, files.left_out)


def check_metadata(card: ModelCard) -> None:
    """Let the hub look at the card's metadata before anything is made there."""
    try:
        card.validate()
    except ValueError as error:
        raise ValueError(f"The hub does not accept the metadata of {CARD}: {error}") from error


def check_license(folder: Path, card: ModelCard) -> None:
    """A mixture of sources under different licences is published only if somebody says under which."""
    receipt = read_json(folder / RECEIPT)
    if receipt and not card.data.get("license") and (reason := conflict(receipt)):
        raise ValueError(f"{reason} Say which with --license (license=...), or in the metadata of {CARD}.")


@contextmanager
def explained(repo_id: str) -> Iterator[None]:
    """Turn what the hub or the network answers into one line that says what to do."""
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise ValueError(f"Cannot publish to {repo_id}: {ADVICE[401]}.") from error
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is no name for a repository: {error}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        advice = ADVICE.get(status, LATER if status >= 500 else "see what it says").format(repo_id=repo_id)
        says = f" ({error.server_message})" if error.server_message else ""
        raise ValueError(f"Cannot publish to {repo_id}: status {status}{says}: {advice}. {SAFE}") from error
    except (HTTPError, ConnectionError) as error:
        kind = type(error).__name__
        raise ValueError(f"Cannot publish to {repo_id}: the connection failed ({kind}): {LATER}. {SAFE}") from error
