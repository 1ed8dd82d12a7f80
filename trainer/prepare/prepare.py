"""Posts -> buckets, pixels, raw latents -> shards and their index; what fails one image at a time is set aside.

One process reads the posts, all of them encode, one puts the set together. Work happens in ``<shards>.unfinished``:
whatever was encoded before, in a run that was killed or in a complete set, is not encoded again.
"""

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from tqdm import tqdm

from trainer import __version__
from trainer.config.schema import Config
from trainer.core.disk import disk_space
from trainer.core.distributed import Team, choose_device, join_team, uses_cpu
from trainer.core.errors import UserError
from trainer.core.layout import MANIFEST_FILE, NOTES_FILE, QUARANTINE_FILE
from trainer.data.images import PIXEL_SETTINGS
from trainer.data.index import open_index
from trainer.data.sources import iterate_sources, name_sources
from trainer.data.tables import read_table
from trainer.model.base import VaeWeights, read_vae_alone
from trainer.model.latents import describe_numbers
from trainer.model.sdxl import DTYPES
from trainer.model.vae import build_vae
from trainer.prepare.decode import decoders
from trainer.prepare.empty_captions import check_empty_captions
from trainer.prepare.encode import Chunk, Encoder, encode_chunk
from trainer.prepare.inputs import Inputs, survey_inputs
from trainer.prepare.merge import count_by, merge_set, place_set, read_complete, show_examples, tell, write_jsonl
from trainer.prepare.remarks import tell_remarks
from trainer.prepare.work import (
    Todo,
    Work,
    check_settings,
    hold_work,
    is_done,
    make_folders,
    plan_todo,
    read_done,
    read_stock,
    read_todo,
    refuse_others,
    share_work,
    work_folder,
)


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
    by_source: dict[str, dict[str, int]] = field(default_factory=dict)  # remarks by source and kind

    def __str__(self) -> str:
        lines = [f"{self.samples} samples in {self.shards} shards: {self.folder}"]
        lines += [f"  removed by filters.{name}: {count}" for name, count in self.filtered.items()]
        lines += [f"  set aside, {reason}: {count}" for reason, count in self.set_aside.items()]
        lines += [f"  noted, {reason}: {count}" for reason, count in self.notes.items()]
        lines += [f"  noted in {line}" for line in tell_remarks(self.by_source)]
        if self.encoded < self.samples:
            what = f"{self.encoded} were left" if self.encoded else "nothing to do"
            lines.append(f"  {self.samples - self.encoded} of {self.samples} samples were encoded before, {what}")
        lines += [f"  see {self.folder / QUARANTINE_FILE}"] if self.set_aside else []
        lines += [f"  see {self.folder / NOTES_FILE}"] if self.notes or self.by_source else []
        return "\n".join(lines)


@dataclass(frozen=True)
class Begun:
    """What the main process found before the first image was opened."""

    inputs: Inputs
    done_before: frozenset[int]  # chunks


def prepare(config: Config, progress: bool = True) -> Summary:
    """Make ``data.shards`` of the config's sources, go on where an earlier run was killed, or add what is new.

    Under a launcher of several processes each of them calls this, and all return the same.

    Raises:
        UserError: on a key that occurs twice, too many images set aside, or a set made with other settings.
    """
    folder = find_place(config.data.shards)
    work = Work(work_folder(folder))
    check_paths(config)
    with join_team() as team, ExitStack() as stack:
        if team.is_main:
            warn_of_fp16(config)
        weights = read_weights(config, team)
        latents = describe_latents(config, weights)
        begun: Begun | Summary | None = None
        if team.is_main:
            stack.enter_context(hold_work(work, folder))
            begun = begin(work, folder, latents, config, progress)
        begun = team.share(begun)
        if isinstance(begun, Begun):
            if not team.is_main:
                stack.enter_context(share_work(work))
            encode_share(work, config, weights, team, begun, progress)
            team.wait()
            begun = team.share(finish(work, folder, begun, latents, config) if team.is_main else None)
        assert isinstance(begun, Summary)
        return begun


