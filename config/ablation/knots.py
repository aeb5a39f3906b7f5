# Own and previous cell of 32 tokens, and cells whose strands are knotted with the last one.
out_dir = "out-ablation/knots"
use_knot_attention = True
