"""`ServedJudge`: a vision-language model behind an OpenAI-compatible server, such as vLLM, SGLang or `transformers serve`.

Answers in words come from `POST {url}/chat/completions`, media as PNG data URIs, temperature always sent (vLLM would otherwise take
the checkpoint's own). Probabilities come in one of two ways:

    logprobs    the most probable first tokens of a chat completion (vLLM, SGLang, hosted ones)
    systemone   typed questions with a probability for every answer (`transformers serve`, which knows no logprobs)

With `logprobs` only the `top` first tokens are known; `wire` says what that makes of a choice. With `systemone` the server puts the
question in its own words: "Answer Yes or No only." behind a question of Yes and No, otherwise lettered options. It knows the
probabilities among the choices alone, so a row sums to one, unlike in `LocalJudge`.

An answer that fails is tried again only if the server is overloaded (429), broken (5xx) or out of reach; what then fails is NaN or
None, is counted in `failures`, and is explained once. Sources: the OpenAI chat API; vLLM's and SGLang's documentation of it
(`continue_final_message`); transformers 5.23 `cli/serving`.
"""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import json
import math
import os
import random
import sqlite3
import threading
import warnings
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import closing
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

import torch
from torch import Tensor

from .judging import Ask, Judge
from .loading import expand
from .wire import TOLD, Unanswered, listed_odds, mp4_uri, png, typed_odds, written, yes_first

__all__ = ["ServedJudge"]

T = TypeVar("T")
CHAT = "/chat/completions"
LONGEST_PAUSE = 10.0  # seconds between two tries
ASSETS = 4  # images that a System One request may hold


