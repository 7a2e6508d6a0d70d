"""The tables of docs/ that the code makes (`<!-- table NAME -->`)."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable
from typing import Any

import torch
import yaml
from transformers import GenerationConfig, Qwen2Config

from benchmarks.plan.question import Question, by_moment, savings
from benchmarks.workload import workload
from eval.ask import AskConfig
from eval.config import EvalConfig
from eval.export import ExportConfig
from grpo_core.config import GRPOConfig
from grpo_core.forecast.machine import machine
from grpo_core.recipes import RECIPES
from grpo_core.train import PRESETS
from rewards.tables import markdown
from sft_core.job import SFTConfig
from sft_core.learn.footprint import GB, Lengths
from sft_core.model.source import Source
from sft_core.names import REFUSED, SAME, SHARED, Same
from tests.kernels import CALLS, Call, asked_for, kernel

PROGRAMS = {SFTConfig: "SFT", GRPOConfig: "GRPO", EvalConfig: "evaluation", AskConfig: "asking", ExportConfig: "export"}


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


def recipes() -> str:
    rows = [["recipe", "what it sets, and where the paper says so", "besides, in the paper"]]
    for name, recipe in RECIPES.items():
        flags = ", ".join(f"`--{flag} {value}` ({place})" for flag, (value, place) in recipe.settings.items())
        rows.append([f"`--recipe {name}`<br>{recipe.paper}", flags, recipe.besides])
    return markdown(rows)


def attention() -> str:
    """Which kernel each of this project's calls gets, for head sizes that are multiples of 8, up to 256."""
    at = {
        "T4, fp16": ((7, 5), torch.float16),
        "T4, bf16": ((7, 5), torch.bfloat16),
        "T4, float32": ((7, 5), torch.float32),
    }
    at |= {"8.0 and later, half": ((8, 0), torch.bfloat16), "8.0 and later, float32": ((8, 0), torch.float32)}
    rows = [["attention of", *at]]
    rows += [[call, *(told(call, *where) for where in at.values())] for call in CALLS]
    return markdown(rows)


def told(call: Call, capability: tuple[int, int], dtype: torch.dtype) -> str:
    masked, grouped = asked_for(call, capability, dtype)
    how = f"{'mask' if masked else 'no mask'}{', shared keys' if grouped else ''}"
    return f"{kernel(capability, dtype, 64, masked, grouped)} ({how})"


def head_sizes() -> str:
    """The kernel under a mask, by the size of a head."""
    at = {"T4, fp16": ((7, 5), torch.float16), "T4, float32": ((7, 5), torch.float32)}
    at |= {"8.0 and later, half": ((8, 0), torch.float16), "8.0 and later, float32": ((8, 0), torch.float32)}
    sizes = {64: "64, 80, 128, 256 (multiples of 8)", 36: "36, 60 (of 4)", 33: "33"}
    rows = [["head size", *at]]
    rows += [[name, *(kernel(*where, size, True, False) for where in at.values())] for size, name in sizes.items()]
    return markdown(rows)


TABLES: dict[str, Callable[[], str]] = {
    "attention": attention,
    "head-sizes": head_sizes,
    "recipes": recipes,
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
