"""The benchmark of loading: what it measures shows who holds a whole model, and both ways train the same model."""

import pytest

from benchmarks.loading import contest, make_model, row

SPARE = 60e6  # bytes that loading takes beside weights


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loading")
    return folder, make_model(folder, "small")


def test_ranks_that_read_their_parts_hold_a_share_and_a_layer(model):
    folder, sizes = model
    allowed = sizes["weights"] / 2 + sizes["layer"] + SPARE
    parts, whole = (contest(folder, way, 2, False, sizes) for way in ("parts", "whole"))
    assert [rank["loss"] for rank in parts] == [rank["loss"] for rank in whole]
    # of whole models the first rank only reads its mapped files, and the other gets all weights from it
    assert max(rank["load_peak"] for rank in parts) < allowed < max(rank["load_peak"] for rank in whole)
    assert row("parts", 2, True, sizes, None).endswith("killed | | | |")
    assert f"{sizes['weights'] / 2e9 + sizes['layer'] / 1e9 + 1:.2f} |" in row("parts", 2, False, sizes, parts)
