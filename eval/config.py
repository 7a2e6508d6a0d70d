"""Settings of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass

from sft_core.config import FolderConfig, ModelConfig, flag
from sft_core.errors import require
from sft_core.text.config import TaskConfig


@dataclass(frozen=True)
class EvalConfig(FolderConfig, ModelConfig, TaskConfig):
    """Greedy evaluation, with samples as well if --samples is given."""

    batch_size: int = flag(32, "completions generated at a time")
    samples: int = flag(0, "samples per problem in addition to the greedy answer, for pass@k and maj@k; 0: none")
    temperature: float = flag(1.0, "sampling temperature of --samples (1: GRPO's default)")
    seed: int = flag(42, "random seed of the samples")
    max_completion_tokens: int = flag(256, "longest completion in tokens; one that reaches it counts as truncated")
    tensorboard: bool = flag(False, "write TensorBoard events")

    def check(self) -> None:
        for part in (TaskConfig, ModelConfig, FolderConfig):
            part.check(self)
        require(self.batch_size >= 1, "batch_size", self.batch_size, "1 or more")
        require(self.max_completion_tokens >= 1, "max_completion_tokens", self.max_completion_tokens, "1 or more")
        require(self.samples >= 0, "samples", self.samples, "0 or more")
        require(
            self.temperature > 0, "temperature", self.temperature, "more than 0: the greedy answer is evaluated anyway"
        )
        require(0 <= self.seed < 2**32, "seed", self.seed, "0 to 2**32 - 1")
        require(
            self.answers != "none", "answer_type", "none", "a type of answers: without them there is nothing to compare"
        )
        require(self.model != "tiny", "model", self.model, "a trained model, such as the final/ folder of a run")
        require(
            not self.endless or self.eval_problems > 0,
            "eval_problems",
            self.eval_problems,
            f"more than 0: the {self.task} task has no end",
        )
