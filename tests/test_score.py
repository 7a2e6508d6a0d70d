"""From the names of reward functions to one number a row; and the same functions inside TRL."""

from __future__ import annotations

import math
import re
import sys

import pytest

from rewards import (
    REWARDS,
    Reward,
    RewardError,
    load_reward,
    load_rewards,
    score,
)
from tests.test_rewards import TEXT_REWARDS, xml

# --- from names to one number a row ------------------------------------------------------------------------------


@pytest.fixture
def write_module(tmp_path, monkeypatch):
    """Writes an importable module and forgets it after the test."""
    monkeypatch.syspath_prepend(tmp_path)
    names = []

    def write(name, source):
        (tmp_path / f"{name}.py").write_text(source, encoding="utf-8")
        names.append(name)

    yield write
    for name in names:
        sys.modules.pop(name, None)


MY_REWARD = "def my_reward(prompts, completions, answer, **columns):\n    return [len(text) for text in completions]\n"


def test_a_reward_of_ones_own_is_loaded_by_module_and_name(write_module):
    write_module("my_module", MY_REWARD)
    rewards = load_rewards(["numeric_reward_func", "my_module:my_reward"], [1.0, 0.01])
    assert [reward.name for reward in rewards] == ["numeric_reward_func", "my_reward"]
    scores = score(rewards, ["?", "?"], ["#### 4", "four"], {"answer": ["4", "4"]})
    assert scores.by_function == {"numeric_reward_func": [1.0, 0.0], "my_reward": [6.0, 4.0]}
    assert scores.total == pytest.approx([1.06, 0.04])


def test_weights_default_to_one_and_multiply_only_the_total():
    names = ["correctness_reward_func", "int_reward_func"]
    for weights in (None, []):
        assert [reward.weight for reward in load_rewards(names, weights)] == [1.0, 1.0]
    completions = [xml("4"), xml("5"), "4"]
    scores = score(load_rewards(names, [0.5, -2]), ["?"] * 3, completions, {"answer": ["4"] * 3})
    assert scores.total == [0.0, -1.0, 0.0]
    assert scores.by_function == {"correctness_reward_func": [2.0, 0.0, 0.0], "int_reward_func": [0.5, 0.5, 0.0]}


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("corectness_reward_func", "correctness_reward_func"),
        ("numeric", "numeric_reward_func"),
        ("int", "int_reward_func"),
        ("xmlcount_reward", "xmlcount_reward_func"),
    ],
)
def test_an_unknown_reward_is_refused_with_the_nearest_known_name(name, nearest):
    with pytest.raises(ValueError, match=f"--rewards '{name}': no such .*nearest known name is {nearest}") as caught:
        load_reward(name)
    assert all(known in str(caught.value) for known in [*REWARDS, "my_module:my_reward"])


@pytest.mark.parametrize("name", ["", ":", "my_module:", ":my_reward", "a:b:c", "..m:f", "a/b:f", " "])
def test_what_is_not_a_module_and_a_name_is_refused_before_any_import(name):
    with pytest.raises(ValueError, match="--rewards '.*': no such reward function.*my_module:my_reward"):
        load_reward(name)


def test_a_module_that_cannot_be_imported_is_named(write_module):
    with pytest.raises(ValueError, match="--rewards 'no_such_module:f': cannot import no_such_module .*PYTHONPATH"):
        load_reward("no_such_module:f")
    write_module("needs_more", "import no_such_dependency")
    with pytest.raises(ValueError, match="cannot import needs_more .*no_such_dependency"):
        load_reward("needs_more:f")


@pytest.mark.parametrize(("source", "error"), [("1 / 0", ZeroDivisionError), ("from math import f", ImportError)])
def test_an_error_inside_ones_own_module_keeps_its_traceback(write_module, source, error):
    write_module("broken_module", source)
    with pytest.raises(error):
        load_reward("broken_module:f")


