# Features of each token's point on a sphere, added after the embedding.
out_dir = "out-ablation/manifold_sphere"
use_manifold = True
skip_manifold_spectral = True
