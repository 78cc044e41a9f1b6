import subprocess
import sys

import pytest

from ds_llm.config.modes import MODES
from ds_llm.train.modes import module


@pytest.mark.parametrize("name", MODES)
def test_the_module_of_a_mode_has_what_its_entry_says(name):
    found, mode = module(name), MODES[name]
    assert callable(found.check) and callable(found.build)
    assert (hasattr(found, "figures"), hasattr(found, "shown")) == (mode.own_figures, mode.shown)


def test_reading_a_configuration_and_a_sweep_takes_no_torch():
    code = "import sys; import ds_llm.config.run, ds_llm.sweeps.file; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
