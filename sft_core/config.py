"""Settings, in parts that the configs of SFT, GRPO and evaluation are built from. Each field is a flag."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import yaml

from sft_core.errors import require
from sft_core.precision import pick_device


def flag(default: Any, help: str, *aliases: str) -> Any:
    """A dataclass field whose help text is the flag's; `aliases`: further spellings, such as --output_path."""
    metadata = {"help": help, "aliases": aliases}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class ModelConfig:
    """The model that is trained or asked."""

    model: str = flag("Qwen/Qwen2.5-0.5B-Instruct", "hub name, model or adapter folder; tiny: the built-in model")
    adapter_path: str | None = flag(None, "a LoRA adapter to load onto --model (training continues it)")
    from_scratch: bool = flag(False, "random weights with the shape in --model's config.json, instead of its weights")
    config_overrides: list[str] = flag([], "with --from_scratch: key=value pairs that replace entries of config.json")
    lora: bool = flag(False, "train a new LoRA adapter, not all weights (extra: lora)")
    lora_r: int = flag(16, "LoRA rank (16: as in the projects that the presets come from)")
    lora_alpha: int = flag(32, "LoRA scale: the update is multiplied by alpha / r")
    lora_dropout: float = flag(0.0, "dropout before the adapter in SFT; GRPO trains without dropout")
    lora_targets: list[str] = flag(
        ["all-linear"], "names of the layers to adapt; all-linear: all except the output head"
    )
    use_4bit: bool = flag(
        False, "keep the weights below a LoRA adapter in 4 bits (QLoRA's NF4; CUDA only, extra: quant)"
    )
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, mps")
    precision: Literal["auto", "float32", "bf16", "fp16"] = flag(
        "auto", "auto: bf16 if the hardware has it, else fp16 on CUDA, else float32"
    )
    gradient_checkpointing: bool = flag(False, "recompute activations: less memory, 1.3x the time")
    share_prompts: bool = flag(True, "encode a group's prompt once; the learner then pads no rows; same gradient")
    logit_chunk: int = flag(
        2**26, "how many logits the learner computes at a time (2**26: 256 MB); same gradient; 0: all"
    )
    rows_leave: bool = flag(
        True, "finished completions leave the batch, and make room for problems that wait; same distribution"
    )
    decoding: Literal["auto", "segments", "compiled", "paged"] = flag(
        "segments",
        "how completions are decoded: rows leave when they end (segments), a compiled pass over a cache of fixed size, "
        "or continuous batching (paged); same random numbers; auto: compiled where a GPU can, else segments",
    )
    half_copies: bool = flag(True, "sampler and reference cast their matrices once, not per use; same numbers")

    keep_freed_memory: bool = flag(True, "on a Linux CPU, the process keeps freed memory for its next allocation")

    def check(self) -> None:
        require(
            not (self.lora and self.adapter_path),
            "lora",
            self.lora,
            "either --lora (a new adapter) or --adapter_path (one to train further), not both",
        )
        require(
            self.model != "tiny" or not (self.adapter_path or self.from_scratch),
            "model",
            self.model,
            "a model folder or hub name if --adapter_path or --from_scratch is given",
        )
        require(
            self.from_scratch or not self.config_overrides,
            "config_overrides",
            self.config_overrides,
            "only together with --from_scratch",
        )
        require(
            not self.lora or find_spec("peft") is not None, "lora", self.lora, "the peft package: pip install '.[lora]'"
        )
        if self.use_4bit:
            self._check_4bit()
        require(self.logit_chunk >= 0, "logit_chunk", self.logit_chunk, "0 or more")
        require(self.lora_r >= 1, "lora_r", self.lora_r, "1 or more")
        require(0 <= self.lora_dropout < 1, "lora_dropout", self.lora_dropout, "0 or more and below 1")
        pick_device(self.device)

    def _check_4bit(self) -> None:
        adapted = self.lora or self.adapter_path is not None
        require(adapted, "use_4bit", True, "--lora or --adapter_path beside it: weights of 4 bits cannot be trained")
        require(not self.from_scratch, "use_4bit", True, "the weights of a model, not --from_scratch")
        require(pick_device(self.device).type == "cuda", "use_4bit", True, "a CUDA GPU; on this device leave it out")
        missing = find_spec("bitsandbytes") is None
        require(not missing, "use_4bit", True, "the bitsandbytes package: pip install '.[quant]'")


