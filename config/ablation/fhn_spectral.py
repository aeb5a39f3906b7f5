# Waves whose gates and channel groups know the spectral coordinates of their tokens.
out_dir = "out-ablation/fhn_spectral"
attn_mode = "fhn"
use_fhn_partitioning = True
use_manifold = True
