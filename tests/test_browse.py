"""The completion browser: what is read of a run, what of it a browser shows, and that nothing of it is executed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.browse import __main__ as browse
from benchmarks.browse.page import page
from benchmarks.browse.recorded import read_recorded, spaced
from tests.chromium import PROGRAM, Browser, browser

needs_browser = pytest.mark.skipif(PROGRAM is None, reason="needs a Chromium: apt-get install chromium")

# Two problems a step; the first is drawn again in step 3. Each group: its problem, then each row's text, reward,
# advantage, and tokens on which the advantage acted.
APPLES, PEARS, PLUMS = ("How many apples?", "7"), ("How many pears?", "5"), ("How many plums?", "9")
GROUPS: list[tuple[int, int, tuple[str, str], list[tuple[str, float, float, str]]]] = [
    (1, 0, APPLES, [("3+4=7\n#### 7", 1.0, 0.7, "1111111111"), ("#### 3", 0.0, -0.7, "0100")]),
    (1, 1, PEARS, [("#### 4", 0.1, 0.0, "1111"), ("#### 6", 0.1, 0.0, "1111"), ("#### 8", 0.1, 0.0, "1111")]),
    (2, 0, PLUMS, [("#### 9", 1.0, 0.0, "1111"), ("#### 9", 1.0, 0.0, "1111")]),
    (3, 0, APPLES, [("#### 7", 1.0, 1.4, "1101"), ("#### 8 and", 0.25, -1.4, "000000")]),
]
ANSWERS = {0: ("#### 3", "#### 5"), 2: ("#### 3", "5"), 3: ("#### 7", "5")}


def jsonl(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def number_after(text: str) -> str:
    return text.partition("#### ")[2]


def run_folder(folder: Path) -> Path:
    """A run as `grpo_core.train` leaves it, in miniature."""
    completions, tokens = [], []
    for step, group, (question, expected), rows in GROUPS:
        for i, (text, reward, advantage, kept) in enumerate(rows):
            pieces = [*re.findall(r"####| |\d|\n|\W|\w+", text), "<|im_end|>"]
            assert len(pieces) == len(kept) and "".join(pieces) == text + "<|im_end|>"
            about = {"step": step, "row": 2 * group + i}
            parts = {"numeric_reward_func": float(reward == 1), "bonus": reward if reward < 1 else None}
            answer = {"question": question, "expected": expected, "response": text, "extracted": number_after(text)}
            earned = {"reward": reward, "rewards": parts, "advantage": advantage}
            size = {"tokens": len(pieces), "truncated": text.endswith("and")}
            completions.append({**about, "group": group, **answer, **earned, **size})
            ids = [len(piece) for piece in pieces]
            logps = [-0.5 * k for k in range(len(pieces))]
            tokens.append({**about, "ids": ids, "pieces": pieces, "logps": logps, "kept": kept})
    jsonl(folder / "completions.jsonl", completions)
    jsonl(folder / "tokens.jsonl", tokens)
    for step, texts in ANSWERS.items():
        problems = zip((APPLES, PEARS), texts, strict=True)
        jsonl(
            folder / "heldout" / f"step-{step:06d}.jsonl",
            [
                {"question": q, "expected": e, "response": text, "extracted": number_after(text), "strict": True}
                | {"lenient": True, "tokens": 4, "truncated": False}
                for (q, e), text in problems
            ],
        )
    (folder / "config.yaml").write_text("group_size: 2\nlr: 1.0e-6\nmodel: tiny\nrewards: [numeric_reward_func]\n")
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return run_folder(tmp_path / "my-run")


def changed(run: Path, name: str, line: int, **fields: Any) -> None:
    """The same file with other fields in one line."""
    records = [json.loads(text) for text in (run / name).read_text().splitlines()]
    records[line] |= fields
    jsonl(run / name, records)


def refused(run: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    with pytest.raises(SystemExit) as caught:
        browse.main([str(run), *flags])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    return error


# --- what is read


def test_a_problem_that_is_drawn_again_is_one_problem(run: Path) -> None:
    recorded = read_recorded(run)
    assert [(problem["question"], problem["expected"]) for problem in recorded["problems"]] == [APPLES, PEARS, PLUMS]
    assert [(group["step"], group["problem"]) for group in recorded["groups"]] == [(1, 0), (1, 1), (2, 2), (3, 0)]
    first = recorded["groups"][0]["rows"][0]
    assert (first["reward"], first["rewards"], first["advantage"], first["right"]) == (1.0, [1.0, None], 0.7, True)
    assert [recorded["pieces"][piece][1] for piece, _, _ in first["tokens"]] == [
        *("3", "+", "4", "=", "7", "\n", "####", " ", "7", "<|im_end|>")
    ]
    assert [logp for _, logp, _ in first["tokens"]][:3] == [0, -50, -100]


def test_a_held_out_problem_has_an_answer_of_each_evaluation(run: Path) -> None:
    apples, pears = read_recorded(run)["heldout"]
    assert [(answer["step"], answer["text"], answer["right"]) for answer in apples["answers"]] == [
        (0, "#### 3", False),
        (2, "#### 3", False),
        (3, "#### 7", True),
    ]
    assert [answer["right"] for answer in pears["answers"]] == [True, False, False]


def test_a_run_that_is_too_large_is_cut_to_every_kth_step_and_says_so(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert spaced({step: 10 for step in range(1, 12)}, most=50) == (3, [1, 4, 7, 10, 11])
    assert spaced({1: 10, 2: 10, 3: 10}, most=5) == (2, [1, 3])
    assert spaced({1: 10, 2: 10}, most=0) == (1, [1, 2])
    assert spaced({}, most=5)[1] == []
    recorded = read_recorded(run, most_tokens=34)
    assert [group["step"] for group in recorded["groups"]] == [1, 1, 3]
    said = "Shown: one step in 2, and the last, 2 of 3, so that the page has at most 34 tokens (--max_tokens)."
    assert said in recorded["about"]
    browse.main([str(run), "--max_tokens", "34"])
    out = capsys.readouterr().out
    assert said in out and str(run / "completions.html") in out


def test_a_run_without_tokens_is_shown_as_text(run: Path) -> None:
    (run / "tokens.jsonl").unlink()
    recorded = read_recorded(run)
    assert recorded["pieces"] == [] and recorded["groups"][0]["rows"][0]["text"] == "3+4=7\n#### 7"
    assert any("no tokens.jsonl" in line for line in recorded["about"])


def test_a_run_that_is_killed_in_the_middle_of_a_line_can_be_looked_at(run: Path) -> None:
    for name in ("completions.jsonl", "tokens.jsonl"):
        with (run / name).open("a") as file:
            file.write('{"step": 4, "ro')
    assert len(read_recorded(run)["groups"]) == 4


def test_tokens_that_are_on_file_twice_are_no_obstacle(run: Path) -> None:
    """After --resume of a checkpoint from before there was a tokens.jsonl."""
    tokens = (run / "tokens.jsonl").read_text()
    once = read_recorded(run)
    (run / "tokens.jsonl").write_text(2 * tokens)
    assert read_recorded(run) == once


@pytest.mark.parametrize(
    ("name", "line", "fields", "message"),
    [
        ("completions.jsonl", 2, {"step": "one"}, "line 3: expected step to be of type int; it is 'one'"),
        ("completions.jsonl", 0, {"response": None}, "line 1: expected response to be of type str; it is None"),
        ("completions.jsonl", 0, {"row": True}, "line 1: expected row to be of type int; it is True"),
        ("tokens.jsonl", 1, {"ids": [1]}, "line 2: expected ids, pieces, logps and kept of 4 tokens; there are 1, 4"),
        ("heldout/step-000002.jsonl", 1, {"tokens": {}}, "line 2: expected tokens to be of type int; it is {}"),
    ],
)
def test_a_record_that_is_none_is_one_line_with_its_file_and_number(
    run: Path, name: str, line: int, fields: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    changed(run, name, line, **fields)
    assert f"{run / name}, {message}" in refused(run, capsys)


def test_what_holds_no_run_of_grpo_is_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"{tmp_path}: expected a run folder" in refused(tmp_path, capsys)
    assert "--max_tokens -1: expected 0 or more" in refused(run, capsys, "--max_tokens", "-1")
    assert "expected a file in an existing folder" in refused(run, capsys, "--output", str(tmp_path / "no" / "a.html"))
    assert f"--output {run}: expected a file" in refused(run, capsys, "--output", str(run))
    assert "nowhere: expected a run folder" in refused(tmp_path / "nowhere", capsys)
    assert "--outptu: no such flag; did you mean --output?" in refused(run, capsys, "--outptu", "a.html")
    (run / "config.yaml").write_text("batch_size: 2\nlr: 1.0e-6\n")
    assert "expected a run of grpo_core.train" in refused(run, capsys)


# --- what is shown


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as driven:
        driven.screen(1280, 900)
        yield driven


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of the small run, on the disk."""
    run = run_folder(tmp_path_factory.mktemp("shown") / "my-run")
    browse.main([str(run)])
    return f"file://{run / 'completions.html'}"


