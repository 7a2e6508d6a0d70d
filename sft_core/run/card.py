"""The model card: the README.md beside the weights, with what the run has measured and nothing else.

Every number comes from the run's own files, config.yaml, provenance.json and log.jsonl; what they do not hold is left
out.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from rewards.jsonl import read_jsonl
from rewards.tables import markdown
from sft_core.run.provenance import shown_flags, without_folders
from sft_core.run.trained import Trained
from sft_core.text.config import PromptConfig, is_hub_name
from sft_core.text.example import Example
from sft_core.text.prompts import prompt_messages
from sft_core.text.read import GSM8K

QUESTION = "Ben has 3 boxes of 4 pens and gives 5 pens away. How many pens are left?"


def model_card(trained: Trained, name: str, adapter: bool) -> str:
    """README.md for the model under its new name.

    Args:
        name: OWNER/NAME on the hub, or the export's folder.
        adapter: whether the weights are a LoRA adapter, to be opened with peft.

    Raises:
        ValueError: a file of the run cannot be read.
    """
    settings, base = trained.settings(), trained.hub_base()
    log = read_jsonl(trained.run / "log.jsonl", torn_end=True) if trained.run else []
    log = [line for line in log if line["step"] <= trained.step]
    held = [line for line in log if line.get("kind") == "eval"]
    kind, task = _kind(settings), str(settings.get("task"))
    metadata = ModelCardData(
        base_model=base,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=[tag for tag, there in (("grpo", kind == "GRPO"), ("sft", kind == "SFT"), ("lora", adapter)) if there],
        datasets=[GSM8K] if task == "gsm8k" else [task] if is_hub_name(task) else None,
        **_results(name, settings, log),
    )
    parts = [f"---\n{metadata.to_yaml()}\n---", f"# {name.split('/')[-1]}", _what(kind, settings, base, adapter)]
    if kind:
        parts += [_facts(settings, log), _accuracy(held)]
    parts += [_usage(name, settings)]
    if kind:
        parts += [_origin(trained, settings)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _kind(settings: dict[str, Any]) -> str:
    return "" if not settings else "GRPO" if "group_size" in settings else "SFT"


def _what(kind: str, settings: dict[str, Any], base: str | None, adapter: bool) -> str:
    thing = "A LoRA adapter" if adapter else "A causal language model"
    if not kind:
        return f"{thing}. It was exported without a run folder, so nothing is known here of how it was trained."
    begun = f"[{base}](https://huggingface.co/{base})" if base else f"`{without_folders(str(settings.get('model')))}`"
    if settings.get("model") == "tiny":
        begun = "the built-in model, a small untrained Qwen2"
    if settings.get("from_scratch"):
        begun = f"random weights in the shape of {begun}"
    how = {"GRPO": "Group Relative Policy Optimization (GRPO)", "SFT": "supervised fine-tuning"}[kind]
    return f"{thing} trained by {how} with grpo-from-scratch. It began with {begun}."


def _facts(settings: dict[str, Any], log: list[dict[str, Any]]) -> str:
    """What was done, as a table."""
    steps = [line for line in log if line.get("kind") == "train"]
    task = str(settings.get("task"))
    rows: dict[str, Any] = {"task": f"`{GSM8K}`, its train split" if task == "gsm8k" else f"`{without_folders(task)}`"}
    if steps:
        rows["optimizer steps"] = steps[-1]["step"]
    if settings.get("lora") or settings.get("adapter_path"):
        own = f", rank {settings['lora_r']}, alpha {settings['lora_alpha']}" if settings.get("lora") else ""
        rows["trained weights"] = f"a LoRA adapter{own}"
    if "group_size" in settings:
        rows["completions a step"] = f"{settings['prompts_per_step']} prompts x {settings['group_size']}"
        weights = settings["reward_weights"] or [1] * len(settings["rewards"])
        pairs = zip(settings["rewards"], weights, strict=True)
        rows["rewards"] = ", ".join(f"`{reward}` x {weight:g}" for reward, weight in pairs)
        if settings.get("shuffle_rewards"):
            rows["rewards"] += ", shuffled at random: a control experiment"
        if steps and steps[-1].get("reward_mean") is not None:
            rows["mean reward of the last step"] = f"{steps[-1]['reward_mean']:.3f}"
    return markdown([["", ""], *([name, str(value)] for name, value in rows.items())])


def _accuracy(held: list[dict[str, Any]]) -> str:
    """The first and the last evaluation on held-out problems."""
    asked = [line for line in held if line.get("accuracy") is not None]
    if not asked:
        losses = [line for line in held[-1:] if line.get("heldout_loss") is not None]
        return "".join(
            f"Held-out loss after step {line['step']}: {line['heldout_loss']:.4f} nats a token." for line in losses
        )
    rows = [["after step", "accuracy", "95% interval", "problems"]]
    for line in asked if len(asked) < 2 else (asked[0], asked[-1]):
        interval = f"{line['accuracy_low']:.1%} to {line['accuracy_high']:.1%}"
        rows.append([str(line["step"]), f"{line['accuracy']:.1%}", interval, str(line["problems"])])
    how = "One greedy answer to each problem, scored strictly; Wilson intervals."
    return f"## Held-out accuracy\n\n{markdown(rows)}\n\n{how}"


def _results(name: str, settings: dict[str, Any], log: list[dict[str, Any]]) -> dict[str, Any]:
    """The accuracy for the hub's leaderboards, where it was measured after the last step on a data set of the hub."""
    last = max((line["step"] for line in log), default=0)
    asked = [
        line for line in log if line.get("accuracy") is not None and line["kind"] == "eval" and line["step"] == last
    ]
    if not asked or settings.get("task") != "gsm8k" or settings.get("eval_file"):
        return {}
    result = EvalResult(
        task_type="text-generation",
        dataset_type=GSM8K,
        dataset_name="GSM8K",
        dataset_config="main",
        dataset_split="test",
        metric_type="accuracy",
        metric_name=f"greedy accuracy on the first {asked[-1]['problems']} problems",
        metric_value=asked[-1]["accuracy"],
    )
    return {"model_name": name.split("/")[-1], "eval_results": [result]}


