"""What is this text worth? Strings in, floats out: answer extraction, reward functions, their weighted sum."""

from rewards.call import RewardError, RewardFunction, TrainerState
from rewards.combine import REWARDS, Reward, Scores, check_signatures, load_reward, load_rewards, score
from rewards.extract import (
    choice_letter,
    extract_hash_answer,
    extract_xml_answer,
    gold_answer,
    is_integer,
    last_number,
    parse_number,
    same_answer,
    same_number,
    words,
)
from rewards.functions import (
    Completion,
    completion_text,
    correctness_reward_func,
    int_reward_func,
    numeric_reward_func,
    soft_format_reward_func,
    soft_overlong_reward_func,
    strict_format_reward_func,
    xmlcount_reward_func,
)

__all__ = [
    "REWARDS",
    "Completion",
    "Reward",
    "RewardError",
    "RewardFunction",
    "Scores",
    "TrainerState",
    "check_signatures",
    "choice_letter",
    "completion_text",
    "correctness_reward_func",
    "extract_hash_answer",
    "extract_xml_answer",
    "gold_answer",
    "int_reward_func",
    "is_integer",
    "last_number",
    "load_reward",
    "load_rewards",
    "numeric_reward_func",
    "parse_number",
    "same_answer",
    "same_number",
    "score",
    "soft_format_reward_func",
    "soft_overlong_reward_func",
    "strict_format_reward_func",
    "words",
    "xmlcount_reward_func",
]
