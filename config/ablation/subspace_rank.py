# The stream lives in one random subspace of dimension 64.
out_dir = "out-ablation/subspace_rank"
subspace_rank = 64
