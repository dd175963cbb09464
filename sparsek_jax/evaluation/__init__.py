"""Evaluation: held-out loss, the scorer's gates, reports, and text sampled from a model."""
