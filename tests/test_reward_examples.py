"""The two example rewards: programs are run within limits, and a judge is asked about many rows at the same time."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import rewards.examples
from rewards import Reward, score
from rewards.examples import judged, passes_tests

RIGHT = "Here it is:\n```python\ndef f(x):\n    return 2 * x\n```\nThat doubles."


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        (RIGHT, 1.0),
        (RIGHT.replace("2 * x", "x"), 0.0),
        ("def f(x):\n    return 2 * x\nimport os; os._exit(0)", 0.0),  # ends before the tests
        ("exit()", 0.0),
        ("while True: pass", 0.0),
        ("f = lambda x: 2 * x\nfull = bytearray(2**31)", 0.0),
        ("no program", 0.0),
        ("\x00", 0.0),
        ("", 0.0),
    ],
)
def test_a_program_is_worth_1_where_its_tests_pass(text: str, reward: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewards.examples, "SECONDS", 3.0)
    assert passes_tests(["?"], [text], ["assert f(3) == 6"]) == [reward]


def test_a_program_sees_nothing_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert passes_tests(["?"], ["import os"], ["assert 'HF_TOKEN' not in os.environ"]) == [1.0]


class Judge(BaseHTTPRequestHandler):
    together = threading.Barrier(4)

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = asked["messages"][0]["content"]
        self.together.wait(timeout=20)  # breaks unless four ask at the same time
        said = "I cannot say." if "vague" in text else "It deserves 7." if "decent" in text else "12"
        body = b"not JSON" if "broken" in text else json.dumps({"choices": [{"message": {"content": said}}]}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("JUDGE_URL", f"http://127.0.0.1:{server.server_port}")
    yield
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_judge_is_asked_about_all_rows_at_the_same_time(endpoint: None) -> None:
    texts = ["decent", "vague", "broken", "excellent"]
    scores = score([Reward("judged", judged)], ["?"] * 4, texts, {"question": ["?"] * 4})
    assert scores.by_function["judged"] == [0.7, None, None, 1.0]


def test_a_judge_that_is_not_there_has_no_opinion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_URL", "http://127.0.0.1:9")
    scores = score([Reward("judged", judged)], ["?"], ["x"], {"question": ["?"]})
    assert scores.by_function["judged"] == [None]
