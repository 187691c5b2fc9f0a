"""Hugging Face's names and files."""
