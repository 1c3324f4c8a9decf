"""A Hugging Face Hub on loopback, for tests: the endpoints that huggingface_hub calls, and faults on demand.

It is one process, and the real client talks to it over real connections: repositories, preupload, LFS,
commits on top of a named parent, tags, trees, files with ranges, tokens. Kept in memory, large files in a folder. Left
out: xet (to be disabled in the client), pull requests, branches besides main, history beyond what a revision holds.
"""

import base64
import contextlib
import hashlib
import json
import random
import re
import shutil
import tempfile
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml

LARGE = {
    ".safetensors",
    ".faiss",
    ".parquet",
    ".bin",
    ".npy",
}  # kept by LFS, as a new repository's .gitattributes has it
LARGE_FROM = 10 * 2**20
sleep = time.sleep  # tests replace time.sleep; a slow Hub is slow nevertheless
REPO = r"(?P<id>[^/]+/[^/]+)"
KIND = r"(?P<kind>models|datasets)"
FILES = r"/(?P<prefix>datasets/)?" + REPO


@dataclass(frozen=True)
class Blob:
    """Content of a file: bytes of a small one, the place of a large one."""

    size: int
    git: str  # SHA-1 as git names the blob; of the pointer for a large one
    sha256: str | None
    content: bytes | Path


@dataclass
class Repo:
    """One repository; `commits` maps each revision to all files at it."""

    id: str
    kind: str
    private: bool
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    main: str = ""

    def commit(self, files: dict[str, Blob]) -> str:
        self.main = hashlib.sha1(f"{self.kind}/{self.id}/{len(self.commits)}".encode()).hexdigest()
        self.commits[self.main] = files
        return self.main

    def revision(self, name: str) -> str:
        """Revision of a name. Raises Answer where there is none."""
        found = self.main if name == "main" else self.tags.get(name, name)
        if found not in self.commits:
            raise Answer(404, {"error": f"Invalid rev id: {name}"}, {"X-Error-Code": "RevisionNotFound"})
        return found


class Answer(Exception):
    """What the Hub answers: a status, JSON or bytes or a file, and headers."""

    def __init__(self, status: int, body: object = b"", headers: dict[str, str] | None = None):
        super().__init__(status)
        plain = isinstance(body, (bytes, Path))
        self.status, self.headers = status, dict(headers or {})
        self.body = body if plain else json.dumps(body).encode()
        if not plain:
            self.headers.setdefault("Content-Type", "application/json")


def git_blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def small(content: bytes) -> Blob:
    return Blob(len(content), git_blob(content), None, content)


