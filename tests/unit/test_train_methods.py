"""LoRA through PEFT: what is trained, and a merged student that computes what base and adapters computed."""

import pytest
import torch
import train_support as support
from transformers import AutoConfig, AutoModelForCausalLM

from distill import catalog
from distill.errors import UserError
from distill.recipe import Lora, Train
from distill.train.learn.fit import adapter_tensors
from distill.train.ranks import memory
from distill.train.student import methods
from distill.train.student import model as student


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return support.make_student(tmp_path_factory.mktemp("student"))


def test_adapters_alone_are_trained_in_float32_beside_a_base_in_bfloat16(base):
    settings = Train(adapter=Lora(kind="lora", r=4))
    model = student.load(base, settings, torch.bfloat16)
    methods.with_adapters(model, settings.adapter)
    trained = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".lora_" in name and dtype == torch.float32 for name, dtype in trained.items())
    assert len(trained) == 2 * 7 * 2  # A and B of seven linear layers, twice; not of the head
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_it_begins_at_the_base(base):
    settings = Train(adapter=Lora(kind="lora"))
    plain, adapted = (student.load(base, settings, torch.float32) for _ in range(2))
    methods.with_adapters(adapted, settings.adapter)
    ids = torch.arange(20)[None]
    plain.set_attn_implementation("eager")
    adapted.set_attn_implementation("eager")
    assert torch.equal(plain(ids).logits, adapted(ids).logits)


def test_the_merged_student_computes_what_base_and_adapters_do(base):
    settings = Train(adapter=Lora(kind="lora", r=4, alpha=8))
    model = student.load(base, settings, torch.float32)
    methods.with_adapters(model, settings.adapter)
    torch.manual_seed(0)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    merged = student.merged(base, settings, settings.adapter, adapter_tensors(trained), torch.float32)
    assert not any("lora" in name for name in merged.state_dict())
    for one in (model, merged):
        one.set_attn_implementation("eager")
    ids = torch.arange(20)[None]
    ours, theirs = model(ids).logits, merged(ids).logits
    assert (ours - theirs).abs().max() < 1e-4 * ours.abs().max()
    plain = AutoModelForCausalLM.from_pretrained(base)(ids).logits
    assert (ours - plain).abs().max() > 0.1 * plain.abs().max(), "the adapters did nothing"


def test_a_layer_that_is_not_there_is_named_with_those_that_are(base):
    settings = Train(adapter=Lora(kind="lora", target_modules=("c_attn",)))
    with pytest.raises(UserError, match=r"adapter\.target_modules \['c_attn'\] matches no layer .*down_proj.*q_proj"):
        methods.with_adapters(student.load(base, settings, torch.float32), settings.adapter)


@pytest.mark.parametrize(
    "setting, what",
    [({"adapter": {"kind": "qlora"}}, "adapter.kind is qlora"), ({"optim": "adamw_8bit"}, "adamw_8bit")],
)
def test_a_missing_extra_is_one_line(base, tmp_path, monkeypatch, setting, what):
    monkeypatch.setattr("transformers.utils.is_bitsandbytes_available", lambda: False)
    run = support.prepare(tmp_path / "run", support.sums(24))
    with pytest.raises(UserError, match=rf"{what}, which needs bitsandbytes: pip install 'distill\[qlora\]'"):
        support.make_loop(base, run, tmp_path / "checkpoints", setting)


def test_a_student_whose_context_was_extended_says_so(base, tmp_path):
    directory = tmp_path / "run"
    support.begin(directory, support.sums(24), base)
    support.train_here(directory, base, {"max_steps": 2, "max_position_embeddings": 4096, "rope_theta": 5e5})
    config = AutoConfig.from_pretrained(directory / "student")
    assert (config.max_position_embeddings, config.rope_parameters["rope_theta"]) == (4096, 5e5)
    assert "| context extended to | 4,096 tokens, RoPE base 500000 |" in (directory / "student/README.md").read_text()


@pytest.mark.parametrize("tracker, message", [("nothing", "unknown tracker 'nothing'"), ("wandb", "pip install wandb")])
def test_a_tracker_that_would_be_passed_over_is_refused(base, tmp_path, monkeypatch, tracker, message):
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: [])
    run = support.prepare(tmp_path / "run", support.sums(24))
    with pytest.raises(UserError, match=message):
        support.make_loop(base, run, tmp_path / "checkpoints", {"report_to": (tracker,)})


def test_padding_is_never_the_end_token(base, tmp_path):
    """The tokenizer's own pad where it is another; else one that is never sampled."""
    from distill.chat import Chat

    chat = Chat.load(base, "chatml")
    assert student.padding(chat) == chat.tokenizer.pad_token_id
    chat.tokenizer.pad_token = chat.tokenizer.eos_token
    chat.tokenizer.add_special_tokens({"additional_special_tokens": ["<|fim_pad|>"]})
    assert student.padding(chat) == chat.tokenizer.convert_tokens_to_ids("<|fim_pad|>")


@pytest.mark.parametrize(
    ("setting", "named"),
    [({"optim": "adamw_8bit"}, "optim adamw_8bit"), ({"adapter": {"kind": "qlora"}}, "adapter.kind qlora")],
)
def test_what_cannot_be_sharded_is_trained_with_ddp(monkeypatch, setting, named):
    """bitsandbytes' 8-bit optimiser refuses DTensors, and its 4-bit weights are none. `auto` never chooses FSDP."""
    with pytest.raises(ValueError, match=f"{named} cannot be combined with parallel fsdp; set parallel to ddp"):
        Train.model_validate(setting | {"parallel": "fsdp"})
    tried = []

    def estimate(config, settings, dtypes, tokens, supervised, layout, *more):
        tried.append(layout)
        return memory.Memory(1e18, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)  # fits nowhere

    monkeypatch.setattr(memory, "estimate", estimate)
    for changes in (setting, {}):
        recipe = catalog.load_recipe("tiny").model_copy(update={"train": Train.model_validate(changes)})
        with pytest.raises(UserError, match="training needs about"):
            memory.check(recipe, (10, 10), None, 2)
    assert tried == ["ddp", "ddp", "fsdp"]
