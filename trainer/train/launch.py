"""What a run needs before its first step: the processes, the data, the base; each checked before harm is done."""

from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    AutocastKwargs,
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast_object_list,
    patch_environment,
)

from trainer.config.environment import hide_environment
from trainer.config.fixed import describe_fixed
from trainer.config.schema import Config
from trainer.core.console import log
from trainer.core.distributed import Processes, uses_cpu
from trainer.core.errors import UserError
from trainer.data.index import Index, count_fields
from trainer.data.loader import MicroBatches
from trainer.data.percentiles import OWN_SCORES, Resolved, choose_thresholds, resolve_anew
from trainer.data.plan import build_plan
from trainer.data.sample_weights import describe_sum, find_sample_weights
from trainer.data.subset import open_chosen, record_subset
from trainer.data.substitutes import Substitutes
from trainer.data.tag_counts import find_frequent
from trainer.data.tag_maps import hash_tag_maps
from trainer.data.template import ready_rules
from trainer.data.tokens import hash_tokenizers, load_tokenizers
from trainer.model.base import (
    Base,
    VaeWeights,
    find_base,
    find_tokenizers,
    hash_base,
    note_configs,
    note_weights,
    read_predictions,
    read_vae,
    read_vocab_sizes,
)
from trainer.model.diffusion import check_prediction
from trainer.model.exports import find_recorded
from trainer.model.latents import describe_numbers, find_other_numbers
from trainer.model.lineage import describe_software, read_lineage
from trainer.sample.pictures import check_config_prompts
from trainer.train.beginning import Resumed, find_resumed
from trainer.train.kernels import set_kernels
from trainer.train.launch_checks import check_environment, check_installed, check_processes, ignored_settings
from trainer.train.run import run_path


@dataclass(frozen=True)
class RunInputs:
    """What a run is made from."""

    config: Config
    accelerator: Accelerator
    resumed: Resumed | None  # found, but not checked yet; None where the run begins from the base
    data: MicroBatches
    base: Base
    vae: VaeWeights
    facts: dict[str, Any]  # what a checkpoint records of its inputs, and a resume compares
    fixed: dict[str, Any]  # the config's values that a resume may not change, see config.fixed
    software: dict[str, Any]  # commit and versions of what runs here: on the disk they may change under a long run

    @property
    def processes(self) -> Processes:
        """All that train, and which of them this is."""
        return processes_of(self.accelerator)

    @property
    def first(self) -> int:
        """The step with which this attempt begins."""
        return self.resumed.state["step"] if self.resumed else 0

    @property
    def last(self) -> int:
        """Optimizer steps of the whole run."""
        schedule = self.config.schedule
        if schedule.max_steps is not None:
            return schedule.max_steps
        assert schedule.epochs is not None
        return self.data.plan.steps_for_epochs(schedule.epochs)

    @property
    def fork(self) -> dict[str, Any] | None:
        """The run that this one branched off, see Resumed."""
        return self.resumed.fork if self.resumed else None


def processes_of(accelerator: Accelerator) -> Processes:
    """Accelerate's processes as ours."""
    return Processes(accelerator.process_index, accelerator.num_processes)


def build_accelerator(config: Config) -> Accelerator:
    """The processes and the arithmetic.

    Raises:
        UserError: for fp16 without a GPU, a package that is not installed, a way to train that is none of ours, or a
            number of processes that the config does not allow.
    """
    check_installed(config)
    check_environment()
    if config.precision.compute == "fp16" and uses_cpu():
        raise UserError(
            "precision.compute fp16 needs a GPU; on the CPU use precision.compute=fp32 precision.frozen=fp32"
        )
    set_kernels(config.precision, uses_cpu())
    compute = config.precision.compute
    autocast = config.precision.weights == "autocast" and compute != "fp32"
    with patch_environment(ACCELERATE_DYNAMO_BACKEND="no", ACCELERATE_GRADIENT_ACCUMULATION_STEPS="1"):
        accelerator = Accelerator(
            mixed_precision=config.precision.compute if autocast else "no",
            log_with=list(config.logging.trackers) or None,
            project_config=ProjectConfiguration(logging_dir=str(run_path(config) / "trackers")),
            kwargs_handlers=[
                # each weight is used once in a forward: a cache would hold 16-bit copies of all of them until its end
                AutocastKwargs(cache_enabled=False),
                DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
                # one rank hashes and writes tens of gigabytes while the others wait
                InitProcessGroupKwargs(timeout=timedelta(hours=2)),
            ],
        )
    if compute == "fp16" and not autocast:  # Accelerate scales losses only under autocast
        accelerator.scaler = torch.amp.GradScaler(accelerator.device.type)
    for note in ignored_settings():
        log.info("note: %s", note)
    check_processes(config, accelerator.num_processes)
    return accelerator


