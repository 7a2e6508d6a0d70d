"""What people hand in: files at their extremes, prompts over the limit, models that lack something. Each is handled
rightly, or is one line that says what is wrong and where."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import eval.__main__
import grpo_core.train
import sft_core.train
from sft_core.config import ModelConfig
from sft_core.model.policy import load_policy, load_tokenizer
from sft_core.model.source import find_source
from sft_core.model.tiny import build_tiny
from sft_core.text.config import TaskConfig
from sft_core.text.example import Example
from sft_core.text.prompts import drop_long_prompts, encode_prompt, prompt_messages
from sft_core.text.tasks import load_task, read_problems
from tests.helpers import tokenizer

GOOD = b'{"question": "2 + 2?", "answer": "#### 4"}'
FOUR = Example("2 + 2?", "#### 4", "4")
PROGRAMS: dict[str, Callable[[list[str]], None]] = {
    "sft_core.train": sft_core.train.main,
    "grpo_core.train": grpo_core.train.main,
    "eval": eval.__main__.main,
}


def read(folder: Path, content: bytes) -> list[Example]:
    path = folder / "problems.jsonl"
    path.write_bytes(content)
    return read_problems(path)


def complaint(folder: Path, content: bytes) -> str:
    """The one line with which a file is refused."""
    with pytest.raises(ValueError) as caught:
        read(folder, content)
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and message.isprintable() and len(message) < 400
    return message.removeprefix(f"{folder / 'problems.jsonl'}")


# --- JSONL at its extremes


def test_a_byte_order_mark_line_ends_and_blank_lines_of_any_system_do_no_harm(tmp_path: Path) -> None:
    for content in (
        b"\xef\xbb\xbf" + GOOD,
        b"\xef\xbb\xbf\r\n" + GOOD + b"\r\n",
        GOOD + b"\r\n\r\n \t \r\n",
        b"\n\n\x0c\n" + GOOD,
    ):
        assert read(tmp_path, content) == [FOUR]
    assert ", line 2: not JSON" in complaint(tmp_path, GOOD + b"\n\xef\xbb\xbf" + GOOD)  # it belongs to the start alone


def test_a_line_of_ten_megabytes_is_read(tmp_path: Path) -> None:
    long = "A long story. " * 750_000
    [example, after] = read(tmp_path, json.dumps({"question": long, "answer": "#### 4"}).encode() + b"\n" + GOOD)
    assert example.question == long and after == FOUR


def test_lines_of_other_scripts_and_control_characters_are_kept_as_they_are(tmp_path: Path) -> None:
    for text in ("Äpfel 苹果 😀", "a\u2028b\u2029c\x85d", "a\0b", "tab\tand\nline"):
        for ascii_only in (True, False):
            line = json.dumps({"question": text, "answer": f"{text}\n#### 4"}, ensure_ascii=ascii_only)
            assert read(tmp_path, line.encode()) == [Example(text, f"{text}\n#### 4", "4")]


def test_further_columns_may_hold_anything(tmp_path: Path) -> None:
    for value in (b"NaN", b"-Infinity", b"1e999", b'"\\ud800"', b"null", b'[{"a": 1}]', b"[" * 50 + b"]" * 50):
        assert read(tmp_path, GOOD[:-1] + b', "more": ' + value + b"}") == [FOUR]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"question": "half a \\ud800", "answer": "#### 4"}', "column question holds half of a surrogate pair"),
        (b'{"question": "2?", "answer": "\\udc00\\n#### 4"}', "column answer holds half of a surrogate pair"),
        (b'{"question": "2?", "answer": "#### 4", "question": "3?"}', "not JSON (the key 'question' is there twice)"),
        (b'{"question": "2?", "answer": "#### four"}', "`#### 'four'`, which is not a number; --answer_type text"),
        (b'{"question": "2?", "answer": "#### 4 apples\\r\\u2028"}', "which is not a number"),
        (b'{"question": "2?", "answer": "#### "}', "ends in `####` and nothing after it"),
        (b'{"question": "2?", "answer": "four"}', "'four' has no `#### N`, and is not a number; --answer_type text"),
        (b'{"question": NaN, "answer": "#### 4"}', "column question is missing, empty or not a string"),
        (b"NaN", "found float"),
        (b"[" * 200_000, "not JSON (maximum recursion"),
        (b'{"a":' * 200_000, "not JSON (maximum recursion"),
        (b'{"question": "raw \x00", "answer": "#### 4"}', "not JSON (Invalid control character"),
        (b"\x00" * 4096, "not JSON"),
        (b'{"n": ' + b"9" * 5000 + b"}", "not JSON (Exceeds the limit"),
        (b'{"question": "\xed\xa0\x80", "answer": "#### 4"}', "not JSON ('utf-8' codec"),
        (b'{"question": "caf\xe9", "answer": "#### 4"}', "not JSON ('utf-8' codec"),
        (GOOD + GOOD, "not JSON (Extra data"),
        (GOOD + b"\r" + GOOD, "not JSON (Extra data"),
        (b"\xff\xfe" + GOOD.decode().encode("utf-16-le"), "not JSON ('utf-8' codec"),
    ],
)
def test_what_is_no_problem_is_named_by_its_line(tmp_path: Path, line: bytes, words: str) -> None:
    message = complaint(tmp_path, GOOD + b"\n\n" + line + b"\n" + GOOD)
    assert message.startswith(", line 3: ") and words in message, message


def test_a_million_keys_of_which_two_are_the_same_are_found_at_once(tmp_path: Path) -> None:
    keys = ", ".join(f'"{i}": 0' for i in range(300_000))
    assert "'7' is there twice" in complaint(tmp_path, f'{{{keys}, "7": 0}}'.encode())


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["question", "answer", "x"]), inner),
    max_leaves=6,
)
LINES = (
    st.binary(max_size=60)
    | st.text(st.characters(), max_size=40).map(lambda text: text.encode("utf-8", "surrogatepass"))
    | ANY_JSON.map(lambda value: json.dumps(value).encode())
    | st.builds(
        lambda question, answer: json.dumps({"question": question, "answer": f"{answer}#### 4"}).encode(),
        st.text(st.characters()),
        st.text(st.characters()),
    )
    | st.just(GOOD)
)


@settings(max_examples=300)
@given(st.lists(LINES, max_size=4), st.sampled_from([b"\n", b"\r\n", b"\r"]), st.sampled_from([b"", b"\xef\xbb\xbf"]))
def test_any_file_gives_problems_or_a_one_line_error(lines: list[bytes], end: bytes, mark: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "problems.jsonl"
        path.write_bytes(mark + end.join(lines))
        try:
            examples = read_problems(path)
        except ValueError as error:
            assert str(error).startswith(str(path)) and str(error).isprintable()
        else:
            for example in examples:
                example.question.encode() + example.solution.encode()  # what tokenizers and logs will do
                assert example.question.strip() and example.answer


# --- files that are none


def the_error_line(program: str, argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        PROGRAMS[program](argv)
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1
    return err.strip()


@pytest.mark.parametrize("flag", ["--task", "--eval_file"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_folder_or_a_pipe_is_not_a_task(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], program: str, flag: str
) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(ValueError, match="is not a file"):
            read_problems(path)
        if flag == "--task" and path == tmp_path:
            with pytest.raises(ValueError, match=f"--task {path}: cannot load"):  # a folder may hold a data set
                load_task(TaskConfig(task=str(path)), seed=0)
            continue
        line = the_error_line(program, ["--model", str(tmp_path), flag, str(path)], capsys)
        assert f"{flag} {path}: expected" in line and "existing" in line


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "problems.jsonl"
    path.write_bytes(GOOD)

    def denied(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)  # root may read everything
    with pytest.raises(ValueError, match=r"problems\.jsonl: cannot be read \(Permission denied\)"):
        load_task(TaskConfig(task=str(path)), seed=0)


# --- prompts over the limit


def problems(folder: Path) -> Path:
    lines = [json.dumps({"question": "Tom has 3 apples. " * n, "answer": "#### 3"}) for n in (1, 30, 2, 1)]
    path = folder / "long.jsonl"
    path.write_text("\n".join(lines))
    return path


@pytest.mark.parametrize("program", PROGRAMS)
def test_long_prompts_are_refused_where_that_is_asked_for(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], program: str
) -> None:
    argv = ["--model", str(model), "--task", str(problems(tmp_path)), "--eval_problems", "0", "--system_prompt="]
    argv += ["--max_prompt_tokens", "60", "--max_completion_tokens", "8", "--long_prompts", "refuse"]
    line = the_error_line(program, argv, capsys)
    assert "--long_prompts refuse: 1 of 4 prompts are over --max_prompt_tokens 60, the longest with " in line
    assert "'Tom has 3 apples. Tom has" in line


def test_long_prompts_are_dropped_unless_refused_and_refusing_lets_short_ones_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    examples, tok = read_problems(problems(tmp_path)), tokenizer()
    lengths = [len(encode_prompt(tok, prompt_messages(e, TaskConfig(system_prompt="")))) for e in examples]
    drop = TaskConfig(system_prompt="", max_prompt_tokens=60)
    assert drop_long_prompts(examples, tok, drop) == [examples[0], *examples[2:]]
    assert "left out 1 of 4" in capsys.readouterr().out
    enough = TaskConfig(system_prompt="", max_prompt_tokens=max(lengths), long_prompts="refuse")
    assert drop_long_prompts(examples, tok, enough) == examples
    assert capsys.readouterr().out == ""


# --- models that lack something


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny(tmp_path_factory.mktemp("model"), seed=0)


def bare(folder: Path, **tokens: str) -> Path:
    """A model and a tokenizer that name no special token but these, and no chat template."""
    plain = PreTrainedTokenizerFast(tokenizer_object=tokenizer()._tokenizer, **tokens)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 256, "vocab_size": len(plain)}
    GPT2LMHeadModel(GPT2Config(**sizes, eos_token_id=None, bos_token_id=None)).save_pretrained(folder)
    plain.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_model_that_nothing_ends_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], program: str) -> None:
    folder = bare(tmp_path / "endless")
    argv = ["--model", str(folder), "--task", str(problems(tmp_path)), "--system_prompt="]
    argv += ["--max_prompt_tokens", "60", "--max_completion_tokens", "8"]
    line = the_error_line(program, argv, capsys)
    assert line == f"error: --model {folder}: has no end-of-sequence token, so its completions would never end"


def test_a_model_without_padding_token_and_chat_template_is_trained_and_asked(tmp_path: Path) -> None:
    folder = bare(tmp_path / "model", eos_token="<|im_end|>")
    config = ModelConfig(model=str(folder), device="cpu", precision="float32")
    assert load_tokenizer(find_source(config)).pad_token_id is None
    policy = load_policy(config)
    assert policy.pad_id == policy.eos_ids[0] == policy.tokenizer.eos_token_id
    argv = ["--task", str(problems(tmp_path)), "--prompt_format", "hash", "--system_prompt=", "--device", "cpu"]
    argv += ["--max_prompt_tokens", "60", "--max_completion_tokens", "8", "--eval_problems", "1", "--no_progress"]
    final = tmp_path / "run" / "final"
    train = ["--max_steps", "1", "--no_tensorboard", "--output_dir", str(final.parent)]
    sft_core.train.main(["--model", str(folder), *argv, *train, "--batch_size", "3"])
    eval.__main__.main(["--model", str(final), *argv, "--output_dir", str(tmp_path / "answers")])
    assert (tmp_path / "answers" / "answers.jsonl").is_file()