def _usage(name: str, settings: dict[str, Any]) -> str:
    """Code that prompts the model as in training."""
    fields = [field.name for field in dataclasses.fields(PromptConfig)]
    prompt = PromptConfig(**{field: settings[field] for field in fields if field in settings})
    messages = (
        prompt_messages(Example(QUESTION, "", ""), prompt) if settings else [{"role": "user", "content": QUESTION}]
    )
    shown = json.dumps(messages, indent=4, ensure_ascii=False)
    return f"""## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

name = {name!r}
messages = {shown}
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False)
prompt = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, enable_thinking=False, return_tensors="pt", return_dict=True
)
answer = model.generate(**prompt, max_new_tokens={settings.get("max_completion_tokens", 256)}, do_sample=False)
print(tokenizer.decode(answer[0, prompt["input_ids"].shape[1]:], skip_special_tokens=True))
```"""


def _origin(trained: Trained, settings: dict[str, Any]) -> str:
    """Command, versions, hardware and every setting, without the folders of the machine that ran it."""
    assert trained.run
    lines = ["## How it was made", ""]
    try:
        made = json.loads((trained.run / "provenance.json").read_text(encoding="utf-8"))
        rows = {
            "command": f"`python {shown_flags(shlex.split(made['command']))}`",
            "commit": made["commit"],
            "versions": ", ".join(f"{package} {version}" for package, version in made["versions"].items()),
            "hardware": "; ".join(made["hardware"]),
            "started": made["started"],
        }
        lines.append(markdown([["", ""], *([name, value] for name, value in rows.items() if value)]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # somebody has deleted or edited it: the settings below are the run's in any case
    shown = {name: _shown(value) for name, value in settings.items()}
    text = yaml.safe_dump(shown, sort_keys=False, allow_unicode=True)
    return "\n".join(
        [*lines, "", "<details><summary>All settings</summary>", "", "```yaml", text + "```", "", "</details>"]
    )


def _shown(value: Any) -> Any:
    if isinstance(value, list):
        return [_shown(item) for item in value]
    return without_folders(value) if isinstance(value, str) else value
