# Points on a sphere, and spectral coordinates in queries and keys.
out_dir = "out-ablation/manifold_spectral"
use_manifold = True
