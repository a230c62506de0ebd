# SPDX-License-Identifier: Apache-2.0
"""
A hub on 127.0.0.1: what `huggingface_hub`, `diffusers` and `datasets` ask of the real one, answered from folders.

A repository may be gated, answers may fail as planned, and what a client uploads becomes a folder. Clients go there by
`Hub.environment`.
"""

import base64
import contextlib
import hashlib
import json
import re
import socket
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit


LARGE = 10_000  # bytes; a larger upload goes by LFS


class Hub(ThreadingHTTPServer):
    """
    Args:
        root (`pathlib.Path`): Uploads become `root/OWNER/NAME`; clients keep their cache in `root/cache`.

    Attributes:
        requests (`list[tuple[str, str]]`): Method and path of every request so far.
        failures (`dict[str, list]`): By a part of a path, how the next requests to it fail: a status code, or `"cut"`
            for a connection that breaks in the middle of the file.
        readable (`set[str]`): Repositories that nobody may write to.
        allowed (`set[str]`): Tokens that gated repositories are open to. `hf_known` is valid, and not among them.
        uploaded (`dict[str, dict]`): Of each repository that was created, what the client asked for.
    """

    daemon_threads = True

    def __init__(self, root):
        super().__init__(("127.0.0.1", 0), Handler)
        self.root, self.repos, self.objects, self.uploaded = Path(root), {}, {}, {}
        self.requests, self.failures, self.allowed, self.readable = [], {}, {"hf_allowed"}, set()
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.environment = {"HF_ENDPOINT": self.url, "HF_HOME": str(self.root / "cache"), "HF_HUB_OFFLINE": "0"}
        self.environment["HF_HUB_DISABLE_XET"] = "1"  # its storage is another server's
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @contextlib.contextmanager
    def away(self):
        """During this block nobody is there."""
        self.shutdown()
        self.socket.close()
        yield
        self.socket = socket.socket(self.address_family, self.socket_type)
        self.server_bind()
        self.server_activate()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def close(self):
        self.shutdown()
        self.server_close()

    def add(self, name, folder, kind="models", gated=False, **revisions):
        """Serve `folder` as the repository `name`; `revisions` are further folders by the name of their branch."""
        folders = {"main": Path(folder)} | {revision: Path(path) for revision, path in revisions.items()}
        self.repos[kind, name] = {"gated": gated, "folders": folders}

    def downloads(self):
        """How often each file was sent, by its path in its repository."""
        found = [re.fullmatch(r".*/resolve/[^/]+/(.*)", path) for method, path in self.requests if method == "GET"]
        return Counter(unquote(match[1]) for match in found if match)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        """Say nothing: the requests are in `Hub.requests`."""

    def do_GET(self):
        url = urlsplit(self.path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.query, self.cut = parse_qs(url.query), False
        self.server.requests.append((self.command, url.path))
        for part, failures in self.server.failures.items():
            wanted = self.command == "GET" or not failures or failures[0] != "cut"
            if part in url.path and failures and wanted:
                failure = failures.pop(0)
                self.cut = failure == "cut"
                if not self.cut:
                    return self.send(failure, b"a planned failure")
        for pattern, action in ROUTES.items():
            if match := re.fullmatch(pattern, url.path):
                return action(self, **{name: unquote(value) for name, value in match.groupdict().items() if value})
        return self.error(404, "EntryNotFound")

    do_HEAD = do_POST = do_PUT = do_GET

    def send(self, status, data=b"", **headers):
        self.send_response(status)
        for name, value in ({"Content_Length": len(data)} | headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if self.cut else data)
            self.close_connection = self.cut

    def json(self, value):
        self.send(200, json.dumps(value).encode(), Content_Type="application/json")

    def error(self, status, code):
        self.send(status, code.encode(), X_Error_Code=code, X_Error_Message=f"{code}, says the hub of the tests")

    def token(self):
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def place(self, kind, repo, revision="main", files=True):
        """Folder and commit of a revision; `None`, and the answer is sent, where the client may not see it."""
        found = self.server.repos.get((kind, repo))
        if found is None:  # the real hub tells those who are not logged in that they may not see it
            return self.error(404 if self.token() else 401, "RepoNotFound")
        if found["gated"] and files and self.token() not in self.server.allowed:
            return self.error(403 if self.token() else 401, "GatedRepo")
        for branch, folder in found["folders"].items():
            commit = hashlib.sha1(f"{repo} {branch}".encode()).hexdigest()
            if revision in (branch, commit, f"refs/heads/{branch}"):
                return folder, commit
        return self.error(404, "RevisionNotFound")

    # What clients ask for

    def info(self, kind, repo, revision="main"):
        if place := self.place(kind, repo, revision, files=False):  # the list of files is public, also of a gated one
            folder, commit = place
            siblings = [{"rfilename": name} for name in files_of(folder)]
            gated = "auto" if self.server.repos[kind, repo]["gated"] else False
            self.json({"id": repo, "sha": commit, "siblings": siblings, "private": False, "gated": gated, "tags": []})

    def tree(self, kind, repo, revision="main", path=""):
        if place := self.place(kind, repo, revision, files=False):
            folder = place[0] / path
            found = (
                folder.rglob("*") if self.query.get("recursive", ["false"])[0].lower() == "true" else folder.glob("*")
            )
            self.json([entry(place[0], item.relative_to(place[0]).as_posix()) for item in sorted(found)])

    def paths_info(self, kind, repo, revision="main"):
        if place := self.place(kind, repo, revision, files=False):
            asked = json.loads(self.body)["paths"] if self.body[:1] == b"{" else parse_qs(self.body.decode())["paths"]
            there = set(files_of(place[0]))
            self.json([entry(place[0], name) for name in asked if name in there])

    def resolve(self, repo, revision, path, kind="models"):
        if place := self.place("datasets" if kind == "datasets/" else "models", repo, revision):
            folder, commit = place
            if path not in files_of(folder):
                return self.send(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            data = (folder / path).read_bytes()
            etag = f'"{hashlib.sha256(data).hexdigest()}"'
            headers = {"ETag": etag, "X_Repo_Commit": commit, "Accept_Ranges": "bytes", "X_Linked_Size": len(data)}
            start = re.fullmatch(r"bytes=(\d+)-.*", self.headers.get("Range") or "")
            if start and self.command == "GET":
                first = int(start[1])
                headers["Content_Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
                return self.send(206, data[first:], **headers)
            return self.send(200, data, **headers)

    def whoami(self):
        if self.token() not in {"hf_known"} | self.server.allowed:
            return self.error(401, "InvalidToken")
        return self.json({"type": "user", "name": "me", "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def create(self):
        if self.token() not in {"hf_known"} | self.server.allowed:
            return self.error(401, "InvalidToken")
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if ("models", name) in self.server.repos:
            return self.send(409, json.dumps({"url": f"{self.server.url}/{name}"}).encode())
        folder = self.server.root / name
        folder.mkdir(parents=True)
        self.server.add(name, folder)
        self.server.uploaded[name] = asked
        return self.json({"url": f"{self.server.url}/{name}"})

    def may_write(self, kind, repo):
        if repo in self.server.readable:
            return self.error(403, "Forbidden")
        return self.send(200)

    def preupload(self, kind, repo, revision):
        files = json.loads(self.body)["files"]
        modes = {file["path"]: "lfs" if file["size"] > LARGE else "regular" for file in files}
        self.json({"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]})

    def lfs_batch(self, repo):
        upload = f"{self.server.url}/lfs/"
        objects = [
            {"oid": o["oid"], "size": o["size"], "actions": {"upload": {"href": upload + o["oid"]}}}
            for o in json.loads(self.body)["objects"]
        ]
        self.json({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.send(400, b"other bytes than were announced")
        self.server.objects[oid] = self.body
        return self.send(200)

    def commit(self, kind, repo, revision):
        if place := self.place(kind, repo, revision):
            for line in self.body.splitlines():
                record = json.loads(line)
                value, data = record["value"], None
                if record["key"] == "file":
                    data = base64.b64decode(value["content"])
                elif record["key"] == "lfsFile":
                    data = self.server.objects[value["oid"]]
                if data is not None:
                    path = place[0] / value["path"]
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(data)
            self.json({"commitUrl": f"{self.server.url}/{repo}/commit/{place[1]}", "commitOid": place[1]})

    def validate_yaml(self):
        self.json({"errors": [], "warnings": []})


def files_of(folder):
    return [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]


def entry(folder, name):
    """A file or folder as the hub lists it."""
    if (folder / name).is_dir():
        return {"type": "directory", "path": name, "size": 0, "oid": hashlib.sha1(name.encode()).hexdigest()}
    data = (folder / name).read_bytes()
    return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}


REPO, KIND = r"(?P<repo>[^/]+/[^/]+)", r"(?P<kind>models|datasets)"
ROUTES = {
    rf"/api/{KIND}/{REPO}": Handler.info,
    rf"/api/{KIND}/{REPO}/revision/(?P<revision>[^/]+)": Handler.info,
    rf"/api/{KIND}/{REPO}/tree/(?P<revision>[^/]+)(?:/(?P<path>.*))?": Handler.tree,
    rf"/api/{KIND}/{REPO}/paths-info/(?P<revision>[^/]+)": Handler.paths_info,
    rf"/api/{KIND}/{REPO}/preupload/(?P<revision>[^/]+)": Handler.preupload,
    rf"/api/{KIND}/{REPO}/commit/(?P<revision>[^/]+)": Handler.commit,
    rf"/api/{KIND}/{REPO}/auth-check/write": Handler.may_write,
    r"/api/whoami-v2": Handler.whoami,
    r"/api/repos/create": Handler.create,
    r"/api/validate-yaml": Handler.validate_yaml,
    rf"/{REPO}\.git/info/lfs/objects/batch": Handler.lfs_batch,
    r"/lfs/(?P<oid>[0-9a-f]+)": Handler.lfs_put,
    rf"/(?P<kind>datasets/)?{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.*)": Handler.resolve,
}
