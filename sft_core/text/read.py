"""Rows of data from files, folders and the hub, each with words that say where it stands.

JSONL and tables of texts are read line by line, so that an error can name the line; all else by the `datasets` library.
"""

from __future__ import annotations

import csv
import json
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sft_core.text.config import TaskConfig

Rows = Iterator[tuple[str, Any]]

# The hub's name for Cobbe et al., Training Verifiers to Solve Math Word Problems, arXiv 2110.14168.
GSM8K = "openai/gsm8k"


def file_rows(path: Path) -> Rows:
    """A file's rows, by its ending: .json, .csv, .tsv, .parquet; any other holds one JSON object a line, which may have
    whatever Python takes for JSON, NaN included.

    Raises:
        ValueError: no file that can be read, or a malformed line, with its number.
    """
    if not path.is_file():  # a pipe would be read once, and a task is read twice
        raise ValueError(f"{path}: is not a file")
    if path.suffix in (".csv", ".tsv"):
        yield from _table_rows(path)
        return
    if path.suffix in (".json", ".parquet"):
        yield from _library_rows(path)
        return
    try:
        with path.open("rb") as lines:  # decoded line by line, so that the error can name the line
            for number, line in enumerate(lines, start=1):
                text, where = line.removeprefix(BOM_UTF8 if number == 1 else b""), f"{path}, line {number}"
                if text.strip():
                    yield where, _object(text, where)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error


def _object(line: bytes, where: str) -> Any:
    try:
        return json.loads(line.decode(), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:  # of the decoding or of the JSON
        raise ValueError(f"{where}: not JSON ({error})") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object without duplicate keys, of which `json` itself would silently keep the last."""
    row = dict(pairs)
    if len(row) < len(pairs):
        [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {twice[:40]!r} is there twice")
    return row


def _table_rows(path: Path) -> Rows:
    """Of comma- or tab-separated texts: 007 and 1.50 stay as they are written."""
    separator = {".csv": ",", ".tsv": "\t"}[path.suffix]
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            for number, row in enumerate(csv.DictReader(file, delimiter=separator, strict=True), start=1):
                if None in row:
                    raise ValueError(f"row {number} has more cells than there are columns")
                yield f"{path}, row {number}", row
    except (OSError, ValueError, csv.Error) as error:  # of opening, decoding, quoting
        raise ValueError(f"{path}: cannot be read as {path.suffix[1:].upper()} ({error})") from error


def _library_rows(path: Path) -> Rows:
    import datasets  # seconds to import, and most tasks do not need it

    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    read = datasets.Dataset.from_parquet if path.suffix == ".parquet" else datasets.Dataset.from_json
    try:
        with TemporaryDirectory() as cache:  # never the rows of an older file of this name
            rows = read(str(path), cache_dir=cache).to_list()
    except Exception as error:  # of pyarrow or datasets, whatever is wrong about the file
        reason = " ".join(str(error.__cause__ or error).split())[:160]
        raise ValueError(f"{path}: cannot be read as {path.suffix[1:].upper()} ({reason})") from error
    finally:
        if not bars:
            datasets.enable_progress_bars()
    for number, row in enumerate(rows, start=1):
        yield f"{path}, row {number}", row


def data_set_rows(config: TaskConfig, split: str) -> Rows:
    """The rows of a split of GSM8K, of another data set of the hub, or of a folder that holds one.

    Raises:
        ValueError: it cannot be loaded: no network, no such name, configuration or split.
    """
    import datasets

    gsm8k = config.task == "gsm8k"
    name, configuration = (GSM8K, "main") if gsm8k else (config.task, config.config_name or None)
    try:
        if Path(name).is_dir() and any(Path(name).glob("**/state.json")):  # written by `save_to_disk`
            saved = datasets.load_from_disk(name)
            data = saved[split] if isinstance(saved, datasets.DatasetDict) else saved
        else:
            data = datasets.load_dataset(name, configuration, split=split)
    except Exception as error:  # the hub's, of the network, of a name that is not there
        reason = " ".join(str(error).split())[:160]
        other = "--task also takes a local file" if gsm8k else "see --config_name, --train_split and --eval_split"
        raise ValueError(f"--task {config.task}: cannot load {name}, split {split} ({reason}); {other}") from error
    for number, row in enumerate(data):
        yield f"{name} {split} row {number}", dict(row)
