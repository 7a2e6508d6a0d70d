"""Flags by the names that TRL 1.16 and transformers' Trainer give them.

`SAME` lists names that are aliases here, `REFUSED` names that mean something else and are answered with the flag to
use, `SHARED` flags that have the same name in both. docs/from-trl.md shows all three.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple


class Same(NamedTuple):
    """Our flags for one of their names. Of several, the first is always set, the others unless they are given.

    `values`: what particular values become, as `flag=value ...`. "true" also stands for yes, t, 1 and a flag without a
    value, "null" for YAML's null. `only`: no other value is accepted. `note`: what else to know.
    """

    ours: str
    note: str = ""
    values: Mapping[str, str] = {}
    only: bool = False


STEPS = "a GRPO step is one batch of completions with its `--mu` updates, in TRL each update is a step"
SAME: dict[str, Same] = {
    "model_name_or_path": Same("model"),
    "use_peft": Same("lora"),
    "lora_target_modules": Same("lora_targets", "default there: PEFT's choice by model type"),
    "use_cpu": Same("device", "", {"true": "device=cpu", "false": "device=auto"}, True),
    "full_determinism": Same("deterministic"),
    "num_generations": Same("group_size"),
    "use_vllm": Same("vllm", "not tried with a real vLLM yet"),
    "vllm_gpu_memory_utilization": Same("vllm_memory"),
    "vllm_importance_sampling_mode": Same("sampler_mode", "default there: sequence_mask"),
    "vllm_importance_sampling_clip_max": Same("sampler_cap"),
    "max_completion_length": Same("max_completion_tokens", "default there: 512"),
    "dataset_name": Same("task", "files and folders, too; see `--question_column`, `--answer_column`"),
    "dataset_config": Same("config_name"),
    "dataset_train_split": Same("train_split"),
    "dataset_test_split": Same("eval_split"),
    "reward_funcs": Same("rewards", "the built-in functions have other names; write your own as `my_module:my_reward`"),
    "loss_type": Same("loss", "GRPO only; `bnpo` is `dapo` here, whose mean is over the step instead of a micro-batch"),
    "importance_sampling_level": Same("ratio_level", "default there: token; here the `--loss`'s own"),
    "multi_objective_aggregation": Same("reward_aggregation"),
    "epsilon": Same("epsilon_low epsilon_high", "both, unless `--epsilon_high` is given, there and here"),
    "num_iterations": Same("mu"),
    "mask_truncated_completions": Same("mask_truncated"),
    "use_bias_correction_kl": Same("kl_correction", "default there: True"),
    "off_policy_mask_threshold": Same("off_policy_threshold", "off: 0 here, None there"),
    "ref_model_mixup_alpha": Same("ref_sync_mix"),
    "learning_rate": Same("lr", "default there: 5e-5; GRPO 1e-6, SFT 2e-5"),
    "lr_scheduler_type": Same(
        "lr_schedule",
        "`constant` has no warm-up there; here it takes `--warmup_ratio`",
        {
            "linear": "lr_schedule=linear",
            "cosine": "lr_schedule=cosine",
            "constant": "lr_schedule=constant",
            "constant_with_warmup": "lr_schedule=constant",
        },
        True,
    ),
    "num_train_epochs": Same("epochs", "default there: 3"),
    "max_steps": Same(
        "max_steps", f"{STEPS}; for the length that the epochs give: 0 here, -1 there", {"-1": "max_steps=0"}
    ),
    "scale_rewards": Same("scale_rewards", "", {"true": "scale_rewards=group", "false": "scale_rewards=none"}),
    "logging_steps": Same("log_every", f"{STEPS}; a line has that step's metrics, not the mean since the last line"),
    "save_steps": Same("save_every", f"{STEPS}; takes steps or minutes (10m), not a share of the run (0.1)"),
    "eval_steps": Same(
        "eval_every", f"{STEPS}; measures the accuracy of greedy answers, not the mean reward of samples"
    ),
    "save_total_limit": Same("keep_last", "default there: all", {"null": "keep_last=0", "none": "keep_last=0"}),
    "resume_from_checkpoint": Same(
        "resume", "a run without a checkpoint is started", {"true": "resume=newest", "false": ""}
    ),
    "report_to": Same(
        "track tensorboard",
        "",
        {
            "none": "track=none tensorboard=False",
            "tensorboard": "track=none tensorboard=True",
            "wandb": "track=wandb tensorboard=False",
            "tensorboard wandb": "track=wandb tensorboard=True",
        },
        True,
    ),
    "disable_tqdm": Same("progress", "", {"true": "progress=False", "false": "progress=True"}, True),
    "hub_private_repo": Same("private"),
}

_BATCH = "`--prompts_per_step` x `--group_size` completions make a GRPO step, `--batch_size` demonstrations an SFT step"
_PRECISION = "use `--precision bf16`, `fp16`, `float32` or `auto`, the default; trained weights stay float32"
_SAMPLER = "`--vllm` samples with vLLM in this process, on one GPU, with the importance weight of `--sampler_mode`"
_DEVICES = "`torchrun`, and `--parallel ddp`, `fsdp` or `auto`, the default: docs/several-gpus.md"
_ADAPTIVE = "the entropy bonus is constant here: use `--entropy_coef`"
_FIXED = "no such sampling rule here; use `--temperature`, `--top_k`, `--top_p` or `--min_p`"
_FOUR = "use `--use_4bit`: NF4 with nested quantization, which TRL has off by default"
_SYNC = "use `--ref_sync_every N` (N is 512 in TRL; 0: never), which also switches it on"
_VLLM = (
    *("vllm_mode", "vllm_server_host", "vllm_server_port", "vllm_server_base_url", "vllm_max_model_length"),
    *("vllm_tensor_parallel_size", "vllm_enable_sleep_mode", "vllm_importance_sampling_correction"),
)
REFUSED: dict[str, str] = {
    "per_device_train_batch_size": f"use `--micro_batch`, which never changes the gradient; {_BATCH}",
    "gradient_accumulation_steps": f"follows from the step's size and `--micro_batch`; {_BATCH}",
    "generation_batch_size": "use `--prompts_per_step`: it counts prompts, and each step samples its own batch",
    "steps_per_generation": "every step samples its own batch of `--prompts_per_step` prompts, learned `--mu` times",
    "per_device_eval_batch_size": "use `--eval_batch_size` in GRPO, `--batch_size` in eval: greedy answers, not groups",
    "auto_find_batch_size": "on: see `--micro_batch auto`, the default; what does not fit all the same is halved",
    "num_generations_eval": "use `--eval_samples`: samples per held-out problem besides the greedy answer",
    "max_prompt_length": "use `--max_prompt_tokens`: longer prompts are dropped (`--long_prompts`), TRL cut their "
    "beginning off; TRL 1.16 has no such limit",
    "max_length": "use `--max_prompt_tokens` (longer prompts are dropped) and `--max_completion_tokens`",
    "packing": "on where the model allows it: a `--micro_batch` is one sequence without padding",
    "bf16": _PRECISION,
    "fp16": _PRECISION,
    "dtype": _PRECISION,
    "torch_dtype": _PRECISION,
    "load_in_4bit": _FOUR,
    "load_in_8bit": _FOUR,
    "use_bnb_nested_quant": _FOUR,
    "trust_remote_code": "code that comes with a `--model` is never run",
    "disable_dropout": "GRPO trains without dropout; SFT's is `--lora_dropout`",
    "warmup_steps": "use `--warmup_ratio`: the share of the steps (0.05), not their number",
    "optim": "always AdamW (`--adam_beta1`, `--adam_beta2`, `--weight_decay`); `--offload_optimizer` saves its memory",
    "top_entropy_quantile": "use `--top_entropy`: the same share of the tokens, but taken over the whole step; "
    "TRL takes it over each micro-batch",
    "sync_ref_model": _SYNC,
    "ref_model_sync_steps": _SYNC,
    **dict.fromkeys(
        ("use_adaptive_entropy", "entropy_target", "entropy_coef_min", "entropy_coef_max", "entropy_coef_delta"),
        _ADAPTIVE,
    ),
    "repetition_penalty": _FIXED,
    "generation_kwargs": _FIXED,
    **dict.fromkeys(_VLLM, _SAMPLER),
    "cache_implementation": "use `--decoding compiled` for a static cache, `segments` for one that grows",
    "use_transformers_paged": "use `--decoding paged`",
    "use_liger_kernel": "`--logit_chunk` bounds the memory of logits without a kernel",
    **dict.fromkeys(("deepspeed", "fsdp", "fsdp_config", "ddp_backend"), _DEVICES),
    "log_completions": "use `--show_every N` to print some; completions.jsonl in the run folder has all of them",
    "num_completions_to_print": "use `--show_every N`: steps between printed samples",
    "logging_dir": "TensorBoard events are in the run folder, `--output_dir`",
    "run_name": "a run is named by its folder: use `--output_dir runs/NAME`",
    "overwrite_output_dir": "use `--overwrite`, which deletes the run in `--output_dir`; transformers kept its files",
    "eval_strategy": "use `--eval_every N`: steps between evaluations; 0: only at the end",
    "save_strategy": "use `--save_every`: steps (100) or minutes (10m)",
    "logging_strategy": "use `--log_every N`: steps between log lines",
    "hub_model_id": "use `--push_to_hub OWNER/NAME`, which uploads the final model",
    "hub_token": "`--push_to_hub` takes HF_TOKEN from the environment, or a login",
    "data_seed": "`--seed` also seeds the order of the data",
    "reward_model_name_or_path": "use `--rewards my_module:my_reward`, a function that asks the model",
}

SHARED: dict[str, str] = {
    "output_dir": "an existing run is neither overwritten nor continued without `--overwrite` or `--resume`",
    "seed": "",
    "lora_r": "",
    "lora_alpha": "",
    "lora_dropout": "SFT only: GRPO trains without dropout; default there: 0.05",
    "gradient_checkpointing": "default there: True",
    "temperature": "",
    "top_k": "",
    "top_p": "",
    "min_p": "",
    "chat_template_kwargs": "name=value pairs here, a dictionary there; `enable_thinking` is off unless it is given",
    "beta": "",
    "epsilon_high": "CISPO's weight is bounded by 1 + this (the paper), there by this itself",
    "delta": "off: 0 here, None there",
    "reward_weights": "",
    "entropy_coef": "",
    **dict.fromkeys(("sapo_temperature_pos", "sapo_temperature_neg"), ""),
    **dict.fromkeys(("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"), ""),
    "weight_decay": "",
    "adam_beta1": "",
    "adam_beta2": "",
    "adam_epsilon": "",
    "max_grad_norm": "",
    "warmup_ratio": "transformers 4; in 5 a `warmup_steps` below 1",
    "push_to_hub": "takes OWNER/NAME (there `hub_model_id`); the final model alone is uploaded",
}

# --- reading them

YES, NO = ("true", "yes", "y", "t", "1"), ("false", "no", "n", "f", "0")  # as HfArgumentParser reads them
Known = Mapping[str, Collection[str]]  # the fields of a program; with several stages, of each by its name and a dot


def known_names(fields: Collection[str]) -> list[str]:
    """The names of TRL and transformers that a program with these fields has an answer to."""
    refused = [name for name, text in REFUSED.items() if _flags_of(text) & set(fields)]
    return [name for name, same in SAME.items() if set(same.ours.split()) <= set(fields)] + refused


def _flags_of(text: str) -> set[str]:
    return set(re.findall(r"--(\w+)", text))


def _answer(name: str, known: Known) -> tuple[str, Same | None]:
    """The stage before the dot, and what the rest of the name means there.

    Raises:
        ValueError: the name means something else than any flag here.
    """
    stage, plain = name[: name.rfind(".") + 1], name[name.rfind(".") + 1 :].replace("-", "_")
    fields = known.get(stage, ())
    if plain in REFUSED and plain not in fields and _flags_of(REFUSED[plain]) & set(fields):
        raise ValueError(f"--{name}: {REFUSED[plain].replace('`', '')}")
    same = SAME.get(plain)
    return stage, same if same and set(same.ours.split()) <= set(fields) else None


def _by_value(name: str, same: Same, texts: Sequence[str]) -> dict[str, str] | None:
    """What a value that is listed means; None: any value is taken as it is.

    Raises:
        ValueError: no other value is taken.
    """
    text = " ".join(sorted(text.lower() for text in texts)) or "true"
    text = text if text in same.values else "true" if text in YES else "false" if text in NO else text
    if text in same.values:
        return dict(pair.split("=") for pair in same.values[text].split())
    if same.only and text != "null":
        raise ValueError(f"--{name} {' '.join(texts)}: expected {', '.join(same.values)}")
    return None


def own_flags(argv: Sequence[str], known: Known, given: Collection[str] = ()) -> list[str]:
    """A command line with this project's names. `given`: fields that a file sets.

    >>> own_flags(["--learning_rate", "1e-6", "--epsilon=0.1"], {"": ["lr", "epsilon_low", "epsilon_high"]})
    ['--lr', '1e-6', '--epsilon_low=0.1', '--epsilon_high=0.1']

    Raises:
        ValueError: a flag of `REFUSED`, a value that is none here.
    """
    found: list[str] = []
    there = {token[2:].split("=")[0] for token in argv if token.startswith("--")} | set(given)
    for flag, texts, joined in _with_values(argv):
        name = flag.removeprefix("--")
        stage, same = _answer(name, known) if flag.startswith("--") else ("", None)
        values = _by_value(name, same, texts) if same and same.values else None
        if same is None:
            found += [f"{flag}={texts[0]}", *texts[1:]] if joined else [flag, *texts]
        elif values is not None:
            found += [f"--{stage}{ours}={value}" for ours, value in values.items()]
        else:
            for ours in _to_set(same, stage, there):
                found += [f"--{stage}{ours}={texts[0]}", *texts[1:]] if joined else [f"--{stage}{ours}", *texts]
    return found


def _to_set(same: Same, stage: str, there: Collection[str]) -> list[str]:
    """The fields that an alias sets: the first, and those of the others that are not given by themselves."""
    first, *others = same.ours.split()
    return [first, *(ours for ours in others if not {ours, stage + ours} & {name.replace("-", "_") for name in there})]


def _with_values(argv: Sequence[str]) -> Iterator[tuple[str, list[str], bool]]:
    """Each flag, its values, and whether it stood before a `=`; what is before the first flag as a flag."""
    at = 0
    while at < len(argv):
        flag, equals, value = argv[at].partition("=") if argv[at].startswith("--") else (argv[at], "", "")
        end = at + 1
        while end < len(argv) and flag.startswith("--") and not argv[end].startswith("--"):
            end += 1
        yield flag, [*([value] if equals else []), *argv[at + 1 : end]], bool(equals)
        at = end


def own_keys(values: Mapping[str, Any], known: Known) -> dict[str, Any]:
    """The lines of a config file with this project's names.

    >>> own_keys({"learning_rate": 1e-6, "report_to": "none"}, {"": ["lr", "track", "tensorboard"]})
    {'lr': 1e-06, 'track': 'none', 'tensorboard': 'False'}

    Raises:
        ValueError: as `own_flags`; a setting that is there twice, under two names.
    """
    found: dict[str, Any] = {}
    there = {str(key) for key, value in values.items() if value is not None}
    for key, value in values.items():
        stage, same = _answer(str(key), known)
        texts = [str(part) for part in value] if isinstance(value, list) else ["null" if value is None else str(value)]
        set_by_value = _by_value(str(key), same, texts) if same and same.values else None
        if same is None:
            new = {key: value}
        elif set_by_value is not None:
            new = {stage + ours: text for ours, text in set_by_value.items()}
        else:
            new = {stage + ours: value for ours in _to_set(same, stage, there)}
        for ours, its_value in new.items():
            if its_value is not None and (found.get(ours) is not None or (ours != key and ours in there)):
                raise ValueError(f"{key}: is {ours} here, which the file sets already")
            found[ours] = found.get(ours) if its_value is None else its_value
    return found