class ServedJudge(Judge):
    """A judge behind an OpenAI-compatible server: vLLM, SGLang, `transformers serve`, or a hosted one.

    Works from synchronous code also where an event loop runs already, as in notebooks. The server is asked for its models when the
    judge is made, so that a wrong address is an error then and not NaN later.

    Args:
        url: of the API, such as http://localhost:8000/v1.
        model: the name that the server knows; None takes the first that it lists.
        api_key_env: environment variable that holds the key, which is read at each call and never kept; None sends none.
        probabilities: how they are asked for: "logprobs", or "systemone" for `transformers serve`; see the module docstring.
        top: most probable tokens listed; vLLM and OpenAI allow up to 20.
        concurrency: questions under way at a time.
        timeout: seconds for an answer, all tries together.
        connect_timeout: seconds to reach the server.
        retries: tries after the first.
        pause: seconds before the second try, doubled each time up to 10, less a random part of up to half.
        video: "frames" sends the frames of a video as images, "mp4" one H.264 file (`pip install 'kilter[video]'`).
        fps: frames a second of that file.
        cache: file in which the answers of a `url` are kept from one run to the next; None keeps none. Answers drawn at a
            temperature are kept by their seed.
        extra: more fields of every chat request, such as {"chat_template_kwargs": {"enable_thinking": false}}.

    Raises:
        ValueError: `url` holds a password or a query, is no http(s) address, or the key's variable is not set.
        ConnectionError: the server cannot be reached, refuses the key, knows no questions at this address, or lists no models where
            `model` is None.
    """

    def __init__(
        self,
        url: str = "http://localhost:8000/v1",
        model: str | None = None,
        *,
        api_key_env: str | None = None,
        probabilities: Literal["logprobs", "systemone"] = "logprobs",
        top: int = 20,
        concurrency: int = 16,
        timeout: float = 120.0,
        connect_timeout: float = 5.0,
        retries: int = 5,
        pause: float = 0.5,
        video: Literal["frames", "mp4"] = "frames",
        fps: float = 8.0,
        cache: str | None = None,
        extra: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check_address(url)
        if api_key_env is not None and not os.environ.get(api_key_env):
            raise ValueError(f"the environment variable {api_key_env} is not set: export the server's key in it")
        if min(top, concurrency) < 1 or retries < 0 or min(timeout, connect_timeout) <= 0:
            raise ValueError("top and concurrency must be ≥ 1, retries ≥ 0, timeouts above 0")
        self.url, self.api_key_env, self.probabilities, self.top = url.rstrip("/"), api_key_env, probabilities, top
        self.concurrency, self.timeout, self.connect_timeout = concurrency, timeout, connect_timeout
        self.retries, self.pause, self.video, self.fps = retries, pause, video, fps
        self.cache = None if cache is None else expand(cache)
        self.extra: dict[str, Any] = dict(extra or {})
        self.failures, self.warned = 0, False
        self.model = self.served(model)

    def odds(self, asks: Sequence[Ask], choices: Sequence[Sequence[str]]) -> Tensor:
        """See `Judge.odds`; no gradient."""
        spellings = [spelling for choice in choices for spelling in dict.fromkeys(choice)]
        if len(set(spellings)) < len(spellings) or not all(spellings) or not all(choices):
            raise ValueError(f"each choice needs spellings of its own; got {choices}")
        if self.probabilities == "systemone":
            if len(choices) < 2:
                raise ValueError(f'"systemone" compares choices, so it needs two; got {choices}: use "logprobs"')
            path, bodies = "/systemone", [self.typed(ask, choices) for ask in asks]
            rows = self.answers(path, bodies, lambda reply: typed_odds(reply, choices), choices)
        else:
            known = {"logprobs": True, "top_logprobs": self.top}
            bodies = [self.chat(ask, encoded, 0.0, 1) | known for ask, encoded in self.encoded(asks)]
            rows = self.answers(CHAT, bodies, lambda reply: listed_odds(reply, choices), choices)
        missing = [math.nan] * len(choices)
        return torch.tensor([missing if row is None else row for row in rows], dtype=torch.float32).view(
            -1, len(choices)
        )

    def write(self, asks: Sequence[Ask], *, temperature: float = 0.0, max_tokens: int = 512) -> list[str | None]:
        """See `Judge.write`."""
        bodies = [self.chat(ask, encoded, temperature, max_tokens) for ask, encoded in self.encoded(asks)]
        return self.answers(CHAT, bodies, written)

    def encoded(self, asks: Sequence[Ask]) -> list[tuple[Ask, list[list[dict[str, Any]]]]]:
        """Each question with the content parts of its media; a tensor that several questions show is encoded once."""
        seen: dict[int, list[dict[str, Any]]] = {}
        for ask in asks:
            for media in ask.media:
                if id(media) not in seen:
                    seen[id(media)] = self.parts(media)
        return [(ask, [seen[id(media)] for media in ask.media]) for ask in asks]

    def parts(self, media: Tensor) -> list[dict[str, Any]]:
        """An image or a video as content parts of a message."""
        if media.ndim == 4 and self.video == "mp4":
            return [{"type": "video_url", "video_url": {"url": mp4_uri(media, self.fps)}}]
        return [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png(frame)}"}}
            for frame in (media if media.ndim == 4 else [media])
        ]

    def chat(self, ask: Ask, media: list[list[dict[str, Any]]], temperature: float, max_tokens: int) -> dict[str, Any]:
        """The body of a chat completion."""
        content: list[dict[str, Any]] = []
        for i, text in enumerate(ask.pieces):
            content += media[i - 1] if i else []
            content += [{"type": "text", "text": text}] if text else []
        messages: list[dict[str, Any]] = [{"role": "system", "content": ask.system}] if ask.system else []
        messages.append({"role": "user", "content": content})
        body: dict[str, Any] = {"model": self.model, "temperature": temperature, "max_tokens": max_tokens}
        if temperature > 0:
            body["seed"] = ask.seed
        if ask.start:
            messages.append({"role": "assistant", "content": ask.start})
            body |= {"continue_final_message": True, "add_generation_prompt": False}
        if ask.schema:
            format_ = {"name": "answer", "strict": True, "schema": json.loads(ask.schema)}
            body["response_format"] = {"type": "json_schema", "json_schema": format_}
        return {**body, "messages": messages, **self.extra}

    def typed(self, ask: Ask, choices: Sequence[Sequence[str]]) -> dict[str, Any]:
        """The body of a System One request: one question, whose images the server puts where their names stand.

        Raises:
            ValueError: the question needs what this form cannot say.
        """
        frames = [list(media) if media.ndim == 4 else [media] for media in ask.media]
        if ask.start or sum(map(len, frames)) > ASSETS:
            raise ValueError(
                f'"systemone" takes no beginning of the answer and at most {ASSETS} images: use "logprobs"'
            )
        before, assets = ask.system and f"{ask.system}\n\n", {}
        for text, shown in zip(ask.pieces, frames, strict=False):  # the last piece stands behind the media
            names = [f"<media-{len(assets) + i}>" for i in range(1, len(shown) + 1)]
            before += text + "".join(names)
            data = ({"type": "image", "format": "png", "data_base64": png(frame)} for frame in shown)
            assets |= dict(zip(names, data, strict=True))
        question: dict[str, Any] = {"type": "noul"}
        if yes_first(choices) is None:
            question = {"type": "choice", "criteria": {choice[0]: None for choice in choices}}
        state, question["instructions"] = (before, ask.pieces[-1]) if before else (ask.text, None)
        return {"model": self.model, "state": state, "questions": {"answer": question}, "assets": assets}

    def served(self, model: str | None) -> str:
        """The model's name, once the server has been reached."""
        try:
            status, text = finish(self.reach())
        except Unanswered as error:
            raise ConnectionError(f"{self.url} cannot be reached ({error}): start the server, or correct url") from None
        if status in (401, 403):
            raise ConnectionError(f"{self.url} refuses the key (HTTP {status}): name its variable by api_key_env")
        if status in (404, 405):
            raise ConnectionError(
                f"{self.url}{CHAT} is not there (HTTP {status}): url must end where the API begins, as in /v1"
            )
        if model is not None:
            return model
        try:
            return json.loads(text)["data"][0]["id"]
        except (ValueError, LookupError, TypeError):
            raise ConnectionError(f"{self.url} lists no models (HTTP {status}): name the one wanted by model") from None

    async def reach(self) -> tuple[int, str]:
        """Status and text of the list of models, or where there is none, of an empty question: a wrong address knows neither."""
        http = client_library()
        async with self.client() as client:
            try:
                reply = await asyncio.wait_for(client.get(f"{self.url}/models"), self.timeout)
                if reply.status_code == 404:
                    reply = await asyncio.wait_for(client.post(self.url + CHAT, json={}), self.timeout)
            except (http.RequestError, asyncio.TimeoutError) as error:
                raise Unanswered(described(error)) from None
        return reply.status_code, reply.text

    def answers(
        self, path: str, bodies: list[dict[str, Any]], read: Any, choices: Sequence[Sequence[str]] = ()
    ) -> list[Any]:
        """What `read` finds in the reply to each body, None where that failed; `choices` tell it what to look for."""
        told = [json.dumps([self.url, path, choices, body], sort_keys=True) for body in bodies]
        keys = [hashlib.sha256(text.encode()).hexdigest() for text in told]
        found = self.recall(keys)
        news = {key: body for key, body in zip(keys, bodies, strict=True) if key not in found}
        if news:
            results = dict(zip(news, finish(self.gather(path, list(news.values()), read)), strict=True))
            reasons = [str(result) for result in results.values() if isinstance(result, Unanswered)]
            fresh = {key: result for key, result in results.items() if not isinstance(result, Unanswered)}
            self.remember(fresh)
            found |= fresh
            self.count(sum(key not in found for key in keys), len(keys), reasons)
        return [found.get(key) for key in keys]

    async def gather(self, path: str, bodies: list[dict[str, Any]], read: Any) -> list[Any]:
        """Replies as read, or why there is none, a bounded number at a time."""
        gate = asyncio.Semaphore(self.concurrency)

        async def one(body: dict[str, Any]) -> Any:
            async with gate:
                try:
                    return read(await asyncio.wait_for(self.post(client, path, body), self.timeout))
                except Unanswered as error:
                    return error
                except asyncio.TimeoutError:
                    return Unanswered(f"no answer within {self.timeout:g} s")

        async with self.client() as client:
            return await asyncio.gather(*map(one, bodies))

    async def post(self, client: Any, path: str, body: dict[str, Any]) -> Any:
        """The decoded reply.

        Raises:
            Unanswered: the request failed for good, or as often as it may.
        """
        http, chance, reason = client_library(), random.SystemRandom(), ""
        for tried in range(self.retries + 1):
            wait = min(LONGEST_PAUSE, self.pause * 2**tried) * chance.uniform(0.5, 1)
            try:
                reply = await client.post(self.url + path, json=body)
            except http.RequestError as error:
                reason = described(error)
            else:
                if reply.status_code == 200:
                    try:
                        return reply.json()
                    except ValueError:
                        raise Unanswered(f"the reply is no JSON: {self.discreet(reply.text)[:TOLD]}") from None
                reason = f"HTTP {reply.status_code}: {self.discreet(reply.text)[:TOLD]}"
                if reply.status_code != 429 and reply.status_code < 500:
                    break
                asked = reply.headers.get("retry-after", "")
                wait = max(wait, float(asked)) if asked.isdecimal() else wait
            if tried < self.retries:
                await asyncio.sleep(wait)
        raise Unanswered(reason)

    def client(self) -> Any:
        """A connection pool. A server on this machine is not looked for behind a proxy."""
        http = client_library()
        return http.AsyncClient(
            headers={"Authorization": f"Bearer {self.key}"} if self.key else {},
            timeout=http.Timeout(None, connect=self.connect_timeout),
            limits=http.Limits(max_connections=self.concurrency),
            trust_env=not local(urlsplit(self.url).hostname or ""),
        )

    @property
    def key(self) -> str:
        """The server's key, empty without one."""
        return os.environ.get(self.api_key_env, "") if self.api_key_env else ""

    def discreet(self, text: str) -> str:
        """A text without the key, which servers quote when they refuse it."""
        return text.replace(self.key, "…") if self.key else text

    def count(self, failed: int, asked: int, reasons: list[str]) -> None:
        """Counts questions without an answer, and says once why."""
        self.failures += failed
        if failed and not self.warned:
            self.warned = True
            why = self.discreet(reasons[0])
            warnings.warn(
                f"{self.name} got no answer to {failed} of {asked} questions from {self.url} ({why}); more failures are only "
                "counted, in `failures`",
                stacklevel=2,
            )

    def recall(self, keys: list[str]) -> dict[str, Any]:
        """Answers kept from earlier."""
        if self.cache is None:
            return {}
        with closing(sqlite3.connect(self.cache, timeout=60)) as file, file:
            file.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT)")
            rows = [file.execute("SELECT key, answer FROM answers WHERE key = ?", (key,)).fetchone() for key in keys]
        return {row[0]: json.loads(row[1]) for row in rows if row}

    def remember(self, answers: Mapping[str, Any]) -> None:
        """Keeps answers for later."""
        if self.cache is not None and answers:
            with closing(sqlite3.connect(self.cache, timeout=60)) as file, file:
                rows = [(key, json.dumps(answer)) for key, answer in answers.items()]
                file.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?)", rows)


