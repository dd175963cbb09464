"""Evaluation of trained models: held-out loss, scorer diagnostics, reports and samples."""
