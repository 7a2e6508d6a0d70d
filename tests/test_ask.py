"""A trained model is asked as it was trained, at a terminal, through a pipe or from a file; every answer is kept in a
form that can be trained on."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TextStreamer

import eval.ask
from eval.ask import AskConfig, Reply, as_problem, prepare, reply
from eval.samples import Samples, Sampling
from eval.sampling import sample
from sft_core.learn.rows import pack_rows
from sft_core.model.policy import Policy, load_policy
from sft_core.text.config import PromptConfig
from sft_core.text.example import Example
from sft_core.text.prompts import encode_prompt, prompt_messages
from sft_core.text.tasks import read_problems
from tests.helpers import tiny_policy
from tests.test_command_line import forbid_models

HERE = ["--device", "cpu", "--precision", "float32"]


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def pipe(patch: pytest.MonkeyPatch, data: bytes) -> None:
    patch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))


def answering(patch: pytest.MonkeyPatch, *texts: str) -> None:
    """The model's answers, one after the other."""
    left = list(texts)

    def answer(policy: Any, prompt: Any, config: AskConfig) -> Reply:
        extract = eval.ask.FORMATS[config.prompt_format].extract
        return Reply(left[0], extract(left.pop(0)), 1, 5, False, 0.1)

    patch.setattr(eval.ask, "reply", answer)