class LocalHub:
    """Use as a context manager; it serves until the end of the block.

    Args:
        folder: where large files go. tokens: token -> user.

    A fault is a status ("500", "401", "429" which asks to wait a second), "cut" (no answer, nothing done), "lost"
    (done, but no answer), "half" (half of the body, then cut) or "slow".
    """

    def __init__(self, folder: Path, *, tokens: dict[str, str] | None = None):
        self.folder = folder
        self.tokens = tokens or {"hf_right": "me"}
        self.repos: dict[tuple[str, str], Repo] = {}
        self.requests: list[tuple[str, str, str]] = []  # method, path, status or fault
        self.received = 0  # bytes of large files
        self.closed = False
        self.lock = threading.RLock()
        self._rules: list[list] = []
        self._random: tuple[random.Random, float, tuple[str, ...]] | None = None
        folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> "LocalHub":
        handler = type("BoundHandler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.closed = True  # also for connections that are open
        self._server.shutdown()
        self._server.server_close()

    # ---- faults

    def fail(self, path: str, fault: str, *, method: str = "", times: int = 1) -> None:
        """Let the next `times` requests whose method and path match these expressions end in a fault."""
        self._rules.append([re.compile(path), method, fault, times])

    def fail_at_random(self, seed: int, probability: float, faults: tuple[str, ...]) -> None:
        """Let each request end in one of the faults with this probability."""
        self._random = (random.Random(seed), probability, faults)

    def heal(self) -> None:
        """No faults from now on."""
        self._rules, self._random = [], None

    def fault_of(self, method: str, path: str) -> str | None:
        with self.lock:
            for rule in self._rules:
                if rule[3] and rule[0].search(path) and rule[1] in ("", method):
                    rule[3] -= 1
                    return rule[2]
            if self._random and self._random[0].random() < self._random[1]:
                return self._random[0].choice(self._random[2])
        return None

    # ---- what tests look at

    def repo(self, id: str, kind: str = "models") -> Repo:
        return self.repos[kind, id]

    def read(self, id: str, path: str, *, kind: str = "models", revision: str = "main") -> bytes:
        """Content of a file at a revision."""
        repo = self.repo(id, kind)
        content = repo.commits[repo.revision(revision)][path].content
        return content.read_bytes() if isinstance(content, Path) else content

    def asked(self, path: str, *, method: str = "") -> list[tuple[str, str, str]]:
        """Requests that match."""
        return [each for each in self.requests if re.search(path, each[1]) and method in ("", each[0])]


class _Handler(BaseHTTPRequestHandler):
    """One connection: reads a request whole, lets a fault have it or finds its route, answers."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else an answer in two writes waits 40 ms for the client's acknowledgement
    wbufsize = -1
    hub: LocalHub

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        self.serve()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def serve(self) -> None:
        if self.hub.closed:
            self.close_connection = True
            return
        url = urlsplit(self.path)
        self.query, path = url.query, url.path
        fault = self.hub.fault_of(self.command, path)
        with contextlib.suppress(ConnectionError), tempfile.TemporaryFile(dir=self.hub.folder) as body:
            whole = self.receive(body, stop_half_way=fault == "half" and self.command == "PUT")
            answer = self.broken(fault) if whole else None
            answer = answer or (None if fault == "cut" or not whole else self.routed(path, body))
            self.hub.requests.append((self.command, path, fault or (str(answer.status) if answer else "client gone")))
            if answer is None or fault == "lost":
                self.close_connection = True
            else:
                self.send(answer, half=fault == "half")

    def broken(self, fault: str | None) -> Answer | None:
        if fault == "slow":
            sleep(0.05)
        if fault is None or not fault.isdigit():
            return None
        return Answer(int(fault), {"error": f"fault {fault}"}, {"Retry-After": "1"} if fault == "429" else {})

    def receive(self, body, *, stop_half_way: bool) -> bool:
        """Read the request's body, of given length or chunked; says whether all of it."""
        length = int(self.headers.get("Content-Length") or 0)
        left = length // 2 if stop_half_way else length
        while left:
            piece = self.rfile.read(min(left, 2**20))
            if not piece:
                return False
            body.write(piece)
            left -= len(piece)
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while size := int(self.rfile.readline(), 16):
                body.write(self.rfile.read(size))
                self.rfile.readline()
                if stop_half_way:
                    return False
            self.rfile.readline()
        body.seek(0)
        return not stop_half_way

    def send(self, answer: Answer, *, half: bool) -> None:
        size = len(answer.body) if isinstance(answer.body, bytes) else answer.body.stat().st_size
        start = self.range_start(answer, size)
        self.send_response(206 if start else answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        self.send_header("Content-Length", str(size - start))
        self.end_headers()
        if self.command != "HEAD":
            until = start + (size - start) // 2 if half else size
            self.send_content(answer.body, start, until)
        self.wfile.flush()
        self.close_connection = self.close_connection or half

    def send_content(self, body: bytes | Path, start: int, until: int) -> None:
        if isinstance(body, bytes):
            self.wfile.write(body[start:until])
            return
        with body.open("rb") as file:
            file.seek(start)
            while start < until:
                piece = file.read(min(2**20, until - start))
                self.wfile.write(piece)
                start += len(piece)

    def range_start(self, answer: Answer, size: int) -> int:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        return int(asked.group(1)) if asked and answer.status == 200 and int(asked.group(1)) < size else 0

    # ---- routes

    def routed(self, path: str, body) -> Answer:
        """The answer of the first route that matches."""
        try:
            user = self.user()
            for method, pattern, act in ROUTES:
                if found := re.fullmatch(pattern, path):
                    if method in (self.command, "GET" if self.command == "HEAD" else ""):
                        given = {name: unquote(value) for name, value in found.groupdict().items() if value}
                        with self.hub.lock:
                            act(self, user, body, **given)
            raise Answer(404, {"error": f"no route for {self.command} {path}"})
        except Answer as answer:
            return answer

    def user(self) -> str | None:
        """Who asks; None without a token."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if not token:
            return None
        if token not in self.hub.tokens:
            message = "Invalid credentials in Authorization header"
            raise Answer(401, {"error": message}, {"X-Error-Message": message})
        return self.hub.tokens[token]

    def found(self, user: str | None, kind: str, id: str, *, write: bool = False) -> Repo:
        """A repository that the user may read or write."""
        repo = self.hub.repos.get((kind, id))
        owner = id.split("/")[0]
        if repo is None or (repo.private and user != owner):
            raise Answer(404 if user else 401, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        if write and user != owner:
            raise Answer(403 if user else 401, {"error": "no rights"}, {"X-Error-Message": "no rights"})
        return repo

    def whoami(self, user, body) -> None:
        if user is None:
            raise Answer(401, {"error": "Unauthorized"})
        raise Answer(200, {"name": user, "type": "user", "orgs": []})

    def create(self, user, body) -> None:
        asked = json.load(body)
        kind = f"{asked.get('type') or 'model'}s"
        id = f"{asked.get('organization') or user}/{asked['name']}"
        if user is None or id.split("/")[0] != user:
            raise Answer(403 if user else 401, {"error": "no rights"}, {"X-Error-Message": "You don't have the rights"})
        url = {"url": f"{self.hub.endpoint}/{'datasets/' if kind == 'datasets' else ''}{id}"}
        if (kind, id) in self.hub.repos:
            raise Answer(409, url | {"error": "You already created this repo"})
        repo = Repo(id, kind, private=asked.get("visibility") == "private" or bool(asked.get("private")))
        repo.commit({".gitattributes": small(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n")})
        self.hub.repos[kind, id] = repo
        raise Answer(200, url)

    def validate_yaml(self, user, body) -> None:
        front = json.load(body)["content"].split("---\n")[1]
        try:
            yaml.safe_load(front)
        except yaml.YAMLError as error:
            raise Answer(400, {"errors": [{"message": str(error)}], "warnings": []}) from error
        raise Answer(200, {"errors": [], "warnings": []})

    def info(self, user, body, kind, id, revision="main") -> None:
        repo = self.found(user, kind, id)
        oid = repo.revision(revision)
        files = repo.commits[oid]
        front = (
            re.match(r"---\n(.*?)\n---", files["README.md"].content.decode(), re.DOTALL)
            if "README.md" in files
            else None
        )
        card = (yaml.safe_load(front.group(1)) if front else None) or {}
        siblings = [{"rfilename": path} for path in sorted(files)]
        facts = {"id": id, "sha": oid, "private": repo.private, "tags": card.get("tags") or [], "cardData": card}
        raise Answer(200, facts | {"siblings": siblings, "downloads": 0, "likes": 0, "disabled": False, "gated": False})

    def preupload(self, user, body, kind, id, revision) -> None:
        repo = self.found(user, kind, id, write=True)
        files = repo.commits[repo.main]
        modes = []
        for each in json.load(body)["files"]:
            large = Path(each["path"]).suffix in LARGE or each["size"] > LARGE_FROM
            there = files.get(each["path"])
            known = {"oid": there.sha256 or there.git} if there else {}
            mode = {"path": each["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            modes.append(mode | known)
        raise Answer(200, {"files": modes})

    def batch(self, user, body, id, prefix="") -> None:
        self.found(user, "datasets" if prefix else "models", id, write=True)
        objects = []
        for each in json.load(body)["objects"]:
            entry = {"oid": each["oid"], "size": each["size"]}
            if not (self.hub.folder / each["oid"]).exists():
                upload = {"href": f"{self.hub.endpoint}/lfs/{each['oid']}"}
                verify = {"href": f"{self.hub.endpoint}/lfs/{each['oid']}/verify"}
                entry["actions"] = {"upload": upload, "verify": verify}
            objects.append(entry)
        raise Answer(200, {"transfer": "basic", "objects": objects})

    def store(self, user, body, oid) -> None:
        found = hashlib.file_digest(body, "sha256").hexdigest()
        if found != oid:
            raise Answer(400, {"error": "content does not match"})
        body.seek(0)
        partial = self.hub.folder / f"{oid}.partial"
        with partial.open("wb") as file:
            shutil.copyfileobj(body, file, 2**20)
            self.hub.received += file.tell()
        partial.rename(self.hub.folder / oid)
        raise Answer(200)

    def verify(self, user, body, oid) -> None:
        raise Answer(200 if (self.hub.folder / oid).exists() else 404, {})

    def commit(self, user, body, kind, id, revision) -> None:
        repo = self.found(user, kind, id, write=True)
        lines = [json.loads(line) for line in body]
        parent = lines[0]["value"].get("parentCommit")
        if parent and parent != repo.main:
            raise Answer(412, {"error": "A commit has happened since. Please refresh and try again."})
        files = dict(repo.commits[repo.main])
        for line in lines[1:]:
            self.change(files, line["key"], line["value"])
        oid = repo.commit(files)
        url = f"{self.hub.endpoint}/{'datasets/' if kind == 'datasets' else ''}{id}/commit/{oid}"
        raise Answer(200, {"commitOid": oid, "commitUrl": url})

    def change(self, files: dict[str, Blob], key: str, value: dict) -> None:
        """One line of a commit."""
        path = value["path"]
        if key == "file":
            files[path] = small(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            place = self.hub.folder / value["oid"]
            if not place.exists():
                raise Answer(400, {"error": f"LFS object {value['oid']} is missing"})
            pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{value['oid']}\n".encode()
            files[path] = Blob(place.stat().st_size, git_blob(pointer), value["oid"], place)
        elif key == "deletedFile" and path in files:
            del files[path]
        else:
            raise Answer(404, {"error": f"cannot {key} {path}"}, {"X-Error-Code": "EntryNotFound"})

    def tree(self, user, body, kind, id, revision, folder="") -> None:
        repo = self.found(user, kind, id)
        files = repo.commits[repo.revision(revision)]
        deep, inside = "recursive=true" in self.query.lower(), f"{folder.strip('/')}/" if folder.strip("/") else ""
        entries = []
        for path, blob in sorted(files.items()):
            name = path.removeprefix(inside)
            if path.startswith(inside) and (deep or "/" not in name):
                entries.append(_entry(path, blob))
        folders = {
            path[len(inside) :].split("/")[0]
            for path in files
            if path.startswith(inside) and "/" in path[len(inside) :]
        }
        entries += [
            {"type": "directory", "path": inside + name, "oid": "0" * 40, "size": 0} for name in sorted(folders)
        ]
        if inside and not entries:
            raise Answer(404, {"error": "no such folder"}, {"X-Error-Code": "EntryNotFound"})
        raise Answer(200, entries)

    def paths_info(self, user, body, kind, id, revision) -> None:
        repo = self.found(user, kind, id)
        files = repo.commits[repo.revision(revision)]
        text = body.read().decode()
        paths = json.loads(text)["paths"] if text.startswith("{") else re.findall(r"paths=([^&]+)", text)
        paths = [unquote(path) for path in ([paths] if isinstance(paths, str) else paths)]
        raise Answer(200, [_entry(path, files[path]) for path in paths if path in files])

    def refs(self, user, body, kind, id) -> None:
        repo = self.found(user, kind, id)
        main = {"name": "main", "ref": "refs/heads/main", "targetCommit": repo.main}
        tags = [{"name": tag, "ref": f"refs/tags/{tag}", "targetCommit": oid} for tag, oid in repo.tags.items()]
        raise Answer(200, {"branches": [main], "converts": [], "tags": tags})

    def tag(self, user, body, kind, id, revision) -> None:
        repo = self.found(user, kind, id, write=True)
        name = json.load(body)["tag"]
        if name in repo.tags:
            raise Answer(409, {"error": "Tag already exists"})
        repo.tags[name] = repo.revision(revision)
        raise Answer(200, {})

    def untag(self, user, body, kind, id, revision) -> None:
        repo = self.found(user, kind, id, write=True)
        if repo.tags.pop(revision, None) is None:
            raise Answer(404, {"error": "no such tag"}, {"X-Error-Code": "RevisionNotFound"})
        raise Answer(200, {})

    def resolve(self, user, body, id, revision, path, prefix="") -> None:
        repo = self.found(user, "datasets" if prefix else "models", id)
        oid = repo.revision(revision)
        blob = repo.commits[oid].get(path)
        headers = {"X-Repo-Commit": oid, "Accept-Ranges": "bytes"}
        if blob is None:
            raise Answer(404, {"error": "Entry not found"}, headers | {"X-Error-Code": "EntryNotFound"})
        headers |= {"ETag": f'"{blob.sha256 or blob.git}"', "Content-Type": "application/octet-stream"}
        if blob.sha256:
            headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(blob.size)}
        raise Answer(200, blob.content, headers)


def _entry(path: str, blob: Blob) -> dict:
    """A file as trees list it."""
    entry = {"type": "file", "path": path, "size": blob.size, "oid": blob.git}
    if blob.sha256:
        entry["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": 130}
    return entry


API = rf"/api/{KIND}/{REPO}"
ROUTES = (
    ("GET", r"/api/whoami-v2", _Handler.whoami),
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", r"/api/validate-yaml", _Handler.validate_yaml),
    ("GET", API, _Handler.info),
    ("GET", API + r"/revision/(?P<revision>[^/]+)", _Handler.info),
    ("POST", API + r"/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    ("POST", FILES + r"\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", _Handler.store),
    ("POST", r"/lfs/(?P<oid>[0-9a-f]{64})/verify", _Handler.verify),
    ("POST", API + r"/commit/(?P<revision>[^/]+)", _Handler.commit),
    ("GET", API + r"/tree/(?P<revision>[^/]+)(?P<folder>/.*)?", _Handler.tree),
    ("POST", API + r"/paths-info/(?P<revision>[^/]+)", _Handler.paths_info),
    ("GET", API + r"/refs", _Handler.refs),
    ("POST", API + r"/tag/(?P<revision>[^/]+)", _Handler.tag),
    ("DELETE", API + r"/tag/(?P<revision>[^/]+)", _Handler.untag),
    ("GET", FILES + r"/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
)


def point_client_at(hub: LocalHub, monkeypatch, *, cache: Path, token: str | None = "hf_right") -> list[float]:
    """Let huggingface_hub talk to this Hub, with this token and a cache of its own, and not really wait between tries.

    Returns:
        the seconds that it would have waited, growing.
    """
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    return waited
