"""The notebook for one T4, executed cell by cell on the embedded task, stopped in the middle and executed again."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import types
from pathlib import Path
from site import getsitepackages as site_packages
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

import grpo_core.pipeline.__main__
from tests.faulty import FORKS, ended

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "notebooks" / "grpo_t4.ipynb"
STAGES = ("zero-shot", "sft", "sft-eval", "grpo", "grpo-eval")

# A reward that ends the process at its third call, as a disconnect does, while a file asks for it.
FRAGILE = """
import os
import pathlib

calls = 0

def reward(completions, **columns):
    global calls
    calls += 1
    if calls == 3 and pathlib.Path("disconnect").exists():
        os._exit(9)
    return [len(text) % 7 / 4 for text in completions]
"""

MORE = ["--max_prompt_tokens", "90", "--max_completion_tokens", "4", "--eval_problems", "3", "--no_progress"]
MORE += ["--sft.max_steps", "3", "--grpo.max_steps", "4", "--grpo.prompts_per_step", "1", "--grpo.group_size", "2"]
MORE += ["--rewards", "fragile:reward"]


def read() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def cell(beginning: str) -> str:
    """The source of the only code cell that holds this text."""
    [source] = [cell.source for cell in read().cells if cell.cell_type == "code" and beginning in cell.source]
    return str(source)


def executed(folder: Path, settings: dict[str, Any], kernel: str) -> Any:
    """The notebook after its execution in `folder` by `kernel`, with these settings behind its own."""
    notebook = read()
    place = next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
    override = nbformat.v4.new_code_cell("\n".join(f"{name} = {value!r}" for name, value in settings.items()))
    notebook.cells.insert(place + 1, override)
    client = NotebookClient(notebook, timeout=300, kernel_name=kernel, resources={"metadata": {"path": str(folder)}})
    client.execute()
    return notebook


def published(folder: Path) -> Path:
    """A repository that holds what would be published."""
    left_out = shutil.ignore_patterns(
        ".git", ".venv", "build", "runs", "*.egg-info", "__pycache__", ".*_cache", "results"
    )
    shutil.copytree(ROOT, folder, ignore=left_out)
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@host"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *words], check=True)
    return folder


OURS = ("grpo_core", "sft_core", "eval", "rewards", "benchmarks", "grpo_from_scratch", "__editable__")


def fresh_kernel(folder: Path, data: Path) -> str:
    """The name of a kernel that has every package of this environment but ours, and in which pip may install."""
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    packages = folder / "packages"
    packages.mkdir()
    for site in map(Path, site_packages()):
        for entry in site.iterdir() if site.is_dir() else ():
            if not entry.name.startswith(OURS) and not (packages / entry.name).exists():
                (packages / entry.name).symlink_to(entry)
    [own] = (folder / "venv" / "lib").glob("python*/site-packages")
    (own / "more.pth").write_text(f"{packages}\n")
    spec = {"argv": [str(folder / "venv" / "bin" / "python"), "-m", "ipykernel_launcher", "-f", "{connection_file}"]}
    (data / "kernels" / "fresh").mkdir(parents=True)
    (data / "kernels" / "fresh" / "kernel.json").write_text(json.dumps(spec | {"display_name": "fresh"}))
    return "fresh"


def printed(notebook: Any) -> str:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output["text"] for output in outputs if output["output_type"] == "stream")


def shown(notebook: Any, kind: str) -> list[str]:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [output["data"][kind] for output in outputs if kind in output.get("data", {})]


@FORKS
@pytest.mark.slow
def test_the_notebook_installs_itself_continues_after_a_disconnect_and_ends_with_tables_pictures_and_an_answer(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "jupyter"))
    (tmp_path / "fragile.py").write_text(FRAGILE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    settings = {"PRESET": "tiny", "FOLDER": "drive/run", "SAVE_EVERY": "1", "MORE": ["--model", str(model), *MORE]}
    run = tmp_path / "drive" / "run"

    # The command of the cell that trains, which a disconnect ends with its notebook: here, without one.
    (tmp_path / "disconnect").touch()
    words: dict[str, Any] = {**settings, "RUN": run, "TRACK": ""}
    exec("import signal\nimport subprocess\nimport sys\n" + cell("def command"), words)
    argv = [str(word) for word in words["pipeline"][1:]]
    assert ended(argv, program=grpo_core.pipeline.__main__.main).code == 9
    assert not (run / "grpo" / "final").exists() and (run / "sft" / "final").is_dir()
    before = {path: path.read_bytes() for name in STAGES[:3] for path in (run / name).rglob("*") if path.is_file()}

    (tmp_path / "disconnect").unlink()
    settings["REPOSITORY"] = str(published(tmp_path / "published"))
    notebook = executed(tmp_path, settings, fresh_kernel(tmp_path / "fresh", tmp_path / "jupyter"))
    assert {path: path.read_bytes() for path in before} == before
    text = printed(notebook)
    assert (
        f"cloned and installed from {tmp_path / 'published'}" in text
        and "dry run: all of this was loaded and checked" in text
    )
    assert [f"stage {i} of 5: {name}" in text for i, name in enumerate(STAGES, start=1)] == [True] * 5
    log = [json.loads(line) for line in (run / "grpo" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if line["kind"] == "train"] == [1, 2, 3, 4]  # none lost, none twice
    provenance = json.loads((run / "grpo" / "provenance.json").read_text())
    assert [again["after_step"] for again in provenance["resumed"]] == [2]  # the step in flight is what it cost
    [table] = shown(notebook, "text/markdown")
    assert all(name in table for name in ("zero-shot", "sft-eval", "grpo-eval"))
    pictures = {path.name for path in (run / "grpo" / "plots").glob("*.png")}
    assert {"losses.png", "rewards.png", "timing.png", "tokens.png", "curve.png"} <= pictures
    assert len(shown(notebook, "image/png")) == len(pictures)
    [asked] = [json.loads(path.read_text()) for path in (run / "grpo").glob("asked*.jsonl")]  # with a number or without
    assert asked["question"].startswith("Tom has 5 coins") and asked["question"] in text


def test_the_notebook_is_kept_without_outputs_and_its_default_preset_is_one_of_all_stages() -> None:
    for each in read().cells:
        assert each.cell_type == "markdown" or (each.outputs, each.execution_count) == ([], None)
    settings: dict[str, Any] = {}
    exec(cell("PRESET ="), settings)
    for package in ("sft_core", "grpo_core", "eval"):
        assert (ROOT / package / "presets" / f"{settings['PRESET']}.yaml").is_file()
    nbformat.validate(read())


def test_in_colab_the_folder_is_on_the_drive(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source, mounted = cell("google.colab"), []
    monkeypatch.chdir(tmp_path)
    here: dict[str, Any] = {"FOLDER": "run"}
    exec(source, here)
    assert here["RUN"] == tmp_path / "run"
    colab = types.ModuleType("google.colab")
    colab.drive = types.SimpleNamespace(mount=mounted.append)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "google", types.ModuleType("google"))
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    there: dict[str, Any] = {"FOLDER": "run"}
    exec(source, there)
    assert there["RUN"] == Path("/content/drive/MyDrive/run") and mounted == ["/content/drive"]


@pytest.mark.parametrize(("track", "extras"), [("", "lora,plots"), ("wandb", "lora,plots,wandb")])
def test_the_package_is_cloned_and_installed_only_where_it_is_missing(
    track: str, extras: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, ran = tmp_path / "grpo-from-scratch-code", list[list[str]]()
    process = types.SimpleNamespace(run=lambda argv, check: ran.append(argv))
    names = {"sys": sys, "subprocess": process, "Path": Path, "REPOSITORY": "https://host/repository", "TRACK": track}
    source = cell('find_spec("grpo_core")')
    exec(source, {**names, "find_spec": lambda name: object()})
    assert ran == []
    missing: dict[str, Any] = {**names, "find_spec": lambda name: None}
    exec(source, missing)
    clone = ["git", "clone", "--depth", "1", "https://host/repository", str(code)]
    install = [sys.executable, "-m", "pip", "install", "-q", f"{code}[{extras}]"]
    assert ran == [clone, install]
    code.mkdir()  # after a disconnect that left the clone
    exec(source, missing)
    assert ran == [clone, install, install]


def test_an_address_that_nobody_has_put_in_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings: dict[str, Any] = {}
    exec(cell("PRESET ="), settings)
    names = {**settings, "sys": sys, "Path": Path, "find_spec": lambda name: None}
    with pytest.raises(ValueError, match="REPOSITORY above: put in the address"):
        exec(cell('find_spec("grpo_core")'), names)


def test_a_command_that_fails_stops_the_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "failing.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"sys": sys, "subprocess": subprocess, "PRESET": "", "RUN": "", "SAVE_EVERY": ""}
    names |= {"TRACK": "", "MORE": []}
    exec("import signal\n" + cell("def command"), names)
    with pytest.raises(RuntimeError, match="failing ended with code 9"):
        names["command"]("failing")


def test_an_interrupt_reaches_the_command_once_and_lets_it_save(capsys: pytest.CaptureFixture[str]) -> None:
    """A program that is interrupted saves itself first: it must neither be killed nor be interrupted twice."""
    program = "import sys, time\ntry:\n    sys.stdout.write('ready\\n')\n    sys.stdout.flush()\n    time.sleep(60)\n"
    program += "except KeyboardInterrupt:\n    print('saved')\n"
    names: dict[str, Any] = {"sys": sys, "subprocess": subprocess, "PRESET": "", "RUN": "", "SAVE_EVERY": ""}
    names |= {"TRACK": "", "MORE": []}
    exec("import signal\n" + cell("def command"), names)

    class Once:
        """Standard output at which a person interrupts the cell when the program says that it is ready."""

        def write(self, text: str) -> None:
            print(text, end="")
            if "ready" in text:
                raise KeyboardInterrupt

        def flush(self) -> None:
            pass

    names["sys"] = types.SimpleNamespace(executable=sys.executable, stdout=Once())
    real = subprocess.Popen

    def popen(argv: list[str], **options: Any) -> Any:
        return real([argv[0], "-c", program], **options)

    names["subprocess"] = types.SimpleNamespace(Popen=popen, PIPE=subprocess.PIPE, STDOUT=subprocess.STDOUT)
    names["command"]("program")
    assert capsys.readouterr().out == "ready\nsaved\n"
