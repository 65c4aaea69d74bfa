"""Runs of a training command that measure and train nothing."""
