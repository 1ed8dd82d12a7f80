"""From which checkpoint a run resumes or forks, and what must be as it was: config, data, base, VAE and tokenizers."""

import socket
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trainer.config.fixed import find_interpolated, fixed_values
from trainer.config.yaml_text import read_yaml
from trainer.core.console import log
from trainer.core.distributed import Processes
from trainer.core.errors import UserError, shorten
from trainer.core.files import set_aside, sha256_bytes, sha256_json
from trainer.core.layout import CHECKPOINTS_FOLDER, CONFIG_FILE
from trainer.core.progress import format_count
from trainer.data.subset import WHOLE_SET
from trainer.data.tag_maps import TagMaps, hash_tag_maps
from trainer.model.checkpoint import (
    REMEDY_DAMAGED,
    DamagedCheckpoint,
    list_checkpoints,
    list_incomplete,
    step_of,
    verify_checkpoint,
)
from trainer.model.sdxl import trained_parameters
from trainer.report.config_values import find_differences, flatten_config
from trainer.train.beginning import Resumed, find_resumed
from trainer.train.launch import RunInputs
from trainer.train.narrow import NarrowOptimizer
from trainer.train.run import run_path
from trainer.train.save import remove_leftovers

# what a run reads is compared by hashes, so that where it lies is free
OF_DATA = (
    ("data set (index fingerprint)", ("index_fingerprint",)),
    ("subset of the set (SHA-256 of its keys)", ("subset", "sha256")),
    ("choice of tag tables and protected tags (SHA-256 of what they say)", ("tag_maps_sha256",)),
    ("set of weights (SHA-256 of what data.weights gives each image)", ("weights", "sha256")),
)
OF_MODEL = (
    ("base model (SHA-256)", ("base", "sha256")),
    ("prediction type of the base", ("base", "prediction")),
    ("VAE (SHA-256)", ("vae_sha256",)),
    ("VAE config (its numbers)", ("vae_numbers",)),
    ("pair of tokenizers (SHA-256)", ("tokenizers_sha256",)),
)

GUARDED = (*OF_DATA, *OF_MODEL)

DAMAGED = "damaged"  # behind the name of a checkpoint that was set aside
MAX_CHANGES, MAX_VALUE = 6, 40  # in the line that says what a resume changes: keys, and characters of a value
REMEDY = "Restore what it was, or choose another run.name"
RESUME_OR_FORK = (
    "; checkpoint.fork starts a run with these weights and optimizer state under other rates, another schedule, other "
    "data or captions"
)
FORK_REMEDY = "A fork keeps this: restore what it was, or start from an export of that run instead"
FORK_KEEPS = ("optim.name", "model.train_", "diffusion.")  # keys, by their beginnings, that make the state what it is


def settle_resumed(inputs: RunInputs, check: bool) -> RunInputs:
    """With the checkpoint that this run begins with, all of whose bytes are right; to be called under the run's lock.

    Where the newest of the run's own is damaged, that is the one before, and damaged ones are set aside. ``check``
    leaves them where they are.

    Raises:
        UserError: in all processes, when that checkpoint cannot be continued, or would overwrite another; and when it
            was named and is damaged.
    """
    hashes = [inputs.facts[name] for name in ("index_fingerprint", "vae_sha256", "tokenizers_sha256")]
    check_same(inputs.processes, "data set, VAE or tokenizers", sha256_json(hashes))
    damaged: dict[Path, str] = {}
    while True:
        resumed = find_resumed(inputs.config, inputs.processes, damaged)  # another process may have saved meanwhile
        inputs = replace(inputs, resumed=resumed)
        check_resumed(inputs)
        flaw = inputs.processes.decide(lambda found=resumed: find_flaw(found))  # type: ignore[misc]
        if resumed is None or flaw is None:
            break
        if inputs.config.checkpoint.resume != "auto" or resumed.begins_fork:
            raise UserError(flaw)
        damaged[resumed.folder] = flaw
    if inputs.processes.is_main:
        tidy_checkpoints(inputs, check)
    return inputs


def find_flaw(resumed: Resumed | None) -> str | None:
    """What is damaged of a checkpoint, of which every byte is read."""
    try:
        if resumed is not None:
            verify_checkpoint(resumed.folder)
    except DamagedCheckpoint as error:
        return str(error)
    return None


