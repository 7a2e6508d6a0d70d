"""What the pages of docs/ take from the code. `python -m tests.pages` writes it anew, and says which pages it changed.

    ```python           with >>>: a session, run from the page's top to its end in one namespace; its output is compared
    ```python FILE      lines of that file, word for word
    <!-- table NAME --> a table made by a function of `TABLES`, up to <!-- end -->
    *.png               drawn by docs/figures.py

What a session printed is as it was on the author's machine: look at the change before you commit it.
"""

from __future__ import annotations

import ast
import dataclasses
import doctest
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import GenerationConfig, Qwen2Config

from benchmarks.machine import machine
from benchmarks.plan.question import Question, by_moment, savings
from benchmarks.workload import workload
from eval.ask import AskConfig
from eval.config import EvalConfig
from eval.export import ExportConfig
from grpo_core.config import GRPOConfig
from grpo_core.memory.forecast import GB, Lengths
from grpo_core.train import PRESETS
from rewards.tables import markdown
from sft_core.job import SFTConfig
from sft_core.model.source import Source
from sft_core.names import REFUSED, SAME, SHARED, Same

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
DECIMAL = re.compile(r"-?\d+\.\d+(?:e[-+]?\d+)?|-?\d+e[-+]?\d+")  # what is counted has no point, and is to be exact

PROGRAMS = {SFTConfig: "SFT", GRPOConfig: "GRPO", EvalConfig: "evaluation", AskConfig: "asking", ExportConfig: "export"}


# --- sessions


@dataclass(frozen=True)
class Wrong:
    """An example of a session that printed something else than its page says."""

    line: int  # of the example in the page, from 0
    source: str
    want: str
    got: str


class Checker(doctest.OutputChecker):
    """Takes a decimal whose last digit is one off: another processor adds up in another order."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        if super().check_output(want, got, optionflags):
            return True
        wanted, found = DECIMAL.findall(want), DECIMAL.findall(got)
        if len(wanted) != len(found) or not super().check_output(
            *(DECIMAL.sub("N", t) for t in (want, got)), optionflags
        ):
            return False
        return all(abs(Decimal(a) - Decimal(b)) <= last_place(Decimal(a)) for a, b in zip(wanted, found, strict=True))


def last_place(number: Decimal) -> Decimal:
    """One in the last digit of a number as it is written.

    >>> last_place(Decimal("0.250")), last_place(Decimal("1.5e-06"))
    (Decimal('0.001'), Decimal('1E-7'))
    """
    return Decimal(1).scaleb(int(number.as_tuple().exponent))


class _Runner(doctest.DocTestRunner):
    """Notes what is wrong instead of printing it."""

    def __init__(self) -> None:
        super().__init__(Checker(), verbose=False, optionflags=FLAGS)
        self.wrong: list[Wrong] = []

    def report_failure(self, out: Any, test: doctest.DocTest, example: doctest.Example, got: str) -> None:
        self.wrong.append(Wrong(example.lineno, example.source, example.want, got))

    def report_unexpected_exception(self, out: Any, test: doctest.DocTest, example: doctest.Example, info: Any) -> None:
        raise info[1]


def run_sessions(text: str, name: str) -> list[Wrong]:
    """Run a page's sessions; what did not print what the page says."""
    lines, inside = [], False
    for line in text.splitlines():
        if line.startswith("```"):
            inside = not inside and line == "```python"
            lines.append("")
        else:
            lines.append(line if inside else "")
    test = doctest.DocTestParser().get_doctest("\n".join(lines) + "\n", {"__name__": name}, name, name, 0)
    runner, stream = _Runner(), torch.random.get_rng_state()
    try:
        runner.run(test, clear_globs=True)
    finally:
        torch.set_printoptions(profile="default")
        torch.random.set_rng_state(stream)
    return runner.wrong


def corrected(text: str, wrong: list[Wrong]) -> str:
    """The page with what its sessions really print."""
    lines = text.split("\n")
    for example in reversed(wrong):
        start = example.line + example.source.count("\n")
        lines[start : start + example.want.count("\n")] = example.got.rstrip("\n").split("\n") if example.got else []
    return "\n".join(lines)


# --- quotations, links and names


