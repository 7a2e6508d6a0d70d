"""The interfaces of other libraries that this project relies on, by name: a release that changes one fails here, with
the file that has to follow."""

from __future__ import annotations

import importlib
import inspect
from operator import attrgetter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# module:object: the parameters that are given by name (none: it must exist), and the file that does so.
USED = {
    "transformers:AutoModelForCausalLM.from_pretrained": ("", "sft_core/model/policy.py"),
    "transformers:AutoModelForCausalLM.from_config": ("", "sft_core/model/policy.py"),
    "transformers:GenerationMixin.generate": (
        "generation_config logits_processor stopping_criteria streamer",
        "eval/sampling.py",
    ),
    "transformers:DynamicCache.__init__": ("config", "eval/going.py"),
    "transformers:DynamicCache.batch_select_indices": ("", "eval/going.py"),
    "transformers:LogitsProcessor.__call__": ("input_ids scores", "eval/draw.py"),
    "transformers:TopKLogitsWarper.__init__": ("", "eval/draw.py"),
    "transformers:TopPLogitsWarper.__init__": ("", "eval/draw.py"),
    "transformers:MinPLogitsWarper.__init__": ("", "eval/draw.py"),
    "transformers.cache_utils:DynamicLayer.lazy_initialization": ("key_states value_states", "eval/cache.py"),
    "transformers.cache_utils:DynamicLayer.update": ("key_states value_states", "eval/cache.py"),
    "transformers:StaticCache.__init__": ("config max_cache_len", "eval/decoding/compiled.py"),
    "transformers:CompileConfig.__init__": ("mode dynamic", "eval/decoding/compiled.py"),
    "transformers:CompileConfig._compile_all_devices": ("", "eval/decoding/compiled.py"),
    "transformers.cache_utils:StaticLayer.lazy_initialization": (
        "key_states value_states",
        "eval/decoding/compiled.py",
    ),
    "transformers.cache_utils:StaticLayer.update": ("key_states value_states", "eval/decoding/compiled.py"),
    "transformers:PreTrainedModel._can_compile_fullgraph": ("", "sft_core/model/decoding.py"),
    "transformers:GenerationMixin.init_continuous_batching": ("", "eval/decoding/paged.py"),
    "transformers.generation.continuous_batching:ContinuousBatchingManager.add_request": ("", "eval/decoding/paged.py"),
    "transformers.generation.continuous_batching:ContinuousBatchingManager.stop": (
        "block hard_stop",
        "eval/decoding/paged.py",
    ),
    "transformers:StoppingCriteria.__call__": ("input_ids scores", "eval/sampling.py"),
    "transformers:PreTrainedModel.get_output_embeddings": ("", "sft_core/model/backbone.py"),
    "transformers:PreTrainedModel.base_model_prefix": ("", "sft_core/model/backbone.py"),
    "transformers:PreTrainedConfig.get_text_config": ("", "sft_core/model/policy.py"),
    "transformers:PreTrainedConfig.attribute_map": ("", "sft_core/model/segments.py"),
    "transformers:AttentionInterface.register": ("", "sft_core/model/segments.py"),
    "transformers:AttentionMaskInterface.register": ("", "sft_core/model/segments.py"),
    "transformers:PreTrainedModel._supports_attention_backend": ("", "sft_core/model/segments.py"),
    "transformers.masking_utils:causal_mask_function": ("", "sft_core/model/segments.py"),
    "transformers.masking_utils:sdpa_mask": ("mask_function device", "sft_core/model/segments.py"),
    "transformers.integrations.sdpa_attention:sdpa_attention_forward": ("is_causal", "sft_core/model/segments.py"),
    "transformers:PreTrainedTokenizerBase.apply_chat_template": (
        "add_generation_prompt tokenize return_dict",
        "sft_core/text/prompts.py",
    ),
    "transformers:Qwen2ForCausalLM.forward": (
        "input_ids attention_mask position_ids past_key_values use_cache",
        "sft_core/learn/logprobs.py",
    ),
    "transformers.pytorch_utils:Conv1D": ("", "sft_core/model/half.py"),
    "transformers.models.auto.modeling_auto:MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": ("", "benchmarks/families/__main__.py"),
    "transformers.models.auto.configuration_auto:CONFIG_MAPPING": ("", "benchmarks/families/build.py"),
    "peft:PeftModel.set_adapter": ("inference_mode", "grpo_core/reference.py"),
    "peft:PeftModel.get_base_model": ("", "sft_core/model/backbone.py"),
    "peft:LoraConfig.__init__": ("target_modules exclude_modules task_type", "sft_core/model/policy.py"),
    "torch.utils.checkpoint:checkpoint": ("use_reentrant", "sft_core/learn/logprobs.py"),
}


@pytest.mark.parametrize("interface", USED)
def test_an_interface_that_is_used_is_there_with_the_parameters_that_it_is_given(interface: str) -> None:
    names, file = USED[interface]
    module, path = interface.split(":")
    found = attrgetter(path)(importlib.import_module(module))
    if names:
        missing = set(names.split()) - set(inspect.signature(found).parameters)
        assert not missing, f"{file} gives {interface} {sorted(missing)}, which it no longer has"


@pytest.mark.parametrize("interface", USED)
def test_the_file_that_is_named_uses_the_interface(interface: str) -> None:
    *owner, name = interface.split(":")[1].split(".")
    names, file = USED[interface]
    words = names.split() if name == "forward" else [owner[0] if name.startswith("__") else name]
    text = (ROOT / file).read_text()
    assert [word for word in words if word not in text and word != "past_key_values"] == []


def test_generate_takes_the_token_with_the_highest_score_of_those_that_a_logits_processor_gives_back() -> None:
    """So `Draw` can mark the one that it drew (eval/draw.py)."""
    import torch
    from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

    from tests.helpers import tiny_policy

    class Marked(LogitsProcessor):  # type: ignore[misc]
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            assert scores.dtype == torch.float32
            marked = torch.zeros_like(scores)
            marked[:, 10 + input_ids.shape[1]] = 1.0
            return marked

    policy = tiny_policy()
    ids = policy.model.generate(
        torch.tensor([[5, 6, 7]]),
        generation_config=GenerationConfig(max_new_tokens=2, pad_token_id=policy.pad_id),
        logits_processor=LogitsProcessorList([Marked()]),
    )
    assert ids.tolist() == [[5, 6, 7, 13, 14]]
