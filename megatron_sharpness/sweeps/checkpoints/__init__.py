"""λ_c of the checkpoints of a run that is over, measured without updating anything.

For each checkpoint Adam's moments are its own, or are accumulated over some steps; then every one
of the next steps is measured (Fig. 5 and App. B of arXiv 2601.16979).
"""
