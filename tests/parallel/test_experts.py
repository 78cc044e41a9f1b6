"""Which experts ranks can share is said from the configuration, before a model is loaded."""

import pytest
from models.architectures import NOT_SHARED, OTHER_EXPERTS, tiny

from ds_llm.errors import UserError
from ds_llm.parallel.experts import check


@pytest.mark.parametrize("name", ["deepseek_v3", "ernie4_5_moe", "olmoe"])
def test_experts_with_one_weight_for_each_projection_are_shared(name):
    check(tiny(name).config, 2)


@pytest.mark.parametrize("name", [*NOT_SHARED, *OTHER_EXPERTS])
def test_other_experts_are_refused(name):
    with pytest.raises(UserError, match=r"^parallel\.expert: .* cannot be shared: that needs one 3-D .*zero=3$"):
        check(tiny(name).config, 2)
