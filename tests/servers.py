"""Servers on this machine, for what would otherwise need a network."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

HUB_TOKEN = "hf_0123456789abcdefghijklmnopqrstuvwx"


class LocalServer:
    """`with Server(…) as server`: its `answer(request, body)` answers what comes to `url`."""

    def __init__(self):
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _answer(self):
                server.answer(self, self.rfile.read(int(self.headers["Content-Length"] or 0)))

            do_GET = do_HEAD = do_POST = _answer  # noqa: N815

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def __enter__(self):
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()


class Server(LocalServer):
    """Serves `files` by path; `stop_after` bytes it hangs up, `times` times."""

    def __init__(self, files, stop_after=None, times=0, ranges=True):
        self.files, self.stop_after, self.times, self.ranges = files, stop_after, times, ranges
        self.requested, self.busy, self.weak = [], 0, False
        self.altered_once = {}  # by path, what is sent the first time
        super().__init__()

    def answer(self, request, _):
        with_body = request.command != "HEAD"
        path = request.path.split("?")[0]
        body = self.files.get(path)
        if body is None or self.busy:
            request.send_response(503 if body else 404)
            self.busy = max(0, self.busy - 1)
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        etag = f'"{hashlib.sha256(body).hexdigest()}"'
        accepted = ("Sat, 21 Nov 2026 10:00:00 GMT", None if self.weak else etag)
        asked = request.headers.get("Range")
        self.requested.append((path, asked))
        start = 0
        if asked and self.ranges and request.headers.get("If-Range") in accepted:
            start = int(asked.removeprefix("bytes=").split("-")[0])
        request.send_response(206 if start else 200)
        if start:
            request.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        request.send_header("Content-Length", str(len(body) - start))
        request.send_header("ETag", f"W/{etag}" if self.weak else etag)
        request.send_header("Last-Modified", "Sat, 21 Nov 2026 10:00:00 GMT")
        request.send_header("X-Repo-Commit", "0" * 40)
        request.end_headers()
        if not with_body:
            return
        body = self.altered_once.pop(path, body)
        if self.times and self.stop_after is not None:
            self.times -= 1
            request.wfile.write(body[start : start + self.stop_after])
            request.wfile.flush()
            request.close_connection = True
            return
        request.wfile.write(body[start:])


def weights_hub(folder, repository, corrupt=()):
    """The part of the hub's interface that its client uses, over a folder."""
    files, siblings, tree = {}, [], []
    for path in sorted(f for f in folder.rglob("*") if f.is_file()):
        name, body = str(path.relative_to(folder)), path.read_bytes()
        digest = hashlib.sha256(body).hexdigest()
        sizes = {"size": len(body), "pointerSize": 100}
        siblings.append({"rfilename": name, "size": len(body), "blobId": git_id(body)})
        tree.append({"type": "file", "path": name, "size": len(body), "oid": digest[:40]})
        if path.suffix == ".safetensors":
            siblings[-1]["lfs"] = {"sha256": digest} | sizes
            tree[-1]["lfs"] = {"oid": digest} | sizes
        if name in corrupt:
            body = body[:-1] + bytes([body[-1] ^ 1])
        files[f"/{repository}/resolve/main/{name}"] = body
        files[f"/{repository}/resolve/{'0' * 40}/{name}"] = body
    info = {"id": repository, "sha": "0" * 40, "siblings": siblings, "tags": [], "private": False}
    files[f"/api/models/{repository}"] = json.dumps(info).encode()
    files[f"/api/models/{repository}/revision/main"] = files[f"/api/models/{repository}"]
    files[f"/api/models/{repository}/tree/{'0' * 40}"] = json.dumps(tree).encode()
    return Server(files)


def git_id(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub(LocalServer):
    """The part of the hub's interface that its client uses for data sets; one branch, main."""

    def __init__(self):
        self.files, self.private, self.refuses, self.commits = {}, {}, None, 0
        self.tokens, self.bodies = set(), []
        super().__init__()

    def sha(self, repository):
        content = repr(sorted((k, v) for k, v in self.files[repository].items()))
        return hashlib.sha1(content.encode()).hexdigest()

    def answer(self, request, body):
        path = unquote(urlsplit(request.path).path)
        self.tokens.add(request.headers.get("Authorization"))
        self.bodies.append(body)
        if self.refuses:
            return self.send(request, self.refuses, b"{}")
        if path == "/api/validate-yaml":
            return self.send(request, 200, b'{"errors": [], "warnings": []}')
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else None
            name = name or asked["name"]
            status = 409 if name in self.files else 200
            if status == 200:
                hidden = asked.get("private") or asked.get("visibility") == "private"
                self.files[name], self.private[name] = {".gitattributes": b"x"}, bool(hidden)
            return self.send(request, status, json.dumps({"url": f"{self.url}/{name}"}).encode())
        found = re.fullmatch(
            r"(?:/api)?/datasets/([^/]+/[^/]+)(?:/(\w+)(?:/([^/]+)(?:/(.*))?)?)?", path
        )
        if not found or found[1] not in self.files:
            error = {"X-Error-Code": "RepoNotFound"}
            return self.send(request, 404, b"{}", error)
        return self.of_repository(request, body, *found.groups())

    def of_repository(self, request, body, name, verb, revision, file):
        files = self.files[name]
        if verb == "preupload":
            asked = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                     for f in asked]  # fmt: skip
            return self.send(request, 200, json.dumps({"files": modes}).encode())
        if verb == "commit":
            self.commits += 1
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "deletedFile":
                    del files[value["path"]]
            done = {
                "commitOid": self.sha(name),
                "commitUrl": f"{self.url}/datasets/{name}/commit/{self.sha(name)}",
                "success": True,
            }
            return self.send(request, 200, json.dumps(done).encode())
        if verb == "tree":
            tree = [{"type": "file", "path": f, "size": len(b), "oid": hashlib.sha1(b).hexdigest()}
                    for f, b in files.items()]  # fmt: skip
            return self.send(request, 200, json.dumps(tree).encode())
        if verb == "resolve":
            headers = {"ETag": f'"{hashlib.sha1(files[file]).hexdigest()}"',
                       "X-Repo-Commit": self.sha(name)}  # fmt: skip
            return self.send(request, 200, files[file], headers)
        if revision not in (None, "main", self.sha(name)):
            return self.send(request, 404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        siblings = [{"rfilename": f, "size": len(b), "blobId": git_id(b)} for f, b in files.items()]
        info = {"id": name, "sha": self.sha(name), "private": self.private[name], "tags": [],
                "siblings": siblings}  # fmt: skip
        return self.send(request, 200, json.dumps(info).encode())

    def send(self, request, status, body, headers=()):
        request.send_response(status)
        for key, value in dict(headers).items():
            request.send_header(key, value)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(body)
