"""Posts -> buckets, pixels, raw latents -> shards and their index; what fails one image at a time is set aside.

One process reads the posts, all of them encode, one puts the set together. Work happens in ``<shards>.unfinished``:
whatever was encoded before, in a run that was killed or in a complete set, is not encoded again.
"""

from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch

from trainer import __version__
from trainer.config.schema import Config
from trainer.core.asked import check_asked
from trainer.core.console import log
from trainer.core.disk import disk_space, format_bytes
from trainer.core.distributed import Processes, choose_device, join_processes, uses_cpu
from trainer.core.errors import UserError
from trainer.core.layout import LATENTS_FILE, MANIFEST_FILE, NOTES_FILE, OTHERS_LOCK_FILE, QUARANTINE_FILE
from trainer.core.locks import hold_lock
from trainer.core.progress import Meter, format_count, waiting
from trainer.data.images import PIXEL_SETTINGS
from trainer.data.index import Index, find_hash_problem, open_index
from trainer.data.sources import iterate_sources, name_sources
from trainer.data.sources.records import explain_reason
from trainer.model.base import VaeWeights, read_vae_alone
from trainer.model.latents import describe_numbers
from trainer.model.sdxl import DTYPES
from trainer.model.vae import build_vae
from trainer.prepare.decode import decoders
from trainer.prepare.encode import Chunk, Encoder, encode_chunk, look_ahead
from trainer.prepare.inputs import Survey, refuse_empty_captions, survey_inputs
from trainer.prepare.merge import find_lost, merge_set, plan_chunks
from trainer.prepare.remarks import count_reasons, format_counts, format_remarks, list_examples, write_jsonl
from trainer.prepare.work import (
    Work,
    bind_settings,
    hold_work,
    make_folders,
    place_set,
    read_done,
    read_pending,
    refuse_others,
)

# why an image was set aside that may be sound today, though its file has the size and time that it had
RETRIED = {"unreadable", "out_of_memory", "killed_decoder"}


@dataclass(frozen=True)
class Summary:
    """What ``prepare`` did, for people."""

    folder: Path
    samples: int
    shards: int
    set_aside: dict[str, int]  # by reason
    filtered: dict[str, int]  # by filter
    notes: dict[str, int]
    encoded: int  # samples whose latents were made this time; 0 when there was nothing to encode
    size: int = 0  # bytes of its shards
    by_source: dict[str, dict[str, int]] = field(default_factory=dict)  # remarks by source and kind

    def __str__(self) -> str:
        what = f"{format_count(self.samples, 'sample')} in {format_count(self.shards, 'shard')}"
        lines = [f"{what}, {format_bytes(self.size)}: {self.folder}"]
        lines += [f"  removed by filters.{name}: {count:,}" for name, count in self.filtered.items()]
        lines += [f"  set aside: {count:,} {explain_reason(reason)}" for reason, count in self.set_aside.items()]
        lines += [f"  noted, {reason}: {count:,}" for reason, count in self.notes.items()]
        lines += [f"  noted in {line}" for line in format_remarks(self.by_source)]
        if self.encoded < self.samples:
            what = f"{self.encoded:,} were left" if self.encoded else "nothing to do"
            before = f"{self.samples - self.encoded:,} of {format_count(self.samples, 'sample')} were encoded before"
            lines.append(f"  {before}, {what}")
        lines += [f"  see {self.folder / QUARANTINE_FILE}"] if self.set_aside else []
        lines += [f"  see {self.folder / NOTES_FILE}"] if self.notes or self.by_source else []
        return "\n".join(lines)


@dataclass(frozen=True)
class Begun:
    """What the main process found before the first image was opened."""

    old: Index | None  # the complete set that is joined
    survey: Survey
    shards: list[int]  # numbers of those that are to be made


def prepare(config: Config) -> Summary:
    """Make ``data.shards`` of the config's sources, resume where an earlier run was killed, or add what is new.

    Under a launcher of several processes each of them calls this, and all return the same.

    Raises:
        UserError: on a key that occurs twice, too many images set aside, or a set made with other settings.
    """
    work = Work(find_place(config.data.shards))
    check_paths(config)
    with join_processes() as processes, ExitStack() as stack:
        check_asked(processes.world, None, "scripts/build_shards.py")
        if processes.is_main:
            warn_of_fp16(config)
        else:
            processes.wait()  # the main process downloads the VAE where it has to be, the others find it then
        weights = read_vae_alone(config.model)
        latents = describe_latents(config, weights)
        begun: Begun | Summary | None = None
        if processes.is_main:
            processes.wait()
            stack.enter_context(hold_work(work))
            begun = begin(work, latents, config)
        begun = processes.share(begun)
        if isinstance(begun, Begun):
            if not processes.is_main:  # while there is one, no new preparation begins
                busy = f"another process is preparing in {work.folder}"
                stack.enter_context(hold_lock(work.folder / OTHERS_LOCK_FILE, busy, shared=True))
            encode_share(work, config, weights, processes, begun)
            processes.wait()
            begun = processes.share(finish(work, begun, latents, config) if processes.is_main else None)
        assert isinstance(begun, Summary)
        return begun


