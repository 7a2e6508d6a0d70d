"""TRL's GRPOTrainer on a case: the real `train()`, with its completions handed in and everything it computes noted."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.parity.cases import (
    PROMPTS,
    Case,
    Trace,
    completions,
    model_folder,
    prompt_ids,
    rewards,
    tokenizer,
)

# Our flags and TRL's arguments, where the value is the same.
SAME = {
    "beta": "beta",
    "epsilon_low": "epsilon",
    "scale_rewards": "scale_rewards",
    "reward_aggregation": "multi_objective_aggregation",
    "kl_correction": "use_bias_correction_kl",
    "sapo_temperature_pos": "sapo_temperature_pos",
    "sapo_temperature_neg": "sapo_temperature_neg",
    "vespo_k_pos": "vespo_k_pos",
    "vespo_lambda_pos": "vespo_lambda_pos",
    "vespo_k_neg": "vespo_k_neg",
    "vespo_lambda_neg": "vespo_lambda_neg",
    "ref_sync_every": "ref_model_sync_steps",
    "ref_sync_mix": "ref_model_mixup_alpha",
    "mask_truncated": "mask_truncated_completions",
    "top_entropy": "top_entropy_quantile",
    "entropy_coef": "entropy_coef",
    "temperature": "temperature",
    "mu": "num_iterations",
    "group_size": "num_generations",
    "max_completion_tokens": "max_completion_length",
    "reward_weights": "reward_weights",
    "lr": "learning_rate",
    "lr_schedule": "lr_scheduler_type",
    "max_grad_norm": "max_grad_norm",
    "weight_decay": "weight_decay",
    "adam_beta1": "adam_beta1",
    "adam_beta2": "adam_beta2",
    "adam_epsilon": "adam_epsilon",
}


def arguments(config: Any, accumulation: int) -> dict[str, Any]:
    """TRL's arguments for one of our configurations whose rows are learned in so many micro-batches."""
    args = {theirs: getattr(config, ours) for ours, theirs in SAME.items()}
    args["loss_type"] = "grpo" if config.loss == "gspo" else config.loss
    args["importance_sampling_level"] = config.objective.ratio_level
    # CISPO's bound is epsilon_high itself there, 1 + epsilon_high here and in the paper (see the declared differences).
    args["epsilon_high"] = config.epsilon_high + (config.loss == "cispo")
    args["delta"] = config.delta or None
    args["off_policy_mask_threshold"] = config.off_policy_threshold or None
    args["sync_ref_model"] = config.ref_sync_every > 0
    args["ref_model_sync_steps"] = config.ref_sync_every or 512
    args["per_device_train_batch_size"] = config.prompts_per_step * config.group_size // accumulation
    args["gradient_accumulation_steps"] = accumulation
    return args


class Recorder(TrainerCallback):  # type: ignore[misc]
    """Notes the weights after each optimizer step and the metrics of each log."""

    def __init__(self, trace: Trace, model: Any) -> None:
        self.trace, self.model, self.logs = trace, model, []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.trace.weights.append({name: p.detach().clone() for name, p in self.model.named_parameters()})

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "grad_norm" in logs:
            self.logs.append(dict(logs))


def run(
    case: Case,
    config: Any,
    folder: Path,
    ragged: bool | None = None,
    reward_functions: list[Any] | None = None,
    change_model: Callable[[Any], None] = lambda model: None,
    spoil_loss: Callable[[int, Tensor], Tensor] = lambda update, loss: loss,
    **overrides: Any,
) -> Trace:
    """Train for `case.updates` optimizer steps.

    The prompts are ragged for the rotary family only: TRL passes no position ids, so that a model with absolute
    positions sees padding as a shift (see the declared differences). `overrides` are TRL's own arguments.
    """
    trace = Trace()
    ragged = case.family == "qwen2" if ragged is None else ragged

    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        ids = [prompt_ids(int(prompt), ragged) for prompt in prompts]
        made = completions(len(trace.rollouts), case.rows)
        trace.rollouts.append(list(zip(ids, made, strict=True)))
        return {"prompt_ids": ids, "completion_ids": made, "logprobs": None}

    model = AutoModelForCausalLM.from_pretrained(model_folder(case.family, folder), dtype=torch.float32)
    change_model(model)
    with tempfile.TemporaryDirectory() as output:
        args = {
            "output_dir": output,
            "max_steps": case.updates,
            "warmup_steps": round(config.warmup_ratio * case.updates),
            "seed": 0,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "disable_tqdm": True,
        }
        trainer = GRPOTrainer(
            model=model,
            processing_class=tokenizer(),
            reward_funcs=reward_functions or rewards(case.none_rewards),
            train_dataset=Dataset.from_dict({"prompt": [str(number) for number in range(PROMPTS)]}),
            args=GRPOConfig(**(args | arguments(config, case.accumulation) | overrides)),
            rollout_func=rollout,
        )
        trainer.remove_callback(PrinterCallback)
        _note_everything(trainer, trace, spoil_loss)
        recorder = Recorder(trace, trainer.model)
        trainer.add_callback(recorder)
        trainer.train()
    trace.metrics = metrics_of_rollouts(recorder.logs, case.mu)
    return trace


