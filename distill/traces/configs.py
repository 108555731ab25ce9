"""Ready configurations that train a student on an exported file with TRL, axolotl or LLaMA-Factory.

Each trains on the answer alone, with its reasoning. That needs care in all three: many chat templates (R1's own, and
Qwen3's for earlier turns) delete what stands before `</think>`, so the template is written out beside the file and set
in the configuration, with the marks around the assistant's turn from which TRL derives its mask; LLaMA-Factory has
templates of its own, and the one named keeps the text as it is.
"""

import json
from pathlib import Path
from typing import Literal

import yaml

from distill.durable import write_whole
from distill.errors import UserError
from distill.model_files import read_object
from distill.recipe import StudentCard
from distill.traces.exported import Format

Trainer = Literal["trl", "axolotl", "llama-factory"]

_CHATML = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{ '<|im_start|>assistant\\n' }}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}
{%- else -%}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""
_LLAMA3 = """\
{{- bos_token -}}
{%- for message in messages -%}
{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
{%- if message['role'] == 'assistant' -%}
{% generation %}{{ message['content'] + '<|eot_id|>' }}{% endgeneration %}
{%- else -%}
{{ message['content'] + '<|eot_id|>' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif -%}
"""
READS: dict[Trainer, tuple[Format, ...]] = {
    "trl": ("messages", "prompt-completion", "openr1"),
    "axolotl": ("messages", "sharegpt", "openr1"),
    "llama-factory": ("messages", "sharegpt", "openr1"),
}
REGISTRY = "dataset_info.json"  # where LLaMA-Factory looks for the data sets of a directory
TEMPLATES = {"chatml": "<|im_start|>", "llama3": "<|start_header_id|>"}  # that are written, and what each begins with
CONTEXT = 32_768  # tokens of a row at most; longer students are given this much too


def check_readable(trainer: Trainer, form: Format) -> None:
    """Raise UserError when a trainer cannot read a layout."""
    if form not in READS[trainer]:
        raise UserError(
            f"--config {trainer} cannot read --format {form}; choose --format {' or '.join(READS[trainer])}"
        )


def template_of(student: StudentCard, named: str | None, directory: Path | None) -> str:
    """The template of `TEMPLATES` with which a student is trained. named: that of its recipe or its card; None: its
    own, of which the turns count, not what it does with their reasoning. directory: its weights, if they are here.

    Errors: UserError for a template that is not written for other trainers.
    """
    if named is not None:
        form, found = named, f"{student.name} has {named}"
    elif directory is None:
        form, found = None, f"that of {student.name} is beside its weights, which are not on this machine"
    else:
        own = _own_template(directory)
        form = next((name for name, begins in TEMPLATES.items() if begins in own), None)
        found = f"{student.name} has another of its own" if own else f"{student.name} has none"
    if form not in TEMPLATES:
        raise UserError(
            f"--config writes the chat templates {' and '.join(TEMPLATES)}, and {found}; name another --student, or "
            f"export without --config"
        )
    return form


def _own_template(directory: Path) -> str:
    """The text of the template, or of all templates, of a model directory."""
    file, config = directory / "chat_template.jinja", directory / "tokenizer_config.json"
    if file.is_file():
        return file.read_text(encoding="utf-8", errors="replace")
    return str((read_object(config) if config.is_file() else {}).get("chat_template") or "")


def write_config(
    trainer: Trainer,
    out: Path,
    form: Format,
    file_type: str,
    student: StudentCard,
    weights: str,
    chat_template: str,
    max_length: int | None = None,
) -> list[Path]:
    """Write the configuration beside the exported file `out`; return the files. weights: a hub id, or a directory.
    chat_template: see `template_of`. max_length: tokens of a row, of a run that trains the student; at most as many as
    the student's context has."""
    check_readable(trainer, form)
    llama = chat_template == "llama3"
    template = out.with_name(f"{out.stem}.jinja")
    config = out.with_name(f"{out.stem}.{trainer}.yaml")
    length = min(max_length or CONTEXT, student.context)
    loader = "json" if file_type == "jsonl" else "parquet"
    written = {config: "", template: _LLAMA3 if llama else _CHATML}
    if trainer == "trl":
        command, values = f"trl sft --config {config}", _trl(out, form, loader, llama)
        values |= {"chat_template_path": str(template), "model_name_or_path": weights, "max_length": length}
    elif trainer == "axolotl":
        command, values = f"axolotl train {config}", _axolotl(out, form, loader, llama)
        values |= {"chat_template_jinja": str(template), "base_model": weights, "sequence_len": length}
    else:
        del written[template]
        name = out.stem.replace(".", "-")
        registry = out.with_name(REGISTRY)
        written[registry] = json.dumps(_registered(registry) | {name: _dataset(out, form)}, indent=2) + "\n"
        command, values = f"llamafactory-cli train {config}", _llama_factory(out, name, llama)
        values |= {"model_name_or_path": weights, "cutoff_len": length}
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    written[config] = f"# {student.name} on {out.name}: {command}\n{text}"
    for path, content in written.items():
        write_whole(path, content)
    return list(written)