def quotations(text: str) -> list[tuple[str, str]]:
    """(file, lines) of each block that quotes a file."""
    return re.findall(r"^```python (\S+)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def is_quoted(block: str, source: str) -> bool:
    """Whether the block's lines stand in the source one after the other, at whatever indentation."""
    wanted, there = ([line.strip() for line in part.splitlines()] for part in (block, source))
    return any(there[at : at + len(wanted)] == wanted for at in range(len(there)))


def links(text: str) -> list[tuple[str, str]]:
    """(text, target) of each link and picture, those inside blocks of code left out."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    return [(label, target) for label, target in re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", prose) if "://" not in target]


def anchors(text: str) -> set[str]:
    """What GitHub makes of the page's headings."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def names(source: str) -> set[str]:
    """What a module defines: functions, classes, constants, and of classes `Class.member`."""

    def of(body: list[ast.stmt], prefix: str) -> Iterator[str]:
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                yield prefix + node.name
                if isinstance(node, ast.ClassDef):
                    yield from of(node.body, f"{prefix}{node.name}.")
                else:
                    yield from of(node.body, prefix)  # a function within a function
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            yield from (prefix + target.id for target in targets if isinstance(target, ast.Name))

    return set(of(ast.parse(source).body, ""))


def first_column(text: str) -> list[str]:
    """Every `word` in the first cell of every row of the page's tables."""
    cells = re.findall(r"^\| ([^|]*) \|", text, re.MULTILINE)
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


# --- tables


def settings() -> str:
    """Every field of the three programs' configs, by the class that declares it."""
    presets = {name: yaml.safe_load((PRESETS / f"{name}.yaml").read_text()) for name in ("t4", "tiny")}
    parts: dict[type, list[str]] = {}
    for config, program in PROGRAMS.items():
        for part in reversed(config.__mro__):
            if dataclasses.is_dataclass(part) and inspect.get_annotations(part):
                parts.setdefault(part, []).append(program)
    sections = []
    for part, programs in parts.items():
        own = presets if "GRPO" in programs else {}
        rows = [["flag", "default", *(f"`{name}`" for name in own), "what it is, and where the default comes from"]]
        for field in dataclasses.fields(part):
            if field.name in inspect.get_annotations(part):
                others = [_shown(values[field.name]) if field.name in values else "" for values in own.values()]
                # Tags and bars that are meant to be read.
                meaning = field.metadata["help"].replace("<", "&lt;").replace("|", "\\|")
                rows.append([f"`--{field.name}`", _shown(_default(field)), *others, meaning])
        about = " ".join((part.__doc__ or "").split("\n\n")[0].split())
        title = f"### {part.__name__}: {', '.join(programs)}"
        sections.append(f"{title}\n\n{about}\n\n{markdown(rows)}")
    return "\n\n".join(sections)


def _default(field: Any) -> Any:
    return field.default if field.default is not dataclasses.MISSING else field.default_factory()


def _shown(value: Any) -> str:
    """A value as it is typed on the command line."""
    if isinstance(value, list):
        return "`" + " ".join(map(str, value)) + "`" if value else "none"
    if value is None:
        return "none"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value!s}`" if value != "" else "`''`"


def qwen() -> Source:
    """Qwen2.5-0.5B-Instruct's shape (its config.json), without a file: the hub may be out of reach."""
    shape = {"vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24}
    shape |= {"num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True}
    return Source("Qwen/Qwen2.5-0.5B-Instruct", None, Qwen2Config(**shape), GenerationConfig())


def t4() -> Question:
    """The t4 preset on a T4, at the longest prompts and completions that it admits."""
    config = workload("t4", [])
    return Question(config, qwen(), machine("t4"), Lengths(config.max_prompt_tokens, config.max_completion_tokens))


def t4_items() -> str:
    forecast = t4().plan
    items = [[name, f"{size / GB:.2f}"] for name, size in forecast.items.items()]
    total = ["**together**", f"**{forecast.peak / GB:.2f}**"]
    return markdown([[f"held at the peak, in {forecast.worst}", "GB"], *items, total])


def t4_moments() -> str:
    return markdown([["moment", "GB"], *([name, f"{size / GB:.2f}"] for name, size in by_moment(t4().plan))])


def t4_savings() -> str:
    rows = [[f"`{flags}`", f"{size / GB:.2f}", f"{left / GB:.2f}"] for flags, size, left in savings(t4())]
    return markdown([["flag", "GB less", "peak then"], *rows])


def trl_same() -> str:
    rows = [
        [f"`{name}`", " ".join(f"`--{ours}`" for ours in same.ours.split()), _told(same)]
        for name, same in SAME.items()
        if name != same.ours
    ]
    return markdown([["theirs", "ours", "what to know"], *rows])


def _told(same: Same) -> str:
    """What to know of an alias: its note, and the values that are written differently."""
    values = {value: ours.split() for value, ours in same.values.items() if ours.partition("=")[2] != value}
    written = [
        f"`{value}` is " + (" ".join(f"`--{pair.replace('=', ' ')}`" for pair in ours) or "as without it")
        for value, ours in values.items()
    ]
    return "; ".join(filter(None, [same.note, *written])) or "the same"


def trl_shared() -> str:
    notes = {name: _told(same) for name, same in SAME.items() if name == same.ours} | SHARED
    return markdown([["flag", "what to know"], *([f"`--{name}`", note or "the same"] for name, note in notes.items())])


def trl_refused() -> str:
    by_answer: dict[str, list[str]] = {}
    for name, text in REFUSED.items():
        by_answer.setdefault(text, []).append(f"`{name}`")
    return markdown([["theirs", "here"], *([", ".join(names), text] for text, names in by_answer.items())])


TABLES: dict[str, Callable[[], str]] = {
    "settings": settings,
    "t4-items": t4_items,
    "t4-moments": t4_moments,
    "t4-savings": t4_savings,
    "trl-same": trl_same,
    "trl-shared": trl_shared,
    "trl-refused": trl_refused,
}


def with_tables(text: str) -> str:
    """The page with its tables as the code makes them now."""

    def table(match: re.Match[str]) -> str:
        return f"<!-- table {match[1]} -->\n\n{TABLES[match[1]]()}\n\n<!-- end -->"

    return re.sub(r"<!-- table (\S+) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)


def main() -> None:
    from docs.figures import draw

    for page in PAGES:
        before = page.read_text(encoding="utf-8")
        after = with_tables(before)
        after = corrected(after, run_sessions(after, page.name))
        if after != before:
            page.write_text(after, encoding="utf-8")
            print(f"changed: {page.relative_to(ROOT)}")
    for picture in draw(DOCS):
        print(f"drawn: {picture.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
