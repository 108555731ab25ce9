"""Model directories that cannot be trained: one line each; and a student's directory as other programs read it."""

import json
import shutil

import pytest
import torch
import train_support as support
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from distill import model_files
from distill.chat import Chat
from distill.engine.checkpoint import Checkpoint
from distill.errors import UserError
from distill.recipe import Train
from distill.train.ranks import environment, launch
from distill.train.student import model


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return support.make_student(tmp_path_factory.mktemp("student"))


@pytest.fixture
def broken(student, tmp_path):
    return shutil.copytree(student, tmp_path / "student")


def edit(student, **changes):
    path = student / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(student):
    """The one line with which training refuses a model directory."""
    settings = Train(dtype="float32")
    with pytest.raises(UserError) as caught:
        model.inspect(student, settings)
        model.load(student, settings, torch.float32)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_adapter_files_beside_the_weights(broken):
    (broken / "adapter_config.json").write_text("{}")
    assert "adapter_config.json belongs to an adapter (LoRA)" in refusal(broken)


def test_a_head_that_differs_from_the_embedding_it_is_tied_to(broken):
    tensors = load_file(broken / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    model.inspect(broken, Train())  # the same values are no contradiction
    tensors["lm_head.weight"][200, 3] += 1
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    message = refusal(broken)
    assert "lm_head.weight with values other than model.embed_tokens.weight" in message
    assert "set tie_word_embeddings to false" in message
    edit(broken, tie_word_embeddings=False)
    model.inspect(broken, Train())
    assert torch.equal(model.load(broken, Train(), torch.float32).lm_head.weight, tensors["lm_head.weight"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_weights_that_are_not_finite_are_named(broken, name, value):
    tensors = load_file(broken / "model.safetensors")
    tensors[name].view(-1)[-1] = value
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    assert f"{name} has values that are not finite numbers" in refusal(broken)


@pytest.mark.parametrize(
    "key, value",
    [
        ("layer_types", "full_attention"),
        ("layer_types", [1, 2]),
        ("layer_types", ["nothing", "full_attention"]),
        ("hidden_size", "32"),
        ("hidden_size", 0),
        ("num_attention_heads", 0),
        ("num_attention_heads", 5),
        ("rms_norm_eps", 0),
        ("rms_norm_eps", "small"),
        ("vocab_size", -1),
        ("vocab_size", None),
        ("hidden_act", "nothing"),
        ("model_type", "nothing"),
        ("model_type", 3),
        ("rope_parameters", {"rope_type": "nothing"}),
        ("rope_parameters", 7),
        ("dtype", "float7"),
        ("max_position_embeddings", "long"),
        ("bos_token_id", "first"),
    ],
)
def test_config_values_of_the_wrong_type_or_size(broken, key, value):
    edit(broken, **{key: value})
    assert "config.json" in refusal(broken)


def test_what_the_engine_does_not_compute_is_refused_before_training(broken):
    """With these embeddings the rows of a batch change one another, and the engine could not evaluate the student."""
    edit(broken, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    assert "RoPE type 'dynamic'; supported are" in refusal(broken)


@pytest.mark.parametrize("text", ["[]", "3", "{", ""])
def test_a_config_that_is_no_mapping(broken, text):
    (broken / "config.json").write_text(text)
    assert "config.json cannot be used" in refusal(broken)


@pytest.mark.parametrize("index", ["[]", "{", '{"weight_map": 3}', '{"weight_map": {"a": "absent.safetensors"}}'])
def test_an_index_that_is_damaged_or_names_a_missing_file(broken, index):
    (broken / "model.safetensors").unlink()
    (broken / "model.safetensors.index.json").write_text(index)
    assert "download" in refusal(broken)


def test_one_file_counts_beside_the_shards_of_an_earlier_model(broken):
    """For the engine, for training, also with shards of parameters, and for the count of parameters."""
    tensors, counted = load_file(broken / "model.safetensors"), model_files.parameters(broken)
    shard = "model-00001-of-00001.safetensors"
    stale = {name: tensor + 1 for name, tensor in tensors.items()} | {"an.earlier.weight": torch.ones(3)}
    save_file(stale, broken / shard, {"format": "pt"})
    (broken / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(stale, shard)}))
    settings, name = Train(dtype="float32"), "model.norm.weight"
    model.inspect(broken, settings)
    assert torch.equal(Checkpoint(broken).tensor(name, tuple(tensors[name].shape)), tensors[name])
    assert model_files.parameters(broken) == counted
    filled = model.empty(broken, settings, torch.float32).to_empty(device="cpu")
    filled.tie_weights()
    model.fill(filled, broken)
    for read in (filled, model.load(broken, settings, torch.float32)):
        held = model.stored_tensors(read)
        assert all(torch.equal(held[name], tensor) for name, tensor in tensors.items())


def test_the_students_files_are_read_by_transformers_4_and_5(student, tmp_path):
    """Old and new spellings of the same values; the plain class of the tokenizer; no path of this machine."""
    base = model.load(student, Train(), torch.float32)
    settings = Train(max_position_embeddings=4096, rope_theta=5e5)
    chat = Chat.load(student, "chatml")
    pad = chat.tokenizer.pad_token_id
    model.save(tmp_path / "out", model.empty(student, settings, torch.float32), dict(base.state_dict()), chat, "")
    assert chat.tokenizer.pad_token_id == pad
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["rope_theta"], config["rope_parameters"]["rope_theta"]) == (5e5, 5e5)
    assert config["torch_dtype"] == config["dtype"] == "float32" and "rope_scaling" not in config
    assert AutoConfig.from_pretrained(tmp_path / "out").rope_parameters["rope_theta"] == 5e5
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.float32
    tokenizer = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] in ("PreTrainedTokenizerFast", "Qwen2Tokenizer", "Qwen2TokenizerFast")
    assert not {"local_files_only", "is_local", "backend"} & tokenizer.keys()
    assert not isinstance(tokenizer.get("extra_special_tokens"), list), "transformers 4 expects a mapping there"
    assert tokenizer["additional_special_tokens"] == ["<|im_start|>"]
    assert AutoTokenizer.from_pretrained(tmp_path / "out").all_special_ids == chat.tokenizer.all_special_ids


