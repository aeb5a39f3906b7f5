# Points of E7's coset, and spectral coordinates in queries and keys.
out_dir = "out-ablation/manifold_e7_spectral"
use_manifold = True
manifold = "e7"
