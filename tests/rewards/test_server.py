"""`ServedJudge` against a server that fails in every way, and against `transformers serve` with a random Qwen2-VL."""

from __future__ import annotations

import asyncio
import json
import math
import os
import pickle
import socket
import subprocess
import sys
import time
import urllib.request
import warnings
from pathlib import Path

import pytest
import torch
from torchvision.transforms.functional import pil_to_tensor

import rewards
from rewards import Ask
from tests.rewards import tiny, tiny_vlm
from tests.rewards.faulty import Faulty, listing, pictures, said

QUICK = {"pause": 0.01, "timeout": 20.0}
YES_NO = [["Yes", "yes"], ["No", "no"]]


def judge(server: Faulty, **options) -> rewards.ServedJudge:
    return rewards.ServedJudge(server.url, **{**QUICK, **options})


def images(count: int) -> list[torch.Tensor]:
    return list(tiny.natural(count, 20, 28))


class TestRequests:
    def test_media_arrive_without_loss_before_the_question(self):
        image = images(1)[0]
        with Faulty(lambda *_: said("fine")) as server:
            assert judge(server).write([Ask("What?", (image,), system="Be brief.")], max_tokens=7) == ["fine"]
        (body,) = server.bodies
        system, user = body["messages"]
        assert system == {"role": "system", "content": "Be brief."}
        assert [part["type"] for part in user["content"]] == ["image_url", "text"]
        assert torch.equal(pil_to_tensor(pictures(body)[0]), (255 * image).round().byte())
        assert body["model"] == "tiny" and body["max_tokens"] == 7
        assert body["temperature"] == 0 and "seed" not in body  # else vLLM takes the checkpoint's own temperature

    def test_media_stand_where_the_question_names_them(self):
        a, b = images(2)
        video = torch.stack([a, b, a])
        with Faulty(lambda *_: said("")) as server:
            judge(server).write([Ask("Is <media> like <media>?", (a, video))])
            with pytest.raises(ValueError, match="names <media> 1 times, but shows 2"):
                judge(server).write([Ask("Is <media>?", (a, b))])
        parts = server.bodies[0]["messages"][0]["content"]
        told = [part.get("text", "image") for part in parts]
        assert told == ["Is ", "image", " like ", "image", "image", "image", "?"]

    def test_start_schema_seed_and_more_fields(self):
        ask = Ask("What?", start="The score is", seed=5, schema='{"type": "object"}')
        with Faulty(lambda *_: said("")) as server:
            judge(server, extra={"chat_template_kwargs": {"enable_thinking": False}}).write([ask], temperature=0.5)
        (body,) = server.bodies
        assert body["messages"][-1] == {"role": "assistant", "content": "The score is"}
        assert body["continue_final_message"] is True and body["add_generation_prompt"] is False
        assert body["seed"] == 5 and body["temperature"] == 0.5
        assert body["response_format"]["json_schema"]["schema"] == {"type": "object"}
        assert body["chat_template_kwargs"] == {"enable_thinking": False}

    def test_videos_as_files(self):
        av = pytest.importorskip("av")
        video = tiny.natural(5, 32, 48, slope=2).mean(1, keepdim=True).expand(-1, 3, -1, -1)
        with Faulty(lambda *_: said("")) as server:
            judge(server, video="mp4", fps=4).write([Ask("What?", (video,))])
        import base64
        import io

        (part, _) = server.bodies[0]["messages"][0]["content"]
        file = av.open(io.BytesIO(base64.b64decode(part["video_url"]["url"].partition(",")[2])))
        frames = torch.stack([torch.from_numpy(f.to_ndarray(format="rgb24")) for f in file.decode(video=0)])
        assert frames.shape == (5, 32, 48, 3)
        assert (frames.permute(0, 3, 1, 2) / 255 - video).abs().mean() < 0.02

    def test_the_same_question_is_asked_once(self):
        image = images(1)[0]
        with Faulty(lambda _, n: said(f"{n}")) as server:
            assert judge(server).write([Ask("a", (image,)), Ask("b", (image,)), Ask("a", (image,))])[::2] in (
                ["0"] * 2,
                ["1"] * 2,
            )
        assert len(server.bodies) == 2

    def test_no_more_at_a_time_than_allowed(self):
        with Faulty(lambda body, _: (0.05, said(body["messages"][0]["content"][0]["text"]))) as server:
            texts = [str(i) for i in range(12)]
            assert judge(server, concurrency=3).write([Ask(text) for text in texts]) == texts
        assert 1 < server.most <= 3

    def test_works_where_a_loop_runs(self):
        async def cell() -> list[str | None]:
            return judge(server).write([Ask("What?")])

        with Faulty(lambda *_: said("fine")) as server:
            assert asyncio.run(cell()) == ["fine"]


