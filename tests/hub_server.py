"""A small server that speaks the Hugging Face Hub's API: repositories, commits, large files, downloads."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class Hub:
    """What the server holds, and what was asked of it.

    Attributes:
        repos: of each repository its commits, newest last: an id and the files by name.
        tags: of each repository the commits' names.
        asked: method and path of every request.
        uploaded: large files, by hash.
        claims: sizes that the server claims of files, whatever is true.
    """

    def __init__(self) -> None:
        self.repos: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.tags: dict[str, dict[str, str]] = {}
        self.asked: list[str] = []
        self.uploaded: dict[str, bytes] = {}
        self.claims: dict[str, int] = {}
        self.url = ""

    def commit(self, repo: str, files: dict[str, bytes]) -> str:
        """Add files to what a repository holds."""
        commits = self.repos.setdefault(repo, [])
        whole = {**(commits[-1][1] if commits else {}), **files}
        text = repr((repo, len(commits), sorted((name, hashlib.sha256(data).digest()) for name, data in whole.items())))
        commits.append((hashlib.sha1(text.encode()).hexdigest(), whole))
        return commits[-1][0]

    def find(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The commit of a branch, tag or id."""
        commits = self.repos[repo]
        if revision == "main":
            return commits[-1] if commits else ("0" * 40, {})
        revision = self.tags.get(repo, {}).get(revision, revision)
        return next((each for each in commits if each[0] == revision), None)


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._get(body=False)

    def do_GET(self) -> None:
        self._get(body=True)

    def do_POST(self) -> None:
        path = self._asked()
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if path == "/api/repos/create":
            asked = json.loads(content)
            repo = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            new = repo not in self.hub.repos
            self.hub.repos.setdefault(repo, [])
            self._json({"url": f"{self.hub.url}/{repo}", "id": repo}, 200 if new else 409)
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif path.endswith("/preupload/main"):
            files = json.loads(content)["files"]
            self._json(
                {
                    "files": [
                        {
                            "path": each["path"],
                            "uploadMode": "lfs" if each["path"].endswith(".safetensors") else "regular",
                            "shouldIgnore": False,
                            "oid": None,
                        }
                        for each in files
                    ]
                }
            )
        elif path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(content)["objects"]
            self._json(
                {
                    "transfer": "basic",
                    "objects": [
                        {**each, "actions": {"upload": {"href": f"{self.hub.url}/upload/{each['oid']}"}}}
                        for each in objects
                    ],
                }
            )
        elif path.endswith("/commit/main"):
            repo = path.removeprefix("/api/models/").removesuffix("/commit/main")
            files = {}
            for line in content.splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    files[value["path"]] = self.hub.uploaded[value["oid"]]
            oid = self.hub.commit(repo, files)
            self._json({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo}/commit/{oid}"})
        else:
            self._json({"error": "unknown"}, 404)

    def do_PUT(self) -> None:
        path = self._asked()
        self.hub.uploaded[path.removeprefix("/upload/")] = self.rfile.read(int(self.headers["Content-Length"]))
        self._json({})

    def _get(self, body: bool) -> None:
        path = self._asked()
        if path.startswith("/api/"):
            repo, _, rest = path.removeprefix("/api/models/").partition("/revision/")
            self._json({"id": repo, "sha": rest, "siblings": []} if repo in self.hub.repos else {}, 200)
            return
        repo, _, rest = path.lstrip("/").partition("/resolve/")
        revision, _, name = rest.partition("/")
        if repo == "some/gated":
            self._failed("GatedRepo", 403)
        elif repo not in self.hub.repos:
            self._failed("RepoNotFound", 404)
        elif (found := self.hub.find(repo, revision)) is None:
            self._failed("RevisionNotFound", 404)
        elif name not in found[1]:
            self._failed("EntryNotFound", 404, found[0])
        else:
            data = found[1][name]
            self.send_response(200)
            self.send_header("X-Repo-Commit", found[0])
            self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
            self.send_header("Content-Length", str(self.hub.claims.get(name, len(data))))
            self.end_headers()
            if body:
                self.wfile.write(data)

    def _asked(self) -> str:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        return path

    def _json(self, content: object, code: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _failed(self, what: str, code: int, commit: str | None = None) -> None:
        self.send_response(code)
        self.send_header("X-Error-Code", what)
        if commit:
            self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", "0")
        self.end_headers()


@contextmanager
def serving() -> Iterator[Hub]:
    """A server of this machine, until the end of the block."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OfHub", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
