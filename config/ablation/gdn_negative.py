# The gated delta rule whose memory can change the sign of what it holds for a key.
out_dir = "out-ablation/gdn_negative"
attn_mode = "gdn"
gdn_negative = True
short_conv, short_conv_at = 4, "b"
