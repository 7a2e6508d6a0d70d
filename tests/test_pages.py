"""What tests/pages.py must not overlook when it reads a page."""

from __future__ import annotations

import pytest

from tests.pages import (
    anchors,
    corrected,
    first_column,
    is_quoted,
    links,
    names,
    run_sessions,
)

PAGE = """# A page

```python
>>> x = 1
>>> x + 1
3
>>> for i in range(2):
...     print(i)
```

Text, and further down the same namespace:

```python
>>> x
1
```

```text
>>> not_run
```
"""


def test_a_session_that_prints_something_else_is_noticed_and_corrected() -> None:
    wrong = run_sessions(PAGE, "page.md")
    assert [(each.want, each.got) for each in wrong] == [("3\n", "2\n"), ("", "0\n1\n")]
    right = corrected(PAGE, wrong)
    assert right == PAGE.replace("\n3\n", "\n2\n").replace("print(i)\n", "print(i)\n0\n1\n")
    assert run_sessions(right, "page.md") == []


def test_a_session_that_raises_is_an_error() -> None:
    with pytest.raises(ZeroDivisionError):
        run_sessions("```python\n>>> 1 / 0\n```\n", "page.md")


@pytest.mark.parametrize(("block", "there"), [("a = 1\nb = 2\n", True), ("b = 2\na = 1\n", False), ("a = 1\n", True)])
def test_a_quotation_is_lines_in_a_row(block: str, there: bool) -> None:
    assert is_quoted(block, "def f():\n    a = 1\n    b = 2\n") is there


def test_names_links_and_anchors_are_found() -> None:
    source = "A = 1\nclass B:\n    c: int = 0\n    def d(self): ...\ndef e():\n    def f(): ...\n"
    assert names(source) == {"A", "B", "B.c", "B.d", "e", "f"}
    assert links("[a](b.md#c) ![d](e.png) [f](https://g)\n```text\n[h](i)\n```\n") == [("a", "b.md#c"), ("d", "e.png")]
    assert anchors("# What is `it`, here?\n```bash\n# no heading\n```\n") == {"what-is-it-here"}


def test_the_first_column_is_read_and_no_other() -> None:
    assert first_column("| `a`, `b` | `x` |\n| c | `x` |\n| `d` | x |\n") == ["a", "b", "d"]
