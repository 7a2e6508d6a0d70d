"""A stand-in for the hub: as much of its HTTP API as it takes to make a repository, commit files to it and load them.

It follows what huggingface_hub sends: create, validate the card, ask which files are large, upload those by the LFS
protocol and check their SHA-256, commit; then revisions, trees and `resolve` with the headers that a download needs.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import transformers.utils.hub

TOKEN = "hf_stand_in"  # no secret: nothing but this stand-in takes it


@dataclass
class Hub:
    """What the stand-in holds. `fails`: paths, by pattern, to which it answers with an error of 503."""

    address: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    blobs: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)
    large: list[str] = field(default_factory=list)
    fails: str = ""

    def sha(self, name: str) -> str:
        files = self.repositories[name]
        return hashlib.sha1(b"".join(path.encode() + files[path] for path in sorted(files))).hexdigest()


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer's body waits 40 ms for the receipt of its head

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, code: int, body: Any = None, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def handle_any(self) -> None:
        body, hub = self.body(), self.hub
        path = self.path.partition("?")[0]
        if hub.fails and re.search(hub.fails, path):
            return self.answer(503, {"error": "out of order"})
        if path.startswith("/upload/"):  # the address itself is the permission, as with the hub's storage
            if hashlib.sha256(body).hexdigest() != path.removeprefix("/upload/"):
                return self.answer(400, {"error": "other contents"})
            hub.blobs[path.removeprefix("/upload/")] = body
            return self.answer(200, {})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid credentials"}, {"X-Error-Code": "Unauthorized"})
        found = re.match(r"/(?:api/models/)?([\w-]+/[\w.-]+?)(?:\.git)?(?:/(.*))?$", path)
        if path == "/api/whoami-v2":
            return self.answer(200, {"name": "me", "type": "user", "orgs": []})
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if name in hub.repositories:
                return self.answer(409, {"error": "exists", "url": f"{hub.address}/{name}"})
            hub.repositories[name] = {}
            if asked.get("visibility") == "private" or asked.get("private"):
                hub.private.add(name)
            return self.answer(200, {"url": f"{hub.address}/{name}"})
        if not found or found[1] not in hub.repositories:
            return self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        name, rest = found[1], found[2] or ""
        if self.command == "POST":
            return self.write(name, rest, body)
        return self.read(name, rest)

    def write(self, name: str, rest: str, body: bytes) -> None:
        hub, files = self.hub, self.hub.repositories[name]
        if rest == "preupload/main":
            asked = json.loads(body)["files"]
            modes = [{"path": file["path"], "shouldIgnore": False} for file in asked]
            for mode in modes:
                large = mode["path"].endswith(".safetensors")
                mode["uploadMode"] = "lfs" if large else "regular"
                hub.large += [mode["path"]] * large
            return self.answer(200, {"files": modes})
        if rest == "info/lfs/objects/batch":
            objects = [
                {**asked, "actions": {"upload": {"href": f"{hub.address}/upload/{asked['oid']}"}}}
                for asked in json.loads(body)["objects"]
            ]
            return self.answer(200, {"transfer": "basic", "objects": objects})
        if rest == "commit/main":
            for line in body.splitlines():
                value = json.loads(line)["value"]
                kind = json.loads(line)["key"]
                if kind == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif kind == "lfsFile":
                    files[value["path"]] = hub.blobs[value["oid"]]
                else:
                    hub.commits.append(value["summary"])
            return self.answer(200, {"commitUrl": f"{hub.address}/{name}/commit/x", "commitOid": hub.sha(name)})
        return self.answer(404, {"error": f"no such address: {rest}"})

    def read(self, name: str, rest: str) -> None:
        files, sha = self.hub.repositories[name], self.hub.sha(name)
        if rest == "" or rest.startswith("revision/"):
            siblings = [{"rfilename": path} for path in files]
            about = {"id": name, "sha": sha, "private": name in self.hub.private, "tags": []}
            return self.answer(200, {**about, "siblings": siblings})
        if rest.startswith("tree/"):
            folder = "/".join(rest.split("/")[2:])
            entries = [path for path in files if path.startswith(folder)]
            if folder and not entries:
                return self.answer(404, {"error": "no such folder"}, {"X-Error-Code": "EntryNotFound"})
            return self.answer(
                200, [{"type": "file", "path": path, "size": len(files[path]), "oid": sha} for path in entries]
            )
        if rest.startswith("resolve/"):
            path = "/".join(rest.split("/")[2:])
            if path not in files:
                return self.answer(404, {"error": "no such file"}, {"X-Error-Code": "EntryNotFound"})
            etag = hashlib.sha256(files[path]).hexdigest()
            return self.answer(200, files[path], {"ETag": f'"{etag}"', "X-Repo-Commit": sha})
        return self.answer(404, {"error": f"no such address: {rest}"})

    do_GET = do_HEAD = do_POST = do_PUT = handle_any


@contextmanager
def serving() -> Iterator[Hub]:
    """The stand-in, on a free port of this machine."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def take_for_the_hub(hub: Hub, home: Path, patch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_DISABLE_XET do for a process that has not yet read them."""
    constants = huggingface_hub.constants
    patch.setenv("HF_TOKEN", TOKEN)
    patch.setattr(constants, "ENDPOINT", hub.address)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.address + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_CACHE", str(home))
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)  # recent versions keep one