class TestOdds:
    def odds(self, reply, choices=YES_NO) -> list[float]:
        with Faulty(lambda *_: reply) as server, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = judge(server).odds([Ask("Is it?")], choices)
        assert server.bodies[0]["logprobs"] is True and server.bodies[0]["top_logprobs"] == 20
        assert server.bodies[0]["max_tokens"] == 1
        assert found.shape == (1, len(choices)) and found.dtype == torch.float32
        return found[0].exp().tolist()

    @pytest.mark.parametrize(
        ("masses", "choices", "expected"),
        [
            ({"Yes": 0.6, "yes": 0.2, "No": 0.1, "Maybe": 0.05}, YES_NO, [0.8, 0.1]),
            ({"Yes": 0.6, "Maybe": 0.01}, YES_NO, [0.6, 0.01]),  # at most the smallest listed
            ({"Yes": 0.9, "Maybe": 0.08}, YES_NO, [0.9, 0.02]),  # and what the list leaves over
            ({" Yes": 0.6, "No": 0.3}, YES_NO, [0.1, 0.3]),  # a space makes another token
            ({"ex": 0.5, "g": 0.3, "go": 0.1}, [["excellent"], ["good"]], [0.5, 0.1]),  # words that are split
            ({"f": 0.5, "fair": 0.3, "poor": 0.1}, [["fair"], ["poor"]], [0.3, 0.1]),
            ({"p": 0.5, "poor": 0.3, "bad": 0.1}, [["pretty"], ["poor"]], [0.1, 0.3]),  # "p" begins both
            ({"1": 0.5, "2": 0.25, "3": 0.25}, [["1"], ["2"], ["3"]], [0.5, 0.25, 0.25]),
        ],
    )
    def test_goldens(self, masses, choices, expected):
        assert self.odds(listing(masses), choices) == pytest.approx(expected, rel=1e-5)

    @pytest.mark.parametrize(
        "reply",
        [
            listing({"Perhaps": 0.7, "I": 0.1}),
            listing({"Yes": 0.9, "No": 0.9}),  # probabilities of more than one
            said("Yes"),
            {"choices": [{"logprobs": {"content": []}}]},
            {"choices": [{"logprobs": {"content": [{"token": "Yes", "logprob": None, "top_logprobs": []}]}}]},
            {"choices": [{"logprobs": {"content": [{"token": "Yes", "logprob": math.nan, "top_logprobs": []}]}}]},
            "no json",
            [1],
        ],
        ids=range(8),
    )
    def test_wrong_answers_are_nan(self, reply):
        assert all(map(math.isnan, self.odds(reply)))

    def test_choices_must_differ(self):
        with (
            Faulty(lambda *_: listing({"Yes": 1.0})) as server,
            pytest.raises(ValueError, match="spellings of its own"),
        ):
            judge(server).odds([Ask("Is it?")], [["Yes"], ["No", "Yes"]])


