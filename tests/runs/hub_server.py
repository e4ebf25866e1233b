"""A server on this machine with the few endpoints of the Hugging Face hub that pulling and pushing call."""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
import urllib.parse

_REPOSITORY = r"/api/models/([\w.-]+/[\w.-]+)"


class Hub:
    """Repositories in memory, and what was asked of them.

    Attributes:
      revisions: repository -> revision -> path -> content; a revision of each is `main`.
      gated: repositories whose files nobody may read.
      refusals: path of a request -> HTTP status that it is answered with.
      asked: methods and paths of all requests.
      created: body of each request that created a repository.
      commits: header and files of each commit.
      url: address of the server.
    """

    def __init__(self):
        self.revisions: dict[str, dict[str, dict[str, bytes]]] = {}
        self.gated: set[str] = set()
        self.refusals: dict[str, int] = {}
        self.asked: list[str] = []
        self.created: list[dict] = []
        self.commits: list[tuple[dict, dict[str, bytes]]] = []
        self.url = ""

    def sha(self, repository: str, revision: str) -> str:
        files = self.revisions[repository][revision]
        return hashlib.sha1(b"".join(name.encode() + files[name] for name in sorted(files))).hexdigest()

    def files(self, repository: str, revision: str) -> dict[str, bytes] | None:
        """Files of a revision, which may be a commit."""
        revisions = self.revisions[repository]
        named = revisions | {self.sha(repository, name): files for name, files in revisions.items()}
        return named.get(urllib.parse.unquote(revision))


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_):
        pass

    def answer(self, content=b"", status=200, **headers):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def wrong(self, status, code):
        self.answer({"error": f"{code} of the server"}, status, X_Error_Code=code, X_Error_Message=code)

    def do_GET(self):
        path = urllib.parse.urlsplit(self.path).path
        self.hub.asked.append(f"{self.command} {path}")
        if path in self.hub.refusals:
            return self.answer({"error": "of the server"}, self.hub.refusals[path])
        if found := re.fullmatch(rf"{_REPOSITORY}(?:/revision/([^/]+))?", path):
            return self.about(*found.groups(), lambda repository, revision, files: {
                "id": repository, "sha": self.hub.sha(repository, urllib.parse.unquote(revision)), "private": False,
                "siblings": [{"rfilename": name} for name in files], "tags": [], "downloads": 0, "likes": 0,
            })  # fmt: skip
        if found := re.fullmatch(rf"{_REPOSITORY}/tree/([^/]+)", path):
            return self.about(*found.groups(), lambda repository, revision, files: [
                {"type": "file", "path": name, "size": len(files[name]), "oid": "0" * 40} for name in files
            ])  # fmt: skip
        if found := re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", path):
            return self.file(*found.groups())
        return self.wrong(404, "NoSuchEndpoint")

    do_HEAD = do_GET

    def about(self, repository, revision, content):
        if repository not in self.hub.revisions:
            return self.wrong(401, "RepoNotFound")
        files = self.hub.files(repository, revision or "main")
        if files is None:
            return self.wrong(404, "RevisionNotFound")
        return self.answer(content(repository, revision or "main", files))

    def file(self, repository, revision, name):
        if repository in self.hub.gated:
            return self.wrong(403, "GatedRepo")
        content = (self.hub.files(repository, revision) or {}).get(name)
        if content is None:
            return self.wrong(404, "EntryNotFound")
        return self.answer(content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=revision)

    def do_POST(self):
        path, body = self.path, self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.hub.asked.append(f"POST {path}")
        if path in self.hub.refusals:
            return self.answer({"error": "of the server"}, self.hub.refusals[path])
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            wanted = json.loads(body)
            self.hub.created.append(wanted)
            repository = f"{wanted['organization']}/{wanted['name']}"
            self.hub.revisions[repository] = {"main": {".gitattributes": b""}}
            return self.answer({"url": f"{self.hub.url}/{repository}"})
        if re.fullmatch(rf"{_REPOSITORY}/preupload/[^/]+", path):
            names = [of["path"] for of in json.loads(body)["files"]]
            return self.answer(
                {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
            )
        if found := re.fullmatch(rf"{_REPOSITORY}/commit/([^/]+)", path):
            lines = [json.loads(line) for line in body.splitlines()]
            header = next(line["value"] for line in lines if line["key"] == "header")
            files = {
                line["value"]["path"]: base64.b64decode(line["value"]["content"])
                for line in lines
                if line["key"] == "file"
            }
            self.hub.commits.append((header, files))
            self.hub.revisions[found[1]][found[2]].update(files)
            url = f"{self.hub.url}/{found[1]}/commit/{self.hub.sha(*found.groups())}"
            return self.answer({"commitUrl": url, "commitOid": self.hub.sha(*found.groups())})
        return self.wrong(404, "NoSuchEndpoint")


@contextlib.contextmanager
def running():
    """Yields a `Hub` that is served while the body runs."""
    hub = Hub()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
