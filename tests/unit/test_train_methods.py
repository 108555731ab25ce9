"""LoRA through PEFT: what is trained, and a merged student that computes what base and adapters computed."""

import pytest
import torch
import train_support as support
from transformers import AutoConfig, AutoModelForCausalLM

from distill import catalog
from distill.errors import UserError
from distill.recipe import Lora, Train
from distill.train.learn.fit import adapter_tensors
from distill.train.ranks import memory, model_size
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


@pytest.mark.parametrize(
    "targets, refused",
    [
        (("c_attn",), "'c_attn'"),
        (("q_proj", "v_porj"), "'v_porj'"),
        (("q_proj", "lm_head", "embed_tokens"), "'lm_head', 'embed_tokens'"),
        (("mlp", "up_proj", "proj"), "'mlp', 'proj'"),
    ],
)
def test_names_of_no_linear_layer_of_the_decoder_are_refused_one_by_one(base, targets, refused):
    """Beside right ones, too; the head and the embedding, which the loss and the engine know without adapters."""
    settings = Train(adapter=Lora(kind="lora", target_modules=targets))
    has = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    message = f"target_modules: {refused}: no linear layer of the student's decoder, which has {has}; name some"
    with pytest.raises(UserError, match=message):
        student.inspect(base, settings)
    with pytest.raises(UserError, match=message):
        methods.with_adapters(student.load(base, settings, torch.float32), settings.adapter)


@pytest.mark.parametrize(
    "family, config, targets, adapted",
    [
        ("qwen2", {}, ("q_proj", "layers.1.mlp.up_proj"), 3),
        ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4}, ("c_attn",), 2),  # a Conv1D
        ("qwen3_5_text", support.HYBRID, ("q_proj",), 1),  # in one layer of four
    ],
)
def test_a_name_may_be_that_of_some_layers(family, config, targets, adapted):
    """The memory of adapters is measured with one and two layers, which may have none of them."""
    config = AutoConfig.for_model(family, **support.OTHER | config)
    settings = Train(adapter=Lora(kind="lora", r=4, target_modules=targets))
    model = methods.with_adapters(AutoModelForCausalLM.from_config(config), settings.adapter)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 2 * adapted
    assert model_size.adapters(config, settings.adapter) == sum(p.numel() for p in trained)
    assert model_size.activations(config, settings, methods.dtypes(settings, torch.device("cpu"))).layer > 0


def test_layers_that_cannot_have_adapters_are_named():
    config = AutoConfig.for_model("mamba2", **support.OTHER | support.RECURRENT["mamba2"])
    with pytest.raises(
        UserError, match=r"target_modules: .*'out_proj' is incompatible .* decoder has in_proj, out_proj"
    ):
        methods.with_adapters(AutoModelForCausalLM.from_config(config), Lora(kind="lora"))


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
