"""A run -> files for others: exports, the model card, the published folder."""
