"""The config's fields. Each is documented by the comments before and beside it, which --help-config prints.

Defaults are the recipe's where it fixes them. ``trainer.config.load`` reads, checks and merges configs; this file only
says what there is, and beside each field whether it may change when a run resumes. A field that does not say so may
not.
"""

from dataclasses import MISSING, dataclass, field
from pathlib import PurePath
from typing import Annotated, Any, Literal

from trainer.config.caption_fields import (
    CaptionPart,
    ColumnRule,
    MixConfig,
    QualityRule,
    YearRule,
    default_people,
    default_quality,
    default_ratings,
    default_template,
    default_years,
)

Dtype = Literal["fp32", "bf16", "fp16"]
Format = Literal["single_file", "diffusers"]  # of what is exported and published
OptimizerName = Literal["adamw", "adamw8bit", "adafactor"]
WeightMode = Literal["autocast", "master", "stochastic"]  # what they cost: docs/training.md
GradientDtype = Literal["fp32", "bf16"]
PredictionType = Literal["epsilon", "v_prediction"]  # what they mean: trainer.model.diffusion
TokenLength = Literal[75, 150, 225, 300, 375, 450]
MemoryPolicy = Literal["auto", "none", "selective", "full"]
NUM_TIMESTEPS = 1000  # of SDXL's noise schedule
RATINGS = ("g", "s", "q", "e")  # general, sensitive, questionable, explicit
Place = Annotated[str, "a path; a leading ~ is the home folder"]  # in some fields a hub id or a word may stand instead

# May change on resume: nothing of the samples, the model or the optimizer depends on it, or a hash guards what it names
# (attention and compile: the same batches, not the same bits).
FREE = {"resume": "free"}
# The length of a run: may change where the rate does not depend on it.
LENGTH = {"resume": "length"}


def free(default: Any = MISSING) -> Any:
    """A field that may change on resume."""
    return field(default=default, metadata=FREE)


def free_section(section: type) -> Any:
    """A section whose fields may all change on resume."""
    return field(default_factory=section, metadata=FREE)


@dataclass(frozen=True)
class RunConfig:
    """What the run is called, where it writes, and its seed."""

    name: str  # names the output folder, the tracker's run and the exported files
    stage: str = free()  # the recipe's stage, written to checkpoints and cards
    output_dir: Place = free("runs")  # everything a run writes lies under output_dir / name
    seed: int = 42  # the order, captions, noise and timesteps are functions of it
    num_processes: int | None = free(None)  # if set, a launch with any other number refuses
    # save and stop this long after the process began, early enough for the save: 11h30m, or 11:30:00 as SLURM has it.
    # null: ahead of the end of the SLURM job, where there is one
    time_limit: str | None = free(None)
    # end the job where a rank is at one part of a step for this long (2h, 20m): it hangs, or waits for one that does.
    # null: ten times the median step, and at least 5 minutes. Saves, samples and the first steps have at least 30
    step_timeout: str | None = free(None)
    # a step whose loss or gradients are not finite updates nothing. stop: the run ends there; skip: it counts as a step
    on_nonfinite: Literal["stop", "skip"] = free("stop")
    max_nonfinite_in_a_row: int = free(10)  # with skip: one more of them in a row stops the run
    stop_if_loss_above: float | None = free(None)  # stop at a step whose mean loss is higher: the weights are destroyed


@dataclass(frozen=True)
class ModelConfig:
    """The model that training starts from, and which of its parts are trained."""

    pretrained: Place = free()  # diffusers folder, .safetensors file, hub id, or a run's folder: its newest export
    revision: str | None = free(None)  # branch, tag or commit of a hub id
    vae: Place | None = free(None)  # a separate VAE: folder, single file or hub id
    vae_revision: str | None = free(None)  # branch, tag or commit of model.vae, where that is a hub id
    tokenizer: Place | None = free(None)  # folder or hub id with tokenizer/ and tokenizer_2/, if the model has none
    train_unet: bool = True  # the UNet learns, at optim.unet_lr
    train_text_encoder_1: bool = False  # CLIP ViT-L learns, at optim.text_encoder_1_lr
    train_text_encoder_2: bool = False  # OpenCLIP ViT-bigG learns, at optim.text_encoder_2_lr
    attention: Literal["sdpa", "xformers"] = free("sdpa")  # sdpa: PyTorch's own, which needs nothing installed
    compile: bool = free(False)  # torch.compile of the UNet


