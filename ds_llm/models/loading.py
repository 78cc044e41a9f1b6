"""`ds_llm.pretrained.loading` under the name by which other programs import it."""

from ds_llm.pretrained.loading import *  # noqa: F403
