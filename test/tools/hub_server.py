"""A Hugging Face hub and a music site on 127.0.0.1, with faults by plan and a log of requests.

Speaks as much of the hub's API as huggingface_hub 1 and 2 ask for, with HF_ENDPOINT at `Hub.url`:

    GET       /api/datasets/{repo}[/revision/{revision}]     commit sha and file names
    GET       /api/datasets/{repo}/tree/{revision}[/{path}]  files with size and SHA-256
    POST      /api/datasets/{repo}/paths-info/{revision}     the same, of the paths asked for
    GET HEAD  /datasets/{repo}/resolve/{revision}/{path}     a file; its ETag is its SHA-256
    GET HEAD  /media/{name}                                  a track, or what else `Hub.media` holds

Files and media honour Range. Refusals carry the hub's X-Error-Code.

A fault is planned for a path and used up by one GET or POST of it (HEAD only if `head` is set);
`Hub.always` holds those that last. yt-dlp asks twice for a direct link, first for its type, then
for its bytes: `hub.plan[path] = [None, Fault(drop=100)]` lets the first pass.

    with Hub("owner/name") as hub:
        revision = hub.commit({"data/x.parquet": shard})
        hub.media["x.ogg"] = audio
        hub.plan["/media/x.ogg"] = [Fault(503, retry_after="1"), None, Fault(drop=1000)]
"""

import collections
import dataclasses
import hashlib
import http.server
import json
import mimetypes
import threading
import time
import urllib.parse

TYPES = {".ogg": "audio/ogg", ".opus": "audio/ogg", ".webm": "audio/webm", ".m4a": "audio/mp4", ".flac": "audio/flac"}
HTML = b"<!DOCTYPE html><html><head><title>Before you continue</title></head><body>Consent</body></html>"


@dataclasses.dataclass(frozen=True)
class Fault:
    """What one request gets instead of the right answer.

    Attributes:
        status: HTTP status of an answer without the file.
        retry_after: Its Retry-After header.
        body: Bytes in place of the right ones, with status 200.
        content_type: Their type; the right one if None.
        cut: Length of the answer, the whole file's last bytes missing, under a Content-Length that agrees.
        drop: Body bytes after which the connection closes too early; -1 closes before the headers.
        stall: Body bytes after which the answer waits for `Hub.released`; sets `Hub.stalled`.
        head: HEAD gets it too.
    """

    status: int | None = None
    retry_after: str | None = None
    body: bytes | None = None
    content_type: str | None = None
    cut: int | None = None
    drop: int | None = None
    stall: int | None = None
    head: bool = False


@dataclasses.dataclass(frozen=True)
class Request:
    """A line of the log; `time` is seconds since the epoch, `headers` have lower-case names."""

    method: str
    path: str
    headers: dict[str, str]
    time: float


