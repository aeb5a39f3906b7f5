# Each block's output becomes a learned sum of all so far.
out_dir = "out-ablation/mla"
use_mla = True
