"""Multi-token prediction: what the embedded teacher's draft layer saves.

    python perf/drafts.py [--json FILE] [--threads N]

The embedded teacher solves its own problems with none to three drafts at a time, at several batch sizes: tokens a
second, and the share of drafts that stand. The text is the same each time, and that is checked.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

BATCHES, DRAFTS = (1, 8, 64), (0, 1, 2, 3)


def measure(batch: int, drafts: int, dtype: torch.dtype) -> tuple[dict[str, float], list[tuple[int, ...]]]:
    from distill.chat import Chat
    from distill.engine import Engine, Request, SamplingParams
    from distill.prompts import load_prompts
    from distill.recipe import ProceduralPrompts

    directory = ROOT / "teachers" / "tiny-r1"
    chat = Chat.load(directory)
    source = ProceduralPrompts(kind="procedural", name="arithmetic", split="heldout", limit=40 + 8 * batch)
    prompts = [tuple(chat.prompt_ids(prompt.messages)) for prompt in load_prompts([source])]
    sampling = SamplingParams(temperature=0.6, top_p=0.95, max_new_tokens=192, stop_token_ids=chat.stop_token_ids)
    requests = [Request(str(n), ids, sampling, 0, n, (0,)) for n, ids in enumerate(prompts)]
    engine = Engine.load(directory, dtype=dtype, max_batch=batch, num_speculative_tokens=drafts)
    list(engine.generate(requests[: batch + 1]))  # set up
    tokens, begun = engine.tokens_generated, time.perf_counter()
    done = {c.request_id: c.token_ids for c in engine.generate(requests)}
    seconds = time.perf_counter() - begun
    proposed, stood = engine.drafts
    figures = {"tokens/s": (engine.tokens_generated - tokens) / seconds, "drafts that stand": stood / max(proposed, 1)}
    return figures, [done[request.id] for request in requests]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results: dict[str, dict[str, float]] = {}
    for batch in BATCHES:
        texts = None
        for drafts in DRAFTS:
            figures, text = measure(batch, drafts, torch.bfloat16)
            assert texts is None or text == texts, "drafts changed the text"
            texts = text
            figures["times as fast"] = figures["tokens/s"] / results.get(f"{batch} × 0", figures)["tokens/s"]
            results[f"{batch} × {drafts}"] = figures
            print(
                f"{batch:3} sequences, {drafts} drafts: {figures['tokens/s']:7,.0f} tokens/s, "
                f"{figures['times as fast']:.2f} times as fast, {figures['drafts that stand']:.1%} stand"
            )
    if args.json:
        args.json.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
