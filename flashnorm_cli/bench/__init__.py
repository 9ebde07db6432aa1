"""Benchmarks of the norms: kernels on shapes, and whole models."""