def warn_of_fp16(config: Config) -> None:
    """Say before the work what training will refuse after it."""
    if not uses_cpu():
        return
    if config.precision.compute == "fp16":
        print("warning: precision.compute is fp16, and there is no GPU here: train.py will refuse this config on this "
              "machine (precision.compute=fp32 precision.frozen=fp32 are for the CPU)", file=sys.stderr)  # fmt: skip
    if config.precision.vae == "fp16":
        print("warning: precision.vae is fp16, and there is no GPU here: the CPU is faster in fp32, and SDXL's own VAE "
              "overflows in fp16 (precision.vae=fp32)", file=sys.stderr)  # fmt: skip


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
    """The folder of the set, behind links, so that the work beside it is on the same file system.

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


def read_weights(config: Config, team: Team) -> VaeWeights:
    """The VAE; the main process downloads it where it has to be, the others find it then."""
    if not team.is_main:
        team.wait()
    weights = read_vae_alone(config.model)
    if team.is_main:
        team.wait()
    return weights


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


def begin(work: Work, folder: Path, latents: dict[str, Any], config: Config, progress: bool) -> Begun | Summary:
    """Read the posts and plan what is left; the summary at once where nothing is.

    Raises:
        UserError: when the folder holds something else, or what is there was made with other settings.
    """
    if (work.set / MANIFEST_FILE).exists():  # an earlier run was killed while it put its set in place
        place_set(work, folder)
        make_folders(work)
    old = open_index(folder) if (folder / MANIFEST_FILE).exists() else None
    if old is None and folder.exists() and any(folder.iterdir()):
        raise UserError(f"data.shards: {folder} is not empty and holds no complete set; name another or empty it")
    if old is not None:
        refuse_others(f"data.shards: {folder}", old.manifest, {"latents": latents})
    sharding, joined = {"samples_per_shard": config.data.samples_per_shard}, old.fingerprint if old else None
    check_settings(work, {"latents": latents, "data": sharding, "joins": joined})
    separator = config.captions.keep_tokens_separator
    inputs = survey_inputs(iterate_sources(config.data), config.filters, separator, work.inputs, progress)
    check_empty_captions(read_table(work.inputs), config.data.max_empty_captions, inputs.remarks)
    if old is not None and old.manifest["inputs"]["sha256"] == inputs.sha256:
        return summarise(folder, old.manifest, 0)
    if not inputs.total:
        noted = [f"\n  noted in {line}" for line in tell_remarks(inputs.remarks.counts)]
        paths = ", ".join(source.path for _, source in name_sources(config.data))
        raise UserError(f"no posts in {paths}{''.join(noted)}")
    check_bad_fraction(work, inputs.set_aside, inputs.total, config)
    stock = read_complete(old) if old else read_stock(work.folder / "none")
    todo = plan_todo(work, read_table(work.inputs), stock, inputs.sha256, config.data.samples_per_shard)
    return Begun(inputs, frozenset(chunk for chunk in range(len(todo)) if is_done(work, todo, chunk)))


def encode_share(work: Work, config: Config, weights: VaeWeights, team: Team, begun: Begun, progress: bool) -> None:
    """Encode this process's share of the chunks that are left."""
    todo = read_todo(work)
    left = [chunk for chunk in range(len(todo)) if chunk not in begun.done_before]
    own = left[team.rank :: team.world]
    if not own:
        return
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.precision.tf32
    vae = build_vae(weights.config, weights.state, DTYPES[config.precision.vae]).to(choose_device())
    set_aside = begun.inputs.set_aside + [line for done in read_done(work, todo) for line in done.set_aside]
    total, before = len(todo.rows), len(todo.rows) - count_posts(todo, left)
    with (
        decoders(config.data.decode_processes) as pool,
        tqdm(
            total=total, initial=before, unit="image", desc="encode", disable=not progress or not team.is_main
        ) as meter,
    ):
        encoder = Encoder(vae, pool, config.buckets, config.filters.min_side, config.data.encode_batch_size)

        def advance(made: Chunk) -> None:
            meter.update()
            if made.set_aside:
                check_bad_fraction(work, set_aside + made.set_aside, begun.inputs.total, config)

        for place, chunk in enumerate(own):
            with disk_space(work.set, f"shard {todo.first_shard + chunk} of {config.data.shards}"):
                set_aside += encode_chunk(work, todo, chunk, encoder, advance).set_aside
            if team.world > 1:  # the others' images count in the bar by what they have completed
                done = left[team.world * (place + 1) :]
                meter.n = max(meter.n, total - count_posts(todo, done))


def count_posts(todo: Todo, chunks: Sequence[int]) -> int:
    """Posts of some chunks."""
    return sum(len(todo.rows[todo.chunk(chunk)]) for chunk in chunks)


def check_bad_fraction(work: Work, set_aside: list[dict[str, Any]], total: int, config: Config) -> None:
    """Stop as soon as more is set aside than data.max_bad_fraction of all inputs allows."""
    if len(set_aside) <= config.data.max_bad_fraction * total:
        return
    path = work.folder / QUARANTINE_FILE
    write_jsonl(path, set_aside)
    message = (
        f"{len(set_aside)} of {total} inputs are set aside so far, above data.max_bad_fraction "
        f"{config.data.max_bad_fraction}: {tell(count_by(set_aside, 'reason'))}. {path} names each. Mend the inputs "
        f"and start again, or raise the fraction: what is encoded is kept{advise(set_aside)}"
    )
    raise UserError("\n".join([message, *show_examples(set_aside)]))


def advise(set_aside: list[dict[str, Any]]) -> str:
    """What a message adds where most inputs are posts without an image, as those of a dump of a whole site are."""
    missing = sum(line["reason"] == "image_missing" for line in set_aside)
    if 2 * missing <= len(set_aside):
        return ""
    return ". Where there are more posts than images, missing_images: ignore of a source counts those apart"


def finish(work: Work, folder: Path, begun: Begun, latents: dict[str, Any], config: Config) -> Summary:
    """Put the set together when all chunks are done."""
    todo = read_todo(work)
    chunks = range(len(todo))
    if absent := [chunk for chunk in chunks if not is_done(work, todo, chunk)]:
        raise UserError(
            f"{len(absent)} of {len(todo)} shards are not in {work.folder} though all processes are done: data.shards "
            "must lie on a file system that all of them share; start again"
        )
    done = read_done(work, todo)
    set_aside = begun.inputs.set_aside + [line for each in done for line in each.set_aside]
    check_bad_fraction(work, set_aside, begun.inputs.total, config)
    manifest = merge_set(work, todo, done, begun.inputs, latents, config.filters)
    place_set(work, folder)
    new = [each for chunk, each in zip(chunks, done, strict=True) if chunk not in begun.done_before]
    names = pa.array([shard.name for each in new for shard in each.stock.shards], pa.string())
    encoded = pc.sum(pc.is_in(open_index(folder).table["shard"], names)).as_py()
    return summarise(folder, manifest, int(encoded or 0))


def summarise(folder: Path, manifest: dict[str, Any], encoded: int) -> Summary:
    """What a set holds, and how much of it this run has made."""
    counts = manifest["counts"]
    named = {name: counts.get(name, {}) for name in ("set_aside", "filtered", "notes", "by_source")}
    return Summary(folder, counts["samples"], len(manifest["shards"]), **named, encoded=encoded)
