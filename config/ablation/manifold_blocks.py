# Features of points on a sphere in each block, from the block's own input, in place of once after the embedding.
out_dir = "out-ablation/manifold_blocks"
use_manifold = True
manifold_at = "blocks"
skip_manifold_spectral = True
