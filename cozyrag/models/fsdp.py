"""A sharded generator: weights, gradients and optimizer state split over the processes while a phase trains it.

For generators that fit into each process, but not together with the optimizer state. PyTorch's fully_shard (FSDP2)
shards a copy; the whole model stays in host memory and is updated when the phase saves or ends, so evaluation and
saving never see shards. Left out: the retriever, which is small, and Accelerate's own FSDP and DeepSpeed, which require
every model of a run to be prepared their way (docs/decisions.md). PyTorch's FSDP takes a second to import.
"""

import copy
from collections.abc import Collection, Iterable, Mapping
from functools import partial
from typing import Literal

import torch
from torch import nn

from cozyrag.errors import InputError

NONE = "none"
GRAD: Literal["shard_grad_op"] = "shard_grad_op"  # FSDP's name for ZeRO-2
FULL: Literal["full_shard"] = "full_shard"  # and for ZeRO-3
LAUNCHED = "ACCELERATE_USE_FSDP"  # set by accelerate launch for an FSDP config
CONFIGS = "accelerate_configs/fsdp.yaml or accelerate_configs/zero2.yaml"


def launched(environment: Mapping[str, str]) -> Literal["shard_grad_op", "full_shard"] | None:
    """The sharding that an FSDP config of `accelerate launch` sets in the environment; None without one.

    Raises InputError if the config asks for an option of FSDP that is not supported.
    """
    if environment.get(LAUNCHED, "false").lower() != "true":
        return None
    version = environment.get("FSDP_VERSION", "1")
    if version != "2":
        raise InputError(
            f"Expected fsdp_version: 2 in the config of accelerate launch, found {version}, which cannot make the "
            f"generator whole between phases. Use {CONFIGS}."
        )
    for name in ("OFFLOAD_PARAMS", "ACTIVATION_CHECKPOINTING"):
        if environment.get(f"FSDP_{name}", "false").lower() == "true":
            raise InputError(
                "Expected an FSDP config that only shards the generator, "
                f"found fsdp_{name.lower()}: true, which is not supported. Use {CONFIGS}."
            )
    reshard = environment.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower()
    return GRAD if reshard in ("false", GRAD) else FULL


def is_split(sharding: str | None) -> bool:
    """Whether a value of --generator_sharding shards anything."""
    return sharding not in (None, NONE)


def check_sharding(sharding: str | None, *, processes: int, precision: str) -> None:
    """Raise InputError if a sharded generator cannot be trained: with a single process, or in fp16."""
    if not is_split(sharding):
        return
    if processes == 1:
        raise InputError(
            f"--generator_sharding {sharding}: expected several processes, found one, which would hold all shards. "
            f"Launch with {CONFIGS}, or omit the setting."
        )
    if precision == "fp16":
        raise InputError(
            f"--generator_sharding {sharding}: expected --mixed_precision bf16 or no, found fp16, whose loss scale "
            "each process would choose from its own shard. Use bf16 or no."
        )


class Sharded:
    """This process's shards of a module, in `module`, which computes what the whole one does.

    All processes create one at the same time, from equal weights. Tied weights stay tied.

    Args:
        whole: is moved to host memory and has the weights of the last `gather`.
        blocks: names of the classes whose modules are gathered and freed one by one; everything else is one more unit.
        sharding: FULL frees gathered weights after the forward pass and gathers them again for the backward pass,
            GRAD keeps them in between: faster, with more memory.
        precision: "bf16" computes in bf16, with weights, gradient sums and optimizer in float32; else all is float32.
    """

    def __init__(
        self, whole: nn.Module, blocks: Collection[str], *, device: torch.device, sharding: str, precision: str
    ):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        self.whole = whole.to("cpu")
        # The copy first shares the storage of the weights; fully_shard moves this process's shard to the device.
        shared = {id(weight): nn.Parameter(weight.data, weight.requires_grad) for weight in whole.parameters()}
        self.module = copy.deepcopy(whole, shared)
        policy = MixedPrecisionPolicy(*((torch.bfloat16, torch.float32) if precision == "bf16" else ()))
        mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
        shard = partial(fully_shard, mesh=mesh, mp_policy=policy)
        for module in [module for module in self.module.modules() if type(module).__name__ in blocks]:
            shard(module, reshard_after_forward=sharding == FULL)
        shard(self.module)

    @torch.no_grad()
    def gather(self) -> None:
        """Update the trained weights of `whole` on every process, one at a time. All processes must call it."""
        shards = dict(self.module.named_parameters())
        for name, weight in self.whole.named_parameters():
            if weight.requires_grad:
                weight.copy_(joined(shards[name]))


def joined(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a sharded tensor; another tensor unchanged. All processes must call it."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def held_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes that this process holds of tensors, sharded or not."""
    from torch.distributed.tensor import DTensor

    parts = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return sum(part.numel() * part.element_size() for part in parts)


def keep_state_whole(optimizer: torch.optim.Optimizer) -> None:
    """Make an optimizer of sharded weights save and load its state as one of whole weights does; no effect on others.

    So a checkpoint is the same with and without sharding and for any number of processes. `state_dict` gathers: all
    processes must call it, and the first one gets the state in host memory, one tensor after the other.
    """
    from torch.distributed.tensor import DTensor

    if any(isinstance(weight, DTensor) for group in optimizer.param_groups for weight in group["params"]):
        optimizer.register_state_dict_post_hook(_gathered)
        optimizer.register_load_state_dict_pre_hook(_split)


def _gathered(optimizer: torch.optim.Optimizer, held: dict) -> dict:
    first, state = torch.distributed.get_rank() == 0, {}
    for number, values in held["state"].items():
        whole = {name: joined(value) for name, value in values.items()}
        if first:
            state[number] = {name: value.cpu() for name, value in whole.items()}
    return held | {"state": state}


def _split(optimizer: torch.optim.Optimizer, held: dict) -> dict:
    from torch.distributed.tensor import DTensor, distribute_tensor

    weights = [weight for group in optimizer.param_groups for weight in group["params"]]

    def part(value: torch.Tensor, weight: DTensor) -> torch.Tensor:
        if value.shape != weight.shape:
            return value  # the step counter
        # Every process has read the whole state, so none needs data from the first one.
        return distribute_tensor(value.to(weight.device), weight.device_mesh, weight.placements, src_data_rank=None)

    state = {
        number: {name: part(value, weights[number]) for name, value in values.items()}
        for number, values in held["state"].items()
    }
    return held | {"state": state}