def config_files(trainer: Trainer, out: Path) -> list[Path]:
    """The files that `write_config` creates, for a check before anything is written.

    Errors: UserError when LLaMA-Factory's registry, to which it adds an entry, is there and cannot be read.
    """
    if trainer == "llama-factory":
        _registered(out.with_name(REGISTRY))
        return [out.with_name(f"{out.stem}.{trainer}.yaml")]
    return [out.with_name(f"{out.stem}.{trainer}.yaml"), out.with_name(f"{out.stem}.jinja")]


def _steps() -> dict[str, object]:
    return {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 8,
        "num_train_epochs": 3,
        "learning_rate": 1e-5,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.1,
    }


def _trl_columns(form: Format) -> list[str]:
    return ["prompt", "completion"] if form == "prompt-completion" else ["messages"]


def _registered(registry: Path) -> dict[str, object]:
    """The data sets that LLaMA-Factory finds in a directory already."""
    return read_object(registry) if registry.exists() else {}


def _dataset(out: Path, form: Format) -> dict[str, object]:
    sharegpt = form == "sharegpt"
    tags = {
        "role_tag": "from" if sharegpt else "role",
        "content_tag": "value" if sharegpt else "content",
        "user_tag": "human" if sharegpt else "user",
        "assistant_tag": "gpt" if sharegpt else "assistant",
        "system_tag": "system",
    }
    return {
        "file_name": out.name,
        "formatting": "sharegpt",
        "columns": {"messages": "conversations" if sharegpt else "messages"},
        "tags": tags,
    }


def _trl(out: Path, form: Format, loader: str, llama: bool) -> dict[str, object]:
    masked = "completion_only_loss" if form == "prompt-completion" else "assistant_only_loss"
    return {
        "datasets": [{"path": loader, "data_files": str(out), "columns": _trl_columns(form)}],
        "eos_token": "<|eot_id|>" if llama else "<|im_end|>",
        masked: True,
        "gradient_checkpointing": True,
        "output_dir": f"{out.stem}-student",
        **_steps(),
    }


def _axolotl(out: Path, form: Format, loader: str, llama: bool) -> dict[str, object]:
    sharegpt = form == "sharegpt"
    dataset = {
        "path": str(out),
        "ds_type": loader,
        "type": "chat_template",
        "field_messages": "conversations" if sharegpt else "messages",
        "message_property_mappings": {
            "role": "from" if sharegpt else "role",
            "content": "value" if sharegpt else "content",
        },
        "roles": {"user": ["user", "human"], "assistant": ["assistant", "gpt"], "system": ["system"]},
        "roles_to_train": ["assistant"],
        "train_on_eos": "turn",
    }
    return {
        "datasets": [dataset],
        "chat_template": "jinja",
        "special_tokens": {"eos_token": "<|eot_id|>" if llama else "<|im_end|>"},
        "excess_length_strategy": "drop",
        "sample_packing": True,
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 8,
        "num_epochs": 3,
        "learning_rate": 1e-5,
        "lr_scheduler": "cosine",
        "optimizer": "adamw_torch",
        "bf16": "auto",
        "gradient_checkpointing": True,
        "output_dir": f"{out.stem}-student",
    }


def _llama_factory(out: Path, name: str, llama: bool) -> dict[str, object]:
    return {
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "full",
        "dataset_dir": str(out.parent),
        "dataset": name,
        "template": "llama3" if llama else "qwen",
        "bf16": True,
        "output_dir": f"{out.stem}-student",
        **_steps(),
    }
