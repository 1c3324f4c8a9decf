"""A generator in parts: weights, gradients and optimizer state split over the processes while a phase trains it.

For generators that fit into each process, but not together with what AdamW keeps of them. PyTorch's fully_shard (FSDP2) does
the splitting, on a copy; the whole model rests in host memory and takes the weights back when the phase saves or ends, so
examining, comparing and saving never meet a part. Left out: the retriever, which is small and stays whole, and Accelerate's
own FSDP and DeepSpeed, which want every model of a run prepared their way (docs/decisions.md). PyTorch's modules for it are
imported where they are used: they take a second that other runs need not wait.
"""

import copy
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import nn

from cozyrag.errors import InputError

NONE = "none"
GRAD = "shard_grad_op"  # FSDP's name for what ZeRO-2 splits
FULL = "full_shard"  # and for what ZeRO-3 does
LAUNCHED = "ACCELERATE_USE_FSDP"  # what accelerate launch sets for an FSDP config
CONFIGS = "accelerate_configs/fsdp.yaml or accelerate_configs/zero2.yaml"


def launched(environment: Mapping[str, str]) -> str | None:
    """The sharding that an FSDP config of `accelerate launch` asks for, as it stands in the environment; None without one.

    Raises:
        InputError: the config asks for more of FSDP than is done here.
    """
    if environment.get(LAUNCHED, "false").lower() != "true":
        return None
    if environment.get("FSDP_VERSION", "1") != "2":
        raise InputError(
            f"Expected fsdp_version: 2 in the config of accelerate launch, found {environment.get('FSDP_VERSION', '1')}, whose models cannot be made "
            f"whole again between phases. Use {CONFIGS}."
        )
    for name in ("OFFLOAD_PARAMS", "ACTIVATION_CHECKPOINTING"):
        if environment.get(f"FSDP_{name}", "false").lower() == "true":
            raise InputError(
                f"Expected an FSDP config that only splits the generator, found fsdp_{name.lower()}: true, which would not be done. Use {CONFIGS}."
            )
    again = environment.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower()
    return GRAD if again in ("false", "shard_grad_op") else FULL


def is_split(sharding: str | None) -> bool:
    """Whether a value of --generator_sharding splits anything."""
    return sharding not in (None, NONE)


def check_sharding(sharding: str | None, *, processes: int, precision: str) -> None:
    """Raise InputError where a generator cannot be trained in parts: there is one process, or its precision is fp16."""
    if not is_split(sharding):
        return
    if processes == 1:
        raise InputError(
            f"--generator_sharding {sharding}: expected several processes, found one, which would hold all parts and save nothing. "
            f"Launch with {CONFIGS}, or leave the setting out."
        )
    if precision == "fp16":
        raise InputError(
            f"--generator_sharding {sharding}: expected --mixed_precision bf16 or no, found fp16, whose scale of the loss each process would choose "
            "by its own part. Take one of the two."
        )


class Sharded:
    """The parts of a module on this process, in `module`, which computes what the whole one does.

    All processes make one at the same time, from equal weights. Tied weights stay tied.

    Args:
        whole: rests in host memory from here on, and has the weights of the last `gather`.
        blocks: names of the classes whose modules are gathered and let go one by one; what is outside of them is one more.
        sharding: FULL lets go of gathered weights after the forward pass and gathers them again for the backward pass,
            GRAD keeps them in between: faster, for more memory.
        precision: "bf16" computes in it, with weights, sums of gradients and optimizer in float32; else all is float32.
    """

    def __init__(
        self, whole: nn.Module, blocks: Collection[str], *, device: torch.device, sharding: str, precision: str
    ):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        self.whole = whole.to("cpu")
        # The copy's weights begin as the same storage; fully_shard takes this process's part of each onto the device.
        begun = {id(weight): nn.Parameter(weight.data, weight.requires_grad) for weight in whole.parameters()}
        self.module = copy.deepcopy(whole, begun)
        halved = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32} if precision == "bf16" else {}
        processes = torch.distributed.get_world_size()
        how = {"mesh": init_device_mesh(device.type, (processes,)), "mp_policy": MixedPrecisionPolicy(**halved)}
        for module in [module for module in self.module.modules() if type(module).__name__ in blocks]:
            fully_shard(module, reshard_after_forward=sharding == FULL, **how)
        fully_shard(self.module, **how)

    @torch.no_grad()
    def gather(self) -> None:
        """Bring the trained weights of `whole` up to date on every process, one at a time. All processes must call it."""
        parts = dict(self.module.named_parameters())
        for name, weight in self.whole.named_parameters():
            if weight.requires_grad:
                weight.copy_(parts[name].full_tensor())


def joined(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that is split over the processes as a whole one; another as it is. All processes must call it."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def held_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes that this process holds of tensors, split ones or not."""
    from torch.distributed.tensor import DTensor

    parts = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return sum(part.numel() * part.element_size() for part in parts)


def keep_state_whole(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimizer of split weights give and take its state as one of whole weights does; to others nothing is done.

    So a checkpoint is the same with and without sharding and for any number of processes. `state_dict` gathers: all processes
    must call it, and the first one gets the state, in host memory, one tensor after the other.
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
    from torch.distributed.tensor import distribute_tensor

    weights = [weight for group in optimizer.param_groups for weight in group["params"]]

    def part(value: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if value.shape != weight.shape:
            return value  # the count of steps
        # Every process has read the whole state, so each takes its part without asking the first one.
        return distribute_tensor(value.to(weight.device), weight.device_mesh, weight.placements, src_data_rank=None)

    state = {
        number: {name: part(value, weights[number]) for name, value in values.items()}
        for number, values in held["state"].items()
    }
    return held | {"state": state}
