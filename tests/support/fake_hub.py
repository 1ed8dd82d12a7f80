"""A small Hub on loopback: the endpoints that huggingface_hub 2.4 uses to create a repository and commit into it."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

TOKEN = "hf_" + "t" * 34
LARGE = (".safetensors", ".png")


@dataclass
class Repo:
    private: bool
    files: dict[str, bytes] = field(default_factory=lambda: {".gitattributes": b"*.safetensors filter=lfs\n"})
    commits: list[str] = field(default_factory=lambda: ["0" * 40])
    seen_public: list[set[str]] = field(default_factory=list)  # its files whenever it became public


@dataclass
class Hub:
    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    store: dict[str, bytes] = field(default_factory=dict)  # large files by SHA-256, also those of no commit
    requests: list[str] = field(default_factory=list)
    failures: dict[str, list[int]] = field(default_factory=dict)  # kind of request -> statuses of the next answers
    holding: str = ""  # a kind of request that is not answered while ``release`` is not set
    held: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)
    lose_answer: bool = False  # of the next commit, after it was made


KINDS = [  # method, path, kind
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate"),
    ("GET", r"/api/models/([^/]+/[^/]+)", "info"),
    ("GET", r"/api/models/([^/]+/[^/]+)/tree/main", "tree"),
    ("POST", r"/api/models/([^/]+/[^/]+)/preupload/main", "preupload"),
    ("POST", r"/api/models/([^/]+/[^/]+)/commit/main", "commit"),
    ("PUT", r"/api/models/([^/]+/[^/]+)/settings", "settings"),
    ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
    ("PUT", r"/store/([0-9a-f]{64})", "put"),
]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *arguments: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        self.handle_request()

    do_POST = do_PUT = do_GET

    def handle_request(self) -> None:
        body = self.read_body()
        path = self.path.partition("?")[0]
        found = ((kind, re.fullmatch(pattern, path)) for method, pattern, kind in KINDS if method == self.command)
        kind, match = next(((kind, match) for kind, match in found if match), ("", None))
        if match is None:
            return self.answer(404, {"error": f"{self.command} {path} is not in the fake hub"})
        self.hub.requests.append(kind)
        if kind == self.hub.holding and not self.hub.release.is_set():
            self.hub.held.set()
            self.hub.release.wait(60)
            self.close_connection = True
            return None
        if self.hub.failures.get(kind):
            return self.answer(self.hub.failures[kind].pop(0), {"error": "broken for a moment"})
        if kind != "put" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid credentials in Authorization header"})
        name = match[1] if match.groups() else ""
        if kind in ("info", "tree", "preupload", "commit", "settings", "batch") and name not in self.hub.repos:
            return self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        return getattr(self, f"on_{kind}")(name, body)

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline().strip(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        for key, text in {
            "Content-Type": "application/json",
            "Content-Length": str(len(content)),
            **(headers or {}),
        }.items():
            self.send_header(key, text)
        self.end_headers()
        self.wfile.write(content)

    def on_whoami(self, _: str, __: bytes) -> None:
        self.answer(200, {"type": "user", "name": "owner", "orgs": [], "auth": {"type": "access_token"}})

    def on_create(self, _: str, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        status = 409 if name in self.hub.repos else 200
        self.hub.repos.setdefault(name, Repo(private=asked["visibility"] == "private"))
        self.answer(status, {"url": f"{self.hub.url}/{name}", "name": name})

    def on_validate(self, _: str, body: bytes) -> None:
        header = yaml.safe_load(json.loads(body)["content"].split("---")[1])
        fine = header["license"] == "other" and re.fullmatch(r"[a-z0-9.-]+", header["license_name"])
        self.answer(200 if fine else 400, {"errors": [] if fine else [{"message": "license"}], "warnings": []})

    def on_info(self, name: str, _: bytes) -> None:
        repo = self.hub.repos[name]
        self.answer(200, {"id": name, "private": repo.private, "sha": repo.commits[-1], "tags": [], "downloads": 0})

    def on_tree(self, name: str, _: bytes) -> None:
        entries = []
        for path, content in sorted(self.hub.repos[name].files.items()):
            git = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
            entry: dict[str, Any] = {"type": "file", "oid": git, "size": len(content), "path": path}
            if path.endswith(LARGE):
                entry["oid"] = "1" * 40  # of the pointer
                entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
            entries.append(entry)
        folders = {path.rpartition("/")[0] for path in self.hub.repos[name].files if "/" in path}
        self.answer(200, entries + [{"type": "directory", "oid": "2" * 40, "path": path} for path in sorted(folders)])

    def on_preupload(self, _: str, body: bytes) -> None:
        paths = [file["path"] for file in json.loads(body)["files"]]
        modes = {path: "lfs" if path.endswith(LARGE) else "regular" for path in paths}
        self.answer(
            200, {"files": [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]}
        )

    def on_batch(self, _: str, body: bytes) -> None:
        objects = []
        for asked in json.loads(body)["objects"]:
            action = {"upload": {"href": f"{self.hub.url}/store/{asked['oid']}", "header": {}}}
            objects.append(asked if asked["oid"] in self.hub.store else asked | {"actions": action})
        self.answer(200, {"transfer": "basic", "objects": objects})

    def on_put(self, oid: str, body: bytes) -> None:
        whole = hashlib.sha256(body).hexdigest() == oid
        if whole:
            self.hub.store[oid] = body
        self.answer(200 if whole else 400, {})

    def on_commit(self, name: str, body: bytes) -> None:
        repo, lines = self.hub.repos[name], [json.loads(line) for line in body.splitlines()]
        if lines[0]["value"].get("parentCommit") != repo.commits[-1]:
            return self.answer(412, {"error": "A commit has happened since"})
        files = dict(repo.files)
        for line in lines[1:]:
            value = line["value"]
            match line["key"]:
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.hub.store[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
        repo.files = files
        repo.commits.append(hashlib.sha1(body).hexdigest())
        if self.hub.lose_answer:
            self.hub.lose_answer = False
            return self.answer(500, {"error": "broken after the commit"})
        return self.answer(200, {"commitUrl": f"{self.hub.url}/{name}/commit/x", "commitOid": repo.commits[-1]})

    def on_settings(self, name: str, body: bytes) -> None:
        self.hub.repos[name].private = json.loads(body)["visibility"] == "private"
        if not self.hub.repos[name].private:
            self.hub.repos[name].seen_public.append(set(self.hub.repos[name].files))
        self.answer(200, {})


@contextmanager
def run_hub() -> Iterator[Hub]:
    """The hub, as long as the block lasts."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OwnHandler", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        hub.release.set()
        server.shutdown()
        server.server_close()
        thread.join()
