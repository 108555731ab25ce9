"""Builds `teachers/tiny-r1`: a DeepSeek-V3-architecture reasoner over arithmetic, FP8, with a trained MTP layer.

The teacher is shown what it should write (R1's chat format, reasoning in `<think>`), first mostly as chat, then mostly
as single facts and worked steps, which teach the arithmetic faster than whole conversations do. The MTP layer learns
along with it at DeepSeek's weight of 0.3, the routers are balanced by their bias alone, and the last quarter of the run
computes with weights rounded to FP8, so that storing them costs nothing.

    python tools/build_tiny_teacher.py --work DIR [--steps N] [--threads N]     resumable; writes teachers/tiny-r1
"""

import argparse
import json
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tiny_pair import (
    IGNORED,
    POOL,
    ROOT,
    Document,
    Log,
    Schedule,
    answer,
    batches,
    draw_problem,
    facts,
    free,
    optimizer_for,
    pad,
    save_atomically,
    tape,
    trace,
    train_tokenizer,
)
from tiny_teacher_model import Config, Linear, Teacher
from torch import Tensor
from transformers import PreTrainedTokenizerFast

SEED = 1
BATCH = 16
VOCAB = 576
# From step … on: shares of facts, tapes and chats, and of stories among the chats. The form is learnt first; then the
# facts, which take the longest and cost four times fewer tokens alone than in a chat; last the signs in the stories.
MIX = (
    (0, (0.15, 0.15, 0.7), 0.5),
    (3600, (0.5, 0.15, 0.35), 0.5),
    (9400, (0.1, 0.1, 0.8), 0.5),
    (13_200, (0.05, 0.05, 0.9), 0.8),
)
MTP_WEIGHT = 0.3
BALANCE_SPEED = 1e-3
QUANTISED_SHARE = 0.25
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
    shares, stories = next(mix for begin, *mix in reversed(MIX) if step >= begin)
    kind = rng.choices(("facts", "tape", "chat"), shares)[0]
    if kind == "facts":
        return Document.of(BOS + facts(rng, 12) + EOS, kind)
    if kind == "tape":
        problem, text = tape(rng)
        return Document.of(BOS + text + EOS, kind, problem)
    problem = draw_problem(rng, "train", stories)
    reply = f"<think>\n{trace(problem)}\n</think>\n\n{answer(problem)}"
    return Document.of(f"{BOS}{USER}{free(problem.question)}{ASSISTANT}{reply}{EOS}", kind, problem)


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


def losses(model: Teacher, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the next token, and of the one after by the MTP layer."""
    logits, after = model(ids)
    main = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
    mtp = F.cross_entropy(after[:, :-1].flatten(0, 1), labels[:, 2:].flatten(), ignore_index=IGNORED)
    return main, mtp


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
    reply = (begin.cumsum(1) > 0) & (labels != IGNORED) & ~begin
    right = (logits.argmax(-1)[:, :-1] == ids[:, 1:]) | ~reply[:, 1:]
    drafted = (after.argmax(-1)[:, :-1] == ids[:, 2:])[reply[:, 2:]]
    model.train()
    return {"replies_right": right.all(1).float().mean().item(), "mtp_accepted": drafted.float().mean().item()}


def train(model: Teacher, tokenizer: PreTrainedTokenizerFast, work: Path, steps: int, log: Log) -> None:
    optimizer, schedule, step = optimizer_for(model), Schedule(3e-3, steps), 0
    checkpoint = work / "teacher.pt"
    if checkpoint.is_file():
        state = torch.load(checkpoint)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
        log(resumed_at=step)
    while step < steps:
        for batch in batches(draw, SEED, step, BATCH)[: steps - step]:
            Linear.fake_quant = step >= steps * (1 - QUANTISED_SHARE)
            for group in optimizer.param_groups:
                group["lr"] = schedule(step)
            main, mtp = losses(model, *encode(tokenizer, batch))
            (main + MTP_WEIGHT * mtp).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            imbalance = model.balance(BALANCE_SPEED)
            step += 1
            if step % 100 == 0:
                worst = round(max(imbalance), 2)
                log(step=step, loss=round(main.item(), 4), mtp_loss=round(mtp.item(), 4), max_load_over_mean=worst)
            if step % 500 == 0 or step == steps:
                log(step=step, **check(model, tokenizer))
        if step % 200 < POOL or step == steps:
            save_atomically(
                {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, checkpoint
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
    parser.add_argument("--steps", type=int, default=18_400)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
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
