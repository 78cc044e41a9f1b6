"""Skips bad optimizer steps, refuses to save weights that are not finite, and names the samples at fault.

All ranks decide alike; functions marked as collective need all of them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from ds_llm.checkpoint import folder as checkpoint
from ds_llm.compat.deepspeed import own_part
from ds_llm.config.sections import StabilityConfig
from ds_llm.distributed.collectives import gather
from ds_llm.errors import UserError

SHOWN = 8  # most samples to name


def veto(options: StabilityConfig, state: dict, loss: float, aux: float, valid: float, unit: str) -> str | None:
    """The reason to skip a step with these figures, which are reduced over the ranks; None for a good step."""
    if not valid:
        return f"no supervised {unit} in the batch"
    if not math.isfinite(loss) or not math.isfinite(aux):
        return f"the loss is {loss if not math.isfinite(loss) else aux}"
    recent = state["recent_losses"]
    if options.spike_factor and len(recent) == options.spike_window:
        usual = statistics.median(recent)
        if loss > options.spike_factor * usual:
            return f"the loss {loss:.4g} is more than {options.spike_factor:g} x the recent median {usual:.4g}"
    return None


def count(options: StabilityConfig, state: dict, reason: str | None, loss: float, fault: bool) -> None:
    """Update the run's state after a step. reason: why it was skipped, None if applied. fault: it counts as bad."""
    if reason is None:
        state["bad_steps"] = 0
        if options.spike_factor:
            state["recent_losses"] = (state["recent_losses"] + [loss])[-options.spike_window :]
    else:
        state["bad_steps"] += fault
        state["skipped_steps"] += 1


def given_up(state: dict, output: Path, reason: str) -> UserError:
    """The error that ends a run after too many skipped steps in a row."""
    return UserError(
        f"training stopped at step {state['step']}: {state['bad_steps']} steps in a row skipped, the last because "
        f"{reason}; {_good(output)}. Lower optim.lr or look at the data of these steps"
    )


def blame(picks: Sequence[Sequence[int]], losses: Sequence[torch.Tensor]) -> str:
    """ " in samples 3, 17 and 2 more": the samples of micro-batches with a loss that is not finite. Collective.

    picks: the sample numbers of each micro-batch of this rank. losses: the summed loss of each.
    """
    mine = [int(i) for pick, loss in zip(picks, losses, strict=True) if not torch.isfinite(loss).all() for i in pick]
    found = sorted(set().union(*gather(mine)))
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return f" in samples {', '.join(map(str, found[:SHOWN]))}{more}" if found else ""


@torch.no_grad()
def check_weights(model: nn.Module, output: Path, step: int, source: str | None) -> None:
    """Raise `UserError` where a weight of `model` is NaN or infinite on any rank. Collective.

    Such a model cannot learn, and its checkpoints would replace the good ones. source: name of the loaded model.
    """
    bad = None
    for name, parameter in model.named_parameters():
        held = own_part(parameter)
        if held.is_floating_point() and not torch.isfinite(held).all():
            bad = name
            break
    name = next(filter(None, gather(bad)), None)
    if name is None:
        return
    if step:
        raise UserError(f"training stopped at step {step}, not saved: the weight {name} is not finite; {_good(output)}")
    raise UserError(f"{source or 'the model'}: the weight {name} is not finite; training cannot begin")


def _good(output: Path) -> str:
    done = checkpoint.steps(output)
    return f"the last good checkpoint is {checkpoint.folder(output, done[0])}" if done else "none was saved"
