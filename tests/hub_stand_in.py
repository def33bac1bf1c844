"""What huggingface_hub asks of the hub, answered by a server in this process. It keeps repositories in memory."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

WRITER, READER = "hf_writer", "hf_reader"


def git_hash(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repository:
    private: bool = False
    gated: bool = False
    branches: dict = field(default_factory=lambda: {"main": {}})  # name to bytes by path
    commits: list = field(default_factory=list)  # what each changed
    snapshots: dict = field(default_factory=dict)  # commit to bytes by path

    def commit(self, branch, changes):
        files = {path: content for path, content in (self.branches[branch] | changes).items() if content is not None}
        self.branches[branch] = files
        self.commits.append(changes)
        return self.sha(branch)

    def sha(self, branch):
        """A hash of the files: the branch's commit."""
        digest = hashlib.sha1(repr(sorted((p, git_hash(c)) for p, c in self.branches[branch].items())).encode()).hexdigest()
        self.snapshots[digest] = self.branches[branch]
        return digest

    def files(self, revision):
        if revision in self.branches:
            self.sha(revision)
            return self.branches[revision]
        return self.snapshots.get(revision)


class Hub:
    """The server's state, and how it may misbehave."""

    def __init__(self):
        self.repositories = {}
        self.large = {}  # by sha256
        self.address = ""
        self.claims_sha = None  # a commit's name, whatever the commit
        self.sends = {}  # other bytes than the listed ones, by path
        self.breaks_off = set()  # paths of which half is sent
        self.refuses_with = None  # a status for everything
        self.calls_large = (".safetensors", ".gguf")

    def add(self, name, files, **settings):
        self.repositories[name] = repository = Repository(**settings)
        repository.commit("main", files)
        return repository

    def entry(self, path, content):
        item = {"type": "file", "path": path, "size": len(content), "oid": git_hash(content)}
        if path.endswith(self.calls_large):
            digest = hashlib.sha256(content).hexdigest()
            self.large[digest] = content
            item["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 130}
        return item


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> Hub:
        return self.server.hub

    def log_message(self, format, *args):  # noqa: A002
        pass

    def do_GET(self):
        self.answer(self.read)

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self):
        self.answer(self.write)

    def do_PUT(self):
        body = self.body()
        self.hub.large[hashlib.sha256(body).hexdigest()] = body
        self.send(200, {})

    def answer(self, method):
        body, path = self.body(), unquote(urlsplit(self.path).path).strip("/")
        if self.hub.refuses_with:
            return self.send(self.hub.refuses_with, {"error": "no"})
        return method(path, body)

    @property
    def token(self):
        return (self.headers.get("authorization") or "").removeprefix("Bearer ")

    def body(self):
        if self.headers.get("transfer-encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("content-length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def send(self, status, content, **headers):
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"content-length": str(len(raw))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def seen(self, name):
        """The repository, if the one who asks can see it; else the answer is sent."""
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and not self.token):
            self.send(404 if self.token else 401, {"error": "Repository not found"}, x_error_code="RepoNotFound")
            return None
        if repository.gated and self.token != WRITER:
            self.send(403, {"error": "gated"}, x_error_code="GatedRepo")
            return None
        return repository

    def read(self, path, body):
        parts = path.split("/")
        if parts[:2] == ["api", "models"]:
            name, rest = "/".join(parts[2:4]), parts[4:]
            repository = self.seen(name)
            return repository and self.describe(name, repository, *rest)
        return self.resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:])) if parts[2] == "resolve" else self.send(404, {})

    def describe(self, name, repository, what="revision", *revision):
        revision = "/".join(revision) or "main"
        files = repository.files(revision)
        if files is None:
            return self.send(404, {"error": "no revision"}, x_error_code="RevisionNotFound")
        if what == "tree":
            return self.send(200, [self.hub.entry(path, content) for path, content in files.items()])
        sha = self.hub.claims_sha or (repository.sha(revision) if revision in repository.branches else revision)
        siblings = [{"rfilename": path} for path in files]
        return self.send(200, {"id": name, "sha": sha, "private": repository.private, "siblings": siblings, "tags": []})

    def resolve(self, name, revision, path):
        repository = self.seen(name)
        if repository is None:
            return None
        content = (repository.files(revision) or {}).get(path)
        if content is None:
            return self.send(404, {"error": "no file"}, x_error_code="EntryNotFound")
        item, sent = self.hub.entry(path, content), self.hub.sends.get(path, content)
        headers = {"x_repo_commit": revision, "etag": f'"{item["oid"]}"'}
        if path in self.hub.breaks_off and self.command == "GET":
            self.send_response(200)
            self.send_header("content-length", str(len(sent)))
            self.end_headers()
            self.wfile.write(sent[: len(sent) // 2])
            self.close_connection = True
            return None
        if "lfs" in item:
            headers |= {"x_linked_etag": f'"{item["lfs"]["oid"]}"', "x_linked_size": str(len(content))}
        return self.send(200, sent, **headers)

    def write(self, path, body):
        if not self.token:
            return self.send(401, {"error": "Invalid username or password."})
        if path == "api/validate-yaml":
            return self.send(200, {"errors": [], "warnings": []})
        if self.token != WRITER:
            return self.send(403, {"error": "Forbidden"})
        if path == "api/repos/create":
            return self.create(json.loads(body))
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [self.upload(item) for item in json.loads(body)["objects"]]
            return self.send(200, {"transfer": "basic", "objects": objects})
        if path == "verify":
            item = json.loads(body)
            return self.send(200 if len(self.hub.large[item["oid"]]) == item["size"] else 422, {})
        name, what, branch = "/".join(path.split("/")[2:4]), path.split("/")[4], "/".join(path.split("/")[5:])
        repository = self.seen(name)
        return repository and getattr(self, what)(name, repository, branch, body)

    def create(self, asked):
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        there = name in self.hub.repositories
        if not there:
            private = asked.get("visibility") == "private" or asked.get("private", False)
            self.hub.add(name, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=private)
        return self.send(409 if there else 200, {"url": f"{self.hub.address}/{name}", "name": name, "error": "exists"})

    def upload(self, item):
        if item["oid"] in self.hub.large:
            return item
        href = f"{self.hub.address}/large/{item['oid']}"
        return item | {"actions": {"upload": {"href": href}, "verify": {"href": f"{self.hub.address}/verify"}}}

    def branch(self, name, repository, branch, body):
        if branch in repository.branches:
            return self.send(409, {"error": "exists"})
        repository.branches[branch] = dict(repository.branches["main"])
        return self.send(200, {})

    def preupload(self, name, repository, branch, body):
        files = []
        for item in json.loads(body)["files"]:
            mode = "lfs" if item["path"].endswith(self.hub.calls_large) else "regular"
            files.append({"path": item["path"], "uploadMode": mode, "shouldIgnore": False})
        return self.send(200, {"files": files})

    def commit(self, name, repository, branch, body):
        changes = {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            match line["key"]:
                case "file":
                    changes[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    changes[value["path"]] = self.hub.large[value["oid"]]
                case "deletedFile":
                    changes[value["path"]] = None
        commit = repository.commit(branch, changes)
        url = f"{self.hub.address}/{name}/commit/{commit}"
        return self.send(200, {"success": True, "commitOid": commit, "commitUrl": url})


@contextmanager
def hub_stand_in():
    """Yield a `Hub` that listens at its `address`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.hub = hub = Hub()
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