def warn_of_fp16(config: Config) -> None:
    """Say before the work what training will refuse after it."""
    if not uses_cpu():
        return
    if config.precision.compute == "fp16":
        log.warning("warning: precision.compute is fp16, and there is no GPU here: train.py will refuse this config on "
                    "this machine (precision.compute=fp32 precision.frozen=fp32 are for the CPU)")  # fmt: skip
    if config.precision.vae == "fp16":
        log.warning("warning: precision.vae is fp16, and there is no GPU here: the CPU is faster in fp32, and SDXL's "
                    "own VAE overflows in fp16 (precision.vae=fp32)")  # fmt: skip


def check_paths(config: Config) -> None:
    """Look for what the config names before anything is loaded or fetched.

    Raises:
        UserError: naming the key and the path that is not there.
    """
    for where, source in name_sources(config.data):
        if source.kind != "dataset" and not Path(source.path).exists():  # of a data set it may be a hub id
            raise UserError(f"{where}: {source.path} does not exist")
        if source.images is not None and not Path(source.images).exists():
            raise UserError(f"{where}: {source.images}, where its images are to be, does not exist")


def find_place(shards: str) -> Path:
    """The folder of the set, after links are followed, so that the work beside it is on the same file system.

    Raises:
        UserError: where no folder can be put by a rename.
    """
    folder = Path(shards)
    folder = folder.resolve() if folder.is_symlink() else folder
    if folder.exists() and not folder.is_dir():
        raise UserError(f"data.shards: {shards} is a file: name a folder")
    if folder.is_mount():
        raise UserError(
            f"data.shards: {shards} is a mount point, beside which nothing can be made: name a folder in it"
        )
    return folder


def describe_latents(config: Config, weights: VaeWeights) -> dict[str, Any]:
    """The manifest's section that says what made the latents."""
    return {
        "vae_sha256": weights.sha256,
        "vae_dtype": config.precision.vae,
        **describe_numbers(weights.scale),
        # as they are written: sets of version 0.2 have them so in their fingerprints
        "scaling_factor": weights.config["scaling_factor"],
        "shift_factor": weights.config.get("shift_factor"),
        "buckets": asdict(config.buckets),
        "pixels": PIXEL_SETTINGS,
        "code_version": __version__,
        # one is what all sets of version 0.1 have
        **({"encode_batch_size": config.data.encode_batch_size} if config.data.encode_batch_size > 1 else {}),
    }


def begin(work: Work, latents: dict[str, Any], config: Config) -> Begun | Summary:
    """Read the posts and plan what is to be encoded; the summary at once where nothing is to be done.

    Raises:
        UserError: when the folder holds something else, or what is there was made with other settings.
    """
    if (work.set / MANIFEST_FILE).exists():  # an earlier run was killed while it put its set in place
        place_set(work)
        make_folders(work)
    old = open_index(work.shards) if (work.shards / MANIFEST_FILE).exists() else None
    if old is None and work.shards.exists() and any(work.shards.iterdir()):
        raise UserError(f"data.shards: {work.shards} is not empty and holds no complete set; name another or empty it")
    if old is not None:
        refuse_others(f"data.shards: {work.shards}", old.manifest, {"latents": latents})
    sharding, joined = {"samples_per_shard": config.data.samples_per_shard}, old.fingerprint if old else None
    bind_settings(work, {"latents": latents, "data": sharding, "joins": joined})
    separator = config.captions.keep_tokens_separator
    survey = survey_inputs(iterate_sources(config.data), config.filters, separator, work.inputs)
    refuse_empty_captions(work.inputs, config.data.max_empty_captions, survey.remarks)
    retried = old is not None and not RETRIED.isdisjoint(old.manifest["counts"].get("set_aside", {}))
    if old is not None and not retried and old.manifest["inputs"]["sha256"] == survey.sha256:
        return summarise_set(work.shards, old.manifest, 0)
    if not survey.total:
        noted = [f"\n  noted in {line}" for line in format_remarks(survey.remarks.counts)]
        paths = ", ".join(source.path for _, source in name_sources(config.data))
        raise UserError(f"no posts in {paths}{''.join(noted)}")
    check_bad_fraction(work, survey.set_aside, survey.total, config)
    named = old.manifest.get("latents_sha256") if old else None  # version 0.1 had no latents.arrow
    if named and (problem := find_hash_problem(work.shards / LATENTS_FILE, named)):
        raise UserError(f"{work.shards}: {problem}; restore it from a copy, or move the folder away")
    with waiting("compare with what is encoded"):
        plan_chunks(work, old, survey, config.data.samples_per_shard)
    return Begun(old, survey, sorted(read_pending(work).keys() - read_done(work).keys()))


