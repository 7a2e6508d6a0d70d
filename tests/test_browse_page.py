"""The page of the completion browser, in a real browser."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.browse import __main__ as browse
from benchmarks.browse.page import page
from benchmarks.browse.recorded import read_recorded
from tests.chromium import Browser, browser
from tests.test_browse import APPLES, PEARS, changed, jsonl, needs_browser, question, run_folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return run_folder(tmp_path / "my-run")


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
def test_a_token_shows_its_sign_by_class_and_its_numbers_by_mouse_and_keys(chromium: Browser, address: str) -> None:
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
    order = [re.findall(r"standard deviation ([\d.]+)", text)[0] for text in chromium.texts("#list small")]
    assert order == ["0.71", "0.53", "0.00", "0.00"]
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
