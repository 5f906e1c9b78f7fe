"""An HTTP service: post an image, get its classes. Threads share one engine.

Usage: python examples/nodes/service.py FILE.pcn [--port 8080] [--top 5]
Ask:   curl --data-binary @photo.jpg http://localhost:8080/classify
"""

from __future__ import annotations

import argparse
import io
import json
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image, UnidentifiedImageError

import pcn_deploy
from pcn_deploy.errors import DataError, ParityError

LARGEST = 32 * 2**20
"""Bytes of an image that are read; a longer request is refused."""


class Handler(BaseHTTPRequestHandler):
    """One request, in a thread of its own."""

    engine: pcn_deploy.Engine
    top: int

    def do_GET(self) -> None:
        """Tell what answers, for a health check."""
        known = self.path == "/health"
        engine = {"target": self.engine.target, "executed_by": self.engine.executed_by}
        self._reply(200 if known else 404, engine if known else {"error": "GET /health, or POST an image to /classify"})

    def do_POST(self) -> None:
        """Classify the image that was sent, in any format that Pillow reads."""
        length = int(self.headers.get("Content-Length", 0))
        if self.path != "/classify" or not 0 < length <= LARGEST:
            self._reply(400, {"error": f"Post one image of at most {LARGEST >> 20} MiB to /classify."})
            return
        try:
            with Image.open(io.BytesIO(self.rfile.read(length))) as image:
                (classes,) = self.engine.classify(image, k=self.top)
        except (DataError, OSError, UnidentifiedImageError) as error:
            self._reply(400, {"error": str(error)})
        except ParityError as error:  # the engine has no answer for it
            self._reply(500, {"error": str(error)})
        else:
            self._reply(200, {"classes": [asdict(one) for one in classes]})

    def _reply(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def serve(engine: pcn_deploy.Engine, port: int, top: int = 5) -> ThreadingHTTPServer:
    """A service that listens; `serve_forever` answers."""
    handler = type("EngineHandler", (Handler,), {"engine": engine, "top": top})
    return ThreadingHTTPServer(("127.0.0.1", port), handler)


def main() -> None:
    """Serve until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--top", type=int, default=5)
    options = parser.parse_args()
    with pcn_deploy.load(options.bundle) as engine, serve(engine, options.port, options.top) as server:
        engine.predict(engine.preprocess(Image.new("RGB", (640, 480))))  # the first run is the slowest
        print(f"{engine.executed_by} answers at http://127.0.0.1:{server.server_port}/classify", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("Stopped.")


if __name__ == "__main__":
    main()
