"""Losses on other data along the training update, and the data mix that follows from them.

The relative critical sharpness λ_c^{1→2} = 2/η_c^{1→2}, with η_c^{1→2} = min{η > 0 : L₁(θ − ηΔθ₂) >
L₁(θ)} (Def. 4.1 of arXiv 2601.16979), says how far the update made for one objective can go before
another loss rises.
"""
