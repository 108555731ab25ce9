"""Gemma 4 as a student: its template, a training of a tiny one from cards to scores, and the memory that it is said to
take."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_support as support
from chat_support import ANSWERED, QUESTION
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from distill.catalog import load_student
from distill.chat import Chat
from distill.engine import Engine, EngineOptions
from distill.errors import UserError
from distill.recipe import Train
from distill.train.ranks import model_size
from distill.train.rollouts.memory import _cached
from distill.train.student import methods

# What is published, in the fewest words: turns, the channel of thoughts, which is stripped from answers, and, in the
# large sizes, an empty one in front of an answer without thinking.
SMALL_SIZES = (
    "{%- macro strip(text) -%}{%- set ns = namespace(out='') -%}{%- for part in text.split('<channel|>') -%}"
    "{%- set ns.out = ns.out + part.split('<|channel>')[0] -%}{%- endfor -%}{{- ns.out | trim -}}{%- endmacro -%}"
    "{{ bos_token }}{%- if enable_thinking is defined and enable_thinking -%}"
    "{{ '<|turn>system\n<|think|>\n<turn|>\n' }}{%- endif -%}"
    "{%- for m in messages -%}{%- set role = 'model' if m['role'] == 'assistant' else m['role'] -%}"
    "{{ '<|turn>' + role + '\n' }}{%- if role == 'model' -%}{{ strip(m['content']) }}"
    "{%- else -%}{{ m['content'] | trim }}{%- endif -%}{{ '<turn|>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|turn>model\n' }}{%- endif -%}"
)
LARGE_SIZES = SMALL_SIZES.replace(
    "{{ '<|turn>model\n' }}{%- endif -%}",
    "{{ '<|turn>model\n' }}{%- if not enable_thinking | default(false) -%}{{ '<|channel>thought\n<channel|>' }}"
    "{%- endif -%}{%- endif -%}",
)
CHANNEL = "<|channel>thought\ntwo\n<channel|>2"


def tokenizer(directory: Path, template: str | None) -> Path:
    """A byte-level tokenizer with Gemma 4's control tokens; its end token is not the one that ends a turn."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    plain.add_special_tokens(["<pad>", "<eos>", "<bos>", "<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|think|>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<eos>", bos_token="<bos>", pad_token="<pad>")
    fast.chat_template = template
    fast.save_pretrained(directory)
    (directory / "generation_config.json").write_text('{"eos_token_id": [257, 260]}')
    return directory


@pytest.mark.parametrize("template", [SMALL_SIZES, "gemma"])
def test_a_row_keeps_the_reasoning_and_the_token_that_ends_the_turn(template: str, tmp_path: Path) -> None:
    own = None if template == "gemma" else template
    chat = Chat.load(tokenizer(tmp_path, own), None if own else template)
    ids, prompt = chat.training_ids(ANSWERED)
    assert chat.tokenizer.decode(ids[:prompt]) == "<bos><|turn>user\n1 + 1?<turn|>\n<|turn>model\n"
    assert chat.tokenizer.decode(ids[prompt:]) == "<think>\ntwo\n</think>\n\n2<turn|>"
    assert ids[:prompt] == chat.prompt_ids(QUESTION)
    assert chat.stop_token_ids == (257, 260) and chat.tokenizer.convert_ids_to_tokens(ids[-1]) == "<turn|>"


@pytest.mark.parametrize("template", [SMALL_SIZES, "gemma"])
def test_a_channel_in_an_answer_is_text_and_not_deleted(template: str, tmp_path: Path) -> None:
    """The template of the checkpoint strips channels; what an answer contains of control tokens is text."""
    own = None if template == "gemma" else template
    chat = Chat.load(tokenizer(tmp_path, own), None if own else template)
    ids, prompt = chat.training_ids([*QUESTION, {"role": "assistant", "content": CHANNEL}])
    assert chat.tokenizer.decode(ids[prompt:]) == CHANNEL + "<turn|>"
    channel = chat.tokenizer.convert_tokens_to_ids("<|channel>")
    assert channel not in ids, "the tokens of a channel are the template's alone"