def tidy_checkpoints(inputs: RunInputs, check: bool) -> None:
    """Say what of the run's checkpoints is damaged or not whole; damaged ones are set aside, leftovers removed."""
    folder, resumed = run_path(inputs.config) / CHECKPOINTS_FOLDER, inputs.resumed
    for path in list_incomplete(folder):
        log.info("note: %s is called like a checkpoint and is not whole: it counts as none", path)
    for path, reason in resumed.damaged if resumed else ():
        lies = "it would be set aside" if check else f"it lies in {set_aside(path, DAMAGED)} now"
        said = reason.removesuffix(f"; {REMEDY_DAMAGED}")
        log.warning("warning: %s. The run goes on from the checkpoint before it; %s", said, lies)
    if not check:
        remove_leftovers(folder)


def check_resumed(inputs: RunInputs) -> None:
    """Compare the checkpoint that this run begins with, if any, with this config and these data.

    Raises:
        UserError: in all processes, when resuming would not continue that run, or would overwrite another.
    """
    inputs.processes.decide(lambda: check_newest(inputs))
    inputs.processes.agree(lambda: check_continued(inputs))


def check_newest(inputs: RunInputs) -> None:
    """Refuse to overwrite: what this run begins with must be the newest of the run's own that is whole."""
    path, resumed = run_path(inputs.config), inputs.resumed
    unusable = {folder for folder, _ in resumed.damaged} if resumed else set()
    own = [folder for folder in list_checkpoints(path / CHECKPOINTS_FOLDER) if folder not in unusable]
    if own and step_of(own[-1]) > inputs.first:
        begins = resumed.folder if resumed else "the base"
        raise UserError(f"{path} has newer checkpoints than {begins}; move them away, or choose another run.name")


def check_continued(inputs: RunInputs) -> None:
    """Refuse what would not continue the checkpoint."""
    resumed = inputs.resumed
    if resumed is None:
        return
    if resumed.begins_fork:
        check_fork(inputs, resumed)
        return
    check_config(resumed.folder, resumed.state, inputs.fixed)
    if "fixed" not in resumed.state and (unknown := find_interpolated(inputs.fixed["values"])):
        log.warning("warning: %s does not record the value of %s: make sure that it is the same now",
                    resumed.folder, ", ".join(unknown))  # fmt: skip
    # a version that records no tables and no subset had none
    state = {"tag_maps_sha256": hash_tag_maps(TagMaps()), "subset": WHOLE_SET} | resumed.state
    check_inputs(resumed.folder, state, inputs.facts, GUARDED, REMEDY)


def check_same(processes: Processes, what: str, digest: str) -> None:
    """Refuse to train with something that is not the same in all processes.

    Raises:
        UserError: in all of them, naming the hosts.
    """
    seen = processes.gather((socket.gethostname(), digest))
    others = [f"{rank} (on {host})" for rank, (host, found) in enumerate(seen) if found != seen[0][1]]
    if others:
        raise UserError(
            f"{what} of process {', '.join(others)} differ from those of the main process (on {seen[0][0]}): all must "
            "read the same files, from a file system that their hosts share or from equal copies"
        )


def hash_state(sdxl: nn.Module, optimizer: Optimizer) -> str:
    """A digest of the bits of weights and optimizer state, summed up where they lie."""
    tensors: list[Tensor] = []
    if isinstance(optimizer, NarrowOptimizer):
        tensors = [optimizer.weights.weights, *([] if (behind := optimizer.weights.behind) is None else [behind])]
    parameters = trained_parameters(sdxl)
    tensors += [value.detach() for value in sdxl.parameters()]
    for parameter in parameters.values():
        state = sorted(optimizer.state.get(parameter, {}).items())
        tensors += [value for _, value in state if isinstance(value, Tensor)]
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    device = next(sdxl.parameters()).device
    sums = [tensor.view(integers[tensor.element_size()]).sum(dtype=torch.int64).to(device) for tensor in tensors]
    return sha256_bytes(torch.stack(sums).cpu().numpy().tobytes())


