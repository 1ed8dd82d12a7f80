"""Prompts -> pictures, with any checkpoint."""
