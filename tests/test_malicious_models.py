"""Models made to harm: weights that point elsewhere or are missing, code and templates that a model brings along."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import eval.__main__
import sft_core.run.checkpoint
import sft_core.train
from sft_core.model.tiny import build_tiny
from tests.helpers import PEFT_IS_BEHIND
from tests.test_malicious import ASK, TRAIN, Place

pytestmark = pytest.mark.filterwarnings(PEFT_IS_BEHIND)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    model = str(build_tiny(folder / "model", seed=0))
    steps = ["--max_steps", "1", "--save_every", "1"]
    sft_core.train.main([*TRAIN, *steps, "--model", model, "--output_dir", str(folder / "run")])
    lora = ["--lora", "--lora_r", "4"]
    sft_core.train.main([*TRAIN, *steps, *lora, "--model", model, "--output_dir", str(folder / "adapted")])
    (folder / "adapted" / "final").rename(folder / "adapter")
    for run in ("run", "adapted"):
        shutil.rmtree(folder / run / "final", ignore_errors=True)  # so that the run is not finished
    return folder


@pytest.fixture
def place(sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Place:
    questions: list[Any] = []
    monkeypatch.setattr("builtins.input", lambda *args: questions.append(args) or "n")
    shutil.copytree(sound, tmp_path, dirs_exist_ok=True)
    description = tmp_path / "adapter" / "adapter_config.json"
    text = description.read_text()
    assert str(sound / "model") in text
    description.write_text(text.replace(str(sound / "model"), str(tmp_path / "model")))
    return Place(tmp_path, capsys, questions)


# --- an index of weights


@pytest.mark.parametrize(
    "named",
    ["pytorch_model.bin", "../outside.safetensors", "/etc/passwd", "sub/x.safetensors", "none.safetensors", 7, None],
)
def test_an_index_that_points_elsewhere_is_refused(place: Place, named: Any) -> None:
    model = place.path / "model"
    shutil.copy(model / "model.safetensors", place.path / "outside.safetensors")
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(place.pickles()[1])
    index = {"metadata": {}, "weight_map": {"model.norm.weight": named}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    line = place.asked("--model", str(model))
    assert str(model) in line and ("only *.safetensors beside it" in line or "holds no none.safetensors" in line)


@pytest.mark.parametrize("text", ["[]", "{}", '{"weight_map": []}', "{", "\x00"])
def test_a_malformed_index_is_refused(place: Place, text: str) -> None:
    model = place.path / "model"
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json" in place.asked("--model", str(model))


def test_a_model_in_shards_is_read(place: Place) -> None:
    """Without this the refusals above could be of any index."""
    model = place.path / "model"
    loaded = AutoModelForCausalLM.from_pretrained(model)
    (model / "model.safetensors").unlink()
    loaded.save_pretrained(model, max_shard_size="500KB")
    assert (model / "model.safetensors.index.json").is_file() and not (model / "model.safetensors").exists()
    assert place.asked("--model", str(model)) == ""


def test_safetensors_that_are_cut_short_or_of_another_model_are_refused(place: Place) -> None:
    weights = place.path / "model" / "model.safetensors"
    whole = weights.read_bytes()
    for length in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        weights.write_bytes(whole[:length])
        assert "model.safetensors: cannot be loaded" in place.asked("--model", str(weights.parent))
    save_file({"model.norm.weight": torch.zeros(5)}, weights, metadata={"format": "pt"})
    assert f"--model {weights.parent}: cannot be loaded" in place.asked("--model", str(weights.parent))


def without(weights: Path, *names: str) -> None:
    """Take these tensors out of a file."""
    held = load_file(weights)
    save_file({name: held[name] for name in held if name not in names}, weights, metadata={"format": "pt"})


def test_weights_that_lack_a_tensor_are_refused_and_never_filled_at_random(place: Place) -> None:
    """The libraries make the missing ones up and warn; a run would train, or an evaluation ask, half a stranger."""
    model, adapter = place.path / "model", place.path / "adapter"
    norm, tied = "model.norm.weight", ["lm_head.weight", "model.embed_tokens.weight"]
    for folder, file, names in (
        (model, "model.safetensors", [norm]),
        (model, "model.safetensors", [*tied, norm]),
        (adapter, "adapter_model.safetensors", [sorted(load_file(adapter / "adapter_model.safetensors"))[0]]),
    ):
        kept = (folder / file).read_bytes()
        without(folder / file, *names)
        line = place.asked("--model", str(folder))
        assert str(folder) in line and line.endswith(f"the weights lack {', '.join(names)})"), line
        (folder / file).write_bytes(kept)
    every = sorted(load_file(model / "model.safetensors"))[1:]
    without(model / "model.safetensors", *every)
    assert f"the weights lack {', '.join(every[:3])} and {len(every) - 3} more" in place.asked("--model", str(model))


@pytest.mark.parametrize("run", ["run", "adapted"])
def test_a_checkpoint_that_lacks_a_tensor_is_refused_whatever_its_manifest_says(place: Place, run: str) -> None:
    [checkpoint] = (place.path / run / "checkpoints").iterdir()
    weights = checkpoint / ("model.safetensors" if run == "run" else "adapter_model.safetensors")
    name = sorted(load_file(weights))[-1]
    without(weights, name)
    (checkpoint / "manifest.json").unlink()
    sft_core.run.checkpoint._write_manifest(checkpoint)
    line = place.ended(sft_core.train.main, "--resume", str(place.path / run))
    assert checkpoint.name in line and line.endswith(f"the weights lack {name})")


def test_tied_weights_are_not_lacking_and_further_ones_are_left_out_with_a_word(place: Place) -> None:
    weights = place.path / "model" / "model.safetensors"
    held = load_file(weights)
    assert "lm_head.weight" not in held
    save_file({**held, "head.of.another": torch.zeros(3)}, weights, metadata={"format": "pt"})
    place.capsys.readouterr()
    eval.__main__.main([*ASK, "--model", str(weights.parent), "--output_dir", str(place.path / "answers")])
    said = place.capsys.readouterr().err
    assert said == f"{weights.parent}: not a part of the model, and left out: head.of.another\n"


# --- code that a model brings along


def edited(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_the_code_of_a_model_is_not_run(place: Place) -> None:
    model = place.path / "model"
    for name in ("modeling_evil", "configuration_evil", "tokenization_evil", "custom_generate/generate"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / f"{name}.py").write_text(place.code())
    maps = {"AutoConfig": "configuration_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}
    maps |= {"AutoModel": "modeling_evil.Evil"}
    edited(model / "config.json", auto_map=maps)
    assert place.asked("--model", str(model)) == ""  # the model's type is known here: its own code is not needed
    edited(model / "config.json", architectures=["Evil"])
    place.asked("--model", str(model))
    place.asked("--model", str(model), "--from_scratch")
    edited(model / "config.json", model_type="evil")
    line = place.asked("--model", str(model))
    assert str(model) in line and "no model known here" in line


@pytest.mark.parametrize("own", ["Qwen2Tokenizer", "EvilTokenizer"])
def test_the_code_of_a_tokenizer_is_not_run(place: Place, own: str) -> None:
    for folder in (place.path / "model", place.path / "adapter"):
        (folder / "tokenization_evil.py").write_text(place.code())
        auto_map = {"AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"]}
        edited(folder / "tokenizer_config.json", auto_map=auto_map, tokenizer_class=own)
        line = place.asked("--model", str(folder))
        assert not line or str(folder) in line


@pytest.mark.parametrize(
    "entry",
    [
        {"attn_implementation": "evil/kernel"},
        {"_attn_implementation": "evil/kernel"},
        {"transformers_weights": "pytorch_model.bin"},
        {"dtype": "evil"},
    ],
)
def test_a_config_that_names_kernels_weights_or_nonsense_is_refused(place: Place, entry: dict[str, Any]) -> None:
    model = place.path / "model"
    (model / "pytorch_model.bin").write_bytes(place.pickles()[1])
    edited(model / "config.json", **entry)
    line = place.asked("--model", str(model))
    assert str(model) in line and ("dtype" in entry or "names a kernel or a file of weights" in line)


def test_an_adapter_that_names_a_module_to_import_is_refused(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    (place.path / "evil_core.py").write_text(place.code())
    monkeypatch.syspath_prepend(place.path)
    adapter = place.path / "adapter"
    edited(adapter / "adapter_config.json", megatron_config={"a": 1}, megatron_core="evil_core")
    assert f"{adapter}/adapter_config.json: names a module to import" in place.asked("--model", str(adapter))


# --- templates

ESCAPES = [
    "{{ cycler.__init__.__globals__.os.mkdir('CANARY') }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.append('x') }}",
    "{{ raise_exception('not\\nthis') }}",
    "{% for message in messages %}{{ message['content'] + 1 }}{% endfor %}",
    "{% for",
    "{{ namespace.__init__.__globals__['__builtins__']['__import__']('os').mkdir('CANARY') }}",
    "{% for i in range(999999999) %}x{% endfor %}",
    "{% include '/etc/passwd' %}",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_a_chat_template_that_breaks_out_or_fails_is_one_line(place: Place, template: str) -> None:
    for folder in (place.path / "model", place.path / "adapter"):
        (folder / "chat_template.jinja").write_text(template.replace("CANARY", str(place.canary)))
        assert "chat template" in place.asked("--model", str(folder))


# --- our own lines


def test_no_line_of_ours_opens_a_pickle_or_trusts_code() -> None:
    root = Path(__file__).parent.parent
    for package in ("rewards", "sft_core", "eval", "grpo_core"):
        for path in (root / package).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            for word in ("pickle.", "import pickle", "torch.load(", "torch.save(", "joblib", "trust_remote_code=True"):
                assert word not in text, f"{path.name}: {word}"
            for call in ("from_config(", "from_pretrained("):
                for after in text.split(f"AutoModelForCausalLM.{call}")[1:]:
                    assert "trust_remote_code=False" in after[:200] or "**options" in after[:100], path.name