def question(chromium: Browser) -> str:
    return chromium.text("main h2")


@needs_browser
def test_the_page_shows_each_group_and_asks_nobody_for_anything(chromium: Browser, address: str) -> None:
    chromium.requests.clear()
    chromium.open(address)
    assert chromium.text("h1") == "my-run"
    assert chromium.text("#count") == "4 of 4 groups"
    assert question(chromium) == APPLES[0]
    assert chromium.texts("main h3") == ["Completion 0", "Completion 1"]
    assert chromium.texts("main .bars b") == ["1.00", "none", "+0.70", "0.00", "0.00", "−0.70"]
    assert chromium.texts(".tokens") == ["3+4=7⏎\n#### 7<|im_end|>", "#### 3<|im_end|>"]
    assert chromium.requests == [address]
    assert chromium.complaints == []


@needs_browser
def test_a_tokens_sign_is_told_by_class_and_its_numbers_by_mouse_and_keys(chromium: Browser, address: str) -> None:
    chromium.open(address)
    kinds = "[...block.querySelectorAll('.t')].map((token) => token.classList[1])"
    assert chromium.value(f"[...document.querySelectorAll('.tokens')].map((block) => {kinds})") == [
        ["pos"] * 10,
        ["off", "neg", "off", "off"],
    ]
    chromium.hover("article:last-of-type .t:nth-child(2)")
    assert chromium.text("#inspector") == 'token 2 of 4: " ", id 1, log p −0.50 (p = 60.7%), advantage −0.70'
    chromium.press("ArrowRight")  # no completion has the focus: the problem's next draw
    assert "step=3" in chromium.value("location.hash")
    assert chromium.value(f"(() => {{ const block = document.querySelector('.tokens'); return {kinds}; }})()") == [
        *("pos", "pos", "off", "pos")
    ]
    chromium.press("ArrowLeft")
    chromium.click("article:last-of-type .tokens")
    for _ in range(9):
        chromium.press("ArrowRight")
    assert chromium.text("#inspector").startswith('token 4 of 4: "<|im_end|>", id 10, log p −1.50')
    assert chromium.text("#inspector").endswith("no advantage acted on it")
    for _ in range(9):
        chromium.press("ArrowLeft")
    assert chromium.text("#inspector").startswith("token 1 of 4:") and "step=3" not in chromium.value("location.hash")


