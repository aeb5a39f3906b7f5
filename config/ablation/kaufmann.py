# Knot-gated attention over a WaveKAN landscape, propagated by waves.
out_dir = "out-ablation/kaufmann"
use_kaufmann_attention = True
