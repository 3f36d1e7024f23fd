"""A server that speaks as much of the JSON interface of Cloud Storage as gcsfs, TensorStore and ArrayRecord use."""

import contextlib
import http.server
import itertools
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator


class Buckets(dict):
    """{bucket: {name of an object: its bytes}}, as the server at `address` shows them."""

    address = ""

    @property
    def environment(self) -> dict[str, str]:
        """The variables of a process that is to take this server for Cloud Storage."""
        return {
            "STORAGE_EMULATOR_HOST": self.address,  # of gcsfs and google-cloud-storage
            "TENSORSTORE_GCS_HTTP_URL": self.address,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",  # of TensorStore
            "CLOUD_STORAGE_EMULATOR_ENDPOINT": self.address,  # of ArrayRecord
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # would ask another service for the kind of the bucket
        }


@contextlib.contextmanager
def serving(*names: str) -> Iterator[Buckets]:
    """Serve empty buckets of these names from a thread."""
    buckets = Buckets({name: {} for name in names})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.handle_error = lambda *_: None  # clients break connections off
    server.buckets, server.uploads, server.generations = buckets, {}, {}
    server.lock, server.count = threading.RLock(), itertools.count(2)
    buckets.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield buckets
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def _handle(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.server.lock:
            code, headers, answer = self._answer(self.command, self.path, body, self.headers)
        self.send_response(code)
        for name, value in {**headers, "Content-Length": len(answer)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_POST = do_PUT = do_DELETE = _handle

    def _answer(self, method: str, path: str, body: bytes, headers) -> tuple[int, dict, bytes]:
        url = urllib.parse.urlsplit(path)
        query = dict(urllib.parse.parse_qsl(url.query))
        if "upload_id" in query:
            return self._resumed(query["upload_id"], body, headers)
        parts = re.fullmatch(r"(?:/upload|/download)?/(?:storage/v1/)?b/([^/]+)(?:/o(?:/(.+))?)?", url.path)
        bucket, name = parts.groups() if parts else url.path[1:].split("/", 1)  # the second is how ArrayRecord reads
        name, what = urllib.parse.unquote(name or ""), "/o" in url.path
        objects = self.server.buckets.get(bucket)
        if objects is None:
            return 403 if bucket == "forbidden" else 404, {}, b"{}"
        if moved := re.fullmatch(r"(.+)/moveTo/o/(.+)", name):
            there = moved[1] in objects
            return self._put(bucket, moved[2], {}, objects.pop(moved[1])) if there else (404, {}, b"{}")
        if method == "POST":
            return self._upload(bucket, query, body, headers)
        if not name and parts:
            return self._list(bucket, query) if what else _json({"kind": "storage#bucket", "name": bucket})
        if name not in objects:
            return 404, {}, b"{}"
        generation = self.server.generations.get((bucket, name), "1")
        if query.get("ifGenerationMatch", generation) != generation:
            return 412, {}, b"{}"
        if query.get("ifGenerationNotMatch") == generation:
            return 304, {}, b""
        if method == "DELETE":
            del objects[name]
            return 204, {}, b""
        if parts and query.get("alt") != "media":
            return _json(self._described(bucket, name))
        return self._media(objects[name], generation, headers)

    def _media(self, content: bytes, generation: str, headers) -> tuple[int, dict, bytes]:
        known = {"x-goog-generation": generation, "Content-Type": "application/octet-stream"}
        if not (asked := re.fullmatch(r"bytes=(\d*)-(\d*)", headers.get("Range", ""))):
            return 200, known, content
        first = int(asked[1]) if asked[1] else max(0, len(content) - int(asked[2]))
        last = min(int(asked[2]) if asked[1] and asked[2] else len(content) - 1, len(content) - 1)
        if first > last:
            return 416, {}, b"{}"
        return 206, {**known, "Content-Range": f"bytes {first}-{last}/{len(content)}"}, content[first : last + 1]

    def _list(self, bucket: str, query: dict) -> tuple[int, dict, bytes]:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        items, prefixes = [], set()
        for name in sorted(self.server.buckets[bucket]):
            if name.startswith(prefix) and query.get("startOffset", "") <= name < query.get("endOffset", "\U0010ffff"):
                folder, found, _ = name.removeprefix(prefix).partition(delimiter) if delimiter else ("", "", "")
                if found:
                    prefixes.add(prefix + folder + delimiter)
                else:
                    items.append(self._described(bucket, name))
        return _json({"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)})

    def _upload(self, bucket: str, query: dict, body: bytes, headers) -> tuple[int, dict, bytes]:
        kind, name = query.get("uploadType"), query.get("name")
        if kind == "multipart":
            edge = re.search(r"boundary=[\"']*([^\"';]+)", headers["Content-Type"])[1].encode()
            parts = [part.partition(b"\n\n")[2].removesuffix(b"\n") for part in body.split(b"--" + edge)[1:3]]
            name, body = json.loads(parts[0])["name"], parts[1]
        elif kind == "resumable":
            number = str(next(self.server.count))
            self.server.uploads[number] = [bucket, name or json.loads(body)["name"], query, b""]
            return (
                200,
                {"Location": f"{self.server.buckets.address}{self.path.partition('?')[0]}?upload_id={number}"},
                b"",
            )
        return self._put(bucket, name, query, body)

    def _resumed(self, number: str, body: bytes, headers) -> tuple[int, dict, bytes]:
        upload = self.server.uploads[number]
        upload[3] += body
        if headers.get("Content-Range", "").endswith("/*"):
            return 308, {"Range": f"bytes=0-{len(upload[3]) - 1}"}, b""
        return self._put(*upload)

    def _put(self, bucket: str, name: str, query: dict, content: bytes) -> tuple[int, dict, bytes]:
        there = self.server.generations.get((bucket, name), "1") if name in self.server.buckets[bucket] else "0"
        if query.get("ifGenerationMatch", there) != there:
            return 412, {}, b"{}"
        self.server.buckets[bucket][name] = content
        self.server.generations[bucket, name] = str(next(self.server.count))
        return _json(self._described(bucket, name))

    def _described(self, bucket: str, name: str) -> dict:
        content, generation = self.server.buckets[bucket][name], self.server.generations.get((bucket, name), "1")
        time = "2026-01-01T00:00:00.000Z"
        known = {"name": name, "bucket": bucket, "generation": generation, "size": len(content)}
        return {"kind": "storage#object", "metageneration": "1", "timeCreated": time, "updated": time, **known}


def _json(value: dict) -> tuple[int, dict, bytes]:
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()
