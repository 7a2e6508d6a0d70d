"""Two rewards to start your own from: programs that are run, and answers that another model judges.

--rewards rewards.examples:passes_tests     needs a column `tests`: Python assertions
--rewards rewards.examples:judged           asks a chat endpoint: JUDGE_URL, JUDGE_MODEL, JUDGE_KEY
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import secrets
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from tempfile import TemporaryDirectory

from rewards.extract import last_number, parse_number
from rewards.functions import Completion, completion_text

SECONDS, MEMORY, AT_ONCE = 5.0, 2**30, 16
_FENCED = re.compile(r"```(?:python|py)?\n(.*?)```", re.DOTALL)
_LIMIT = """try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, ({0}, {0}))
except (ImportError, ValueError, OSError):  # Windows, macOS
    pass
"""
_ASKED = (
    "How good is this answer, from 0 (useless) to 10 (perfect)? Reply with the number alone.\n\n"
    "Question:\n{question}\n\nAnswer:\n{answer}"
)


def passes_tests(
    prompts: Sequence[Completion], completions: Sequence[Completion], tests: Sequence[str], **columns: object
) -> list[float]:
    """1.0 where the Python program in a completion passes its row's assertions, else 0.0.

    Each runs in a process of its own, without this one's environment and variables, for SECONDS and (on Linux) with
    MEMORY bytes at most. That is no sandbox: what it may read and write is what you may. Use a container where that
    matters.

    >>> passes_tests(["?"] * 3, ["def f(x): return 2 * x", "def f(x): return x", "exit()"], ["assert f(3) == 6"] * 3)
    [1.0, 0.0, 0.0]
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool, TemporaryDirectory() as folder:
        texts = [completion_text(completion) for completion in completions]
        return list(pool.map(_passes, texts, tests, [folder] * len(texts)))


def _passes(text: str, tests: str, folder: str) -> float:
    fenced = _FENCED.findall(text)
    limit = _LIMIT.format(MEMORY)
    mark = secrets.token_hex(16)  # printed after the tests alone: a program that ends before them has not passed
    program = f"{limit}{fenced[-1] if fenced else text}\n{tests}\nprint({mark!r})\n"
    try:
        command = [sys.executable, "-I", "-c", program]
        done = subprocess.run(command, capture_output=True, timeout=SECONDS, cwd=folder, env={}, check=False)
    except (subprocess.TimeoutExpired, OSError, ValueError):  # a text with a null byte is no command
        return 0.0
    return float(done.returncode == 0 and done.stdout.decode(errors="replace").split()[-1:] == [mark])


async def judged(
    prompts: Sequence[Completion], completions: Sequence[Completion], question: Sequence[str], **columns: object
) -> list[float | None]:
    """A number from 0 to 1 by a model behind a chat endpoint as OpenAI's, vLLM's and llama.cpp's servers have it.

    Up to AT_ONCE rows are asked about at the same time. An endpoint that fails has no opinion on the row.
    """
    free = asyncio.Semaphore(AT_ONCE)

    async def of(asked: str, completion: Completion) -> float | None:
        async with free:
            return await asyncio.to_thread(_judge, asked, completion_text(completion))

    return list(await asyncio.gather(*(of(*row) for row in zip(question, completions, strict=True))))


def _judge(question: str, answer: str) -> float | None:
    message = {"role": "user", "content": _ASKED.format(question=question, answer=answer)}
    body = {"model": os.environ.get("JUDGE_MODEL", ""), "temperature": 0, "messages": [message]}
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {os.environ.get('JUDGE_KEY', '')}"}
    url = os.environ.get("JUDGE_URL", "http://127.0.0.1:8000") + "/v1/chat/completions"
    try:
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=60) as reply:
            said = json.load(reply)["choices"][0]["message"]["content"]
    except (OSError, ValueError, LookupError, TypeError):  # of the network, of a reply of another shape
        return None
    number = parse_number(last_number(str(said)) or "")
    return min(1.0, max(0.0, float(number) / 10)) if number is not None else None
