"""The device on which Triton kernels are checked: the GPU where there is one, else Triton's interpreter."""

from collections.abc import Iterator

import pytest
import torch

from ds_llm.kernels import _triton


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module")
def poisoned() -> Iterator[None]:
    """Fills every tensor that torch allocates uninitialised with NaN (or the largest integer)."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before


@pytest.fixture(params=["torch", "triton"])
def path(request, device: torch.device) -> Iterator[str]:
    """What operators run: the torch references, or the kernels, interpreted where there is no GPU."""
    if request.param == "torch" and device.type == "cuda":
        pytest.skip("CUDA tensors go to the kernels")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_triton, "interpret_on_cpu", request.param == "triton")
        yield request.param