def client_library() -> Any:
    """httpx, or httpx2 with the same interface: the one that huggingface_hub brings along."""
    try:
        import httpx  # type: ignore[import-not-found]

        return httpx
    except ImportError:
        import httpx2

        return httpx2


def check_address(url: str) -> None:
    """Raises unless `url` is an address to which paths can be added, without a secret.

    Raises:
        ValueError: it is not; the message shows no password.
    """
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and parts.hostname and (parts.port or True)
    except ValueError:  # brackets or a port that are none
        known = parts = None
    if "@" in url or (parts and (parts.query or parts.fragment)):
        raise ValueError(
            "url must hold no password, query or fragment, because it is written to files: name the key's variable by api_key_env"
        )
    if not known:
        raise ValueError(f"url must be an http(s) address such as http://localhost:8000/v1; got {url!r}")


def local(host: str) -> bool:
    """Whether a host is this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def described(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".rstrip(": ")


def finish(work: Coroutine[Any, Any, T]) -> T:
    """Runs a coroutine to its end in a thread of its own, whether or not a loop runs in this one; an interrupt cancels it."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    future = asyncio.run_coroutine_threadsafe(work, loop)

    async def end() -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()  # type: ignore[union-attr]
        await asyncio.gather(*tasks, return_exceptions=True)  # type: ignore[arg-type]

    try:
        return future.result()
    finally:
        asyncio.run_coroutine_threadsafe(end(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
