"""Helpers of scripts/benchmark.py."""