class TestFaults:
    def test_overload_breakdown_and_a_cut_connection_are_tried_again(self):
        with Faulty(lambda _, n: [500, 429, None, 503, said("fine")][n]) as server, warnings.catch_warnings():
            warnings.simplefilter("error")
            assert judge(server, retries=4).write([Ask("What?")]) == ["fine"]
        assert len(server.bodies) == 5

    @pytest.mark.parametrize("reply", [400, 404, 422, "garbage", {"choices": []}, said(None), said([1])], ids=range(7))
    def test_other_faults_are_final(self, reply):
        with Faulty(lambda *_: reply) as server:
            served = judge(server)
            with pytest.warns(UserWarning, match="no answer to 1 of 1 questions"):
                assert served.write([Ask("What?")]) == [None]
        assert len(server.bodies) == 1 and served.failures == 1

    def test_failures_stay_their_own_are_counted_and_told_once(self):
        plan = lambda body, _: 500 if body["messages"][0]["content"][0]["text"] == "b" else said("fine")  # noqa: E731
        with Faulty(plan) as server:
            served = judge(server, retries=1)
            with pytest.warns(UserWarning, match="1 of 3 questions from .*HTTP 500") as told:
                assert served.write([Ask("a"), Ask("b"), Ask("c")]) == ["fine", None, "fine"]
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                assert served.write([Ask("b")]) == [None]
        assert len(told) == 1 and served.failures == 2

    def test_slow_answers_do_not_hold_up_quick_ones(self):
        plan = lambda body, _: (30.0 if body["messages"][0]["content"][0]["text"] == "slow" else 0.0, said("fine"))  # noqa: E731
        with Faulty(plan) as server:
            served = judge(server, timeout=2.0)
            begun = time.perf_counter()
            with pytest.warns(UserWarning, match="no answer within 2 s"):
                assert served.write([Ask("slow"), Ask("quick")]) == [None, "fine"]
            assert time.perf_counter() - begun < 20

    def test_a_server_that_dies_in_between(self):
        with Faulty(lambda *_: said("fine")) as server:
            served = judge(server, retries=1)
            assert served.write([Ask("What?")]) == ["fine"]
        with pytest.warns(UserWarning, match="ConnectError"):
            assert served.odds([Ask("What?")], YES_NO).isnan().all()

    def test_a_server_that_is_not_there(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        with pytest.raises(ConnectionError, match=r"cannot be reached.*start the server"):
            rewards.ServedJudge(url, "tiny")

    @pytest.mark.parametrize(
        "url", ["localhost:8000", "ftp://host/v1", "http://host:80a0/v1", "http://[::1/v1", "http://host/v1#a"]
    )
    def test_wrong_addresses(self, url):
        with pytest.raises(ValueError, match="url must"):
            rewards.ServedJudge(url)

    @pytest.mark.parametrize("url", ["http://user:secret@host/v1", "user:secret@host/v1", "https://host/v1?key=secret"])
    def test_a_secret_in_the_address_is_refused_and_not_repeated(self, url):
        with pytest.raises(ValueError, match="url must hold no password") as told:
            rewards.ServedJudge(url)
        assert "secret" not in str(told.value)

    @pytest.mark.parametrize("wrong", ["", "/v1/chat/completions", "/v2"])
    def test_an_address_beside_the_api_is_an_error_at_once(self, wrong):
        missing = pytest.raises(ConnectionError, match=r"/chat/completions is not there \(HTTP 404\): url must end")
        with Faulty(lambda *_: said("fine")) as server, missing:
            rewards.ServedJudge(server.url.removesuffix("/v1") + wrong, "tiny")

    def test_a_server_without_a_list_of_models(self):
        with Faulty(lambda *_: 422, status=404) as server:
            assert judge(server, model="mine").model == "mine"
            with pytest.raises(ConnectionError, match="name the one wanted by model"):
                judge(server)

    def test_a_server_without_models(self):
        with Faulty(lambda *_: 500, models=()) as server:
            with pytest.raises(ConnectionError, match="name the one wanted by model"):
                judge(server)
            assert judge(server, model="mine").model == "mine"


class TestKey:
    def test_it_is_sent_and_neither_kept_nor_told(self, monkeypatch):
        monkeypatch.setenv("KILTER_TEST_KEY", "sesame")
        with Faulty(lambda *_: 400) as server:
            served = judge(server, api_key_env="KILTER_TEST_KEY")
            with pytest.warns(UserWarning, match="HTTP 400") as told:
                served.write([Ask("What?")])
        assert all({k.lower(): v for k, v in h.items()}["authorization"] == "Bearer sesame" for h in server.headers)
        assert "sesame" not in str(told[0].message)  # though the server quotes it
        assert b"sesame" not in pickle.dumps(served) and "sesame" not in str(served.arguments)

    def test_errors(self, monkeypatch):
        monkeypatch.delenv("KILTER_TEST_KEY", raising=False)
        with Faulty(lambda *_: 400, status=401) as server:
            with pytest.raises(ValueError, match="KILTER_TEST_KEY is not set"):
                judge(server, api_key_env="KILTER_TEST_KEY")
            with pytest.raises(ConnectionError, match="refuses the key"):
                judge(server)


class TestCache:
    def test_answers_are_kept_and_failures_are_not(self, tmp_path):
        file = str(tmp_path / "answers.sqlite")
        image, other = images(2)
        with Faulty(lambda _, n: 400 if n == 0 else said(f"{n}")) as server:
            served = judge(server, cache=file)
            with pytest.warns(UserWarning, match="HTTP 400"):
                assert served.write([Ask("a", (image,))]) == [None]
            assert served.write([Ask("a", (image,))]) == ["1"]
            assert judge(server, cache=file).write([Ask("a", (image,))]) == ["1"]
            for n, (ask, options) in enumerate(
                [
                    (Ask("b", (image,)), {}),
                    (Ask("a", (other,)), {}),
                    (Ask("a", (image,), system="s"), {}),
                    (Ask("a", (image,), start="s"), {}),
                    (Ask("a", (image,)), {"max_tokens": 9}),
                    (Ask("a", (image,)), {"temperature": 1.0}),
                    (Ask("a", (image,), seed=1), {"temperature": 1.0}),
                ],
                start=2,
            ):
                assert served.write([ask], **options) == [f"{n}"]
            assert judge(server, cache=file, model="else").write([Ask("a", (image,))]) == ["9"]
        with Faulty(lambda *_: said("another server")) as server:  # that may serve another model by the same name
            assert judge(server, cache=file).write([Ask("a", (image,))]) == ["another server"]

    def test_odds_are_kept(self, tmp_path):
        with Faulty(lambda *_: listing({"Yes": 0.6, "No": 0.3})) as server:
            served = judge(server, cache=str(tmp_path / "answers.sqlite"))
            first, second = (served.odds([Ask("a")], YES_NO) for _ in range(2))
            assert torch.equal(first, second) and len(server.bodies) == 1
            assert torch.equal(
                served.odds([Ask("a")], YES_NO[::-1]), first.flip(1)
            )  # another question to the same words


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> Path:
    return tiny_vlm.save_qwen2_vl(tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def real(qwen, tmp_path_factory):
    """`transformers serve` with a random Qwen2-VL."""
    pytest.importorskip("uvicorn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("serve") / "log"
    command = [Path(sys.executable).with_name("transformers"), "serve", qwen, "--device", "cpu", "--port", str(port)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=file, env=environment) as process:
        try:
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            for _ in range(600):
                try:
                    opener.open(f"http://localhost:{port}/health", timeout=10)
                    break
                except OSError:
                    assert process.poll() is None, log.read_text()
                    time.sleep(0.2)
            yield f"http://localhost:{port}/v1"
        finally:
            process.terminate()


class Stock:
    """Qwen2-VL in this process, asked as the documentation of transformers does."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.model = AutoModelForImageTextToText.from_pretrained(folder)
        self.processor = AutoProcessor.from_pretrained(folder)

    def inputs(self, image: torch.Tensor, text: str):
        from torchvision.transforms.functional import to_pil_image

        content = [
            {"type": "image", "image": to_pil_image((255 * image).round().byte())},
            {"type": "text", "text": text},
        ]
        return self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )

    def next(self, image: torch.Tensor, text: str, words: list[str]) -> torch.Tensor:
        """Probabilities of the next token among those of some words."""
        with torch.no_grad():
            logits = self.model(**self.inputs(image, text)).logits[0, -1]
        ids = [self.processor.tokenizer.encode(word)[0] for word in words]
        return logits[ids].softmax(0)

    def write(self, image: torch.Tensor, text: str, count: int) -> str:
        inputs = self.inputs(image, text)
        made = self.model.generate(**inputs, do_sample=False, max_new_tokens=count)[0, inputs["input_ids"].shape[1] :]
        return self.processor.decode(made, skip_special_tokens=True)


class TestTransformersServe:
    def test_words_are_those_of_the_model(self, real, qwen):
        stock, shown = Stock(qwen), [tiny.natural(1, 56, 70, seed=s)[0] for s in range(2)]
        served = rewards.ServedJudge(real, str(qwen))
        asks = [Ask(f"what is this {word}?", (image,)) for image in shown for word in ("image", "cat")]
        texts = served.write(asks, max_tokens=8)
        assert texts == [stock.write(ask.media[0], ask.text, 8).strip() for ask in asks]
        assert len(set(texts)) > 1

    @pytest.mark.parametrize("order", [1, -1])
    def test_yes_and_no_have_the_probabilities_of_the_model(self, real, qwen, order):
        stock, shown = Stock(qwen), [tiny.natural(1, 56, 70, seed=s)[0] for s in range(3)]
        served = rewards.ServedJudge(real, str(qwen), probabilities="systemone")
        odds = served.odds([Ask("Is it a cat?", (image,)) for image in shown], YES_NO[::order]).exp()
        expected = [stock.next(x, "\n\nIs it a cat?\nAnswer Yes or No only.", ["Yes", "No"][::order]) for x in shown]
        torch.testing.assert_close(odds, torch.stack(expected), rtol=1e-4, atol=1e-5)
        assert odds[:, 0].std() > 1e-4

    def test_other_choices_become_lettered_options(self, real, qwen):
        image = tiny.natural(1, 56, 70)[0]
        served = rewards.ServedJudge(real, str(qwen), probabilities="systemone")
        odds = served.odds([Ask("How good is it?", (image,))], [["good"], ["bad"], ["poor"]]).exp()[0]
        options = "A. good\nB. bad\nC. poor\nAnswer with the letter of the option that fits best (A to C) only."
        expected = Stock(qwen).next(image, f"\n\nHow good is it?\n{options}", ["A", "B", "C"])
        torch.testing.assert_close(odds, expected, rtol=1e-4, atol=1e-5)

    def test_no_logprobs_names_the_remedy(self, real, qwen):
        served = rewards.ServedJudge(real, str(qwen))
        with pytest.warns(UserWarning, match='knows probabilities="systemone"'):
            assert served.odds([Ask("Is it?")], YES_NO).isnan().all()

    def test_an_unknown_model_is_no_answer(self, real):
        with pytest.warns(UserWarning, match="HTTP 400.*pinned"):
            assert rewards.ServedJudge(real, "another").write([Ask("What?")]) == [None]

    def test_what_typed_questions_cannot_say(self, real, qwen):
        served = rewards.ServedJudge(real, str(qwen), probabilities="systemone")
        for ask in (Ask("Is it?", start="It"), Ask("Is it?", (torch.rand(5, 3, 28, 28),))):
            with pytest.raises(ValueError, match='use "logprobs"'):
                served.odds([ask], YES_NO)
        with pytest.raises(ValueError, match="compares choices"):
            rewards.VQAScore(served)(tiny.natural(1, 28, 28), ["a cat"])

    def test_a_local_judge_says_the_same(self, real, qwen):
        """What it says in words, and how probable Yes is where it is asked as the server asks."""
        local = rewards.LocalJudge(str(qwen), dtype="float32", quantize="hard")
        served = rewards.ServedJudge(real, str(qwen), probabilities="systemone")
        shown = [tiny.natural(1, 56, 70, seed=s)[0] for s in range(3)]
        asks = [Ask("what is this?", (image,)) for image in shown]
        assert served.write(asks, max_tokens=6) == [text.strip() for text in local.write(asks, max_tokens=6)]
        worded = [Ask("\n\nIs it a cat?\nAnswer Yes or No only.", (image,)) for image in shown]
        here = local.odds(worded, [["Yes"], ["No"]]).log_softmax(-1)
        there = served.odds([Ask("Is it a cat?", (image,)) for image in shown], YES_NO)
        torch.testing.assert_close(there, here, rtol=0, atol=2e-3)  # one resizes levels, the other numbers

    def test_yes_no_by_a_served_judge(self, real, qwen):
        served = rewards.ServedJudge(real, str(qwen), probabilities="systemone")
        media = tiny.natural(3, 56, 70)
        scores = rewards.YesNo(served, "Does it show {prompt}?")(media, ["a cat", "a dog", "a red bird"])
        odds = served.odds(
            [Ask(f"Does it show {p}?", (m,)) for m, p in zip(media, ("a cat", "a dog", "a red bird"), strict=True)],
            YES_NO,
        )
        torch.testing.assert_close(scores, odds[:, 0].exp())


def test_typed_probabilities_beyond_float32_stay_finite():
    from rewards.wire import typed_odds

    odds = typed_odds({"answers": {"answer": {"type": "noul", "noul": 1.0}}}, YES_NO)
    assert odds == [0.0, pytest.approx(math.log(2**-25))]
    assert json.dumps(odds)
