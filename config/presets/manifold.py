# Tokens as points of the coset E7(7)/SU(8), with spectral coordinates in queries and keys.
out_dir = "out-manifold"
use_manifold = True
manifold = "e7"
