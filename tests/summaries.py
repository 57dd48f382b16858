"""Summaries of runs, as `diva-lab run` makes them, for a report."""

import numpy as np
import pandas as pd


def summary_of(seeds: int = 1, **changes: float) -> pd.DataFrame:
    """A summary of the original, DIVA and a random push; `changes` are DIVA's measures with / as __."""
    row = {"pairs/mean": 0.18, "pairs/mean/low": 0.16, "pairs/mean/high": 0.2, "zeroshot": 0.96, "zeroshot/low": 0.95}
    row |= {"zeroshot/high": 0.97, "probe/mean": 0.5, "nmi": 0.8, "acc": 0.8, "ari": 0.7, "emoji/mean": np.nan}
    diva = row | {name.replace("__", "/"): value for name, value in changes.items()}
    rows = [
        {"objective": name, "seed": seed, **values, "note": "", "run": f"{name}-{seed}"}
        for name, values in {"none": row, "diva": diva, "perturb-norm": row}.items()
        for seed in range(seeds)
    ]
    table = pd.DataFrame(rows)
    table.loc[table["objective"] == "diva", "pairs/mean"] += 0.01 * np.arange(seeds)
    return table


BETTER = {"pairs__mean": 0.28, "pairs__mean__low": 0.26, "pairs__mean__high": 0.3, "zeroshot": 0.955}