def size_of(text: str) -> int:
    """In bytes; 0 for what is no size.

    >>> size_of("15GiB"), size_of("1.5 GB"), size_of("much")
    (16106127360, 1500000000, 0)
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG])(i?)B", text, re.ASCII)
    return int(float(found[1]) * (1024 if found[3] else 1000) ** ("KMG".index(found[2]) + 1)) if found else 0


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer: AdamW, a learning rate schedule, gradient clipping."""

    lr: float = flag(1e-6, "peak learning rate (1e-6: TRL's GRPO; SFT needs 10 to 100 times it)")
    lr_schedule: Literal["constant", "linear", "cosine"] = flag(
        "linear", "decay to 0 after the warm-up; constant: no decay (linear: TRL)"
    )
    warmup_ratio: float = flag(0.0, "share of the steps in which the learning rate rises from 0")
    adam_beta1: float = flag(0.9, "AdamW's decay of the mean gradient (PyTorch's default)")
    adam_beta2: float = flag(0.999, "AdamW's decay of the mean squared gradient (PyTorch's default)")
    adam_epsilon: float = flag(1e-8, "AdamW's epsilon, added to the denominator (PyTorch's default)")
    weight_decay: float = flag(0.0, "AdamW's weight decay of matrices; biases and norms are never decayed")
    max_grad_norm: float = flag(1.0, "clip the norm of the gradient to this (1: TRL); 0: no clipping")
    max_skipped: int = flag(5, "the run ends after N steps in a row whose loss or gradient is not finite")
    max_steps: int = flag(0, "steps to train for; 0: see --epochs")
    epochs: float = flag(1.0, "passes over the training problems if --max_steps is 0")
    micro_batch: int = flag(
        0, "rows per forward and backward pass; auto (0): tokens, as memory allows; never changes the gradient"
    )
    memory: str = flag("", "what --micro_batch auto may plan for, such as 15GiB; empty: the memory that is free")
    parallel: Literal["auto", "ddp", "fsdp"] = flag(
        "auto", "under torchrun: each rank has all weights (ddp), a part (fsdp), or a part where memory asks for it"
    )
    offload_optimizer: str = flag(
        "", "where AdamW's moments are kept between steps: cpu (for CUDA), or a folder for memory-mapped files"
    )
    seed: int = flag(42, "random seed of weights, data order and sampling")
    deterministic: bool = flag(
        False, "CUDA: only kernels that give the same bits every time, some of them slower (a CPU's always do)"
    )

    def check(self) -> None:
        require(self.lr > 0, "lr", self.lr, "more than 0")
        require(0 <= self.warmup_ratio < 1, "warmup_ratio", self.warmup_ratio, "0 or more and below 1")
        require(self.max_steps > 0 or self.epochs > 0, "epochs", self.epochs, "more than 0 (or --max_steps)")
        require(self.adam_epsilon > 0, "adam_epsilon", self.adam_epsilon, "more than 0")
        for name in ("adam_beta1", "adam_beta2"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "0 or more and below 1")
        require(0 <= self.seed < 2**32, "seed", self.seed, "0 to 2**32 - 1")
        for name in ("max_grad_norm", "weight_decay", "max_steps"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        require(self.micro_batch >= 0, "micro_batch", self.micro_batch, "auto, or 1 or more")
        require(self.max_skipped >= 1, "max_skipped", self.max_skipped, "1 or more")
        require(not self.memory or bool(size_of(self.memory)), "memory", self.memory, "a size such as 15GiB or 800MB")
        require(not (self.memory and self.micro_batch), "memory", self.memory, "only together with --micro_batch auto")
        for name in ("offload_optimizer", "use_4bit"):
            beside = self.parallel == "fsdp" and getattr(self, name)
            require(not beside, "parallel", self.parallel, f"ddp or auto beside --{name}")
        require(
            self.offload_optimizer in ("", "cpu") or Path(self.offload_optimizer).is_dir(),
            "offload_optimizer",
            self.offload_optimizer,
            "cpu, or an existing folder on a disk",
        )


NEWEST = "newest"  # what --resume without a value means
LENGTH = ("max_steps", "epochs")  # where a run ends: --resume may move it
PASSING = ("output_dir", "resume", "overwrite", "dry_run")  # not part of what a run is, so not in its config.yaml
# What may differ when a run is continued, because it changes no number of the training.
FREE_ON_RESUME = (
    *PASSING,
    *LENGTH,
    *("push_to_hub", "private"),
    *("log_every", "eval_every", "save_every", "keep_last", "tensorboard", "track", "progress", "show_every"),
    *("record_tokens", "rank_timeout", "vllm_memory"),
    *(
        "max_skipped",
        "micro_batch",
        "memory",
        "offload_optimizer",
        "parallel",
        "keep_freed_memory",
        "reward_timeout",
        "eval_batch_size",
        "deterministic",
    ),
    "eval_samples",
    *("device", "precision"),  # where the arithmetic that `auto` finds is another, `Progress` refuses
)


@dataclass(frozen=True)
class FolderConfig:
    """Where a program writes its files."""

    output_dir: str = flag("", "the run folder; default: a new one under runs/", "--output_path")
    overwrite: bool = flag(False, "delete the run in --output_dir and start again")
    dry_run: bool = flag(False, "check everything, print what would be done, and write nothing")
    tensorboard: bool = flag(True, "write TensorBoard events")
    progress: bool = flag(True, "show progress bars")
    rank_timeout: int = flag(1800, "under torchrun: the run ends if a rank keeps the others waiting for N seconds")

    def check(self) -> None:
        require(self.rank_timeout >= 1, "rank_timeout", self.rank_timeout, "1 or more")
        self._check_folder(going_on=False)

    def _check_folder(self, going_on: bool) -> None:
        folder = Path(self.output_dir)
        found = {entry.name for entry in folder.iterdir()} if self.output_dir and folder.is_dir() else set()
        # A run that was killed in its first moments leaves these, and config.yaml alone.
        found -= {"config.yaml.unfinished", "provenance.json.unfinished"}
        a_run = found == {"config.yaml"} or found >= {"config.yaml", "provenance.json"}  # else somebody's own
        require(
            not a_run or self.overwrite or going_on,
            "output_dir",
            self.output_dir,
            "a folder that is new or empty; this one holds a run, which --overwrite deletes and --resume goes on with",
        )
        require(
            (a_run or not found) and not (self.output_dir and folder.is_file()),
            "output_dir",
            self.output_dir,
            "a folder that is new or empty, or holds a run: other files are never touched",
        )
        require(
            all(parent.is_dir() for parent in folder.parents if parent.exists()),
            "output_dir",
            self.output_dir,
            "a path inside folders; one of its parents is a file",
        )


@dataclass(frozen=True)
class RunConfig(FolderConfig):
    """A training run: what it logs and saves, and when. The run folder holds everything that it writes."""

    resume: str | None = flag(
        None,
        "continue the run in --output_dir from its newest checkpoint (start it if there is none), a RUN, or "
        "RUN/checkpoints/step-000100",
    )
    log_every: int = flag(1, "steps between log lines")
    eval_every: int = flag(0, "steps between evaluations on held-out problems; 0: at the end (GRPO: and at the start)")
    save_every: str = flag(
        "10m", "steps (100) or minutes (10m) between checkpoints, which --resume needs; 0: only when interrupted"
    )
    keep_last: int = flag(2, "keep the newest N checkpoints; 0: all")
    track: Literal["none", "wandb"] = flag(
        "none", "also track the run in Weights & Biases (extra: wandb; W&B reads WANDB_PROJECT, WANDB_MODE, ...)"
    )
    push_to_hub: str = flag(
        "", "OWNER/NAME: upload the final model to this hub repository, with a model card (needs HF_TOKEN or a login)"
    )
    private: bool = flag(False, "with --push_to_hub: make a new repository private")

    @property
    def save_interval(self) -> tuple[int, float]:
        """Steps and seconds between checkpoints; at most one of them is not 0."""
        text = self.save_every
        return (0, 60 * float(text[:-1])) if text.endswith("m") else (int(text), 0.0)

    def check(self) -> None:
        require(self.log_every >= 1, "log_every", self.log_every, "1 or more")
        for name in ("eval_every", "keep_last"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        require(
            re.fullmatch(r"\d+|\d+(\.\d+)?m", self.save_every, re.ASCII) is not None,
            "save_every",
            self.save_every,
            "a number of steps (100) or of minutes (10m)",
        )
        found = find_spec("wandb") if self.track == "wandb" else None
        # A folder named wandb, as W&B leaves them lying, is found too; but it has no file to be imported from.
        there = found is not None and found.origin is not None
        require(self.track == "none" or there, "track", self.track, "the wandb package: pip install '.[wandb]'")
        if self.resume is not None:
            require(bool(self.output_dir), "resume", self.resume, "--output_dir as well, or --resume RUN")
            require(not self.overwrite, "overwrite", True, "either --overwrite (start again) or --resume (continue)")
        self._check_folder(going_on=self.resume is not None)


def as_yaml(config: Any) -> str:
    """The resolved config as a file that `--config` accepts."""
    return str(yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))
