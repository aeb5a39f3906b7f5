# Waves and attention in turn.
out_dir = "out-ablation/fhn_softmax"
attn_pattern = "fhn,softmax"
