"""Two processes that score unequal shares of some samples with a sharded and with a split model."""

import json
import sys
from pathlib import Path

import numpy as np

from ds_llm.distributed.environment import rank
from ds_llm.scoring.forward import Scorer
from ds_llm.scoring.metrics import Sample

WAYS = {
    "zero3": {"zero3": True},
    "offload": {"zero3": True, "offload": True},
    "tensor_parallel": {"tensor_parallel": 2},
}


def main(folder: Path) -> None:
    rows = [Sample(np.array(ids), np.array(scored)) for ids, scored in json.loads((folder / "rows.json").read_text())]
    batches = [rows[:2], rows[2:5], rows[5:6], rows[6:]]
    shares = [batches[:3], batches[3:]]
    found = {}
    for way, options in WAYS.items():
        with Scorer(folder / "model", ["entropy", "ifd"], dtype="fp32", **options) as scorer:
            assert scorer.collective
            scores = [row for batch in shares[rank()] for row in scorer.score(batch)]
            for _ in range(max(map(len, shares)) - len(shares[rank()])):
                scorer.idle()
            held = sum(p.numel() for p in scorer.model.parameters())
            found[way] = {"scores": scores, "held": held, "fingerprint": scorer.fingerprint}
    (folder / f"rank-{rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
