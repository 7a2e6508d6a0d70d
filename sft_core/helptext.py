"""What --help shows: the flags that people set most, or with `--help all` every flag, by what it is about."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from transformers import HfArgumentParser

from rewards.terminal import ALL, Arguments, no_such_flag
from sft_core.names import known_names

# The flags of all programs by what they are about. Plain --help shows those before the bar.
GROUPS = {
    "data": "task question questions | config_name train_split eval_split question_column answer_column answer_type "
    "prompt_format eval_file difficulty max_samples eval_problems long_prompts max_prompt_tokens shots system_prompt "
    "chat_template_kwargs worked_share slips",
    "model": "model lora | adapter_path from_scratch config_overrides lora_r lora_alpha lora_dropout lora_targets "
    "device precision merge sft_preset",
    "sampling": "prompts_per_step group_size max_completion_tokens samples | temperature top_k top_p min_p "
    "dynamic_sampling eval_samples vllm vllm_memory sampler_mode sampler_cap",
    "objective": "rewards recipe loss beta | reward_format reward_weights reward_timeout reward_aggregation "
    "scale_rewards overlong_buffer ratio_level token_loss aggregation mu epsilon_low epsilon_high delta "
    "sapo_temperature_pos sapo_temperature_neg vespo_k_pos vespo_lambda_pos vespo_k_neg vespo_lambda_neg "
    "kl_correction ref_sync_every ref_sync_mix mask_truncated top_entropy entropy_coef off_policy_threshold "
    "shuffle_rewards",
    "optimizer": "lr max_steps epochs batch_size | lr_schedule warmup_ratio adam_beta1 adam_beta2 adam_epsilon "
    "weight_decay max_grad_norm max_skipped seed deterministic",
    "memory and speed": "micro_batch gradient_checkpointing | memory parallel offload_optimizer use_4bit "
    "eval_batch_size share_prompts logit_chunk rows_leave decoding half_copies "
    "keep_freed_memory",
    "run folder": "output output_dir append_to zip resume dry_run | push_to_hub private overwrite log_every eval_every "
    "save_every keep_last tensorboard track progress record_tokens show_every rank_timeout",
}
FEW = 15  # a program with no more flags than these shows them all


def names_of(title: str) -> tuple[list[str], list[str]]:
    """A group's fields: those that plain --help shows, and the others."""
    often, _, others = GROUPS[title].partition("|")
    return often.split(), others.split()


class Parser(Arguments, HfArgumentParser):
    """A config class's flags, with errors of one line. `others`: the parsers that further flags are handed on to."""

    def __init__(self, *args: Any, others: Sequence[Parser] = (), **options: Any) -> None:
        self.others = others
        super().__init__(*args, **options)

    def format_help(self) -> str:
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        formatter.add_text(self.description)
        for title, actions in self._sections():
            formatter.start_section(title)
            formatter.add_arguments(actions)
            formatter.end_section()
        formatter.add_text(self.epilog)
        if not self.every:
            formatter.add_text(ALL)
        return formatter.format_help()

    def _sections(self) -> Iterator[tuple[str, list[argparse.Action]]]:
        """Flags by group, the program's own before those that it hands on; each once."""
        fields = {name for title in GROUPS for part in names_of(title) for name in part}
        own = [action for action in self._actions if self.others or action.dest not in fields]
        grouped = {} if self.others else _told(self)
        often = [
            name
            for title in GROUPS
            for name in (names_of(title)[0] if len(grouped) > FEW else sum(names_of(title), []))
        ]
        if not self.every:
            yield "flags", [*own, *(grouped[name] for name in often if name in grouped)]
            return
        yield "flags", own
        for other in self.others:
            grouped = _told(other) | grouped
        taken = {action.dest for action in own}
        for title in GROUPS:
            names = [name for part in names_of(title) for name in part if name in grouped and name not in taken]
            yield title, [grouped[name] for name in names]

    def unknown(self, flags: Sequence[str]) -> NoReturn:
        fields = [action.dest for action in self._actions]
        flag = next((flag for flag in flags if flag.startswith("--")), flags[0])
        no_such_flag(flag, [*self.flags, *(f"--{name}" for name in known_names(fields))])


def _told(parser: Parser) -> dict[str, argparse.Action]:
    """The action of each field; what turns a switch off is told beside the switch."""
    return {action.dest: action for action in parser._actions if action.help != argparse.SUPPRESS}


class Help(argparse.RawDescriptionHelpFormatter):
    """One spelling of each flag, what turns a switch off beside it, and defaults where there is something to say."""

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, **{"max_help_position": 32, **options})

    def _format_action_invocation(self, action: argparse.Action) -> str:
        flags = [flag for flag in action.option_strings if "-" not in flag.lstrip("-")]
        if action.const is True:
            return ", ".join([*flags, *(f"--no_{action.dest}" for _ in flags[:1] if action.default is True)])
        values = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{', '.join(flags or action.option_strings)} {values}".rstrip()

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        letters: dict[Any, str] = {int: "N", float: "X", Path: "FILE"}
        return letters.get(action.type, super()._get_default_metavar_for_optional(action))

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        several = action.nargs == "+" and isinstance(action.option_strings, list) and action.option_strings
        return f"{default_metavar} ..." if several else super()._format_args(action, default_metavar)

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        if default is None or default is False or default in ("", [], argparse.SUPPRESS) or "default:" in text:
            return text
        default = " ".join(map(str, default)) if isinstance(default, list) else default
        return text + f" (default: {str(default).replace('%', '%%')})"
