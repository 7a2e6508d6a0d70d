"""The pages of docs/ say what the code does: sessions, quotations, names, links; tables of settings, fields, files."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

import sft_core.train
from eval.__main__ import main as evaluate
from sft_core.run.checkpoint import write_whole
from tests.exercises import exercises
from tests.faulty import FORKS, SFT, command, ended
from tests.helpers import PEFT_IS_BEHIND, adapted, tiny_policy
from tests.pages import (
    DOCS,
    PAGES,
    ROOT,
    anchors,
    first_column,
    is_quoted,
    links,
    names,
    quotations,
    run_sessions,
)
from tests.tables import PROGRAMS, with_tables

pytestmark = FORKS

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
ANEW = "python -m tests.pages"


@pytest.fixture(scope="module")
def sft(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small SFT run."""
    run = tmp_path_factory.mktemp("sft") / "run"
    assert ended(command(model, run, own=SFT), program=sft_core.train.main).code == 0
    return run


# --- what is executed or made


@pytest.mark.parametrize(
    "page", [page for page in PAGES if "\n>>> " in page.read_text(encoding="utf-8")], ids=lambda page: page.name
)
def test_a_session_prints_what_its_page_says(page: Path) -> None:
    assert run_sessions(page.read_text(encoding="utf-8"), page.name) == [], ANEW


@pytest.mark.parametrize("printed", ["3 of 0.249 and 1.5e-06", "3 of 0.251 and 1.4e-06"])
def test_a_session_may_be_one_off_in_the_last_digit_of_a_decimal(printed: str) -> None:
    text = f"```python\n>>> print('{printed}')\n3 of 0.250 and 1.5e-06\n```\n"
    assert run_sessions(text, "page") == []


@pytest.mark.parametrize(
    "printed",
    [
        "4 of 0.250 and 1.5e-06",
        "3 of 0.252 and 1.5e-06",
        "3 of -0.250 and 1.5e-06",
        "3 of 0.250",
        "3 or 0.250 and 1.5e-06",
    ],
)
def test_a_session_may_be_no_more_off_than_that(printed: str) -> None:
    text = f"```python\n>>> print('{printed}')\n3 of 0.250 and 1.5e-06\n```\n"
    [wrong] = run_sessions(text, "page")
    assert wrong.got == printed + "\n"


