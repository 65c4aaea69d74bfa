"""A mix of training data that follows the measurements.

The relative critical sharpness λ_c^{1→2} (Def. 4.1 of arXiv 2601.16979) says which of two losses
would rise first along the training update; the share of one component of the data is kept where the
two meet.
"""