def encode_share(work: Work, config: Config, weights: VaeWeights, processes: Processes, begun: Begun) -> None:
    """Encode this process's share of the shards that are to be made."""
    own = begun.shards[processes.rank :: processes.world]
    if not own:
        return
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.precision.tf32
    device = choose_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)  # pinned memory is the current one's
    vae = build_vae(weights.config, weights.state, DTYPES[config.precision.vae]).to(device)
    pending, done = read_pending(work), read_done(work)
    set_aside = begun.survey.set_aside + [
        line for number in pending if number in done for line in done[number].set_aside
    ]
    total, left = (sum(len(pending[number]) for number in numbers) for numbers in (pending, begun.shards))
    with decoders(config.data.decode_processes) as pool, Meter("encode", total, "image", total - left) as meter:
        encoder = Encoder(vae, pool, config.buckets, config.filters.min_side, config.data.encode_batch_size)

        def advance(chunk: Chunk, images: int) -> None:
            meter.update(min(processes.world * images, total - meter.done))  # the others are about as far
            if chunk.set_aside:  # before the chunk counts: what is mended, by a plug-in too, is looked at again
                check_bad_fraction(work, set_aside + chunk.set_aside, begun.survey.total, config)

        outcomes = look_ahead(encoder, (pending[number] for number in own))
        for number in own:
            posts = islice(outcomes, len(pending[number]))
            with disk_space(work.set, f"shard {number} of {config.data.shards}"):
                set_aside += encode_chunk(Chunk(work, number, encoder), posts, advance).set_aside


def check_bad_fraction(work: Work, set_aside: list[dict[str, Any]], total: int, config: Config) -> None:
    """Stop as soon as more is set aside than data.max_bad_fraction of all inputs allows."""
    if len(set_aside) <= config.data.max_bad_fraction * total:
        return
    write_jsonl(work.quarantine, set_aside)
    missing = sum(line["reason"] == "image_missing" for line in set_aside)
    advice = ""
    if 2 * missing > len(set_aside):  # posts without an image, as those of a dump of a whole site are
        advice = ". Where there are more posts than images, missing_images: ignore of a source counts those apart"
    message = (
        f"{len(set_aside):,} of {format_count(total, 'input')} are set aside so far, above data.max_bad_fraction "
        f"{config.data.max_bad_fraction}: {format_counts(count_reasons(set_aside))}. {work.quarantine} names each. "
        f"Mend the inputs and start again, or raise the fraction: what is encoded is kept{advice}"
    )
    raise UserError("\n".join([message, *list_examples(set_aside)]))


def finish(work: Work, begun: Begun, latents: dict[str, Any], config: Config) -> Summary:
    """Put the set together when all chunks are done."""
    pending, done = read_pending(work), read_done(work)
    if absent := [*(pending.keys() - done.keys()), *find_lost(work, begun.old, done)]:
        raise UserError(
            f"{len(absent)} of {format_count(len(pending), 'shard')} are not in {work.folder} though all processes are "
            "done: data.shards must lie on a file system that all of them share; start again"
        )
    set_aside = begun.survey.set_aside + [line for number in pending for line in done[number].set_aside]
    check_bad_fraction(work, set_aside, begun.survey.total, config)
    filtered = sum((Counter(done[number].filtered) for number in pending), Counter(begun.survey.filtered))
    survey = replace(begun.survey, set_aside=set_aside, filtered=dict(filtered))
    if begun.old is not None and not any(done[number].shards for number in pending):
        latents = begun.old.manifest["latents"]  # the version that made them, which is in the fingerprint
    with waiting("put the set together"):
        manifest = merge_set(work, begun.old, done, survey, latents, config.filters)
    place_set(work)
    made = pa.array([shard.name for number in begun.shards for shard in done[number].shards], pa.string())
    encoded = pc.sum(pc.is_in(open_index(work.shards).table["shard"], made)).as_py()
    return summarise_set(work.shards, manifest, int(encoded or 0))


def summarise_set(folder: Path, manifest: dict[str, Any], encoded: int) -> Summary:
    """What a set holds, and how much of it this run has made."""
    counts = manifest["counts"]
    named = {name: counts.get(name, {}) for name in ("set_aside", "filtered", "notes", "by_source")}
    return Summary(folder, counts["samples"], len(manifest["shards"]), **named, encoded=encoded,
                   size=sum(shard["size"] for shard in manifest["shards"]))  # fmt: skip
