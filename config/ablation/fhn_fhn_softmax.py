# Two layers of waves, one of attention, in turn.
out_dir = "out-ablation/fhn_fhn_softmax"
attn_pattern = "fhn,fhn,softmax"