@needs_browser
@pytest.mark.parametrize(
    ("show", "found"),
    [
        ("spread", ["step 1, group 0", "step 3, group 0"]),
        ("equal", ["step 1, group 1", "step 2, group 0"]),
        ("wrong", ["step 1, group 1"]),
        ("right", ["step 2, group 0"]),
        ("mixed", ["step 1, group 0", "step 3, group 0"]),
        ("truncated", ["step 3, group 0"]),
        ("again", ["step 1, group 0", "step 3, group 0"]),
    ],
)
def test_groups_are_filtered(show: str, found: list[str], chromium: Browser, address: str) -> None:
    chromium.open(address)
    chromium.choose("#show", show)
    assert [text.split(":")[0] for text in chromium.texts("#list small")] == found
    assert chromium.text("#count") == f"{len(found)} of 4 groups"
    assert found[0] in chromium.text("main .note")
    assert f"show={show}" in chromium.value("location.hash")


@needs_browser
def test_groups_are_searched_sorted_and_walked_through_with_keys(chromium: Browser, address: str) -> None:
    chromium.open(address)
    chromium.choose("#sort", "spread")
    order = [re.findall(r"spread ([\d.]+)", text)[0] for text in chromium.texts("#list small")]
    assert order == ["0.50", "0.38", "0.00", "0.00"]
    chromium.press("j")
    assert "step 3, group 0" in chromium.text("main .note")
    chromium.press("k")
    assert "step 1, group 0" in chromium.text("main .note")
    chromium.press("/")
    for letter in "PEARS":
        chromium.press(letter)
    assert chromium.texts("#list span") == [PEARS[0]] and question(chromium) == PEARS[0]
    chromium.open(f"{address}#q=8+and")  # in a completion
    assert chromium.text("#count") == "1 of 4 groups" and "step 3" in chromium.text("main .note")
    chromium.open(f"{address}#q=nowhere")
    assert chromium.text("main") == "Nothing matches."


