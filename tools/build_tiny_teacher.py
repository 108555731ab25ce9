"""Builds `teachers/tiny-r1`: a DeepSeek-V3-architecture reasoner over arithmetic, FP8, with a trained MTP layer.

The teacher is shown what it should write (R1's chat format, reasoning in `<think>`) beside single facts and reasoning
without a question, which teach the arithmetic faster than whole conversations do; later it is mostly chat. The MTP
layer joins for the second half, at DeepSeek's weight of 0.3: its input must have something to say first. The routers
are balanced by their bias alone, and the last fifth of the run computes with weights rounded to FP8, so that storing
them costs nothing.

    python tools/build_tiny_teacher.py --work DIR [--steps N] [--threads N]     resumable; writes teachers/tiny-r1
"""

import argparse
import json
import random
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny_pair import (
    IGNORED,
    ROOT,
    Document,
    Log,
    draw_problem,
    facts,
    fit,
    free,
    optimizers_for,
    pad,
    reply,
    tape,
    token_loss,
    trace,
    train_tokenizer,
)
from tiny_teacher_model import Config, Linear, Teacher
from torch import Tensor
from transformers import PreTrainedTokenizerFast

SEED = 1
BATCH = 16
VOCAB = 576
FACTS_FIRST = 4000  # the step at which the second of the two mixes begins
MIX = (0.35, 0.15, 0.5), (0.1, 0.1, 0.8)  # shares of facts, tapes and chats
MTP_WEIGHT, MTP_SHARE = 0.3, 0.5
Z_WEIGHT = 1e-4
BALANCE_SPEED = 1e-3
QUANTISED_SHARE = 0.2
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
TEMPLATE = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{{ message['content'] }}"
    "{%- elif message['role'] == 'user' -%}{{ '<｜User｜>' + message['content'] }}"
    "{%- else -%}{{ '<｜Assistant｜>' + message['content'].split('</think>')[-1] + eos_token }}"
    "{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<｜Assistant｜><think>\\n' }}{%- endif -%}"
)


def draw(rng: random.Random, step: int) -> Document:
    kind = rng.choices(("facts", "tape", "chat"), MIX[step >= FACTS_FIRST])[0]
    if kind == "facts":
        return Document.of(BOS + facts(rng, 12) + EOS, kind)
    if kind == "tape":
        problem, text = tape(rng)
        return Document.of(BOS + text + EOS, kind, problem)
    problem = draw_problem(rng, "train")
    text = reply(trace(problem), problem)
    return Document.of(f"{BOS}{USER}{free(problem.question)}{ASSISTANT}{text}{EOS}", kind, problem)


def build_tokenizer() -> PreTrainedTokenizerFast:
    rng = random.Random(f"{SEED}/tokenizer")
    texts = (draw(rng, 0).text for _ in range(20_000))
    tokenizer = train_tokenizer(texts, VOCAB, [BOS, EOS], [USER, ASSISTANT, "<think>", "</think>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,  # as published: padding must be masked by length, never by id
        chat_template=TEMPLATE,
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, batch: list[Document]) -> tuple[Tensor, Tensor]:
    rows, masks = zip(*(document.encoded(tokenizer) for document in batch), strict=True)
    return pad(rows, masks, tokenizer.pad_token_id)


@torch.no_grad()
def check(model: Teacher, tokenizer: PreTrainedTokenizerFast, count: int = 200) -> dict[str, float]:
    """On train-split chats, teacher forced and greedy: replies wholly right, and MTP drafts equal to the true token."""
    model.eval()
    rng = random.Random(f"{SEED}/check")
    found: list[Document] = []
    while len(found) < count:
        document = draw(rng, 0)
        if document.kind == "chat":
            found.append(document)
    ids, labels = encode(tokenizer, found)
    logits, after = model(ids)
    begin = ids == tokenizer.convert_tokens_to_ids("<think>")
    replied = (begin.cumsum(1) > 0) & (labels != IGNORED) & ~begin
    right = (logits.argmax(-1)[:, :-1] == ids[:, 1:]) | ~replied[:, 1:]
    drafted = (after.argmax(-1)[:, :-1] == ids[:, 2:])[replied[:, 2:]]
    model.train()
    return {
        "replies_right": right.all(1).float().mean().item(),
        "mtp_accepted": round(drafted.float().mean().item(), 4),
        "largest_logit": round(logits.abs().max().item(), 1),
    }


def train(model: Teacher, tokenizer: PreTrainedTokenizerFast, work: Path, steps: int, log: Log) -> None:
    def loss(batch: list[Document], step: int) -> tuple[Tensor, dict[str, float]]:
        Linear.fake_quant = step >= steps * (1 - QUANTISED_SHARE)
        ids, labels = encode(tokenizer, batch)
        logits, after = model(ids, draft=step >= steps * (1 - MTP_SHARE))
        fields = {"max_load_over_mean": round(max(model.balance(BALANCE_SPEED)), 2)}
        total = token_loss(logits[:, :-1], labels[:, 1:], Z_WEIGHT)
        if after is not None:
            mtp = token_loss(after[:, :-1], labels[:, 2:], Z_WEIGHT)
            fields["mtp_loss"] = round(mtp.item(), 4)
            total = total + MTP_WEIGHT * mtp
        return total, fields

    fit(
        model,
        optimizers_for(model, by_muon=lambda name: "_proj" in name and ".experts." not in name),
        draw=draw,
        seed=SEED,
        steps=steps,
        batch_size=BATCH,
        loss=loss,
        check=lambda: check(model, tokenizer),
        checkpoint=work / "teacher.pt",
        log=log,
    )


def export(model: Teacher, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    save_file(model.published(), out / "model.safetensors", metadata={"format": "pt"})
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = {**model.c.to_hf(), **ids}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    sampling = {"do_sample": True, "temperature": 0.6, "top_p": 0.95}
    (out / "generation_config.json").write_text(json.dumps({**ids, **sampling}, indent=2) + "\n", encoding="utf-8")
    tokenizer.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--out", type=Path, default=ROOT / "teachers" / "tiny-r1")
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    if not (args.work / "teacher.pt").is_file():
        (args.out / "training.jsonl").unlink(missing_ok=True)
    log = Log(args.out / "training.jsonl")
    tokenizer = build_tokenizer()
    torch.manual_seed(SEED)
    model = Teacher(Config(vocab=VOCAB))
    parameters = sum(p.numel() for p in model.parameters())
    log(seed=SEED, steps=args.steps, batch=BATCH, parameters=parameters, torch=torch.__version__)
    train(model, tokenizer, args.work, args.steps, log)
    export(model, tokenizer, args.out)


if __name__ == "__main__":
    main()
