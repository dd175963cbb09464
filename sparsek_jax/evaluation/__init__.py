"""Judging a trained model: held-out loss, gate diagnostics, reports and samples."""