@dataclass(frozen=True)
class SourceConfig:
    """Where some of the posts and images come from."""

    # posts: a posts file, .jsonl, .json, .csv, .tsv or .parquet; folder: images with sidecars; tars: a webdataset tar
    # or a folder of them; dataset: a folder or hub id for the package datasets; kohya: a meta_*.json of sd-scripts
    kind: Literal["posts", "folder", "tars", "dataset", "kohya"]
    path: Place = free()  # the file or folder, or the hub id, as the kind says
    images: Place | None = free(None)  # posts and kohya: the folder of images, or of tars that hold them
    name: str | None = free(None)  # in the index's column `source` and in reports; null: the path's last part
    repeats: int = 1  # how often an image of it is seen in a pass
    prefix_keys: bool = free(False)  # put the source's name before its keys, where two sites number their posts alike
    # what a caption of several lines is: its first, all of them as tags, or variants, of which each pass draws one
    lines: Literal["first", "tags", "variants"] = "first"
    follow_links: bool = free(False)  # enter folders that are links, and read files that are; not for datasets
    split: str | None = None  # dataset: null is train
    revision: str | None = None  # dataset: branch, tag or commit of a hub id
    image_column: str | None = None  # dataset: null is its only column of images
    # dataset and posts: the column or field of finished captions; null: caption, or text or prompt where no tags are
    caption_column: str | None = None
    # dataset and posts: further columns or fields with captions of the image, each of which is one more variant
    more_caption_columns: list[str] | None = None
    strip_prefix: str | None = free(None)  # posts and kohya: what file names begin with that is not here
    # posts and kohya: ignore counts posts without an image apart from what is set aside
    missing_images: Literal["set_aside", "ignore"] = free("set_aside")

    @property
    def label(self) -> str:
        """What the source is called."""
        return PurePath(self.path).name if self.name is None else self.name


@dataclass(frozen=True)
class ImageRule:
    """Of which images a rule is. All that it says of an image must hold."""

    # the image has this tag: of the post, in its finished caption, or one that captions.quality or captions.years gives
    tag: str | None = None
    rating: Literal["g", "s", "q", "e", "none"] | None = None  # the post's; none: it has none
    # a column of the index (score, year, source, original_width, ...), or another field of the post
    column: str | None = None
    above: float | None = None  # the column's number is above this
    below: float | None = None  # the column's number is below this
    equals: str | None = None  # the column's number or text is this
    artist_count_below: int | None = None  # one of its artists has fewer images than this in the set
    character_count_below: int | None = None  # the same for its characters
    copyright_count_below: int | None = None  # the same for its series


@dataclass(frozen=True, kw_only=True)
class WeightRule(ImageRule):
    """How much more often, or how much less, some images are seen. All that a rule says of an image must hold."""

    factor: float  # times the image's weight; 0: it is never seen


@dataclass(frozen=True, kw_only=True)
class SubsetRule(ImageRule):
    """Which images of a set are trained on. All that a rule says of an image must hold."""

    exclude: bool = False  # those of which it holds are left out, whatever other rules say


