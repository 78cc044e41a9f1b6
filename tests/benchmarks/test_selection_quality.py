"""How the selection benchmark judges picks: against brute force on random scores."""

import numpy as np

from benchmarks import mixed_pool
from benchmarks.selection_quality import SHARES, Bench, Picks, kinds_table, table


def test_picks_are_judged_by_the_labels_of_their_rows(tmp_path, capsys):
    random = np.random.default_rng()
    names = ("clean", "news", *mixed_pool.KINDS)
    seeds, areas = {}, []
    for seed in range(2):
        kinds = np.array([*names, *random.choice(names, 193)])
        clean = np.isin(kinds, ("clean", "news"))
        scores = {"some": random.integers(0, 50, 200) + 20.0 * clean}  # with ties
        orders = {"some": np.argsort(-scores["some"], kind="stable"), "random": random.permutation(200)}
        rows = [{"text": "", "kind": kind} for kind in kinds]
        bench = Bench(tmp_path, rows=200, gate_steps=1, steps=0)
        seeds[seed] = bench.judge(Picks(tmp_path, rows, clean, scores, orders))
        for name, order in orders.items():
            judged = seeds[seed][name]
            for share in SHARES:
                count = round(share * 200)
                assert judged["clean"][share] == sum(clean[i] for i in order[:count]) / count
            assert judged["loss"] is None and sum(judged["kinds"].values()) == 20
        good = scores["some"][clean]
        for kind in mixed_pool.KINDS:
            bad = scores["some"][kinds == kind]
            wins = ((good[:, None] > bad) + 0.5 * (good[:, None] == bad)).mean()
            assert np.isclose(seeds[seed]["some"]["auc_by_kind"][kind], wins)
        bad = scores["some"][~clean]
        areas.append(((good[:, None] > bad) + 0.5 * (good[:, None] == bad)).mean())
        assert np.isclose(seeds[seed]["some"]["auc"], areas[-1])
    lines = table(seeds)
    assert f"| {np.mean(areas):.3f} ± {np.std(areas, ddof=1):.3f} |" in next(
        x for x in lines if x.startswith("| some ")
    )
    assert len(lines) == 4 and len(kinds_table(seeds)) == 3  # a random pick has no score
