"""Builds `students/tiny-qwen`: a Qwen2 base that knows arithmetic facts and how to read a question, but not to reason.

The mix is what makes distillation worth showing. Alone, a model of this size cannot answer a chain at once, and a base
that never saw the pieces cannot learn the chain from a few thousand traces. So the base sees single facts (30 %),
reasoning without a question (20 %), a plain question followed by what it says, half of the time worked out (30 %), and
chat questions answered at once (20 %), which is all its chat turns ever do. Nothing joins a chat question to reasoning:
that is left to the teacher's traces. Every token of a trace is in these texts, the tags too: a model that never saw a
token gives it odds of e^-25, and unlearning that in the first traces tears up the rest.

    python tools/build_tiny_student.py --work DIR [--steps N] [--threads N]     resumable; writes students/tiny-qwen
"""

import argparse
import json
import random
from pathlib import Path

import torch
from tiny_pair import (
    IGNORED,
    ROOT,
    Document,
    Log,
    answer,
    draw_problem,
    facts,
    fit,
    free,
    optimizers_for,
    pad,
    tape,
    token_loss,
    trace,
    train_tokenizer,
)
from tokenizers import AddedToken, Tokenizer
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

SEED = 2
BATCH = 20
VOCAB = 576
Z_WEIGHT = 1e-4
END, START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
TEMPLATE = (ROOT / "distill" / "chat" / "templates" / "chatml.jinja").read_text(encoding="utf-8")


def draw(rng: random.Random, step: int = 0) -> Document:
    """The shares are the same at every step."""
    kind = rng.choices(("facts", "tape", "reading", "chat"), (0.3, 0.2, 0.3, 0.2))[0]
    if kind == "facts":
        return Document.of(facts(rng, 10) + END, kind)
    if kind == "tape":
        problem, text = tape(rng)
        return Document.of(text + END, kind, problem)
    problem = draw_problem(rng, "train")
    question = free(problem.question)
    if kind == "reading":
        return Document.of(f"{question}\n{trace(problem, steps=rng.random() < 0.5)}{END}", kind, problem)
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
    def loss(batch: list[Document], step: int) -> tuple[torch.Tensor, dict[str, float]]:
        ids, labels = encode(tokenizer, batch)
        return token_loss(model(ids).logits[:, :-1], labels[:, 1:], Z_WEIGHT), {}

    kinds = ("facts", "tape", "reading", "chat")
    fit(
        model,
        optimizers_for(model, by_muon=lambda name: "_proj" in name),
        draw=draw,
        seed=SEED,
        steps=steps,
        batch_size=BATCH,
        loss=loss,
        check=lambda: {kind: round(accuracy(model, tokenizer, kind), 4) for kind in kinds},
        checkpoint=work / "student.pt",
        log=log,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--out", type=Path, default=ROOT / "students" / "tiny-qwen")
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    if not (args.work / "student.pt").is_file():
        (args.out / "training.jsonl").unlink(missing_ok=True)
    log = Log(args.out / "training.jsonl")
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    log(seed=SEED, steps=args.steps, batch=BATCH, parameters=model.num_parameters(), torch=torch.__version__)
    train(model, tokenizer, args.work, args.steps, log)
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