@needs_browser
def test_a_problem_is_followed_over_time_and_the_address_keeps_the_place(chromium: Browser, address: str) -> None:
    chromium.open(address)
    assert chromium.texts(".strip button") == ["step 1: mean 0.50", "step 3: mean 0.63"]
    chromium.click(".strip li:last-child button")
    assert chromium.texts(".tokens")[0] == "#### 7<|im_end|>"
    assert chromium.texts(".badge") == ["truncated", "no advantage acted on it"]
    there = chromium.value("location.href")
    chromium.value("history.back()")
    chromium.wait("document.querySelector('.tokens').innerText.startsWith('3+4')")
    chromium.open(there)
    assert chromium.texts(".tokens")[0] == "#### 7<|im_end|>"
    for key, step in (("]", "1"), ("]", "2"), ("[", "1")):
        chromium.press(key)
        assert f"at={step}" in chromium.value("location.hash")
    assert chromium.text("#count") == "2 of 4 groups" and chromium.text("#at-said") == "1 only"
    for nonsense in ("#view=constructor&show=toString&at=x&step=99", "#%%%"):
        chromium.open(address + nonsense)
        assert question(chromium) == APPLES[0]
    assert chromium.complaints == []


@needs_browser
def test_held_out_problems_show_the_answer_before_and_after(chromium: Browser, address: str) -> None:
    chromium.open(address)
    chromium.click("[data-view=heldout]")
    assert chromium.texts("#list small") == ["✗ ✗ ✓", "✓ ✗ ✗"]
    assert chromium.texts("main h3") == ["before: steps 0 to 2", "after: step 3"]
    assert chromium.texts("main .text") == ["#### 3", "#### 7"]
    chromium.choose("#show", "lost")
    assert chromium.texts("#list span") == [PEARS[0]]
    assert chromium.texts("main h3") == ["before: step 0", "after: steps 2 to 3"]


@needs_browser
@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_is_wider_than_the_screen(width: int, chromium: Browser, address: str) -> None:
    chromium.screen(width, 800)
    for place in ("", "#step=3&group=0", "#view=heldout"):
        chromium.open(address + place)
        assert chromium.value("document.documentElement.scrollWidth") <= width
    chromium.screen(1280, 900)


# --- what is not executed

HOSTILE = {
    "ends the script": "</script><script>document.title = 'owned'</script>",
    "ends the data": '"}]}</script><img src=x onerror="document.title = \'owned\'">',
    "markup": "<img src=x onerror=alert(1)><svg onload=alert(1)><iframe src='javascript:alert(1)'></iframe><!--",
    "a template's own": "$data ${script} $$ {{title}} %(x)s `${document.title = 'owned'}`",
    "entities": "&lt;b&gt; &amp; &#60;",
    "turned around": "user\u202e txt.exe \u2066abc\u2069 \u200b\ufeff",
    "no character": "half \ud83d and \udc00 \u0000 \u001b[31m",
    "lines": "a\r\nb\u2028c\u2029d\te",
    "marks": "Z" + "\u0301" * 300,
    "prototype": "__proto__",
}