class Hub:
    """The server and all it serves; fields may be changed while it runs."""

    def __init__(self, repo: str):
        self.repo = repo
        self.media: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.on_request = lambda request: None  # called before the answer, in the server's thread
        self.reset()
        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._http.daemon_threads = True
        self._http.hub = self
        self.port = self._http.server_port
        self.url = f"http://127.0.0.1:{self.port}"

    def reset(self) -> None:
        """Forget commits, plans and requests, and let stalled answers go; media stay."""
        self.commits: dict[str, dict[str, bytes]] = {}  # sha -> path -> bytes
        self.refs: dict[str, str] = {}
        self.gated = self.missing = False
        self.plan: dict[str, list[Fault | None]] = collections.defaultdict(list)
        self.always: dict[str, Fault] = {}
        self.requests.clear()
        self.on_request = lambda request: None
        if hasattr(self, "released"):
            self.released.set()
        self.stalled, self.released = threading.Event(), threading.Event()

    def commit(self, files: dict[str, bytes]) -> str:
        """Make a commit of these files, move main to it and return its sha."""
        sha = hashlib.sha1(b"".join(path.encode() + data for path, data in sorted(files.items()))).hexdigest()
        self.commits[sha] = dict(files)
        self.refs["main"] = sha
        return sha

    def asked(self, prefix: str = "/", method: str | None = None) -> list[Request]:
        """Requests so far of paths that begin so."""
        return [r for r in list(self.requests) if r.path.startswith(prefix) and method in (None, r.method)]

    def resolve_path(self, path: str, revision: str | None = None) -> str:
        """Where a file of the repository is asked for."""
        return f"/datasets/{self.repo}/resolve/{revision or self.refs['main']}/{path}"

    def __enter__(self):
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.released.set()
        self._http.shutdown()
        self._http.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits 40 ms for an acknowledgement

    def log_message(self, *_):
        pass

    def handle(self):
        try:
            super().handle()
        except ConnectionError:  # the client left, as yt-dlp does once it knows the type
            self.close_connection = True

    def do_GET(self):
        hub = self.server.hub
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        length = int(self.headers.get("Content-Length") or 0)
        self.form = urllib.parse.parse_qs(self.rfile.read(length).decode())
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, path, headers, time.time())
        hub.requests.append(request)
        hub.on_request(request)
        fault = hub.always.get(path)
        if hub.plan[path] and (self.command != "HEAD" or (hub.plan[path][0] or Fault()).head):
            fault = hub.plan[path].pop(0)
        if fault and self.command == "HEAD" and not fault.head:
            fault = None
        if fault and fault.drop == -1:
            self.close_connection = True
        elif fault and fault.status:
            extra = {} if fault.retry_after is None else {"Retry-After": fault.retry_after}
            self._refuse(fault.status, "planned", **extra)
        elif path.startswith("/media/"):
            name = path.removeprefix("/media/")
            if name in hub.media:
                suffix = name[name.rfind(".") :]
                kind = TYPES.get(suffix) or mimetypes.guess_type(name)[0]
                self._send_file(hub.media[name], fault, kind)
            else:
                self._refuse(404, "no such track")
        else:
            self._repository(path.strip("/").split("/"), fault)

    do_HEAD = do_POST = do_GET

    def _repository(self, parts: list[str], fault: Fault | None) -> None:
        hub, known = self.server.hub, self.headers.get("Authorization") is not None
        if parts == ["api", "agent-harnesses"]:  # huggingface_hub 2 keeps the answer in HF_HOME
            return self._send_json({"standardEnvVars": [], "harnesses": {}}, fault)
        api = parts[0] == "api"
        owner, name, *parts = parts[2 if api else 1 :] + ["", ""]
        kind, revision, *path = [part for part in parts if part] or ["revision", "main"]
        revision = hub.refs.get(revision, revision)
        if hub.missing or f"{owner}/{name}" != hub.repo:
            return self._refuse(404 if known else 401, "Repository not found", "RepoNotFound")
        if revision not in hub.commits:
            return self._refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        if hub.gated and kind == "resolve":
            return self._refuse(403 if known else 401, f"Access to dataset {hub.repo} is restricted", "GatedRepo")
        files, path = hub.commits[revision], "/".join(path)
        if kind == "resolve" and path in files:
            digest = hashlib.sha256(files[path]).hexdigest()
            about = {"ETag": f'"{digest}"', "X-Linked-Etag": f'"{digest}"', "X-Linked-Size": len(files[path])}
            return self._send_file(files[path], fault, "application/octet-stream", {"X-Repo-Commit": revision} | about)
        if kind == "revision":
            gated = "manual" if hub.gated else False
            names = [
                {"rfilename": p, "size": len(d), "blobId": "0" * 40, "lfs": _lfs(d, "sha256")} for p, d in files.items()
            ]
            info = {"_id": "1", "id": hub.repo, "sha": revision, "private": False, "gated": gated, "tags": []}
            return self._send_json(info | {"siblings": names}, fault)
        if kind == "tree" and (not path or any(p.startswith(f"{path}/") for p in files)):
            return self._send_json([_entry(p, d) for p, d in files.items() if p.startswith(path)], fault)
        if kind == "paths-info":
            return self._send_json([_entry(p, d) for p, d in files.items() if p in self.form.get("paths", ())], fault)
        return self._refuse(404, f"{path} does not exist", "EntryNotFound")

    def _send_file(self, data: bytes, fault: Fault | None, kind: str, extra: dict | None = None) -> None:
        fault = fault or Fault()
        if fault.body is not None:
            data = fault.body
        data = data[: fault.cut]
        start, stop, status, headers = 0, len(data), 200, {"Accept-Ranges": "bytes"} | (extra or {})
        if (asked := self.headers.get("Range", "")).startswith("bytes="):
            first, last = asked.removeprefix("bytes=").split(",")[0].split("-")
            start = int(first) if first else max(0, len(data) - int(last))
            if start >= len(data):
                return self._refuse(416, "no such range", **{"Content-Range": f"bytes */{len(data)}"})
            stop = min(int(last) + 1, len(data)) if first and last else len(data)
            status, headers["Content-Range"] = 206, f"bytes {start}-{stop - 1}/{len(data)}"
        self._send(status, data[start:stop], headers | {"Content-Type": fault.content_type or kind}, fault)

    def _send_json(self, value, fault: Fault | None) -> None:
        self._send_file(json.dumps(value).encode(), fault, "application/json")

    def _refuse(self, status: int, message: str, code: str | None = None, **headers) -> None:
        code = {} if code is None else {"X-Error-Code": code, "X-Error-Message": message}
        body = json.dumps({"error": message}).encode()
        self._send(status, body, {"Content-Type": "application/json"} | code | headers)

    def _send(self, status: int, body: bytes, headers: dict, fault: Fault | None = None) -> None:
        fault, hub = fault or Fault(), self.server.hub
        self.send_response(status)
        for name, value in ({"Content-Length": len(body)} | headers).items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault.stall is not None:
            self.wfile.write(body[: fault.stall])
            self.wfile.flush()
            released = hub.released  # a reset puts another in its place
            hub.stalled.set()
            released.wait(60)
            body = body[fault.stall :]
        if fault.drop is not None:
            self.close_connection = True
            body = body[: fault.drop]
        self.wfile.write(body)


def _lfs(data: bytes, name: str) -> dict:
    """What the hub says of a file in Git LFS; the name of the digest differs between its calls."""
    return {name: hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}


def _entry(path: str, data: bytes) -> dict:
    return {"type": "file", "path": path, "oid": "0" * 40, "size": len(data), "lfs": _lfs(data, "oid")}
