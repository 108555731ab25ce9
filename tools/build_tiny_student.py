"""Builds `students/tiny-qwen`: a Qwen2 base that knows arithmetic facts and how to read a question, but not to reason.

The mix is what makes distillation worth showing. Alone, a model of this size cannot answer a chain at once, and a base
that never saw the pieces cannot learn the chain from a few thousand traces. So the base sees single facts (30 %),
worked steps without a question (20 %), a question followed by its expression, half of the time with the steps (30 %),
and chat questions answered at once (20 %), which is all its chat turns ever do. Nothing joins a chat question to worked
steps: that is left to the teacher's traces. Towards the end half of the worked documents get words and tags around
them: a model that never saw a token gives it odds of e^-25, and unlearning that in the first traces tears up the rest.

    python tools/build_tiny_student.py --work DIR [--steps N] [--threads N]     resumable; writes students/tiny-qwen
"""

import argparse
import json
import random
from pathlib import Path

import torch
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
    train_tokenizer,
)
from tokenizers import AddedToken, Tokenizer
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

SEED = 2
BATCH = 20
VOCAB = 576
WORDED = 16_000
END, START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
TEMPLATE = (ROOT / "distill" / "templates" / "chatml.jinja").read_text(encoding="utf-8")


def draw(rng: random.Random, step: int = 0) -> Document:
    """The shares are the same at every step; from WORDED on, half of the worked documents have words around them."""
    kind = rng.choices(("facts", "tape", "reading", "chat"), (0.3, 0.2, 0.3, 0.2))[0]
    worded = step >= WORDED and rng.random() < 0.5
    if kind == "facts":
        return Document.of(facts(rng, 10) + END, kind)
    if kind == "tape":
        problem, text = tape(rng)
        if worded:
            text = f"<think>\n{text}\n</think>\n\n{answer(problem)}"
        return Document.of(text + END, kind, problem)
    problem = draw_problem(rng, "train")
    question = free(problem.question)
    if kind == "reading":
        steps = "\n" + "\n".join(problem.steps) if rng.random() < 0.5 else ""
        text = f"{problem.expression}{steps}"
        if worded:
            text = f"The expression is {problem.expression}.{steps}"
            text += f"\nSo the result is {problem.answer}." if steps else ""
        return Document.of(f"{question}\n{text}{END}", kind, problem)
    turn = f"{START}user\n{question}{TURN_END}\n{START}assistant\n{answer(problem)}{TURN_END}"
    return Document.of(turn, kind, problem)


def build_tokenizer() -> Qwen2Tokenizer:
    rng = random.Random(f"{SEED}/tokenizer")
    texts = (draw(rng).text for _ in range(20_000))
    special, added = [END, START, TURN_END], ["<think>", "</think>"]
    return as_qwen2(train_tokenizer(texts, VOCAB, special, added), special, added)


def as_qwen2(trained: Tokenizer, special: list[str], added: list[str]) -> Qwen2Tokenizer:
    """The same tokens, ids and segmentation in the form that `AutoTokenizer` gives every Qwen2 checkpoint.

    Whatever tokenizer.json says, transformers rebuilds a Qwen2 tokenizer with Qwen2's own pre-tokenizer, which splits
    numbers into digits. Added tokens are matched before it, so numbers and spaced operators become added tokens.
    """
    state = json.loads(trained.to_str())["model"]
    operators = {f"Ġ{sign}Ġ": f" {sign} " for sign in "+-="}  # byte-level spelling → text
    vocab = {operators.get(token, token): index for token, index in state["vocab"].items()}
    vocab |= {token: trained.token_to_id(token) for token in special + added}
    merges = [tuple(pair) for pair in state["merges"] if "".join(pair) in vocab]
    tokenizer = Qwen2Tokenizer(
        vocab=vocab,
        merges=merges,
        unk_token=None,
        eos_token=TURN_END,
        pad_token=END,
        chat_template=TEMPLATE,
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_tokens([AddedToken(token, special=True) for token in special])
    numbers = [str(number) for number in range(10, 100)]
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in [*added, *numbers, *operators.values()]])
    return tokenizer


def build_model(tokenizer: Qwen2Tokenizer) -> Qwen2ForCausalLM:
    torch.manual_seed(SEED)
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen2ForCausalLM(config)


def encode(tokenizer: Qwen2Tokenizer, batch: list[Document]) -> tuple[torch.Tensor, torch.Tensor]:
    rows, masks = zip(*(document.encoded(tokenizer) for document in batch), strict=True)
    return pad(rows, masks, tokenizer.pad_token_id)


@torch.no_grad()
def accuracy(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, kind: str, count: int = 200) -> float:
    """Share of the results right: of train-split documents of one kind, teacher forced and greedy."""
    rng = random.Random(f"{SEED}/check/{kind}")
    found: list[Document] = []
    while len(found) < count:
        document = draw(rng)
        if document.kind == kind:
            found.append(document)
    ids, labels = encode(tokenizer, found)
    before = tokenizer("{" if kind == "chat" else " = ")["input_ids"][-1]
    here = (ids[:, :-1] == before) & (labels[:, 1:] != IGNORED)
    if kind == "reading":  # every number and sign of the expression
        here = (labels[:, 1:] != IGNORED) & torch.isin(ids[:, 1:], torch.tensor(numbers(tokenizer)))
    guess = model(ids).logits[:, :-1].argmax(-1)
    return float((guess == ids[:, 1:])[here].float().mean())


def numbers(tokenizer: Qwen2Tokenizer) -> list[int]:
    return [tokenizer(str(n))["input_ids"][0] for n in range(100)]


def train(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, work: Path, steps: int, log: Log) -> None:
    optimizer, schedule, step = optimizer_for(model), Schedule(3e-3, steps), 0
    checkpoint = work / "student.pt"
    if checkpoint.is_file():
        state = torch.load(checkpoint)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
        log(resumed_at=step)
    while step < steps:
        for batch in batches(draw, SEED, step, BATCH)[: steps - step]:
            ids, labels = encode(tokenizer, batch)
            for group in optimizer.param_groups:
                group["lr"] = schedule(step)
            logits = model(ids).logits[:, :-1]
            targets = labels[:, 1:].flatten()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets, ignore_index=IGNORED)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step % 200 == 0:
                log(step=step, loss=round(loss.item(), 4), lr=round(schedule(step), 6))
            if step % 1000 == 0 or step == steps:
                scores = {kind: accuracy(model, tokenizer, kind) for kind in ("facts", "tape", "reading", "chat")}
                log(step=step, **{kind: round(score, 4) for kind, score in scores.items()})
        if step % 200 < POOL or step == steps:
            save_atomically(
                {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, checkpoint
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--out", type=Path, default=ROOT / "students" / "tiny-qwen")
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    log = Log(args.out / "training.jsonl")
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    log(seed=SEED, steps=args.steps, batch=BATCH, parameters=model.num_parameters(), torch=torch.__version__)
    train(model, tokenizer, args.work, args.steps, log)
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