def test_a_function_that_the_module_lacks_is_refused_with_the_nearest_it_has(write_module):
    write_module("my_module", MY_REWARD + "constant = 3\n")
    with pytest.raises(ValueError, match="my_rewrad does not exist in module my_module; the nearest .* my_reward"):
        load_reward("my_module:my_rewrad")
    with pytest.raises(ValueError, match="constant is 3, not a function in module my_module"):
        load_reward("my_module:constant")


@pytest.mark.parametrize("weights", [[1.0], [1.0, 1.0, 1.0], [1.0, math.nan], [math.inf, 1.0]])
def test_weights_that_do_not_fit_are_refused(weights):
    with pytest.raises(ValueError, match="--reward_weights: "):
        load_rewards(["int_reward_func", "numeric_reward_func"], weights)


def test_no_reward_at_all_is_refused():
    with pytest.raises(ValueError, match="--rewards: no reward function given"):
        load_rewards([], None)


@pytest.mark.parametrize("twin", ["int_reward_func", "my_module:int_reward_func"])
def test_two_rewards_of_one_name_are_refused(write_module, twin):
    write_module("my_module", MY_REWARD.replace("my_reward", "int_reward_func"))
    with pytest.raises(ValueError, match="--rewards 'int_reward_func': two functions called int_reward_func"):
        load_rewards(["int_reward_func", twin], None)


def one(values, name="mine", weight=1.0):
    """A reward that returns these values whatever it is asked."""
    return Reward(name, lambda prompts, completions, **columns: values, weight)


def test_none_leaves_a_function_out_of_its_row_and_all_none_is_nan():
    rewards = [one([1.0, None, None], "a", 2.0), one([1, 3, None], "b", 10.0)]
    scores = score(rewards, ["?"] * 3, ["x"] * 3, {})
    assert scores.total[:2] == [12.0, 30.0] and math.isnan(scores.total[2])
    assert scores.by_function == {"a": [1.0, None, None], "b": [1.0, 3.0, None]}


def test_whatever_float_takes_is_a_value():
    numpy, torch = pytest.importorskip("numpy"), pytest.importorskip("torch")
    values = [1, True, numpy.float32(0.5), numpy.int64(2), torch.tensor(0.25), torch.tensor([4.0])]
    scores = score([one(values)], ["?"] * 6, ["x"] * 6, {})
    assert scores.total == [1.0, 1.0, 0.5, 2.0, 0.25, 4.0]
    assert {type(value) for value in scores.by_function["mine"]} == {float}
    assert score([one(torch.tensor([1.0, 2.0]))], ["?"] * 2, ["x"] * 2, {}).total == [1.0, 2.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, "1.5", b"1.5", [1.0, 2.0], {}, 1j, 10**400])
def test_a_value_that_is_no_finite_number_is_refused_with_its_row(bad):
    found = re.escape(repr(bad)[:20])
    with pytest.raises(ValueError, match=f"reward function mine: returned {found}.* for row 1; .*finite number"):
        score([one([0.0, bad])], ["?"] * 2, ["x"] * 2, {})


def test_a_tensor_of_several_elements_is_not_a_value():
    torch = pytest.importorskip("torch")
    with pytest.raises(ValueError, match="reward function mine: .* for row 0"):
        score([one(torch.zeros(2, 2))], ["?"] * 2, ["x"] * 2, {})


@pytest.mark.parametrize("count", [0, 1, 3])
def test_the_wrong_number_of_values_is_refused(count):
    with pytest.raises(ValueError, match=f"reward function mine: returned {count} values for 2 completions"):
        score([one([0.0] * count)], ["?"] * 2, ["x"] * 2, {})


@pytest.mark.parametrize("returned", [None, 1.0])
def test_a_function_that_returns_no_list_is_refused(returned):
    with pytest.raises(ValueError, match=f"reward function mine: returned {returned}, not a list of 2 values"):
        score([one(returned)], ["?"] * 2, ["x"] * 2, {})


