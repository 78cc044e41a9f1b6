"""What the device may lack: marks that skip the cases which need it, each with one reason wherever it is used."""

import pytest
from deepspeed.accelerator import get_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

NO_FP16 = "DeepSpeed finds no fp16 arithmetic on this device"
# in jobs, which run on the CPU wherever the tests run, and in the tests' own process
FP16_IN_JOBS, FP16_HERE = (bool(kind.is_fp16_supported()) for kind in (CPU_Accelerator(), get_accelerator()))
in_fp16_jobs = pytest.mark.skipif(not FP16_IN_JOBS, reason=NO_FP16)
in_fp16_here = pytest.mark.skipif(not FP16_HERE, reason=NO_FP16)
