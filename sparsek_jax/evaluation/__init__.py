"""Evaluation: held-out loss, the scorer's gates, and reports."""
