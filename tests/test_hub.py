"""What is pushed to the hub is the run's own model with the run's own numbers, and opens from there; what stops the
upload loses nothing."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, constants
from safetensors.torch import load, load_file
from transformers import AutoModelForCausalLM

import eval.ask
import eval.export
import grpo_core.train
import sft_core.train
from sft_core.config import FREE_ON_RESUME, RunConfig
from sft_core.run.card import model_card
from sft_core.run.hub import pushing
from sft_core.run.trained import Trained, find_trained
from sft_core.text.config import PromptConfig
from sft_core.text.example import Example
from sft_core.text.prompts import encode_prompt, prompt_messages
from tests.faulty import SFT, command
from tests.helpers import PEFT_IS_BEHIND
from tests.hub import Hub, serving, take_for_the_hub
from tests.test_command_line import forbid_models

# huggingface_hub 2.4 hands files to httpx in a way that it is about to drop.
HUB_IS_BEHIND = "ignore:Use 'content=<...>' to upload raw bytes/text content:DeprecationWarning"
pytestmark = [pytest.mark.filterwarnings(PEFT_IS_BEHIND), pytest.mark.filterwarnings(HUB_IS_BEHIND)]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving() as hub:
        take_for_the_hub(hub, tmp_path / "cache", monkeypatch)
        yield hub


def the_error(capsys: pytest.CaptureFixture[str]) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0].removeprefix("error: ")


def test_a_run_pushes_its_model_and_card_and_the_hub_gives_back_the_same_weights(
    hub: Hub, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    grpo_core.train.main([*command(model, run), "--push_to_hub", "me/small", "--private"])
    assert capsys.readouterr().out.splitlines()[-1] == f"pushed: {hub.address}/me/small"
    assert hub.private == {"me/small"} and hub.large == ["model.safetensors"] and len(hub.commits) == 1
    files = hub.repositories["me/small"]
    final = {path.name for path in (run / "final").iterdir()}
    assert files.keys() == final - {"manifest.json"} | {"README.md"}
    assert all(files[name] == (run / "final" / name).read_bytes() for name in files.keys() - {"README.md"})
    # Nobody learns where on which machine this was.
    assert not any(str(tmp_path).encode() in text or str(model).encode() in text for text in files.values())

    returned = AutoModelForCausalLM.from_pretrained("me/small").state_dict()
    expected = AutoModelForCausalLM.from_pretrained(run / "final").state_dict()
    assert returned.keys() == expected.keys()
    assert all(torch.equal(returned[name], expected[name]) for name in expected)

    flags = ["--question", "How many?", "--append_to", "", "--device", "cpu", "--precision", "float32"]
    budgets = ["--max_prompt_tokens", "100", "--max_completion_tokens", "4", "--system_prompt="]
    eval.ask.main(["me/small", *flags, *budgets])
    assert "Question: How many?" in capsys.readouterr().out


def test_an_adapter_is_pushed_onto_a_base_of_the_hub_and_merged_into_one_of_this_machine(
    hub: Hub, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    eval.export.main([str(model), "--push_to_hub", "me/base"])
    run, lora = tmp_path / "run", ["--lora", "--lora_r", "4", "--lora_dropout", "0", "--push_to_hub", "me/adapter"]
    sft_core.train.main([*command(Path("me/base"), run, own=SFT), *lora])
    files = hub.repositories["me/adapter"]
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} < files.keys()
    assert load(files["adapter_model.safetensors"]).keys() == load_file(run / "final/adapter_model.safetensors").keys()
    card = ModelCard(files["README.md"].decode()).data
    assert (card.base_model, card.library_name, card.tags) == ("me/base", "peft", ["sft", "lora"])
    logits = eval.export.logits(AutoModelForCausalLM.from_pretrained("me/adapter"))
    assert torch.equal(logits, eval.export.logits(AutoModelForCausalLM.from_pretrained(run / "final")))

    eval.export.main([str(run), "--push_to_hub", "me/adapter-again"])
    assert hub.repositories["me/adapter-again"].keys() == files.keys()
    eval.export.main([str(run), "--merge", "--push_to_hub", "me/merged"])
    assert "adapter_config.json" not in hub.repositories["me/merged"]
    merged = eval.export.logits(AutoModelForCausalLM.from_pretrained("me/merged"))
    assert torch.allclose(logits, merged, atol=1e-4)
    capsys.readouterr()

    # The same adapter on a folder: nobody else could open it.
    argv = [*command(model, tmp_path / "local", own=SFT), "--lora", "--push_to_hub", "me/local"]
    with pytest.raises(SystemExit) as end:
        sft_core.train.main(argv)
    assert end.value.code == 2 and not (tmp_path / "local").exists()
    assert "python -m eval.export RUN --merge --push_to_hub me/local" in the_error(capsys)


def test_an_upload_that_fails_loses_nothing_and_says_how_to_push_again(
    hub: Hub, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "a run"
    hub.fails = "/commit/main"
    with pytest.raises(SystemExit) as end:
        sft_core.train.main([*command(model, run, own=SFT), "--push_to_hub", "me/small", "--private"])
    assert end.value.code == 1
    error = the_error(capsys)
    assert error.startswith("me/small was not pushed (") and "503" in error
    assert AutoModelForCausalLM.from_pretrained(run / "final") and hub.repositories["me/small"] == {}
    hub.fails = ""
    again = shlex.split(error.partition("push again: ")[2])
    assert again[:3] == ["python", "-m", "eval.export"]
    del hub.repositories["me/small"]  # and what was to be private stays so
    hub.private.clear()
    eval.export.main(again[3:])
    assert hub.private == {"me/small"}
    weights = load(hub.repositories["me/small"]["model.safetensors"])
    expected = load_file(run / "final" / "model.safetensors")
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_what_is_to_be_private_is_not_pushed_where_everybody_sees_it(
    hub: Hub, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.repositories["me/open"] = {}
    with pytest.raises(SystemExit) as end:
        eval.export.main([str(whole), "--push_to_hub", "me/open", "--private"])
    assert end.value.code == 1 and "there already, for everybody to see" in the_error(capsys)
    assert hub.repositories["me/open"] == {} and hub.blobs == {}


def test_ctrl_c_during_an_upload_says_how_to_push_again_too(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt), pushing(["runs/a", "--merge"], "me/small"):
        raise KeyboardInterrupt
    again = "python -m eval.export runs/a --merge --push_to_hub me/small"
    assert capsys.readouterr().err == f"me/small was not pushed; nothing is lost, push again: {again}\n"


BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "no token": ("me/small", {"token": None}, "set HF_TOKEN, or run `hf auth login`"),
    "a token that the hub does not know": ("me/small", {"token": "hf_other"}, "the hub does not take the token"),
    "no hub": ("me/small", {"ENDPOINT": "http://127.0.0.1:9"}, "the hub does not take the token"),
    "a hub that is switched off": ("me/small", {"HF_HUB_OFFLINE": True}, "switched off by HF_HUB_OFFLINE"),
    "a name without an owner": ("small", {}, "expected OWNER/NAME"),
    "a name that is a path": ("runs/a/final", {}, "expected OWNER/NAME"),
    "a name with a blank": ("me/so small", {}, "expected OWNER/NAME"),
}


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("program", ["sft_core.train", "grpo_core.train", "eval.export"])
def test_what_would_stop_the_upload_is_found_before_any_weight_is_read(
    what: str,
    program: str,
    hub: Hub,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name, changes, said = BAD[what]
    forbid_models(monkeypatch)
    monkeypatch.setattr(eval.export, "load_policy", None)
    for constant, value in changes.items():
        if constant != "token":
            monkeypatch.setattr(constants, constant, value)
    if "token" in changes:
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.delenv("HF_TOKEN")
        if changes["token"]:
            monkeypatch.setenv("HF_TOKEN", changes["token"])
    main = {"sft_core.train": sft_core.train.main, "grpo_core.train": grpo_core.train.main}.get(
        program, eval.export.main
    )
    argv = [str(model)] if program == "eval.export" else command(model, tmp_path / "run")
    if program == "sft_core.train":
        argv = command(model, tmp_path / "run", own=SFT)
    with pytest.raises(SystemExit) as end:
        main([*argv, "--push_to_hub", name])
    error = the_error(capsys)
    assert end.value.code == 2 and error.startswith(f"--push_to_hub {name}: ") and said in error
    assert not (tmp_path / "run").exists() and hub.repositories == {}


# --- the card


def test_the_cards_numbers_are_the_runs(whole: Path) -> None:
    card = model_card(find_trained(str(whole)), "me/small", adapter=False)
    log = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    first, *_, last = [line for line in log if line["kind"] == "eval"]
    for line in (first, last):
        shown = f"{line['accuracy']:.1%} | {line['accuracy_low']:.1%} to {line['accuracy_high']:.1%} | 2 |"
        assert f"| {line['step']} | {shown}" in card
    made = json.loads((whole / "provenance.json").read_text())
    assert f"| commit | {made['commit']} |" in card or made["commit"] is None
    assert f"torch {made['versions']['torch']}" in card and made["hardware"][0] in card
    assert "| optimizer steps | 3 |" in card and "| rewards | `tests.helpers:length_reward` x 1 |" in card
    settings = yaml.safe_load((whole / "config.yaml").read_text())
    of_card = yaml.safe_load(card.partition("```yaml\n")[2].partition("```")[0])
    assert of_card == {**settings, "model": Path(settings["model"]).name}
    data = ModelCard(card).data
    assert (data.tags, data.pipeline_tag, data.base_model, data.datasets) == (["grpo"], "text-generation", None, None)
    assert str(whole.parent) not in card and str(Path.home()) not in card


def test_the_card_of_a_checkpoint_shows_nothing_of_later_steps(whole: Path) -> None:
    card = model_card(find_trained(str(whole / "checkpoints" / "step-000002")), "me/small", adapter=False)
    assert "| optimizer steps | 2 |" in card and "| 0 | 0.0% |" in card and "| 3 | " not in card


def made_up(folder: Path, **settings: Any) -> Trained:
    """A run folder with a config of its own, and nothing else."""
    (folder / "final").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    (folder / "provenance.json").write_text("{}")
    return find_trained(str(folder))


def test_an_accuracy_on_gsm8k_is_reported_in_the_hubs_metadata(tmp_path: Path) -> None:
    sft = made_up(tmp_path / "sft", task="gsm8k", model="Qwen/Qwen2.5-0.5B", prompt_format="hash")
    trained = made_up(tmp_path / "grpo", task="gsm8k", model=sft.model, group_size=8, prompts_per_step=4,
                      rewards=["a", "b"], reward_weights=[1.0, 0.5])  # fmt: skip
    line = {"kind": "eval", "step": 9, "accuracy": 0.25, "accuracy_low": 0.2, "accuracy_high": 0.3, "problems": 200}
    steps = [{"kind": "train", "step": step} for step in (1, 9)]
    (tmp_path / "grpo" / "log.jsonl").write_text("".join(json.dumps(each) + "\n" for each in (*steps, line)))
    data = ModelCard(model_card(trained, "me/math", adapter=False)).data
    assert (data.base_model, data.datasets, data.model_name) == ("Qwen/Qwen2.5-0.5B", ["openai/gsm8k"], "math")
    [result] = data.eval_results
    assert (result.dataset_type, result.dataset_split, result.metric_value) == ("openai/gsm8k", "test", 0.25)
    assert "first 200 problems" in result.metric_name


def test_what_a_run_does_not_hold_is_not_in_its_card(tmp_path: Path) -> None:
    card = model_card(made_up(tmp_path / "run", task="train.jsonl", model="/data/x"), "me/x", adapter=False)
    assert not any(word in card for word in ("accuracy", "optimizer steps", "commit", "/data", "loss"))
    nothing = model_card(Trained(str(tmp_path), None), "me/x", adapter=False)
    assert "nothing is known here of how it was trained" in nothing and "settings" not in nothing


@pytest.mark.parametrize("prompt_format", ["xml", "hash"])
def test_the_code_in_a_card_asks_the_model_as_it_was_asked_in_training(
    prompt_format: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = made_up(
        tmp_path / "run", task="t.jsonl", model="x", prompt_format=prompt_format, shots=1, max_completion_tokens=5
    )
    qwen3s = tmp_path / "model"  # its template lets the model think aloud unless told not to
    shutil.copytree(model, qwen3s)
    template = qwen3s / "chat_template.jinja"
    template.write_text("{% if enable_thinking is not false %}think {% endif %}" + template.read_text())
    code = model_card(trained, str(qwen3s), adapter=False).partition("```python\n")[2].partition("```")[0]
    told: dict[str, Any] = {}
    exec(code, told)
    config = PromptConfig(prompt_format=prompt_format, shots=1)  # type: ignore[arg-type]
    messages = prompt_messages(Example(told["messages"][-1]["content"], "", ""), config)
    assert told["messages"] == messages
    assert told["prompt"]["input_ids"][0].tolist() == encode_prompt(told["tokenizer"], messages)
    assert told["answer"].shape[1] <= len(told["prompt"]["input_ids"][0]) + 5


def test_pushing_is_neither_part_of_what_a_run_is_nor_on_unless_asked_for() -> None:
    assert RunConfig().push_to_hub == "" and {"push_to_hub", "private"} <= set(FREE_ON_RESUME)
