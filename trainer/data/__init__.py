"""Posts, images, shards, the plan and the loader."""
