"""The processes: which one this is, of how many, how they wait for each other and decide alike; and the device.

Those of a preparation meet before the first image and after the last. Gloo is used on GPUs too: nothing large is sent,
and a wait may last for days, where NCCL's would time out. Those of a training are Accelerate's.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed

from trainer.core.errors import UserError
from trainer.core.progress import format_count

Shared = TypeVar("Shared")
KEPT_GROUPS: list[Any] = []  # see keep_group


@dataclass(frozen=True)
class Processes:
    """This process and the others."""

    rank: int = 0
    world: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process reads the posts and puts the result together."""
        return self.rank == 0

    def share(self, value: Shared) -> Shared:
        """The main process's value, in every process."""
        if self.world == 1:
            return value
        values = [value]
        torch.distributed.broadcast_object_list(values)
        return values[0]

    def gather(self, value: Shared) -> list[Shared]:
        """The value of each process, in each."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(values, value)
        return values

    def decide(self, work: Callable[[], Shared]) -> Shared:
        """What the main process finds, in every process: what a disk shows may differ from one to the other.

        Raises:
            UserError: in all of them, when it does in the main one.
        """
        value, error = None, None
        if self.is_main:
            try:
                value = work()
            except Exception as caught:
                error = caught
        said = None if error is None else str(error) if isinstance(error, UserError) else repr(error)
        value, said = self.share((value, said))
        if error is not None:
            raise error
        if said is not None:
            raise UserError(f"the main process: {said}")
        return value  # type: ignore[return-value]

    def agree(self, work: Callable[[], Shared]) -> Shared:
        """What each process finds for itself.

        Raises:
            UserError: in all of them, when it does in some: one that ended alone would leave the others waiting.
        """
        value, said = None, None
        try:
            value = work()
        except UserError as error:
            said = str(error)
        refused = {rank: text for rank, text in enumerate(self.gather(said)) if text is not None}
        if said is not None:
            raise UserError(said)
        if refused:
            raise UserError("\n".join(f"process {rank}: {text}" for rank, text in refused.items()))
        return value  # type: ignore[return-value]

    def wait(self) -> None:
        """Wait until all are here. One that died ends the others here too."""
        if self.world > 1:
            torch.distributed.barrier()


def keep_group() -> None:
    """Keep the process group, which is about to be ended, for as long as this process lives.

    DDP's reducer would hold it last, and end it under Python's lock while it waits for gloo's threads, one of which may
    need that lock to let a tensor go: the rank would never end.
    """
    if torch.distributed.is_initialized():
        KEPT_GROUPS.append(torch.distributed.group.WORLD)


@contextmanager
def join_processes() -> Iterator[Processes]:
    """The processes that ``accelerate launch`` or ``torchrun`` started; this one alone without them."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Processes()
        return
    torch.distributed.init_process_group("gloo", timeout=timedelta(days=30))
    try:
        yield Processes(int(os.environ["RANK"]), world)
    finally:
        torch.distributed.destroy_process_group()


def uses_cpu() -> bool:
    """Whether there is no GPU, or ACCELERATE_USE_CPU is set."""
    asked = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    return asked or not torch.cuda.is_available()


def suggest_processes(asked: int | None, batch: int, micro_batch: int) -> int:
    """How many processes train on this machine: as many as the config asks for, or one a GPU where its batch allows."""
    processes = asked or (1 if uses_cpu() else torch.cuda.device_count())
    return processes if batch % (micro_batch * processes) == 0 else 1


def choose_device() -> torch.device:
    """This process's GPU, or the CPU where there is none or ACCELERATE_USE_CPU is set.

    Raises:
        UserError: for more processes on a machine than it has GPUs.
    """
    if uses_cpu():
        return torch.device("cpu")
    number, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= gpus:
        raise UserError(
            f"this machine has {format_count(gpus, 'GPU')}, and more processes were started: lower --num_processes"
        )
    return torch.device("cuda", number)


def describe_device(device: torch.device) -> str:
    """The device in words, such as "NVIDIA A100-SXM4-80GB", or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def device_memory(device: torch.device) -> int | None:
    """Bytes of a GPU's memory; None on the CPU."""
    return torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else None


def send_to_host(values: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
    """A copy on the host, and the event after which it is whole; from the CPU it is whole at once.

    The event is what lets the host wait for this copy alone: reading a tensor on the device waits for all that has been
    launched on the stream by then, which is the next step or batch.
    """
    if not values.is_cuda:
        return values, None
    copy = torch.empty_like(values, device="cpu", pin_memory=True)  # else the copy itself would wait
    copy.copy_(values, non_blocking=True)
    arrived = torch.cuda.Event(blocking=True)  # the host sleeps: its cores are the loader's, or the decoders'
    arrived.record(torch.cuda.current_stream(values.device))
    return copy, arrived
