# The gated delta rule in every layer, with its convolutions on q, k and v.
out_dir = "out-ablation/gdn"
attn_mode = "gdn"
short_conv, short_conv_at = 4, "b"
