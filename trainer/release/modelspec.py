"""What a published single file says in the lists of models of other programs: title, author, hint, tags, a thumbnail.

Keys and meanings are those of ModelSpec 1.0 (github.com/Stability-AI/ModelSpec). Its text knows no ``tags``: separated
by commas, they are what trainers write there and other programs read. Exports have none of the last three, so that
their bytes follow from the checkpoint alone.
"""

from trainer.release.card import HUB_TAGS, Release, describe_release, describe_use
from trainer.release.export import publish_entries
from trainer.release.gallery import make_thumbnail_address

LISTED_TAGS = ["anime", *(tag for tag in HUB_TAGS if tag.startswith(("text-to-image", "stable-diffusion")))]


def listing_entries(release: Release) -> dict[str, str | None]:
    """The entries of a published file that differ from its export's; None stands for no entry."""
    said = {
        "usage_hint": usage_hint(release),
        "tags": ", ".join(LISTED_TAGS),
        "thumbnail": make_thumbnail_address(release.samples[0].path) if release.samples else None,
    }
    return publish_entries(release.config) | {f"modelspec.{name}": value for name, value in said.items()}


def usage_hint(release: Release) -> str:
    """How to prompt and with which settings, in two or three short sentences."""
    sampling = release.config.sampling
    example, finished = ", ".join(describe_use(release)["example"]), describe_release(release)["finished"]["all"]
    parts = [
        f"Prompt as the captions are: {example}." if finished else f"Prompt with tags: {example}.",
        f"Euler ancestral, {sampling.num_inference_steps} steps, guidance {sampling.guidance_scale:g}.",
    ]
    if release.config.publish.base_only:
        parts.append("A base to build on, not for inference.")
    return " ".join(parts)
