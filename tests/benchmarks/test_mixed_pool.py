"""The pool of mixed quality is what it says, and its labels tell what was done to each row."""

import json
import random
from collections import Counter

import pytest

from benchmarks import mixed_pool
from ds_llm.errors import UserError


@pytest.fixture(scope="module")
def texts():
    try:
        return mixed_pool.passages()
    except UserError as error:
        pytest.skip(f"no package index and no cached archive: {error}")


def test_corruptions_do_what_their_labels_say(texts):
    draw = random.Random()
    for text in draw.sample(texts, 30):
        words = mixed_pool.shuffled(text, draw)
        assert words != text and sorted(words.split()) == sorted(text.split())
        misread = mixed_pool.ocr(text, draw)
        assert 0.9 < len(misread) / len(text) < 1.15
        kept = sum((Counter(text) & Counter(misread)).values()) / len(text)
        assert 0.8 < kept < 1  # a tenth is misread
        lines = mixed_pool.repeated(text, draw).split("\n")
        assert len(lines) > 1 and len(set(lines)) == 1 and lines[0] in text
        length = draw.randint(300, 900)
        page = mixed_pool.boilerplate(length, draw)
        assert length <= len(page) < length + 150 + page.count("\n") and "{" not in page


def test_pools_share_no_text_with_pretraining_and_held_out_rows(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(mixed_pool, "declarations", lambda: [f"erklärung {i}" for i in range(40)])  # npm's
    pool = mixed_pool.pool(200, seed=random.randrange(1000))
    counts = Counter(row["kind"] for row in pool)
    assert counts == {"clean": 80, "news": 20, **dict.fromkeys(mixed_pool.KINDS, 20)}
    assert len({row["text"] for row in pool}) == 200
    others = [json.loads(line)["text"] for path in mixed_pool.write_texts(tmp_path).values() for line in path.open()]
    ends = {end for text in others for end in (text[:60], text[-60:])}
    for row in pool:
        if row["kind"] in ("clean", "news"):
            assert row["text"][:60] not in ends and row["text"][-60:] not in ends
    assert mixed_pool.pool(200, seed=7) == mixed_pool.pool(200, seed=7) != mixed_pool.pool(200, seed=8)
    with pytest.raises(UserError, match="only 40 foreign texts for 50 rows"):
        mixed_pool.pool(500, seed=0)


def test_declarations_are_foreign(tmp_path):
    try:
        found = mixed_pool.declarations()
    except UserError as error:
        pytest.skip(f"no package index and no cached archive: {error}")
    assert len(found) >= 300 and all(len(text) >= mixed_pool.ARTICLE for text in found)
    english = sum(" the " in text and " of " in text for text in found)
    assert english == 0 and "<" not in "".join(found)
