"""Fit ratings by a peer library, in the peers' own environment: one JSON request per line in, one answer per line out.

A request holds `library`, `data` (npz: `shape`, train_* and held_* rows, columns and values) and the library's own
`settings`; the answer the seconds of the fit alone and the RMSE on the held-out entries.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import numpy as np

THREADS = int(os.environ.get("OMP_NUM_THREADS", "2"))
os.environ |= {"LK_NUM_PROCS": "1", "LK_NUM_THREADS": str(THREADS), "LK_NUM_BACKEND_THREADS": str(THREADS)}


def main() -> None:
    """Answer requests until the input ends."""
    for line in sys.stdin:
        request = json.loads(line)
        data = np.load(request["data"])
        fit = {"cmfrec": cmfrec, "lenskit": lenskit}[request["library"]]
        seconds, predicted = fit(data, tuple(map(int, data["shape"])), request["settings"], request["seed"])
        rmse = float(np.sqrt(np.mean((predicted - data["held_value"]) ** 2)))
        print(json.dumps({"seconds": seconds, "rmse": rmse}), flush=True)


def cmfrec(data: Any, shape: tuple[int, int], settings: dict[str, Any], seed: int) -> tuple[float, Any]:
    """cmfrec.CMF on a sparse matrix, without the tables that only later predictions of new users need."""
    from cmfrec import CMF
    from scipy.sparse import coo_matrix

    matrix = coo_matrix((data["train_value"], (data["train_row"], data["train_column"])), shape=shape)
    settings = settings | {"random_state": seed + 1}
    model = CMF(**settings, nthreads=THREADS, precompute_for_predictions=False, finalize_chol=False, verbose=False)
    began = time.perf_counter()
    model.fit(matrix)
    seconds = time.perf_counter() - began
    return seconds, model.predict(data["held_row"], data["held_column"])


def lenskit(data: Any, shape: tuple[int, int], settings: dict[str, Any], seed: int) -> tuple[float, Any]:
    """lenskit's BiasedMFScorer on a data set that is built outside the clock."""
    import pandas as pd
    from lenskit.als import BiasedMFScorer
    from lenskit.data import from_interactions_df
    from lenskit.parallel import ensure_parallel_init
    from lenskit.training import TrainingOptions

    ensure_parallel_init()
    table = {"user_id": data["train_row"], "item_id": data["train_column"], "rating": data["train_value"]}
    known = from_interactions_df(pd.DataFrame(table))
    scorer = BiasedMFScorer(**settings)
    began = time.perf_counter()
    scorer.train(known, TrainingOptions(rng=seed))
    seconds = time.perf_counter() - began
    users, items = scorer.users.numbers(data["held_row"]), scorer.items.numbers(data["held_column"])
    products = np.einsum("ij,ij->i", scorer.user_embeddings[users], scorer.item_embeddings[items])
    bias = scorer.bias
    return seconds, products + bias.global_bias + bias.user_biases[users] + bias.item_biases[items]


if __name__ == "__main__":
    main()
