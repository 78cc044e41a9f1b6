"""Names of DeepSpeed 0.19.8 that its documentation does not promise, and fields of its parameters and engines.

`NAMES` lists each such name with its module and its purpose. `ds_llm.compat.deepspeed_optimizers` reads the fields of
its optimizers. Importing this module does not import DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ds_llm.compat.names import lookup

NAMES = {
    # optimizers, by which ours knows where the fp32 weights are
    "BF16_Optimizer": ("deepspeed.runtime.bf16_optimizer", "bf16 under ZeRO stage 1, gradients in fp32"),
    "DeepSpeedZeroOptimizer": ("deepspeed.runtime.zero.stage_1_and_2", "ZeRO stages 1 and 2"),
    "DeepSpeedZeroOptimizer_Stage3": ("deepspeed.runtime.zero.stage3", "ZeRO stage 3"),
    "FP16_Optimizer": ("deepspeed.runtime.fp16.fused_optimizer", "fp16 and bf16 without ZeRO, fused optimizer"),
    "FP16_UnfusedOptimizer": ("deepspeed.runtime.fp16.unfused_optimizer", "fp16 and bf16 without ZeRO"),
    "DeepSpeedCPULion": ("deepspeed.ops.lion", "Lion for states in the memory of the CPU"),
    "MuonWithAuxAdam": ("deepspeed.runtime.zero.muon.muon_optimizer", "Muon for matrices, AdamW for the rest"),
    # settings and builds
    "DeepSpeedConfigError": ("deepspeed.runtime.config", "what it raises for a configuration it refuses"),
    "AsyncIOBuilder": ("deepspeed.ops.op_builder", "whether access to NVMe can be built here"),
    "set_z3_leaf_modules": ("deepspeed.utils", "has ZeRO-3 gather blocks of experts whole"),
    "groups": ("deepspeed.utils", "process groups of its parallelism"),
    # experts that ranks share (AutoEP)
    "AutoEPMoELayer": ("deepspeed.module_inject.auto_ep_layer", "base of our layer, by which ZeRO knows its weights"),
    "autoep_placement_to_affine_map": ("deepspeed.checkpoint.autoep_affine", "which expert lies where in a checkpoint"),
    "legacy_uniform_autoep_placement_descriptor": ("deepspeed.checkpoint.autoep_affine", "equal shares of experts"),
    "AFFINE_MAP": ("deepspeed.checkpoint.constants", "key in the description of a weight"),
    "AUTOEP_EXPERT_PLACEMENT": ("deepspeed.checkpoint.constants", "key in the description of a weight"),
    "AUTOEP_PARAM_EP_RANK": ("deepspeed.checkpoint.constants", "key in the description of a weight"),
    "AUTOEP_PARAM_LOCAL_EXPERTS": ("deepspeed.checkpoint.constants", "key in the description of a weight"),
    "AUTOEP_PARAM_LOGICAL_SHAPE": ("deepspeed.checkpoint.constants", "key in the description of a weight"),
    "DS_AUTOEP_UC_META": ("deepspeed.checkpoint.constants", "attribute of a weight that holds its description"),
    # layers that ranks share (AutoTP)
    "DS_AUTOTP_UC_META": ("deepspeed.checkpoint.constants", "attribute of a weight that says how it is split"),
}
# The classes in DeepSpeed's files beside tensors and plain values; whatever else a file names is not loaded.
TRUSTED = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
# Fields that the functions below and `deepspeed_optimizers` read or set; no other module may name them.
FIELDS = (
    "ds_id",
    "ds_numel",
    "ds_shape",
    "ds_tensor",
    "ds_zero_placement_family",
    "ds_zero_partition_group_name",
    "ds_zero_partition_process_group",
    "ds_zero_partition_rank",
    "ds_zero_partition_world_size",
    "_convert_to_deepspeed_param",
    "_enable_mem_efficient_linear",
    "zero_param_process_group",
    "cur_scale",
    "checkpoint_engine",
    "zero_nvme_offload_optimizer",
    "__compatible_ops__",
    "loss_scaler",
    "loss_scale_config",
    "bit16_groups",
    "fp16_groups",
    "fp32_partitioned_groups_flat",
    "single_partition_of_fp32_groups",
)
SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # what of a loss scaler changes in a run


# -- parameters --


def is_partitioned(parameter: torch.nn.Parameter) -> bool:
    """Whether ZeRO-3 has partitioned the parameter. Its values are on this rank only while it is gathered."""
    return hasattr(parameter, "ds_id")


def own_part(parameter: torch.nn.Parameter) -> torch.Tensor:
    """This rank's values of a parameter: its partition under ZeRO-3, else the whole parameter."""
    return getattr(parameter, "ds_tensor", parameter)


