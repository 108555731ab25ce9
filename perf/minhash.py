"""Near-duplicates by MinHash: the filter `near_answers` and datatrove's pipeline on one collection, in one run.

    pip install -c constraints.txt -r perf/requirements.txt
    python perf/minhash.py [--json FILE] [--texts N] [--rounds N] [--seed N]

The collection is families of four texts of R1's length (2,600 words in the median): a random text and three copies,
in each of which up to one word in twenty is replaced, so that the Jaccard similarity of two is between 0.4 and 1.
Both get the same texts in memory, words between spaces, shingles of five, and 20 bands of 6 permutations, and are
timed from the first text to the clusters, each in a process of its own that has imported everything, in turns; the
figures are medians. datatrove writes the files of its three stages to a temporary directory, as our filter does.

Recall is over the pairs whose exact Jaccard similarity reaches the threshold of the filter: the share whose two texts
are in one cluster. Precision is the share of the dropped texts that have such a partner. (datatrove takes every pair
that shares a band; our filter compares the signatures of these pairs with the threshold.)
"""

import argparse
import json
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from distill.filters.judged import Judged

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

FAMILY, CHANGED = 4, 0.05  # texts of a family, and the largest share of words that a copy replaces
MEDIAN, SIGMA, LONGEST = 2600, 0.9, 20_000  # words
VOCABULARY = 20_000
TEXTS, ROUNDS = 1200, 3
SHINGLE, BANDS, ROWS, THRESHOLD = 5, 20, 6, 0.8  # the filter's defaults, given to both


def collection(number: int, seed: int) -> list[str]:
    """The texts, shuffled."""
    draws = np.random.default_rng(seed)
    vocabulary = np.array([f"w{word}" for word in range(VOCABULARY)], dtype=object)
    texts: list[str] = []
    while len(texts) < number:
        length = int(min(LONGEST, max(50, MEDIAN * np.exp(SIGMA * draws.standard_normal()))))
        words = vocabulary[draws.integers(0, VOCABULARY, length)]
        for copy in range(FAMILY):
            changed = words.copy()
            places = draws.random(length) < draws.uniform(0, CHANGED) * (copy > 0)
            changed[places] = vocabulary[draws.integers(0, VOCABULARY, int(places.sum()))]
            texts.append(" ".join(changed))
    return [texts[place] for place in draws.permutation(number)]


def exact_pairs(texts: list[str]) -> set[tuple[int, int]]:
    """The pairs whose Jaccard similarity reaches the threshold, from sets of shingles."""
    sizes: list[int] = []
    holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for number, text in enumerate(texts):
        words = text.split()
        shingles = set(zip(*(words[start:] for start in range(SHINGLE)), strict=False))
        sizes.append(len(shingles))
        for shingle in shingles:
            holders[shingle].append(number)
    shared = Counter(pair for numbers in holders.values() for pair in combinations(numbers, 2))
    return {(i, j) for (i, j), both in shared.items() if both >= THRESHOLD * (sizes[i] + sizes[j] - both)}


# ---- the two sides: text number → number of its cluster


@dataclass(frozen=True)
class Corpus:
    """Judged traces in memory, as a filter sees them."""

    traces: "list[Judged]"
    scratch: Path

    def __len__(self) -> int:
        return len(self.traces)

    def __iter__(self) -> "Iterator[Judged]":
        return iter(self.traces)


def ours(texts: list[str], scratch: Path) -> tuple[float, list[int]]:
    """Seconds and clusters of `near_answers`: its notes, and its verdicts."""
    from distill.filters.base import Candidate, Resources
    from distill.filters.judged import Judged
    from distill.filters.near_answers import NearAnswers
    from distill.prompts.prompt import Prompt
    from distill.traces.trace import Trace

    filter_, resources = NearAnswers(shingle=SHINGLE, bands=BANDS, rows=ROWS, threshold=THRESHOLD), Resources()
    prompt = Prompt.from_question("All of them?", None)
    traces = [Trace(prompt, number, 0, text, None, text, "stop", "synthetic") for number, text in enumerate(texts)]
    judged = [Judged.of(trace, []) for trace in traces]
    begun = time.perf_counter()
    for trace, each in zip(traces, judged, strict=True):
        each.notes[filter_.name] = filter_.note(Candidate(trace, resources))
    clusters = list(range(len(texts)))
    for (_, number), verdict in filter_.judge_corpus(Corpus(judged, scratch), resources):
        if not verdict.keep:
            stays = verdict.evidence["of_sample"]
            assert isinstance(stays, int)
            clusters[number] = stays
    return time.perf_counter() - begun, clusters


