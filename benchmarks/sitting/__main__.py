"""All that wants a GPU, in one sitting, the most telling first: `python -m benchmarks.sitting FOLDER`

Each part is a process of its own with a limit of at most eight minutes; what fails, hangs or lacks a package ends
alone. After each part FOLDER has its record (records.jsonl: outcome, hardware, versions, commit, output) and the page
made from all records (summary.md). A part that is run again replaces its line. Neither network nor weights are needed,
and no package but torch and transformers; parts that need more are skipped where it is missing, and say so.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.sitting.page import page
from benchmarks.sitting.parts import Part, parts, python
from benchmarks.sitting.record import ROOT, Record, append, latest, recorded, run, whereabouts

LEAST = 20.0  # seconds; with fewer left no part is begun


def sitting(folder: Path, chosen: Sequence[Part], minutes: float, environment: dict[str, str], about: Record) -> bool:
    """Run the parts, one after the other, and write records and page; whether none failed."""
    folder.mkdir(parents=True, exist_ok=True)
    end, good = time.monotonic() + 60 * minutes, True
    folders = {
        str(folder.absolute()): folder.name,
        str(ROOT): "HERE",
        sys.prefix: "ENVIRONMENT",
        sys.base_prefix: "PYTHON",
    }
    for part in chosen:
        left = end - time.monotonic()
        if left < min(LEAST, part.limit):
            print(f"{part.name}: not begun, time is up", flush=True)
            good = False
            continue
        record = recorded(part, min(part.limit, left), environment, about, folders)
        append(folder, record)
        (folder / "summary.md").write_text(page(latest(folder)), encoding="utf-8")
        print(f"{part.name}: {record['outcome']} in {record['seconds']:.0f} s; {record['figures']}", flush=True)
        good &= record["outcome"] in ("passed", "skipped")
    return good


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 1 where a part failed or was not begun."""
    names = [part.name for part in parts(Path(), "", False, None)]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sitting",
        description=__doc__,
        epilog=f"parts: {', '.join(names)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="for records.jsonl, summary.md, and the parts' own files in work/")
    parser.add_argument("--parts", nargs="+", choices=names, metavar="NAME", help="these parts only, in this order")
    parser.add_argument("--minutes", type=float, default=60.0, help="for all together (default: %(default)s)")
    parser.add_argument("--model", type=Path, help="a folder with config and tokenizer of a 0.5B model; default: made")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: to try it (default: cuda)")
    parser.add_argument("--small", action="store_true", help="models and steps of a minute each; the default on a CPU")
    parser.add_argument("--commit", default="", help="of this source tree, where git cannot say")
    given = parser.parse_args(argv)
    small, work = given.small or given.device == "cpu", given.folder.absolute() / "work"
    model = given.model and given.model.absolute()
    work.mkdir(parents=True, exist_ok=True)
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment = {**offline, "PYTHONUNBUFFERED": "1", "GRPO_SHARED": str(work / "shared")}
    shapes = [python(), "-m", "benchmarks.sitting.shape", str(work), *["--small"] * small]
    code, text = run([*shapes, *(["--model", str(model)] if model else [])], 120, environment)
    if code:  # the parts will say what they lack
        print(text, file=sys.stderr)
    by_name = {part.name: part for part in parts(work, given.device, small, model)}
    chosen = [by_name[name] for name in given.parts or names]
    return 0 if sitting(given.folder, chosen, given.minutes, environment, whereabouts(environment, given.commit)) else 1


if __name__ == "__main__":
    raise SystemExit(main())