def unpartitioned_shape(parameter: torch.nn.Parameter) -> torch.Size:
    """The parameter's full shape, also where ZeRO-3 has partitioned it."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def unpartitioned_numel(parameter: torch.nn.Parameter) -> int:
    """The parameter's full number of elements, also where ZeRO-3 has partitioned it."""
    return getattr(parameter, "ds_numel", parameter.numel())


def share_experts(weight: torch.nn.Parameter, group: str) -> None:
    """Mark an expert weight, so that ZeRO reduces and partitions it only among the ranks of one group."""
    weight.allreduce, weight.group_name = False, group
    weight.ds_zero_placement_family, weight.ds_zero_partition_group_name = "autoep_expert", group


def is_shared_expert(parameter: torch.nn.Parameter) -> bool:
    """Whether `share_experts` was called for the parameter."""
    return not getattr(parameter, "allreduce", True)


class Partitioner:
    """Gives this rank its part of parameters as ZeRO-3 does, from values of that part alone. Collective.

    settings: DeepSpeed's JSON. Its own `zero.Init` takes whole parameters, which every rank would have to hold.
    """

    def __init__(self, settings: dict):
        import deepspeed

        self._init = deepspeed.zero.Init(config_dict_or_path=settings)
        if self._init.mem_efficient_linear:  # as DeepSpeed does where it partitions a model itself
            self._init._enable_mem_efficient_linear()

    def partition(
        self, parameter: torch.nn.Parameter, fill: Callable[[int, int, torch.Tensor], None], device: torch.device
    ) -> None:
        """Partition a parameter in place whose values are not set yet. device: where it is gathered later.

        fill: writes the elements start to end of the flattened parameter into a tensor.
        """
        from deepspeed.utils import groups

        if is_shared_expert(parameter):
            parameter.ds_zero_partition_process_group = groups._get_expert_data_parallel_group(parameter.group_name)
        self._init._convert_to_deepspeed_param(parameter)
        ranks, rank, numel = (
            parameter.ds_zero_partition_world_size,
            parameter.ds_zero_partition_rank,
            parameter.numel(),
        )
        part = -(-numel // ranks)
        start, end = min(part * rank, numel), min(part * (rank + 1), numel)
        if self._init.zero_param_process_group is not None:  # hpZeRO: a larger part lies on this machine too
            start, end = 0, numel
        with torch.no_grad():
            fill(start, end, parameter.data.view(-1)[start:end])
        parameter.partition()
        parameter.data = torch.empty(0, dtype=parameter.dtype, device=device)


# -- engines and optimizers --


def leave_states_to_us(engine, read_file) -> None:
    """Make an engine read checkpoint files with `read_file`, and leave states on NVMe to `ds_llm.engine.resharding`.

    DeepSpeed 0.19 loses optimizer states on NVMe when it loads a checkpoint.
    """
    engine.checkpoint_engine.load = read_file
    engine.zero_nvme_offload_optimizer = lambda: False


def loss_scale(optimizer) -> float:
    """The factor by which an optimizer multiplies the loss now. It is 1 for an optimizer without loss scaling."""
    return float(getattr(optimizer, "cur_scale", getattr(optimizer, "loss_scale", 1.0)))


def loss_scaler(optimizer):
    """The object that adapts the loss scale, or None. `SCALER` names the fields that hold its state."""
    return getattr(optimizer, "loss_scaler", None) or getattr(optimizer, "loss_scale_config", None)


def use_gloo_alone() -> None:
    """Keep DeepSpeed from compiling its shared-memory communication. Call it before the process group is made.

    Only `inference_all_reduce` uses that extension, and training never calls it. The extension also adds over all
    processes of the job where the caller asks for a smaller group.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


__getattr__ = lookup("deepspeed", NAMES)
