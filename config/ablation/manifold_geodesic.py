# Points on a sphere whose path is straightened by an auxiliary loss.
out_dir = "out-ablation/manifold_geodesic"
use_manifold = True
skip_manifold_spectral = True
geodesic_weight = 0.1
