"""What scripts/experiment.py runs: claims about multi-token prediction, tried by the trainer."""
