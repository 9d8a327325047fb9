"""A chat server on this machine that answers as told, faults included, and remembers what it was asked."""

from __future__ import annotations

import base64
import io
import json
import math
import threading
import time
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image, ImageStat

Reply = Any  # what the body is, an HTTP status, seconds to wait before it, None to hang up
Plan = Callable[[dict, int], Reply]  # of the request and its number


class Faulty:
    """Answers each POST by `plan(body, number)`; a context manager.

    A plan returns a chat completion (`said`, `listing`), text that is sent as it is, an int for an HTTP status, None to cut the
    connection in the middle of a reply, or a pair of seconds to wait and one of these.
    """

    def __init__(self, plan: Plan, models: tuple[str, ...] = ("tiny",), status: int = 200) -> None:
        self.plan, self.models, self.status = plan, models, status
        self.bodies: list[dict] = []
        self.headers: list[Mapping[str, str]] = []
        self.busy = self.most = 0
        self.lock = threading.Lock()

    def __enter__(self) -> Faulty:
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                owner.headers.append(dict(self.headers))
                self.send(
                    owner.status if self.path == "/v1/models" else 404,
                    json.dumps({"data": [{"id": name} for name in owner.models]}),
                )

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                if self.path not in ("/v1/chat/completions", "/v1/systemone"):
                    return self.send(404, "not found")
                with owner.lock:
                    number = len(owner.bodies)
                    owner.bodies.append(body | {"path": self.path})
                    owner.headers.append(dict(self.headers))
                    owner.busy += 1
                    owner.most = max(owner.most, owner.busy)
                reply = owner.plan(body, number)
                if isinstance(reply, tuple):
                    time.sleep(reply[0])
                    reply = reply[1]
                with owner.lock:
                    owner.busy -= 1
                if reply is None:
                    self.send(200, '{"choices": [', promised=1000)
                    self.close_connection = True
                elif isinstance(reply, int):
                    self.send(reply, f"status {reply}, key {self.headers.get('authorization')}")
                else:
                    self.send(200, reply if isinstance(reply, str) else json.dumps(reply))

            def send(self, status: int, text: str, promised: int = 0) -> None:
                data = text.encode()
                try:
                    self.send_response(status)
                    self.send_header("content-length", str(promised or len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                except OSError:  # the client did not wait
                    self.close_connection = True

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}/v1"


def said(text: Any) -> dict:
    """A chat completion."""
    return {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]}


def listing(masses: dict[str, float]) -> dict:
    """A chat completion of one token with the probabilities of the likeliest; the first one given was said."""
    rows = [{"token": token, "logprob": math.log(mass), "bytes": None} for token, mass in masses.items()]
    reply = said(rows[0]["token"])
    reply["choices"][0]["logprobs"] = {"content": [rows[0] | {"top_logprobs": rows}]}
    return reply


def pictures(body: dict) -> list[Image.Image]:
    """The images of a request."""
    urls = [p["image_url"]["url"] for p in body["messages"][-1]["content"] if p["type"] == "image_url"]
    return [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in urls]


def brightness(body: dict) -> list[float]:
    """Mean level of each image of a request, 0 to 1."""
    return [sum(ImageStat.Stat(picture).mean) / 3 / 255 for picture in pictures(body)]