def check_fork(inputs: RunInputs, resumed: Resumed) -> None:
    """Whether this run can begin with another's weights, optimizer state and step.

    Data, captions, rates and schedule may be other ones; what weights and optimizer state are made for may not.

    Raises:
        UserError: where the checkpoint is this run's own, or where this run could not continue it.
    """
    folder, state = resumed.folder, resumed.state
    if state["run"] == inputs.config.run.name:
        raise UserError(f"checkpoint.fork: {folder} is of a run called {state['run']}: this one needs another name")
    if state["step"] >= inputs.last:
        raise UserError(
            f"checkpoint.fork: {folder} has made {format_count(state['step'], 'step')}, where this run begins, but it "
            f"ends after {inputs.last}: set schedule.max_steps or schedule.epochs beyond that"
        )
    before, now = (
        {key: value for key, value in values.items() if key.startswith(FORK_KEEPS)}
        for values in (fixed_values(state["config"]), inputs.fixed["values"])
    )
    refuse_changes(f"checkpoint.fork: {folder}", before, now, FORK_REMEDY)
    check_inputs(folder, state, inputs.facts, OF_MODEL, FORK_REMEDY)


def check_config(checkpoint: Path, state: dict[str, Any], fixed: dict[str, Any]) -> None:
    """Refuse another config; ``fixed`` is what ``describe_fixed`` says of the present one.

    A checkpoint of version 0.2.0 lists no fixed values: they are those of its config.

    Raises:
        UserError: naming every changed key with both values.
    """
    recorded = state.get("fixed", {"values": {}, "digest": fixed["digest"]})
    before, now = fixed_values(state["config"]) | recorded["values"], fixed["values"]
    refuse_changes(str(checkpoint), before, now, REMEDY + RESUME_OR_FORK)
    if recorded["digest"] != fixed["digest"]:
        raise UserError(
            f"{checkpoint}: an environment variable, or another key that the config refers to, has another value now "
            f"than in that run ({', '.join(find_interpolated(now))}). Restore it, or choose another run.name"
        )


def describe_changes(inputs: RunInputs) -> str | None:
    """What of the config is another than at the run's last attempt, as far as a resume may change it, in a line.

    Words of the first command line are not repeated by the second: they are seen here.
    """
    file = run_path(inputs.config) / CONFIG_FILE
    if inputs.resumed is None or inputs.resumed.begins_fork or not file.is_file():
        return None
    found = find_differences([flatten_config(read_yaml(file)), flatten_config(inputs.config.written)])
    changed = [f"{each.key} {' -> '.join(shorten(value, MAX_VALUE) for value in each.values)}" for each in found]
    if not changed:
        return None
    more = f" and {len(changed) - MAX_CHANGES} more" if len(changed) > MAX_CHANGES else ""
    return f"changed since the last attempt: {', '.join(changed[:MAX_CHANGES])}{more}"


def refuse_changes(checkpoint: str, before: dict[str, Any], now: dict[str, Any], remedy: str) -> None:
    """Refuse values of ``now`` that are other ones than before, naming each with both."""
    changed = [key for key in sorted(now) if before.get(key) != now[key]]
    if changed:
        lines = "\n".join(f"  {key}: {before.get(key)!r} in the checkpoint, {now[key]!r} now" for key in changed)
        raise UserError(
            f"{checkpoint} was made with another config, and this run would not continue it:\n{lines}\n{remedy}"
        )


def check_inputs(
    checkpoint: Path,
    state: dict[str, Any],
    facts: dict[str, Any],
    guarded: Sequence[tuple[str, tuple[str, ...]]],
    remedy: str,
) -> None:
    """Refuse other data, another base, VAE or tokenizers; what an older checkpoint does not record is not compared.

    Raises:
        UserError: naming what is another one, with both hashes.
    """
    for what, path in guarded:
        before, now = pick(state, path), pick(facts, path)
        if before is not None and before != now:
            raise UserError(f"{checkpoint} was made with another {what}: {before} there, {now} now. {remedy}")


def pick(values: dict[str, Any], path: tuple[str, ...]) -> Any:
    """The value under a path of keys; None where there is none."""
    for key in path:
        values = values.get(key) or {}
    return values or None


def restore_scaler(scaler: Any, state: dict[str, Any] | None) -> None:
    """Put the loss scaler's numbers back."""
    if scaler is not None and state is not None:
        scaler.load_state_dict(
            {**scaler.state_dict(), "scale": state["scale"], "_growth_tracker": state["growth_tracker"]}
        )