def metrics_of_rollouts(logs: list[dict[str, float]], mu: int) -> list[dict[str, float]]:
    """One entry for each rollout out of TRL's one for each update: means over the updates, but the first learning rate
    and the last gradient norm."""
    merged = []
    for start in range(0, len(logs), mu):
        of_rollout = logs[start : start + mu]
        names = {name for log in of_rollout for name, value in log.items() if value is not None}
        values = {name: [log[name] for log in of_rollout if log.get(name) is not None] for name in names}
        means = {name: sum(found) / len(found) for name, found in values.items()}
        merged.append(means | {"learning_rate": values["learning_rate"][0], "grad_norm": of_rollout[-1]["grad_norm"]})
    return merged


def _note_everything(trainer: Any, trace: Trace, spoil_loss: Callable[[int, Tensor], Tensor]) -> None:
    """Put a note-taker around each method whose result is compared."""
    generate, compute_loss, logps = (
        trainer._generate_and_score_completions,
        trainer._compute_loss,
        trainer._get_per_token_logps_and_entropies,
    )
    clip = trainer.accelerator.clip_grad_norm_
    pending: dict[str, Any] = {"loss": 0.0, "logp": {}}

    def noted_generate(inputs: Any) -> Any:
        out = generate(inputs)
        trace.mask.append(out["completion_mask"].bool())
        trace.advantage.append(out["advantages"].clone())
        if "old_per_token_logps" in out:
            trace.old_logp.append(out["old_per_token_logps"].clone())
        if "ref_per_token_logps" in out:
            trace.ref_logp.append(out["ref_per_token_logps"].clone())
        return out

    def noted_logps(*args: Any, **kwargs: Any) -> Any:
        out = logps(*args, **kwargs)
        pending["last"] = out[0].detach().clone()
        return out

    def noted_loss(model: Any, inputs: Any) -> Tensor:
        loss = spoil_loss(len(trace.loss), compute_loss(model, inputs))
        pending["loss"] += loss.item()
        for ids, logp in zip(inputs["completion_ids"].tolist(), pending["last"], strict=True):
            pending["logp"][tuple(ids)] = logp
        window = inputs["num_items_in_batch"].item() * trainer.current_gradient_accumulation_steps
        trace.window_weight.append(inputs["completion_mask"].sum().item() / window * trainer.args.steps_per_generation)
        return loss

    def noted_clip(*args: Any, **kwargs: Any) -> Any:
        named = trainer.model.named_parameters()
        trace.gradient.append({name: p.grad.clone() for name, p in named if p.grad is not None})
        trace.loss.append(pending["loss"])
        if trainer.args.steps_per_generation == trainer.args.gradient_accumulation_steps:  # this update saw all rows
            trace.logp.append(_in_order(pending["logp"], [completion for _, completion in trace.rollouts[-1]]))
        pending.update(loss=0.0, logp={})
        return clip(*args, **kwargs)

    trainer._generate_and_score_completions = noted_generate
    trainer._get_per_token_logps_and_entropies = noted_logps
    trainer._compute_loss = noted_loss
    trainer.accelerator.clip_grad_norm_ = noted_clip


def _in_order(logp_of_row: dict[tuple[int, ...], Tensor], completion_ids: list[list[int]]) -> Tensor:
    """TRL shuffles a rollout's rows: put them back. Rows are identified by their completions."""
    width = max(map(len, completion_ids))
    pad_id = tokenizer().pad_token_id
    return torch.stack([logp_of_row[(*ids, *[pad_id] * (width - len(ids)))] for ids in completion_ids])
