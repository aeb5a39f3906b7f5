# Queries and keys of unit root mean square.
out_dir = "out-ablation/qk_norm"
qk_norm = True
