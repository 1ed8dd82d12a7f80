"""A set of shards of which only the index says something: its latents are zeros."""

from pathlib import Path
from typing import Any

import numpy as np

from support.posts_on_disk import rows_to_table
from trainer.data.shards import ShardWriter, write_index


def row(key: str, **more: Any) -> dict[str, Any]:
    """An index row of a square image."""
    return {
        "key": key, "source": "posts.jsonl", "content_hash": f"{key:0>64}", "bucket_width": 64, "bucket_height": 64,
        "original_width": 64, "original_height": 64, "crop_left": 0, "crop_top": 0, **more,
    }  # fmt: skip


def write_set(folder: Path, rows: list[dict[str, Any]], latents: dict[str, Any] | None = None, **more: Any) -> Path:
    folder.mkdir()
    writer = ShardWriter(folder, 0)
    for each in rows:
        writer.add(each, np.zeros((4, each["bucket_height"] // 8, each["bucket_width"] // 8), dtype=np.float16))
    shard = writer.finish()
    write_index(folder, rows_to_table(writer.rows), [shard], latents or {"vae_sha256": "another"}, **more)
    return folder
