"""A small stand-in for the Hub's HTTP interface: repositories, branches, large files and commits, all in memory."""

import base64
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub:
    """What was asked of the server: files by revision and path, and every request with its token."""

    def __init__(self):
        self.files: dict[str, dict[str, bytes]] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.created: list[dict] = []
        self.messages: list[str] = []
        # Path, as a pattern, and the statuses of the next answers to it.
        self.failures: dict[str, list[int]] = {}
        self.address = ""

    def answer(self, method: str, path: str, body: bytes, token: str | None):
        self.requests.append((method, path, token))
        for pattern, statuses in self.failures.items():
            if statuses and re.search(pattern, path):
                return statuses.pop(0), {"error": "as the test wishes"}
        if path == "/api/repos/create":
            self.created.append(json.loads(body))
            name = self.created[-1]["name"]
            return 200, {"url": f"{self.address}/me/{name}", "name": f"me/{name}"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if "/branch/" in path:
            return 200, {}
        if "/preupload/" in path:
            kinds = [(file["path"], "lfs" if file["path"].endswith(".safetensors") else "regular") for file in json.loads(body)["files"]]
            return 200, {"files": [{"path": name, "uploadMode": kind, "shouldIgnore": False} for name, kind in kinds]}
        if path.endswith("/info/lfs/objects/batch"):
            asked = json.loads(body)["objects"]
            upload = [{**part, "actions": {"upload": {"href": f"{self.address}/objects/{part['oid']}"}}} for part in asked]
            return 200, {"transfer": "basic", "objects": upload}
        if method == "PUT":
            self.objects[path.rpartition("/")[2]] = body
            return 200, {}
        if "/commit/" in path:
            files = self.files.setdefault(path.rpartition("/")[2], {})
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "header":
                    self.messages.append(value["summary"])
                elif line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self.objects[value["oid"]]
            return 200, {"commitUrl": f"{self.address}/me/run/commit/1", "commitOid": "1", "pullRequestUrl": None}
        return 404, {"error": path}


@contextmanager
def serve():
    """The stand-in, at ``hub.address``."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def handle_any(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
            status, content = hub.answer(self.command, self.path, body, token)
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = do_HEAD = handle_any

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("localhost", 0), Handler)
    hub.address = f"http://localhost:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