def the_error(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as end:
        eval.ask.main(argv)
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1
    return err.removeprefix("error: ").rstrip()


# --- what is asked


def test_a_run_is_asked_with_the_prompt_and_the_budgets_of_its_training(whole: Path) -> None:
    for name in (whole, whole / "final", sorted((whole / "checkpoints").iterdir())[0]):
        config = prepare([str(name), *HERE]).config
        found = (config.prompt_format, config.system_prompt, config.max_prompt_tokens, config.max_completion_tokens)
        assert found == ("hash", "", 90, 4)
    assert prepare(["--model", str(whole), "--prompt_format", "xml", *HERE]).config.prompt_format == "xml"


def test_a_model_without_a_run_is_asked_as_the_flags_say(model: Path) -> None:
    budgets = ["--max_prompt_tokens", "64", "--max_completion_tokens", "16"]
    job = prepare([str(model), "--shots", "1", *budgets, *HERE])
    assert (job.config.shots, job.config.prompt_format, job.kept) == (1, "xml", Path("asked.jsonl"))


def test_the_prompt_is_the_one_that_the_model_was_trained_with(
    whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Sequence[int]] = []

    def answer(policy: Any, prompt: Sequence[int], config: AskConfig) -> Reply:
        asked.append(prompt)
        return Reply("#### 1", "1", 1, 2, False, 0.1)

    monkeypatch.setattr(eval.ask, "reply", answer)
    job = prepare([str(whole), "--question", "What is 1?", "--append_to", "", *HERE])
    job.ask(load_policy(job.config, job.source))
    trained = PromptConfig(prompt_format="hash", system_prompt="")
    tokenizer = load_policy(job.config, job.source).tokenizer
    assert asked == [encode_prompt(tokenizer, prompt_messages(Example("What is 1?", "", ""), trained))]


# --- the answer, while it is written


def test_the_reasoning_is_shown_while_it_is_written_and_is_the_same_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    policy, prompt = tiny_policy(), [9, 40, 77]
    silent = sample(policy, [prompt], Sampling(40, 0)).texts[0]
    pieces: list[tuple[str, bool]] = []
    show = TextStreamer.on_finalized_text

    def noted(streamer: TextStreamer, text: str, stream_end: bool = False) -> None:
        pieces.append((text, stream_end))
        show(streamer, text, stream_end)

    monkeypatch.setattr(TextStreamer, "on_finalized_text", noted)
    answer = reply(policy, prompt, AskConfig(model="x", max_completion_tokens=40))
    assert answer.response == silent
    assert "".join(text for text, _ in pieces) == silent == capsys.readouterr().out.removesuffix("\n")
    early = [text for text, last in pieces if text and not last]
    assert len(early) > 3 and len("".join(early)) > len(silent) / 2


def test_of_several_samples_the_most_frequent_answer_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    policy = tiny_policy()
    torch.manual_seed(3)
    texts = sample(policy, [[9, 40, 77]] * 5, Sampling(6, 1.0)).texts
    torch.manual_seed(3)
    answer = reply(policy, [9, 40, 77], AskConfig(model="x", max_completion_tokens=6, temperature=1.0, samples=5))
    assert answer.response == texts[0] and answer.votes == 0  # an untrained model: no answer in any
    assert capsys.readouterr().out == texts[0] + "\n"


def test_equal_numbers_are_one_vote_also_zero_and_words_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["#### none", "#### none", "#### none", "#### 5", "#### 0", "#### 5", "#### 0.00", "#### $0"]

    def drawn(policy: Policy, prompts: list[list[int]], *_: Any, **__: Any) -> Samples:
        ids = [policy.tokenizer(text)["input_ids"] for text in texts]
        return Samples(pack_rows(prompts, ids, policy.pad_id), texts, torch.zeros(8, dtype=torch.bool), torch.empty(0))

    monkeypatch.setattr(eval.ask, "sample", drawn)
    config = AskConfig(model="x", prompt_format="hash", temperature=1.0, samples=8)
    answer = reply(tiny_policy(), [9, 40, 77], config)
    assert (answer.response, answer.extracted, answer.votes) == ("#### 0", "0", 3)


# --- what is kept


def test_what_is_kept_is_a_task_that_can_be_trained_on(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "answers.jsonl"
    answering(monkeypatch, "3+4=7\n#### 7", "I do not know", "#### $1,000", "#### about 5")
    eval.ask.main([str(whole), "--question", "a?", "b?", "c?", "d?", "--append_to", str(file), *HERE])
    assert read_problems(file) == [Example("a?", "3+4=7\n#### 7", "7"), Example("c?", "#### $1,000", "$1,000")]
    first = rows(file)[0]
    assert (first["response"], first["extracted"], first["model"]) == ("3+4=7\n#### 7", "7", str(whole / "final"))
    assert first["settings"]["prompt_format"] == "hash" and first["timestamp_iso"].startswith("20")
    # What is no problem is kept beside it, or the file would be no task any more.
    unanswered = rows(tmp_path / "answers.unanswered.jsonl")
    assert [(row["question"], row["answer"]) for row in unanswered] == [("b?", None), ("d?", None)]
    out = capsys.readouterr().out
    assert "Answer: 7 " in out and "Answer: none in the format hash" in out
    answering(monkeypatch, "#### 2")
    eval.ask.main([str(whole), "--question", "e?", "--append_to", str(file), *HERE])
    assert [row["question"] for row in rows(file)] == ["a?", "c?", "e?"]


def test_the_file_is_in_the_run_folder_unless_told_otherwise(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert prepare([str(whole), *HERE]).kept == whole / "asked.jsonl"
    assert prepare([str(whole / "final"), "--append_to", "x.jsonl", *HERE]).kept == Path("x.jsonl")
    assert prepare([str(whole), "--append_to", "", *HERE]).kept is None


@pytest.mark.parametrize(
    ("response", "extracted", "expected"),
    [
        ("<reasoning>\n2*3=6\n</reasoning>\n<answer>\n6\n</answer>\n", "6", "2*3=6\n#### 6"),
        ("so #### is a mark\n<answer>6</answer>", "6", "so\n#### 6"),  # a solution ends at its first mark
        ("<answer>6</answer>", "6", "#### 6"),
        ("<answer>six</answer>", "six", None),
        ("nothing", None, None),
        ("", "", None),
    ],
)
def test_a_reply_becomes_gsm8ks_form_or_none(response: str, extracted: str | None, expected: str | None) -> None:
    assert as_problem(Reply(response, extracted, 1, 1, False, 0.0)) == expected


# --- mistakes

MISTAKES: dict[str, tuple[list[str], str]] = {
    "no model": ([], "--model '': expected a run folder, a model or a hub name"),
    "the built-in model": (["tiny"], "--model tiny: expected a run folder"),
    "no such folder": (["./none"], "--model ./none: no such folder"),
    "no such file": (["RUN", "--questions", "none.jsonl"], "--questions none.jsonl: expected an existing file"),
    "two sources": (["RUN", "--questions", "q.jsonl", "--question", "a?"], "--questions q.jsonl: expected either"),
    "a line that is not JSON": (["RUN", "--questions", "q.jsonl"], "q.jsonl, line 2: is not JSON"),
    "a line without a question": (["RUN", "--questions", "r.jsonl"], "r.jsonl, line 1: column question is missing"),
    "no questions": (["RUN", "--questions", "empty.jsonl"], "--questions empty.jsonl: holds no questions"),
    "samples all alike": (["RUN", "--samples", "3"], "--samples 3: expected 1 at --temperature 0"),
    "a seed below 0": (["RUN", "--seed", "-1"], "--seed -1: expected 0 to"),
    "a folder to append to": (["RUN", "--append_to", "."], "--append_to .: expected a file"),
    "no folder to append in": (["RUN", "--append_to", "none/x.jsonl"], "--append_to none/x.jsonl: expected a file"),
    "a budget over the context": (["RUN", "--max_completion_tokens", "999"], "--max_prompt_tokens 90 + --max_comp"),
    "no such flag": (["RUN", "--quesion", "a?"], "--quesion: no such flag; did you mean --question?"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_is_one_line_and_reads_no_weight(
    what: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forbid_models(monkeypatch)
    monkeypatch.setattr(eval.ask, "load_policy", None)
    monkeypatch.chdir(tmp_path)
    Path("q.jsonl").write_text('{"question": "a?"}\nnope\n')
    Path("r.jsonl").write_text('{"text": "a?"}\n')
    Path("empty.jsonl").write_text("")
    argv, said = MISTAKES[what]
    assert the_error(capsys, *(str(whole) if arg == "RUN" else arg for arg in argv)).startswith(said)
    assert not list(tmp_path.glob("asked*"))
