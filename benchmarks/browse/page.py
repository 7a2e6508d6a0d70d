"""From what a run recorded to one HTML file.

Completions are untrusted text. The data is JSON in pure ASCII without `<`, `>` and `&`, in a block that browsers do not
execute, and the page's policy allows the one script and the one style sheet whose hashes it names, and no address.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from pathlib import Path
from string import Template
from typing import Any

HERE = Path(__file__).parent
SCRIPTS = ("text.js", "detail.js", "page.js")  # in the order in which they run
ESCAPES = {ord(sign): f"\\u{ord(sign):04x}" for sign in "<>&"}  # in JSON they occur within strings only


def page(recorded: dict[str, Any]) -> str:
    """The page of what `read_recorded` has read."""
    script = '"use strict";\n' + "\n".join((HERE / name).read_text(encoding="utf-8") for name in SCRIPTS)
    style = (HERE / "page.css").read_text(encoding="utf-8")
    return Template((HERE / "page.html").read_text(encoding="utf-8")).substitute(
        policy=f"default-src 'none'; base-uri 'none'; form-action 'none'; "
        f"script-src {_hash(script)}; style-src {_hash(style)}",
        title=html.escape(f"{recorded['run']}: completions"),
        style=style,
        script=script,
        data=json.dumps(recorded, separators=(",", ":"), allow_nan=False).translate(ESCAPES),
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