def open_inputs(config: Config, accelerator: Accelerator) -> RunInputs:
    """Index, plan, base, tokenizers and VAE, found and checked; no model is built.

    Raises:
        UserError: for missing or damaged files, latents that another VAE made, or settings of samples without effect.
    """
    software, resumed = describe_software(), find_resumed(config, processes_of(accelerator))
    if note := check_config_prompts(config.sampling):
        log.info(note)
    index = open_chosen(config.data, config.captions)
    with accelerator.main_process_first():  # one process downloads, the others find it there
        base = find_first_base(config, resumed)
        prediction = check_prediction(base.reference, read_predictions(base), config.diffusion)
        if note := note_weights(base):
            log.info("note: %s", note)
        vae = read_vae(config.model.vae, base, config.model.vae_revision)
        folders = find_tokenizers(base, config.model.tokenizer)
        for note in note_configs(base, folders):
            log.info("note: %s", note)
    check_latents_made_by(config.data.shards, index.manifest["latents"], vae)
    tokenizers = load_tokenizers(*folders, read_vocab_sizes(base))
    hashed = [hash_base(base) if accelerator.is_main_process else ""]
    lineage = read_lineage(base.path)
    thresholds = run_thresholds(config, index, resumed, lineage)
    own = resumed.state.get("frequent_tags") if resumed is not None and not resumed.begins_fork else None
    frequent = find_frequent(thresholds.captions, index.table, own)
    captions = ready_rules(thresholds.captions, frequent["tags"] if frequent else ())
    if thresholds.source:
        advice = "; a curated set wants those that taught the tags: captions.thresholds_from"
        advice = advice if thresholds.source == OWN_SCORES else ""
        log.info("quality tags by percentile: thresholds from %s%s", thresholds.source, advice)
    weights = find_sample_weights(index, config.data, thresholds.captions)
    plan = build_plan(index, config.run.seed, config.data, weights)
    if weights.record:
        log.info("%s", describe_sum(weights.record, len(index)))
    facts = {
        "base": {
            # what an environment variable holds is not written to a file
            "reference": hide_environment(base.reference, config.written),
            "revision": base.revision,
            "sha256": broadcast_object_list(hashed)[0],
            "prediction": asdict(prediction),
            "lineage": lineage,
        },
        "vae_sha256": vae.sha256,
        "tokenizers_sha256": hash_tokenizers(*folders),
        "vae_numbers": describe_numbers(vae.scale),
        "index_fingerprint": index.fingerprint,
        "images": len(index),
        "subset": record_subset(index),
        "caption_fields": count_fields(index.table, sorted(captions.ruled), beside=captions.uses_caption),
        "thresholds": thresholds.thresholds,
        "frequent_tags": frequent,
        "tag_maps_sha256": hash_tag_maps(captions.maps),
        "weights": weights.record,
    }
    substitutes = Substitutes() if config.data.on_bad_sample == "substitute" else None
    data = MicroBatches(plan, index, tokenizers, captions, config.diffusion, config.data.micro_batch_size, substitutes)
    return RunInputs(config, accelerator, resumed, data, base, vae, facts, describe_fixed(config), software)


def run_thresholds(config: Config, index: Index, resumed: Resumed | None, base: dict[str, Any] | None) -> Resolved:
    """The run's caption rules by score; a checkpoint of version 0.2.0 had those of its set.

    What a fork branches off stands in for the base: it comes after it.
    """
    own, before = None, base or {}
    if resumed is not None and resumed.begins_fork:
        before = resumed.state
    elif resumed is not None:
        own = resumed.state.get("thresholds", resolve_anew(config.captions, index.table, "").thresholds)
    return choose_thresholds(config.captions, index.table, own=own, base=before.get("thresholds"))


def find_first_base(config: Config, resumed: Resumed | None) -> Base:
    """What ``model.pretrained`` names; for a resume or a fork what that run began with.

    A run's folder means its newest export, a hub id without a revision the newest commit.
    """
    if resumed is None:
        return find_base(config.model.pretrained, config.model.revision, runs=Path(config.run.output_dir))
    pretrained, began = Path(config.model.pretrained).expanduser(), resumed.state["base"]
    if (export := find_recorded(pretrained, began["reference"])) is not None:
        return find_base(str(export))
    same_id = not pretrained.exists() and began["reference"] == config.model.pretrained
    return find_base(config.model.pretrained, config.model.revision or (began["revision"] if same_id else None))


def check_latents_made_by(shards: str, made_by: dict[str, Any], vae: VaeWeights) -> None:
    """Compare the VAE with the manifest's section of the one that made the latents.

    Raises:
        UserError: when it is another, or when its config scales latents otherwise.
    """
    if (sha256 := made_by.get("vae_sha256")) != vae.sha256:
        raise UserError(
            f"the latents in {shards} were made by another VAE (SHA-256 {sha256}) than the one that "
            f"this config names ({vae.sha256}); set model.vae to that one, or build the shards again"
        )
    if differing := find_other_numbers(made_by, vae.scale):
        raise UserError(
            f"the latents in {shards} were made by a VAE with the same weights but other numbers in its config: "
            f"{differing}; set model.vae to a folder whose config.json has the former"
        )