def datatrove(texts: list[str], scratch: Path) -> tuple[float, list[int]]:
    """Seconds and clusters of datatrove's signatures, buckets and clusters."""
    from datatrove.data import Document
    from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupSignature
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.utils.text import TextNormConfig
    from datatrove.utils.word_tokenizers import WordTokenizer
    from loguru import logger

    class Spaces(WordTokenizer):  # type: ignore[misc]  # datatrove is not installed where types are checked
        def word_tokenize(self, text: str) -> list[str]:
            return text.split()

        def sent_tokenize(self, text: str) -> list[str]:
            return [text]

        def span_tokenize(self, text: str) -> list[tuple[int, int]]:
            return [(0, len(text))]

    logger.remove()
    norms = TextNormConfig(True, False, False, False, False)  # lower case alone, as ours
    config = MinhashConfig(n_grams=SHINGLE, num_buckets=BANDS, hashes_per_bucket=ROWS, norm_config=norms)
    documents = [Document(text, str(number)) for number, text in enumerate(texts)]
    signatures, buckets, clusters = (str(scratch / stage) for stage in ("signatures", "buckets", "clusters"))
    begun = time.perf_counter()
    MinhashDedupSignature(signatures, config, Spaces()).run(iter(documents))
    for rank in range(BANDS):
        MinhashDedupBuckets(signatures, buckets, config=config).run(rank=rank, world_size=BANDS)
    MinhashDedupCluster(buckets, clusters, config, save_cluster_id=True).run()
    seconds = time.perf_counter() - begun
    numbers = list(range(len(texts)))
    heads: dict[int, int] = {}
    for number, cluster in struct.iter_unpack("<2I", (Path(clusters) / "000000.clusters").read_bytes()):
        numbers[number] = heads.setdefault(cluster, number)
    return seconds, numbers


SIDES = {"ours": ours, "datatrove": datatrove}


# ---- measuring


def figures(clusters: list[int], similar: set[tuple[int, int]]) -> dict[str, float]:
    """Recall and precision by exact similarity."""
    partners = {number for pair in similar for number in pair}
    dropped = [number for number, head in enumerate(clusters) if head != number]
    return {
        "recall": sum(clusters[i] == clusters[j] for i, j in similar) / len(similar),
        "precision": sum(number in partners for number in dropped) / len(dropped),
        "dropped": len(dropped),
    }


def in_its_own_process(side: str, texts: int, seed: int) -> dict[str, object]:
    command = [sys.executable, __file__, "--measure", side, "--texts", str(texts), "--seed", str(seed)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{done.stderr}\nerror: {side} failed; the peer is installed by pip install -r perf/requirements.txt")
    measured: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return measured


def compare(number: int, rounds: int, seed: int) -> dict[str, object]:
    """Figures of both sides, and `ratios`: ours ÷ datatrove's."""
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    measured: dict[str, dict[str, float]] = {}
    texts = collection(number, seed)
    similar = exact_pairs(texts)
    for _ in range(rounds):
        for side in SIDES:
            done = in_its_own_process(side, number, seed)
            clusters, taken = done["clusters"], done["seconds"]
            assert isinstance(clusters, list) and isinstance(taken, float)
            seconds[side].append(taken)
            measured[side] = figures(clusters, similar)
    for side, taken_each in seconds.items():
        measured[side]["texts/s"] = number / statistics.median(taken_each)
    mine, other = measured["ours"], measured["datatrove"]
    settings = {
        "texts": number,
        "words": sum(len(text.split()) for text in texts),
        "shingle": SHINGLE,
        "rounds": rounds,
    }
    return {
        **settings,
        "bands": BANDS,
        "permutations": BANDS * ROWS,
        "pairs above the threshold": len(similar),
        **measured,
        "ratios": {name: mine[name] / other[name] for name in ("texts/s", "recall", "precision")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    parser.add_argument("--texts", type=int, default=TEXTS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--measure", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        with tempfile.TemporaryDirectory() as scratch:
            seconds, clusters = SIDES[args.measure](collection(args.texts, args.seed), Path(scratch))
        print(json.dumps({"seconds": seconds, "clusters": clusters}))
        return
    results = compare(args.texts, args.rounds, args.seed)
    print(json.dumps(results, indent=2))
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
