"""The kernel benchmark runs without a GPU, and times nothing that computes something else."""

import json

import pytest
import torch

from benchmarks import kernels
from benchmarks.kernels import KernelCase, Rates, load_cases


def test_results_are_written(tmp_path, capsys):
    path = tmp_path / "kernels.json"
    kernels.main(["--kernel", "expand", "--small", "--no-compile", "--seconds", "0.001", "--json", str(path)])
    result = json.loads(path.read_text())
    assert {"date", "commit", "machine", "versions", "measured", "copy_bytes_per_second", "rows"} <= set(result)
    assert result["rows"] and all("expand" in row["kernel"] for row in result["rows"])
    for row in result["rows"]:
        assert row["microseconds"] > 0 and row["others"]["eager"] > 0
        expected = 1e6 * row["bytes"] / result["copy_bytes_per_second"]
        assert row["roofline_microseconds"] == pytest.approx(expected)
    printed = capsys.readouterr().out
    assert ("Triton kernels on" in printed) == torch.cuda.is_available()
    assert ("no Triton kernel is timed here" in printed) != torch.cuda.is_available()


def test_byte_counts_need_no_measurement(capsys, monkeypatch):
    monkeypatch.setattr(kernels, "time_functions", None)
    kernels.main(["--bytes"])
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) == 1 + len(list(load_cases(small=False)))
    # half of the 8192 x 8192 bf16 weights and all mask bits read, all weights written, an int64 per row read
    assert f"{8192 * (8192 + 8192 // 8 + 2 * 8192 + 8):,}" in printed


def test_a_wrong_kernel_is_not_timed():
    device = torch.device("cpu")
    rates = Rates(device, 0.001)
    case = KernelCase("add", "2", 8, lambda d: {"ours": lambda: torch.ones(2), "eager": lambda: torch.tensor([1, 1.1])})
    with pytest.raises(SystemExit, match=r"differs from eager by 0\.09"):
        kernels.measure(case, device, rates, compiled=False, seconds=0.001)
    nan = KernelCase(
        "nan", "1", 8, lambda d: {"ours": lambda: torch.full((1,), torch.nan), "eager": lambda: torch.ones(1)}
    )
    with pytest.raises(SystemExit, match="inf"):
        kernels.measure(nan, device, rates, compiled=False, seconds=0.001)


def test_an_unknown_kernel_is_refused(capsys):
    with pytest.raises(SystemExit) as error:
        kernels.main(["--kernel", "nothing"])
    assert error.value.code == 2 and "nothing" in capsys.readouterr().err
