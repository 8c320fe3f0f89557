"""A real HTTP server on loopback that answers like huggingface.co: create a repository, push to it, read from it.

Repositories live in memory. `FakeHub.environment` holds what a process must have in its environment before it imports
huggingface_hub; `FakeHub.requests` what the server was asked, without headers, so a token can never end up in there.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

TOKEN = "hf_" + "x" * 34  # made up; the tests look for it in everything that is printed or pushed
COMMIT = "a" * 40
REPO = r"(?P<repo>[^/]+/[^/]+)"


class FakeHub(ThreadingHTTPServer):
    """The server and what it holds."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, bytes]] = {}  # repo -> path -> content
        self.blobs: dict[str, bytes] = {}  # LFS object id -> content
        self.requests: list[tuple[str, str]] = []  # (method, path)
        self.tokens: set[str] = set()  # what came in as `Authorization`
        self.private: dict[str, bool] = {}
        self.branches: dict[str, set[str]] = {}  # repo -> branches beside main
        self.commits: list[tuple[str, str, bool]] = []  # (repo, branch, whether it is a pull request)
        self.faults: list[tuple[str, int]] = []  # (pattern of a path, status) of answers to come; 0 hangs up

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def environment(self, home: Path) -> dict[str, str]:
        """Variables for a process that is to talk to this server and to no other."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
        }


@contextmanager
def serving() -> Iterator[FakeHub]:
    """A running hub, shut down at the end."""
    with FakeHub() as hub:
        thread = threading.Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


class Handler(BaseHTTPRequestHandler):
    """One request; `routes` is read from top to bottom."""

    protocol_version = "HTTP/1.1"
    server: FakeHub

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""

    def handle_request(self) -> None:
        path, body = self.path.split("?")[0], self.read_body()
        self.server.requests.append((self.command, path))
        self.server.tokens.add(self.headers.get("Authorization", ""))
        for fault in self.server.faults:
            if re.fullmatch(fault[0], path):
                self.server.faults.remove(fault)
                return self.fail(fault[1])
        for pattern, answer in self.routes:
            if match := re.fullmatch(pattern, path):
                return answer(self, body, **match.groupdict())
        self.not_found("RepoNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().strip() or b"0", 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def send(self, content: Any, status: int = 200, **headers: Any) -> None:
        """Answer with bytes as they are, or with anything else as JSON."""
        raw = isinstance(content, bytes)
        data = content if raw else json.dumps(content).encode()
        self.send_response(status)
        kind = "application/octet-stream" if raw else "application/json"
        for key, value in {"Content-Type": kind, "Content-Length": len(data), **headers}.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def fail(self, status: int) -> None:
        """Answer with an error; 0 hangs up without an answer."""
        if status:
            return self.send({"error": f"fault {status}"}, status)
        self.close_connection = True
        self.connection.shutdown(2)

    def not_found(self, code: str) -> None:
        self.send({"error": "Not found"}, 404, X_Error_Code=code)

    def who_am_i(self, body: bytes) -> None:
        role = {"accessToken": {"role": "write"}}
        self.send({"name": "me", "type": "user", "orgs": [], "auth": role})

    def create_repo(self, body: bytes) -> None:
        asked = json.loads(body)
        repo = "me/" + asked["name"].split("/")[-1]
        self.server.repos.setdefault(repo, {})
        self.server.private.setdefault(repo, asked.get("visibility") == "private" or bool(asked.get("private")))
        self.send({"url": f"{self.server.url}/{repo}", "id": repo})

    def validate_card(self, body: bytes) -> None:
        self.send({"errors": [], "warnings": []})

    def preupload(self, body: bytes, repo: str) -> None:
        """Tell which files go through LFS."""
        files = [file["path"] for file in json.loads(body)["files"]]
        modes = {path: "lfs" if path.endswith(".safetensors") else "regular" for path in files}
        self.send({"files": [{"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in modes.items()]})

    def lfs_batch(self, body: bytes, repo: str) -> None:
        """Tell where the large objects are to be put."""
        objects = [{key: item[key] for key in ("oid", "size")} for item in json.loads(body)["objects"]]
        for item in objects:
            if item["oid"] in self.server.blobs:  # it need not be sent again
                continue
            for action in ("upload", "verify"):
                href = {"href": f"{self.server.url}/_lfs/{action}/{item['oid']}", "header": {}}
                item.setdefault("actions", {})[action] = href
        self.send({"transfer": "basic", "objects": objects})

    def lfs_object(self, body: bytes, action: str, oid: str) -> None:
        if action == "upload":
            assert hashlib.sha256(body).hexdigest() == oid
            self.server.blobs[oid] = body
        self.send({})

    def commit(self, body: bytes, repo: str) -> None:
        """Take one JSON object a line: a header, files in base64, large files by object id."""
        for line in map(json.loads, body.decode().splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.server.repos[repo][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.server.repos[repo][value["path"]] = self.server.blobs[value["oid"]]
        url = f"{self.server.url}/{repo}/commit/{COMMIT}"
        proposed = "create_pr=1" in self.path
        self.server.commits.append((repo, self.path.split("?")[0].split("/")[-1], proposed))
        pull_request = {"pullRequestUrl": f"{self.server.url}/{repo}/discussions/1"} if proposed else {}
        self.send({"success": True, "commitOid": COMMIT, "commitUrl": url, "hookOutput": "", **pull_request})

    def create_branch(self, body: bytes, repo: str, branch: str) -> None:
        self.server.branches.setdefault(repo, set()).add(branch)
        self.send({})

    def model_info(self, body: bytes, repo: str) -> None:
        if repo not in self.server.repos:
            return self.not_found("RepoNotFound")
        files = [{"rfilename": path} for path in self.server.repos[repo]]
        about = {"id": repo, "modelId": repo, "sha": COMMIT, "tags": [], "downloads": 0, "likes": 0}
        about["private"] = self.server.private.get(repo, False)
        self.send({**about, "siblings": files, "lastModified": "2025-01-01T00:00:00.000Z"})

    def tree(self, body: bytes, repo: str) -> None:
        files = self.server.repos.get(repo, {}).items()
        oid = {path: hashlib.sha1(content).hexdigest() for path, content in files}
        self.send([{"type": "file", "path": path, "size": len(file), "oid": oid[path]} for path, file in files])

    def resolve(self, body: bytes, repo: str, file: str) -> None:
        if repo not in self.server.repos:
            return self.not_found("RepoNotFound")
        if (content := self.server.repos[repo].get(file)) is None:
            return self.not_found("EntryNotFound")
        tag = hashlib.sha256(content).hexdigest()
        self.send(content, ETag=f'"{tag}"', X_Repo_Commit=COMMIT, X_Linked_Size=len(content))

    routes = (
        ("/api/whoami-v2", who_am_i),
        ("/api/repos/create", create_repo),
        ("/api/validate-yaml", validate_card),
        (f"/api/models/{REPO}/preupload/.*", preupload),
        (rf"/{REPO}\.git/info/lfs/objects/batch", lfs_batch),
        ("/_lfs/(?P<action>upload|verify)/(?P<oid>.+)", lfs_object),
        (f"/api/models/{REPO}/commit/.*", commit),
        (f"/api/models/{REPO}/branch/(?P<branch>.*)", create_branch),
        (f"/api/models/{REPO}(?:/revision/.*)?", model_info),
        (f"/api/models/{REPO}/tree/.*", tree),
        (f"/{REPO}/resolve/[^/]+/(?P<file>.+)", resolve),
    )