@dataclass(frozen=True)
class DataConfig:
    """Posts and images, the shards that are made of them, and the sizes of batches."""

    shards: Place = free()  # folder of tar shards, index.arrow and manifest.json
    posts: list[Place] | None = free(None)  # posts files, as of the kind posts of sources; null: images has sidecars
    images: Place | None = free(None)  # folder of images, found by the post's `file` or its id
    sources: list[SourceConfig] | None = None  # several sources of any kind, instead of posts and images
    samples_per_shard: int = 2000  # posts that become one shard; fewer samples where some are set aside or filtered
    max_bad_fraction: float = free(0.01)  # preparation stops above this share of images set aside
    max_empty_captions: float = free(0.25)  # preparation stops above this share of posts without a caption or tags
    encode_batch_size: int = 1  # images of a bucket that the VAE encodes together; above 1 neighbours decide last bits
    # only these images of the set: a file of keys, one a line, as scripts/choose_subset.py writes it; null: all
    subset: Place | None = free(None)
    # only images of which one of these rules holds (any image, where all of them exclude), and none that excludes;
    # with a file of keys beside them both count
    subset_rules: list[SubsetRule] = field(default_factory=list, metadata=FREE)
    # how often images are seen: the factors of all rules that hold for an image multiply to its weight, which is how
    # often it is seen in a pass, and in an epoch, on average; a source's repeats count beside it
    weights: list[WeightRule] = field(default_factory=list)
    min_weight: float = 0.0  # no weight is below it, but for 0
    max_weight: float = 100.0  # no weight is above it
    global_batch_size: int = 96  # samples of one optimizer step
    bucket_batch_size: int = 48  # samples that share a bucket, drawn together; divides global_batch_size
    micro_batch_size: int = free(16)  # samples of one forward; divides bucket_batch_size
    # a sample that cannot be read, or is not what the index says. stop: the run ends there; substitute: the next sound
    # one of its bucket takes its place, then and in all later passes of the run
    on_bad_sample: Literal["stop", "substitute"] = free("stop")
    max_substituted: float = free(
        0.001
    )  # with substitute: the run stops above this share of bad images, above 1 of them
    loader_threads: int = free(4)  # training, per process: threads that make batches; 0: the main one does
    decode_processes: int = free(4)  # preparation, per process: processes that decode images; 0: it decodes itself
    prefetch_factor: int | None = free(None)  # micro-batches kept ready per thread; null: 2


@dataclass(frozen=True)
class FiltersConfig:
    """Which posts are prepared at all. A post that lacks what a filter asks about is removed by it; null: no filter."""

    min_side: int | None = None  # pixels of the shorter side, read from the file
    min_score: int | None = None  # posts of lower scores are removed
    ratings: list[str] | None = None  # only these of g, s, q, e
    first_year: int | None = None  # of the upload; earlier posts are removed
    last_year: int | None = None  # of the upload; later posts are removed
    required_tags: list[str] = field(default_factory=list)  # a post must have all of them
    forbidden_tags: list[str] = field(default_factory=list)  # a post must have none; "_" and " " are the same
    drop_duplicates: bool = False  # of images with the same bytes one is kept, rather one with a caption


@dataclass(frozen=True)
class CaptionsConfig:
    """How tags become a caption. Nothing is encoded again when these change."""

    # the caption's parts in their order: what is fixed keeps its place, what stands between is shuffled
    template: list[CaptionPart] = field(default_factory=default_template)
    # several captions a sample, of which each pass draws one; what a sample lacks leaves its share to the others
    mix: MixConfig = field(default_factory=MixConfig)
    # tags before it are fixed, after it shuffled, after a second one fixed again; in a tag it is written with spaces
    keep_tokens_separator: str = "|||"
    keep_tokens: int = 0  # leading tags kept in place where a caption has no separator
    shuffle: bool = True  # the free part, in every pass again
    tag_dropout: float = 0.0  # probability of each free tag to be left out
    caption_dropout: float = 0.0  # probability of a caption to be empty
    # probability of a post's tag to be left out that more than frequent_tag_share of the set's samples have
    frequent_tag_dropout: float = 0.0
    frequent_tag_share: float | None = None  # counted once, over the set that the run begins with
    protected_tags: list[str] = field(default_factory=list)  # never left out, but with the whole caption
    protected_tags_file: Place | None = free(None)  # more of them, one a line
    # tables of Danbooru, .jsonl, .json, .csv or .tsv with antecedent_name, consequent_name and status, of which the
    # active count. An alias is replaced; a tag that another of the post's tags implies is left out
    tag_aliases: Place | None = free(None)
    tag_implications: Place | None = free(None)  # see tag_aliases
    # tags that no caption has: one a line, or a table with name, of which those count that are deprecated, where it
    # says is_deprecated
    tag_removals: Place | None = free(None)
    quality: list[QualityRule] = field(default_factory=default_quality)  # tags from scores
    # for quality rules by percentile: the set of shards, or the run, whose thresholds they take; null: those that the
    # base was trained with, else by the scores of this set
    thresholds_from: Place | None = free(None)
    years: list[YearRule] = field(default_factory=default_years)  # tags from the year of the upload
    ratings: dict[str, str] = field(default_factory=default_ratings)  # rating -> tags; one that is not listed adds none
    columns: list[ColumnRule] = field(default_factory=list)  # tags from numbers, after the quality tag
    people: list[str] = field(default_factory=default_people)  # tags that go to the front
    keep_underscore_max_length: int = 3  # tags up to this long keep their underscores: ^_^
    max_token_length: TokenLength = 225  # tokens that are read of a caption, in chunks of 75


