"""Benchmarks beside the peers, and experiments."""
