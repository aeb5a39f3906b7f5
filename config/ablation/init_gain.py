# Matrices in blocks start as N(0, 0.36 / n_embd).
out_dir = "out-ablation/init_gain"
init_gain = 0.6