@dataclass(frozen=True)
class BucketsConfig:
    """The sizes to which images are resized and cropped. Another choice needs shards of its own."""

    base_resolution: int = 1024  # buckets have about this many pixels squared
    min_side: int = 512  # pixels of a bucket's shorter side at least
    max_side: int = 2048  # pixels of a bucket's longer side at most
    step: int = 64  # sides are multiples of it; itself a multiple of 32
    upscale: bool = True  # enlarge images that are smaller than their bucket


@dataclass(frozen=True)
class DiffusionConfig:
    """What the UNet learns to predict, and from which noise."""

    prediction_type: PredictionType = "epsilon"  # epsilon: the noise; v_prediction: see arXiv 2202.00512
    min_timestep: int = 0  # timesteps are uniform over min_timestep .. max_timestep - 1
    max_timestep: int = NUM_TIMESTEPS  # see min_timestep
    # uniform: each sample draws for itself; stratified: a step has one timestep in each of global_batch_size equal
    # parts of the range, so that its loss varies less (as in arXiv 2107.00630, I.1); which part is whose is drawn anew
    timestep_sampling: Literal["uniform", "stratified"] = "uniform"
    noise_offset: float = 0.0  # times a normal number for each channel, added to the noise; 0: none
    min_snr_gamma: float | None = None  # weights of the loss by signal-to-noise, arXiv 2303.09556; null: none
    zero_terminal_snr: bool = False  # the last timestep is pure noise, arXiv 2305.08891; needs v_prediction
    # train this although the base predicts something else, which is refused otherwise
    convert_prediction: bool = free(False)


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and the learning rates."""

    name: OptimizerName = "adamw"  # adamw8bit needs bitsandbytes and a GPU
    unet_lr: float = 0.0  # learning rate of the UNet: above 0 exactly when model.train_unet
    text_encoder_1_lr: float = 0.0  # learning rate of text encoder 1: above 0 exactly when model.train_text_encoder_1
    text_encoder_2_lr: float = 0.0  # learning rate of text encoder 2: above 0 exactly when model.train_text_encoder_2
    betas: list[float] | None = field(default_factory=lambda: [0.9, 0.99])  # of AdamW's moments; null with adafactor
    eps: float | None = 1e-8  # of AdamW's denominator; null with adafactor
    weight_decay: float = 0.1  # a step shrinks weights by the rate times this
    decay_norms_and_biases: bool = True  # as the original did; off: only matrices and convolutions decay
    max_grad_norm: float | None = 1.0  # global norm over all trained parts together; null: not clipped, as 3.0 was


@dataclass(frozen=True)
class ScheduleConfig:
    """How long the run is, and how the learning rate goes over it."""

    # passes over the data; exactly one of epochs and max_steps is set
    epochs: int | None = field(default=None, metadata=LENGTH)
    max_steps: int | None = field(default=None, metadata=LENGTH)  # optimizer steps of the run
    lr: Literal["constant", "cosine", "cosine_restarts"] = "constant"  # the rate's course after the warm-up
    warmup_steps: int = 0  # optimizer steps over which the rate rises to its peak
    min_lr_ratio: float = 0.0  # the rate's floor as a share of its peak, for the cosine schedules
    num_cycles: int = 1  # cycles of cosine_restarts
    cycle_gamma: float = 1.0  # each restart's peak as a share of the one before


@dataclass(frozen=True)
class PrecisionConfig:
    """Number formats of the computation. fp16 as compute needs a GPU."""

    compute: Dtype = "fp16"  # of matrix products and convolutions
    # how trained weights are kept. autocast: in fp32, and cast for each product. master: in compute's 16 bits, beside
    # them what brings back the fp32 values (2 bytes each for bf16, 4 for fp16): the same updates, nothing is cast, and
    # all activations have 16 bits. stochastic: in bf16 alone, updates rounded up or down by chance, 2 bytes less
    weights: WeightMode = "autocast"
    # how gradients of 16-bit weights are added up over micro-batches: in fp32, or in bf16, which takes 2 bytes less for
    # each and is 0.8 % off over 48 micro-batches, 1.1 % over 96 (in fp32 0.13 %, from what each is rounded to)
    gradients: GradientDtype = "fp32"
    frozen: Dtype = "fp16"  # weights of parts that are not trained (none in stage 1)
    vae: Dtype = "fp32"  # SDXL's own VAE overflows in fp16
    tf32: bool = True  # let fp32 matrix products use TF32 on GPUs that have it
    max_skipped_steps: int = 50  # stop when loss scaling skips this many steps in a row
    deterministic: bool = False  # bit-exact kernels on GPU too, slower; on the CPU they always are


@dataclass(frozen=True)
class MemoryConfig:
    """What saves memory at the price of time."""

    # which results the backward pass finds: none computes nothing again, selective keeps those of matrix products,
    # convolutions and attention and computes the rest again, full computes all of a block again. auto: the first of
    # them that fits the GPU with the largest bucket, counted before the first step; on the CPU full
    policy: MemoryPolicy = "full"


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written, which are kept, and from which a run begins."""

    every_steps: int = 1000  # optimizer steps between checkpoints; one more is written at the end
    keep_last: int = 2  # older ones are removed
    keep_every_steps: int | None = None  # checkpoints at multiples of it are never pruned
    resume: Place = "auto"  # auto: the newest of this run, if any; never; or a checkpoint, by path or step
    # another run's folder or checkpoint: this run begins with its weights, optimizer state and step, under other rates,
    # another schedule, other data or captions
    fork: Place | None = None