def test_the_template_of_the_large_sizes_is_refused_for_training(tmp_path: Path) -> None:
    """Its prompt has an empty channel that its rows have not."""
    chat = Chat.load(tokenizer(tmp_path, LARGE_SIZES))
    with pytest.raises(UserError, match="does not begin with its inference prompt.*train.chat_template` to gemma"):
        chat.training_ids(ANSWERED)
    assert Chat.load(tmp_path, "gemma").training_ids(ANSWERED)


def test_the_two_modes_of_its_template(tmp_path: Path) -> None:
    thinking = Chat.load(tokenizer(tmp_path, LARGE_SIZES), thinking=True)
    assert thinking.prompt_text(QUESTION).startswith("<bos><|turn>system\n<|think|>\n<turn|>\n<|turn>user")
    without = Chat.load(tmp_path, thinking=False)
    assert without.prompt_text(QUESTION).endswith("<|turn>model\n<|channel>thought\n<channel|>")
    assert thinking.prefill == without.prefill == ""


SIZES: dict[str, object] = {
    **{"vocab_size_per_layer_input": 272, "num_hidden_layers": 4, "head_dim": 8, "global_head_dim": 16},
    **{"hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2, "use_double_wide_mlp": True, "sliding_window": 20},
    **{"final_logit_softcapping": 30.0, "initializer_range": 0.1},
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "settings",
    [{}, {"packing": True, "gradient_checkpointing": True}, {"adapter": {"kind": "lora", "r": 8, "alpha": 16}}],
    ids=["plain", "packed", "lora"],
)
def test_a_tiny_one_is_trained_and_loads(settings: dict[str, object], tmp_path: Path) -> None:
    """The loss falls, and the engine computes what transformers does of the student's directory."""
    base = support.make_other(tmp_path / "base", "gemma4_text", **SIZES)
    changed = {
        name: tensor * 0.9 if "layer_scalar" in name else tensor for name, tensor in load_file(weights(base)).items()
    }
    save_file(changed, weights(base), metadata={"format": "pt"})
    support.begin(tmp_path / "run", support.sums(24), base)
    whole = {"num_train_epochs": 2.0, "logging_steps": 1, "learning_rate": 1e-2, **settings}
    summary = support.train_here(tmp_path / "run", base, whole)
    assert summary.last_loss < summary.first_loss - 0.2 and summary.padded_rows is None
    student = tmp_path / "run/student"
    model, report = AutoModelForCausalLM.from_pretrained(student, output_loading_info=True, dtype=torch.float32)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.model.layers[0].layer_scalar.item() == pytest.approx(0.9, abs=1e-2), "buffers are stored, too"
    tokens = list(range(40, 90))
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    engine = Engine.load(student, EngineOptions(device="cpu", dtype="float32", max_batch=2, max_context=64))
    ours = engine.score([tokens], 1)[0].logprobs
    assert ours == pytest.approx([logits[i, token].item() for i, token in enumerate(tokens[1:])], abs=1e-4)


def weights(directory: Path) -> Path:
    return directory / "model.safetensors"


def test_the_memory_of_the_published_sizes() -> None:
    """Parameters as counted from the whole model: embeddings of each layer are embeddings."""
    card = load_student("gemma-4-e2b")
    assert card.architecture is not None
    sizes = {key: value for key, value in card.architecture.model_dump().items() if value is not None}
    config = AutoConfig.for_model("gemma4_text", **sizes, max_position_embeddings=card.context)
    shape = model_size.shape(config)
    assert shape.total / 1e9 == pytest.approx(card.parameters, rel=5e-3)  # kinds of layers are not on the card
    assert shape.embedding == 262144 * (1536 + 35 * 256)
    kept = model_size.activations(config, Train(), methods.dtypes(Train(), torch.device("cuda")), "cuda")
    assert kept.layer > 10 * 1536 * 2
    assert _cached(config) == 2 * (29 * 256 + 6 * 512)
