# Features from the coset E7(7)/SU(8): a token's element acts on a learned 56-vector.
out_dir = "out-ablation/manifold_e7"
use_manifold = True
manifold = "e7"
skip_manifold_spectral = True