@dataclass(frozen=True)
class LoggingConfig:
    """What is written to metrics.jsonl and to trackers."""

    every_steps: int = 10  # optimizer steps between lines
    trackers: list[Literal["wandb", "tensorboard"]] = field(
        default_factory=list
    )  # where metrics go beside metrics.jsonl
    project: str = "anime-base-trainer"  # the trackers' project


NEGATIVE_PROMPT = (  # the card's
    "nsfw, lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, "
    "worst quality, low quality, normal quality, jpeg artifacts, signature, watermark, username, blurry, artist name"
)


@dataclass(frozen=True)
class SamplingConfig:
    """Images that are drawn while training, by Euler ancestral."""

    every_steps: int | None = None  # optimizer steps between samples; null: no samples while training
    prompts: list[str] = field(default_factory=list)  # one image each, always with the same noise
    negative_prompt: str = NEGATIVE_PROMPT  # what guidance pushes away from
    num_inference_steps: int = 28  # steps of each image
    guidance_scale: float = 7.0  # 1: no guidance
    width: int | None = None  # pixels; null: buckets.base_resolution
    height: int | None = None  # pixels; null: buckets.base_resolution


@dataclass(frozen=True)
class PublishConfig:
    """The folder that scripts/publish.py makes of a run, and the export's formats."""

    repo_id: str | None = None  # owner/name on the Hub, for the card's script; an upload needs it
    private: bool = True  # stays private on the Hub; false makes it public once what was uploaded is verified
    source_url: str | None = None  # where the corresponding source can be obtained, as the licence requires
    title: str | None = None  # what the model and its files are called; null: the run's name, for files repo_id's
    author: str | None = None  # who trained the model, for the card and the files
    formats: list[Format] = field(default_factory=lambda: ["single_file", "diffusers"])  # what an export writes
    dtype: Dtype = "fp16"  # number format of exported weights
    license_link: str | None = None  # what the card's header links to; null: the licence file in the folder
    card_template: Place | None = None  # a Jinja2 template instead of trainer/release/card.md; null: that one
    base_only: bool = False  # the card says that it is a base to build on, and not for inference
    notes: str | None = None  # Markdown of your own, for a section of the card
    acknowledgements: str | None = None  # Markdown too: whom you thank


@dataclass(frozen=True)
class Config:
    run: RunConfig
    model: ModelConfig
    data: DataConfig
    filters: FiltersConfig = field(default_factory=FiltersConfig)
    captions: CaptionsConfig = field(default_factory=CaptionsConfig)
    buckets: BucketsConfig = field(default_factory=BucketsConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    memory: MemoryConfig = free_section(MemoryConfig)
    checkpoint: CheckpointConfig = free_section(CheckpointConfig)
    logging: LoggingConfig = free_section(LoggingConfig)
    sampling: SamplingConfig = free_section(SamplingConfig)
    publish: PublishConfig = free_section(PublishConfig)
    # as the user wrote it, interpolations unresolved: the only form that is ever written to a file
    written: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
