# Features from Spin(8) rotors acting on 28 + 28 numbers, E7's cheaper relative.
out_dir = "out-ablation/manifold_rotor"
use_manifold = True
manifold = "rotor"
skip_manifold_spectral = True
