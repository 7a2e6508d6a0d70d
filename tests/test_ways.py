"""What a run's sampled answers say of it: worked out or not, right or not, at its beginning and at its end."""

from __future__ import annotations

import json
from pathlib import Path

from grpo_core.ways import LEAST, STEPS, ways, ways_line


def row(step: int, worked: bool, right: bool) -> dict[str, object]:
    response = f"3+4={7 if right else 8}" if worked else "7" if right else "8"
    return {"step": step, "response": response, "extracted": response[-1], "expected": "7"}


def written(folder: Path, rows: list[dict[str, object]]) -> Path:
    path = folder / "completions.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return path


def test_rates_are_of_the_first_and_the_last_ten_steps(tmp_path: Path) -> None:
    many = LEAST * 4
    rows = [row(1, i % 4 == 0, i % 8 == 0) for i in range(many)]
    rows += [row(STEPS + 1, True, True) for _ in range(many)]  # in between: counts for neither end
    rows += [row(30, i % 4 != 0, i % 2 == 0) for i in range(many)]
    found = ways(written(tmp_path, rows), 30)
    assert found["first"] == {"worked": 0.25, "right_if_worked": 0.5, "right_if_bare": 0.0}
    assert found["last"] == {"worked": 0.75, "right_if_worked": 1 / 3, "right_if_bare": 1.0}
    assert ways_line(found, 30).startswith(
        "sampled answers, steps 1-10 -> 21-30: worked out 25% -> 75%; right if so 50% -> 33%"
    )


def test_a_way_of_answering_that_is_rare_at_one_end_is_left_out(tmp_path: Path) -> None:
    rows = [row(step, True, step == 30) for step in (1, 30) for _ in range(LEAST)]
    rows += [row(1, False, True) for _ in range(LEAST)] + [row(30, False, True) for _ in range(LEAST - 1)]
    found = ways(written(tmp_path, rows), 30)
    assert found["first"] == {"worked": 0.5, "right_if_worked": 0.0}
    assert found["last"] == {"worked": LEAST / (2 * LEAST - 1), "right_if_worked": 1.0}
    assert "right if not" not in ways_line(found, 30)


def test_nothing_is_said_of_a_short_run(tmp_path: Path) -> None:
    rows = [row(step, True, True) for step in (1, 30) for _ in range(100)]
    assert ways(written(tmp_path, rows), 30) and ways(written(tmp_path, rows), 2 * STEPS - 1) == {}
    assert ways(tmp_path / "none.jsonl", 30) == {}