def test_a_column_that_the_data_lacks_is_named():
    with pytest.raises(ValueError, match="numeric_reward_func: missing .*'answer'.* here question;"):
        score(load_rewards(["numeric_reward_func"]), ["?"], ["#### 4"], {"question": ["?"]})
    with pytest.raises(ValueError, match="reward function f: .*'answer'.*columns"):
        score([Reward("f", lambda prompts, completions: [0.0])], ["?"], ["x"], {"answer": ["4"]})


def test_a_type_error_inside_a_reward_is_not_mistaken_for_a_missing_column():
    with pytest.raises(RewardError, match="f: raised TypeError: unsupported operand"):
        score([Reward("f", lambda prompts, completions, **columns: [1 + "1"])], ["?"], ["x"], {})


def test_rows_and_columns_of_different_lengths_are_a_bug_and_not_a_batch():
    for prompts, columns in ((["?"], {}), (["?", "?"], {"answer": ["4"]})):
        with pytest.raises(AssertionError):
            score([one([0.0, 0.0])], prompts, ["x", "x"], columns)


# --- inside TRL --------------------------------------------------------------------------------------------------

# What the model below writes, prompt by prompt: the first token is the prompt, the rest its completion.
SPEECHES = [
    ["xml?", "<reasoning>\n", "2 + 2\nis 4", "\n</reasoning>\n<answer>\n", "4", "\n</answer>\n", "<eos>"],
    ["hash?", "3 + 3\n", "#### 6.0", "<eos>"],
]


def tokenizer_and_model_that_recite_the_speeches():
    """A Qwen2 whose next token depends on the last one alone: embeddings are one-hot, and the layers add nothing.

    A random model never hits the format, and comparing zeros with zeros would prove little.
    """
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(["<eos>", *SPEECHES[0], *SPEECHES[1]]))}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<eos>"))
    backend.decoder = tokenizers.decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>", clean_up_tokenization_spaces=False
    )
    config = transformers.Qwen2Config(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = transformers.Qwen2ForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(16))
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        for speech in SPEECHES:
            for token, following in zip(speech, speech[1:], strict=False):
                model.lm_head.weight[vocabulary[following], vocabulary[token]] = 100.0
    return tokenizer, model


@pytest.mark.trl
# TRL 1.16.0 uses names that transformers 5.23 renamed.
@pytest.mark.filterwarnings(
    "ignore:`(is_)?gradient_checkpointing(_enable|_disable)?` is deprecated and will be removed in v6:FutureWarning"
)
def test_every_reward_goes_into_trl_unchanged_and_is_logged_there_as_computed_here(tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    tokenizer, model = tokenizer_and_model_that_recite_the_speeches()
    said = []

    def witness(prompts, completions, answer, **columns):
        said.extend(zip(prompts, completions, answer, strict=True))
        return [None] * len(prompts)

    trainer = trl.GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=[*TEXT_REWARDS.values(), witness],
        train_dataset=datasets.Dataset.from_dict({"prompt": ["xml?", "hash?"], "answer": ["4", "3 + 3\n#### 6"]}),
        args=trl.GRPOConfig(
            output_dir=str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=4,
            num_generations=2,
            max_completion_length=8,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
        ),
    )
    trainer.train()

    prompts, completions, answers = map(list, zip(*said, strict=True))
    assert sorted(completions) == sorted(["".join(speech[1:-1]) for speech in SPEECHES] * 2)
    [log] = [entry for entry in trainer.state.log_history if "reward" in entry]
    for name, function in TEXT_REWARDS.items():
        mean = sum(function(prompts=prompts, completions=completions, answer=answers)) / len(completions)
        assert log[f"rewards/{name}/mean"] == pytest.approx(mean)
        assert mean > 0
    scores = score(load_rewards(list(TEXT_REWARDS)), prompts, completions, {"answer": answers})
    assert log["reward"] == pytest.approx(sum(scores.total) / len(completions))