def test_a_scaled_rope_has_its_old_name_too(tmp_path):
    path = tmp_path / "config.json"
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}
    path.write_text(json.dumps({"dtype": "bfloat16", "rope_parameters": rope}))
    model.spell_for_transformers_4(path)
    config = json.loads(path.read_text())
    assert config["rope_scaling"] == {"rope_type": "llama3", "factor": 8.0} and config["rope_theta"] == 5e5
    assert config["rope_parameters"] == rope


@pytest.mark.parametrize(
    "variables, message",
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 but not RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two', which is no number"),
        ({"WORLD_SIZE": "2", "RANK": "5"}, "WORLD_SIZE=2 but not LOCAL_RANK"),
    ],
)
def test_variables_that_torchrun_did_not_set_are_one_line(monkeypatch, variables, message):
    for name in ("WORLD_SIZE", *environment.REQUIRED):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        environment.several()


def test_a_world_size_of_one_is_one_process(monkeypatch):
    for name in ("WORLD_SIZE", *environment.REQUIRED):
        monkeypatch.delenv(name, raising=False)
    assert (environment.size(), environment.rank(), environment.several()) == (1, 0, False)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert (environment.size(), environment.rank(), environment.several()) == (1, 0, False)


@pytest.mark.parametrize(
    ("devices", "seen", "count"),
    [
        ((), 9, 1),  # torch is not asked
        (("nvidiactl", "nvidia-uvm"), 9, 1),
        (("nvidia2", "nvidia3"), 2, 2),  # in a container that got these two
        (("kfd",), 4, 4),
        (("nvidia0",), 0, 1),  # a torch without CUDA
    ],
)
def test_one_process_for_each_gpu(monkeypatch, tmp_path, devices, seen, count):
    for name in ("WORLD_SIZE", *environment.REQUIRED):
        monkeypatch.delenv(name, raising=False)
    for name in devices:
        (tmp_path / name).touch()
    monkeypatch.setattr(launch, "DEVICES", tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    assert launch.processes(Train()) == count
    four = Train(num_processes=4)
    assert launch.processes(four) == 4
    if count > 1 and count < 4:
        with pytest.raises(UserError, match=r"train\.num_processes is 4 and this machine has 2 GPUs; lower it"):
            launch.refuse_too_many(four)
    else:
        launch.refuse_too_many(four)