def hostile_run(folder: Path, text: str) -> Path:
    """A run all of whose texts are this one."""
    run = run_folder(folder)
    everywhere = {"question": text, "expected": text, "response": text, "extracted": text}
    for name in ("completions.jsonl", "heldout/step-000000.jsonl"):
        records = [json.loads(line) for line in (run / name).read_text().splitlines()]
        jsonl(run / name, [record | everywhere for record in records])
    changed(run, "completions.jsonl", 0, rewards={text: 1.0})
    tokens = [json.loads(line) for line in (run / "tokens.jsonl").read_text().splitlines()]
    jsonl(run / "tokens.jsonl", [row | {"pieces": [text] * len(row["pieces"])} for row in tokens[:3]])
    (run / "config.yaml").write_text(json.dumps({"group_size": 2, "lr": 1, "model": text}))
    return run


@pytest.mark.parametrize("kind", HOSTILE)
def test_no_text_of_a_run_is_markup_in_the_file(kind: str, tmp_path: Path) -> None:
    text = HOSTILE[kind]
    written = page(read_recorded(hostile_run(tmp_path / "run", text)))
    head, _, rest = written.partition('<script type="application/json" id="data">')
    data, _, tail = rest.partition("</script>")
    assert data.isascii() and not set("<>&") & set(data)
    assert json.loads(data)["problems"][0]["question"] == text
    assert written.count("<script") == 2 and written.count("</script>") == 2
    assert kind == "prototype" or text not in head + tail
    assert "http:" not in written and "https:" not in written


@needs_browser
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_completions_are_shown_as_text(kind: str, chromium: Browser, tmp_path: Path) -> None:
    text = HOSTILE[kind]
    run = hostile_run(tmp_path / "run", text)
    browse.main([str(run)])
    chromium.complaints.clear()
    chromium.requests.clear()
    chromium.open(f"file://{run / 'completions.html'}")
    shown = chromium.value("document.querySelector('.tokens .t').textContent") + chromium.text(".tokens")
    beginning = {
        "turned around": "user‹U+202E› txt.exe",
        "no character": "half ‹U+D83D› and ‹U+DC00› ‹U+0000› ‹U+001B›[31m",
        "lines": "a‹U+000D›⏎\nb‹U+2028›c‹U+2029›d\te",
    }
    assert shown.startswith(beginning.get(kind, text))
    chromium.open(f"file://{run / 'completions.html'}#view=heldout")
    assert chromium.texts("main h3")[0] == "always: step 0"
    assert chromium.value("document.title") == "run: completions"
    assert chromium.value("document.querySelectorAll('img, svg, iframe, b:not(.bars b)').length") == 0
    assert chromium.complaints == []
    assert {request for request in chromium.requests if not request.startswith("file://")} <= {"about:blank"}


@needs_browser
def test_a_megabyte_is_cut_until_it_is_asked_for(chromium: Browser, tmp_path: Path) -> None:
    run, many = run_folder(tmp_path / "run"), 50_000
    changed(run, "completions.jsonl", 0, tokens=many)
    parts = {"ids": [1] * many, "pieces": ["twenty characters..."] * many, "logps": [0] * many, "kept": "1" * many}
    changed(run, "tokens.jsonl", 0, **parts)
    changed(run, "heldout/step-000000.jsonl", 0, response="x" * 2**20)
    browse.main([str(run)])
    chromium.open(f"file://{run / 'completions.html'}")
    counted = "document.querySelector('.tokens').querySelectorAll('.t').length"
    assert chromium.value(counted) == 3000 and chromium.texts(".tokens button") == [f"show all {many} tokens"]
    chromium.click(".tokens button")
    assert chromium.value(counted) == many
    chromium.open(f"file://{run / 'completions.html'}#view=heldout")
    assert len(chromium.texts("main .text")[0]) < 20_100
    chromium.click("main .text button")
    assert len(chromium.texts("main .text")[0]) == 2**20


@needs_browser
def test_the_pages_policy_lets_no_other_script_run(chromium: Browser, address: str, tmp_path: Path) -> None:
    """Should a text ever become markup, it still could not do anything."""
    written = Path(address.removeprefix("file://")).read_text()
    inserted = "<script>document.title = 'owned'</script><img src=x onerror=\"document.title = 'owned'\">"
    (tmp_path / "broken.html").write_text(written.replace("<header>", f"{inserted}<header>"))
    chromium.open(f"file://{tmp_path / 'broken.html'}")
    assert question(chromium) == APPLES[0]
    assert chromium.value("document.title") == "my-run: completions"
    assert any("Content Security Policy" in complaint for complaint in chromium.complaints)
    chromium.complaints.clear()
