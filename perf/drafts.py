"""Multi-token prediction: what drafts save.

    python perf/drafts.py [--json FILE] [--work DIR] [--threads N]

First the embedded teacher, whose draft layer is trained, on its own problems: how many of its drafts stand. It has
three layers, so that one more to draft costs a third of a step. Then the checkpoint of perf/engine.py with a draft
layer after its sixteen. Its weights are random, so the layer is run and its drafts are then replaced: by the right
tokens with R1's published rate of accepted first drafts, 81 %, else by wrong ones. The text is the same with and
without drafts, and that is checked.
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path
from typing import Literal

import torch
from checkpoint import CONFIG, write_fp8, write_fp8_with_drafts
from measures import prompt

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

BATCHES, DRAFTS = (1, 8, 64), (0, 1, 2)
PUBLISHED = (
    0.81  # DeepSeek-V3's report, section 5.4.3, gives 0.80 to 0.90 for the second token; R1 was measured at 0.81
)


def measure_tiny(
    batch: int, drafts: int, dtype: Literal["float32", "bfloat16"]
) -> tuple[dict[str, float], list[tuple[int, ...]]]:
    from distill.chat import Chat
    from distill.engine import Engine, EngineOptions, Request, SamplingParams
    from distill.prompts import load_prompts
    from distill.recipe.sources import ProceduralPrompts

    directory = ROOT / "teachers" / "tiny-r1"
    chat = Chat.load(directory)
    source = ProceduralPrompts(kind="procedural", name="arithmetic", split="heldout", limit=40 + 8 * batch)
    prompts = [tuple(chat.prompt_ids(prompt.messages)) for prompt in load_prompts([source])]
    sampling = SamplingParams(temperature=0.6, top_p=0.95, max_new_tokens=192, stop_token_ids=chat.stop_token_ids)
    requests = [Request(str(n), ids, sampling, 0, n, (0,)) for n, ids in enumerate(prompts)]
    engine = Engine.load(directory, EngineOptions(dtype=dtype, max_batch=batch, num_speculative_tokens=drafts))
    list(engine.generate(requests[: batch + 1]))  # set up
    tokens, begun = engine.usage.completion_tokens, time.perf_counter()
    done = {c.request_id: c.token_ids for c in engine.generate(requests)}
    seconds = time.perf_counter() - begun
    proposed, accepted = engine.usage.drafts_proposed, engine.usage.drafts_accepted
    figures = {
        "tokens/s": (engine.usage.completion_tokens - tokens) / seconds,
        "accepted drafts": accepted / max(proposed, 1),
    }
    return figures, [done[request.id] for request in requests]


def measure_large(directory: Path, batch: int, drafts: int, texts: dict[str, tuple[int, ...]]) -> dict[str, float]:
    """Decoding `batch` sequences; `texts`: what they said without drafts, filled in by the run that has none."""
    from distill.engine import Engine, EngineOptions, Request, SamplingParams

    engine = Engine.load(
        directory,
        EngineOptions(dtype="bfloat16", max_batch=batch, cache_tokens=batch * 272, num_speculative_tokens=drafts),
    )
    if drafts:
        propose, rng = engine._drafter.draft, random.Random(0)

        def replaced(sequences, counts):  # type: ignore[no-untyped-def]
            proposed = propose(sequences, counts)
            for sequence, tokens in zip(sequences, proposed, strict=True):
                done = len(sequence.tokens) - len(sequence.request.prompt_ids)
                for i in range(len(tokens)):
                    right = texts[sequence.request.id][done + i]
                    tokens[i] = right if rng.random() < PUBLISHED else (right + 1) % CONFIG["vocab_size"]
            return proposed

        engine._drafter.draft = replaced
    sampling = SamplingParams(temperature=0, max_new_tokens=128)
    for number in range(batch):
        engine.add(Request(str(number), tuple(prompt(number, 128, CONFIG["vocab_size"])), sampling, 0, number, (0,)))
    while engine.usage.completion_tokens < batch:
        engine.step()
    tokens, begun, done = engine.usage.completion_tokens, time.perf_counter(), []
    while engine.has_work:
        done += engine.step()
    seconds = time.perf_counter() - begun
    text = {completion.request_id: completion.token_ids for completion in done}
    assert texts in ({}, text), "drafts changed the text"
    texts |= text
    proposed, accepted = engine.usage.drafts_proposed, engine.usage.drafts_accepted
    return {
        "tokens/s": (engine.usage.completion_tokens - tokens) / seconds,
        "accepted drafts": accepted / max(proposed, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    parser.add_argument("--work", type=Path, default=Path("build/perf"), help="where the checkpoint is kept")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    directory = write_fp8_with_drafts(args.work / "fp8-drafts", write_fp8(args.work / "fp8"))
    results: dict[str, dict[str, float]] = {}

    def report(model: str, batch: int, drafts: int, figures: dict[str, float]) -> None:
        base = results.get(f"{model}, {batch} × 0 drafts", figures)
        figures["times as fast"] = figures["tokens/s"] / base["tokens/s"]
        results[f"{model}, {batch} × {drafts} drafts"] = figures
        print(
            f"{model}: {batch:3} sequences, {drafts} drafts: {figures['tokens/s']:8,.1f} tokens/s, "
            f"{figures['times as fast']:.2f} times as fast, {figures['accepted drafts']:.1%} of the drafts accepted",
            flush=True,
        )

    for batch in BATCHES:
        tiny_text = None
        large_texts: dict[str, tuple[int, ...]] = {}
        for drafts in DRAFTS:
            figures, text = measure_tiny(batch, drafts, "bfloat16")
            assert tiny_text in (None, text), "drafts changed the text"
            tiny_text = text
            report("tiny-r1", batch, drafts, figures)
            report("16 layers", batch, drafts, measure_large(directory, batch, drafts, large_texts))
    if args.json:
        args.json.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
