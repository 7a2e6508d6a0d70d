"""Whole pipelines: run, interrupted, continued, begun anew, planned."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import grpo_core.train
from grpo_core.pipeline.__main__ import SUMMARIES, main
from sft_core.errors import Refused
from sft_core.learn.optim import Optimizer
from tests.helpers import PEFT_IS_BEHIND
from tests.test_pipeline import SMALL, contents, evaluation, settings, weights

# --- runs


@pytest.fixture(scope="module")
def undisturbed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pipeline") / "out"
    main(["--mode", "all", "--model", str(model), *SMALL, "--output_dir", str(out)])
    return out


def test_all_leaves_a_run_folder_for_each_stage_and_one_table(
    undisturbed: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = json.loads((undisturbed / "summary.json").read_text())
    assert list(summary) == ["zero-shot", "sft-eval", "grpo-eval"]
    assert all(summary[name] == evaluation(undisturbed / name) for name in summary)
    assert weights(undisturbed / "sft") != weights(undisturbed / "grpo")
    main(["--resume", str(undisturbed)])  # nothing is left to do but to show the table
    shown = capsys.readouterr().out
    assert shown.count("finished before") == 5
    assert "zero-shot" in shown and "accuracy" in shown and "[" in shown


def stopped(call: int, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """grpo_step, which a person interrupts at its `call`-th time."""
    own, calls = grpo_core.train.grpo_step, 0

    def step(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt
        return own(*args, **kwargs)

    monkeypatch.setattr(grpo_core.train, "grpo_step", step)
    return own


def test_an_interrupted_pipeline_resumes_in_the_stage_that_was_interrupted(
    undisturbed: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    argv = ["--mode", "all", "--model", str(model), *SMALL, "--output_dir", str(out), "--resume"]
    own = stopped(2, monkeypatch)
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 130
    assert f"go on with --resume {out}\n" in capsys.readouterr().err
    main([*argv, "--dry_run"])
    plan = capsys.readouterr().out.split("== stage ")
    assert [text.startswith(f"{i} of 5: ") and "finished before" in text for i, text in enumerate(plan)][1:4] == [
        True
    ] * 3
    assert f"model        {out / 'sft' / 'final'}: " in plan[4] and "goes on after step 1 of 2" in plan[4]
    assert f"starts from {out / 'grpo' / 'final'}; the model below stands in for it" in plan[5]
    before = {name: contents(out / name) for name in ("zero-shot", "sft", "sft-eval")}
    monkeypatch.setattr(grpo_core.train, "grpo_step", own)
    main(argv)
    assert {name: contents(out / name) for name in before} == before
    assert weights(out / "grpo") == weights(undisturbed / "grpo")
    lines = [json.loads(line) for line in (out / "grpo" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 2]


def test_a_pipeline_resumes_with_the_settings_that_it_began_with(
    undisturbed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(undisturbed)
    for flags, line in (
        (["--resume", str(undisturbed), "--grpo.lr", "1"], "--lr 1.0: the run in "),
        (["--resume", str(undisturbed), "--mode", "grpo"], "--mode grpo: the grpo of the pipeline in "),
        (["--output_dir", str(undisturbed)], f"--output_dir {undisturbed}: holds a pipeline; --resume continues"),
    ):
        with pytest.raises(SystemExit):
            main(flags)
        assert line in capsys.readouterr().err
    assert contents(undisturbed) == before


def test_overwrite_begins_every_stage_anew(model: Path, tmp_path: Path) -> None:
    sft = SMALL[: SMALL.index("--grpo.max_steps")]
    argv = ["--mode", "sft", "--model", str(model), *sft, "--output_dir", str(tmp_path / "out")]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "pipeline.yaml.unfinished").write_text("mode: s")  # killed in its first moments
    main(argv)
    first = weights(tmp_path / "out" / "sft")
    (tmp_path / "out" / "grpo" / "final").mkdir(parents=True)  # of an earlier --mode both
    for name in SUMMARIES:
        (tmp_path / "out" / name).write_text("of an earlier --mode all")
    main([*argv, "--overwrite", "--seed", "7"])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["pipeline.yaml", "sft"]
    assert weights(tmp_path / "out" / "sft") != first


def test_the_built_in_model_starts_the_pipeline_untrained(tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = [flag for flag in SMALL if flag not in ("--precision", "float32")]
    main(["--mode", "sft", *flags[: flags.index("--grpo.max_steps")], "--output_dir", str(tmp_path / "alone")])
    main(["--mode", "both", *flags, "--output_dir", str(out)])
    assert weights(out / "sft") == weights(tmp_path / "alone" / "sft")  # as SFT by itself starts it
    assert (out / "start" / "model.safetensors").is_file()


# --- dry run


@pytest.mark.parametrize("flags", [[], ["--lora"]])
@pytest.mark.filterwarnings(PEFT_IS_BEHIND)
def test_a_dry_run_plans_every_stage_and_leaves_nothing(
    flags: list[str], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Optimizer, "clip_and_step", lambda *_: pytest.fail("a step was taken"))
    main(["--mode", "all", "--model", str(model), *SMALL, *flags, "--dry_run"])
    shown = capsys.readouterr().out
    assert [line for line in shown.splitlines() if line.startswith("== stage")] == [
        f"== stage {i} of 5: {name}"
        for i, name in enumerate(("zero-shot", "sft", "sft-eval", "grpo", "grpo-eval"), start=1)
    ]
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_of_a_pipeline_in_progress_names_what_is_finished(
    undisturbed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(undisturbed)
    main(["--resume", str(undisturbed), "--dry_run"])
    assert capsys.readouterr().out.count("finished before") == 5
    assert contents(undisturbed) == before


def test_the_environment_names_the_start_and_the_folder(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = settings(*SMALL, environ={"MODEL_NAME": str(model), "RUN_NAME": "mine"})
    assert found.configs["sft"].model == str(model) and found.folder == Path("runs/mine")
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"--model {model}" in said and "--output_dir runs/mine" in said


def test_a_stage_that_is_refused_while_it_trains_ends_the_pipeline_in_one_line(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any) -> None:
        raise Refused("--model: sampler and learner disagree")

    monkeypatch.setattr(grpo_core.train, "refuse_gap", refuse)
    with pytest.raises(SystemExit) as caught:
        main(["--mode", "both", "--model", str(model), *SMALL, "--output_dir", str(tmp_path / "out")])
    assert caught.value.code == 2
    assert "error: --model: sampler and learner disagree\n" in capsys.readouterr().err
    assert (tmp_path / "out" / "sft" / "final").is_dir() and not (tmp_path / "out" / "grpo" / "final").exists()