@every_page
def test_a_table_on_file_is_the_one_that_the_code_makes(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert with_tables(text) == text, ANEW


def test_the_pictures_are_drawn_and_small(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from docs.figures import draw

    drawn = draw(tmp_path)
    assert {path.name for path in drawn} == {path.name for path in DOCS.glob("*.png")}
    assert all((DOCS / path.name).stat().st_size < 120_000 for path in drawn)


# --- what is pointed at


@every_page
def test_a_quotation_stands_in_its_file_word_for_word(page: Path) -> None:
    for file, block in quotations(page.read_text(encoding="utf-8")):
        assert is_quoted(block, (ROOT / file).read_text(encoding="utf-8")), f"{file} does not hold:\n{block}"


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.name)
def test_every_link_leads_to_a_file_a_heading_or_a_name(page: Path) -> None:
    for label, target in links(page.read_text(encoding="utf-8")):
        path, _, heading = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        if heading:
            assert heading in anchors(file.read_text(encoding="utf-8")), target
        name = label.strip("`")
        if label.startswith("`") and file.suffix == ".py" and not name.endswith(".py"):
            assert name in names(file.read_text(encoding="utf-8")), f"{name} is not in {path}"


OWN_PAGES = [page for page in PAGES if page.name not in ("notes.md", "bug-zoo.md")]  # history, and patches
OTHER_FLAGS = {
    "config",
    "preset",
    "output_path",
    "gpu",
    "gpus",
    "show",
    "list",
}  # the command line's own, benchmarks.plan, tests.zoo
OTHER_FLAGS |= {"mode", "response", "expected"}  # grpo_core.pipeline, rewards
OTHER_FLAGS |= {"nproc_per_node", "nnodes", "rdzv_backend", "rdzv_endpoint", "max_restarts"}  # torchrun
OTHER_FLAGS |= {"seeds", "logdir", "help"}  # benchmarks.plots, tensorboard, every program
OTHER_FLAGS |= {"parts", "minutes", "records"}  # benchmarks.sitting, benchmarks.atlas


@pytest.mark.parametrize("page", OWN_PAGES, ids=lambda page: page.name)
def test_every_flag_that_a_page_names_exists(page: Path) -> None:
    known = {field.name for config in PROGRAMS for field in dataclasses.fields(config)} | OTHER_FLAGS
    known |= {"learning_rate"} if page.name == "from-trl.md" else set()
    found = set(re.findall(r"(?<![-\w])--(?:(?:sft|grpo|eval)\.)?([a-z]\w*)", page.read_text(encoding="utf-8")))
    assert found - known == set()


@every_page
def test_every_page_is_in_the_index_and_leads_on(page: Path) -> None:
    index = {target for _, target in links((DOCS / "README.md").read_text(encoding="utf-8"))}
    assert page.name == "README.md" or page.name in index


def test_the_default_step_is_in_six_files_of_900_lines_together() -> None:
    text = (DOCS / "README.md").read_text(encoding="utf-8")
    files = re.findall(r"^\| (\d)\. \[`([\w/]+\.py)`\]", text, re.MULTILINE)
    assert [number for number, _ in files] == list("123456") and files[0][1] == "grpo_core/step.py"
    assert sum(len((ROOT / file).read_text(encoding="utf-8").splitlines()) for _, file in files) <= 900


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


def test_every_exercise_names_its_tests_and_the_function_to_rewrite() -> None:
    """`python -m tests.exercises` does them all."""
    text = (DOCS / "exercises.md").read_text(encoding="utf-8")
    found = exercises()
    assert [exercise.number for exercise in found] == re.findall(r"^\*\*(\d+)\. (?!Five)", text, re.MULTILINE)
    for exercise in found:
        tests = [word for word in exercise.arguments if "/" in word]
        assert tests and all((ROOT / test).is_file() for test in tests)
    blanked = [exercise.blanked for exercise in found if exercise.blanked]
    assert len(blanked) == len(re.findall(r"\bRewrite\b(?!\*)", text)) == 11
    for bug in blanked:
        source = (ROOT / bug.file).read_text(encoding="utf-8")
        assert source.count(bug.old) == 1
        compile(source.replace(bug.old, bug.new), bug.file, "exec")


# --- metrics


@pytest.fixture(scope="module")
def asked(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small evaluation."""
    run = tmp_path_factory.mktemp("eval") / "run"
    flags = ["--model", str(model), "--output_dir", str(run), "--system_prompt", "", "--prompt_format", "hash"]
    flags += ["--task", "arithmetic", "--eval_problems", "2", "--max_prompt_tokens", "90"]
    flags += ["--max_completion_tokens", "4", "--device", "cpu", "--no_progress", "--samples", "2"]
    assert ended(flags, program=evaluate).code == 0
    return run


def logged(run: Path, kind: str) -> set[str]:
    """Every field that is logged in lines of this kind; reward functions and the like by the name NAME, and the k of
    pass@k by the name K."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    fields = {field for line in lines if line["kind"] == kind for field in line}
    return {re.sub(r"_at_\d+", "_at_K", re.sub(r"/.*", "/NAME", field)) for field in fields}


def described(lines: str) -> list[str]:
    """The fields in the tables of metrics.md whose headings begin like this, and in the one of every line."""
    parts = (DOCS / "metrics.md").read_text(encoding="utf-8").split("\n## ")
    return [name for part in parts if part.startswith((lines, "Every line")) for name in first_column(part)]


def test_every_field_of_the_log_is_described_and_no_other(whole: Path, sft: Path, asked: Path) -> None:
    assert sorted(described("GRPO, train")) == sorted(logged(whole, "train"))
    assert sorted(described("GRPO, eval")) == sorted(logged(asked, "eval")) and logged(whole, "eval") < logged(
        asked, "eval"
    )
    assert sorted(described("SFT")) == sorted(logged(sft, "train") | logged(sft, "eval"))


# --- files


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def sections(page: str) -> dict[str, list[str]]:
    """The first columns of a page's tables, by heading; a further table under a heading is `heading 2`."""
    found: dict[str, list[str]] = {}
    for part in (DOCS / page).read_text(encoding="utf-8").split("\n## ")[1:]:
        tables = part.split("\n| file |")[1:]
        for number, table in enumerate(tables, 1):
            title = part.splitlines()[0] + (f" {number}" if number > 1 else "")
            found[title] = first_column("| file |" + table)
    return found


def test_every_file_of_a_run_is_described_and_no_other(whole: Path, sft: Path) -> None:
    there = {name.rstrip("/") for name in sections("checkpoint.md")["The run folder"]}
    assert {path.name for path in whole.iterdir()} == there
    assert {path.name for path in sft.iterdir()} < there


def test_every_file_of_a_final_model_and_of_a_checkpoint_is_described_and_no_other(whole: Path, sft: Path) -> None:
    tables = sections("checkpoint.md")
    final, checkpoint = set(tables["The final model"]), set(tables["A checkpoint"])
    for run in (whole, sft):
        assert files(run / "final") == final
        assert files(max((run / "checkpoints").iterdir())) == final | checkpoint


@pytest.mark.filterwarnings(PEFT_IS_BEHIND)
def test_every_file_of_an_adapter_is_described_and_no_other(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    policy = adapted(tiny_policy())
    policy.model.peft_config["default"].base_model_name_or_path = str(tmp_path)
    write_whole(tmp_path / "adapter", policy.save)
    tables = sections("checkpoint.md")
    replaced = {"model.safetensors", "config.json", "generation_config.json"}
    assert files(tmp_path / "adapter") == (set(tables["The final model"]) - replaced) | set(tables["The final model 2"])
