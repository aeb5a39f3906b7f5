# A causal convolution of 4 taps before each attention and MLP: the control for gated scans.
out_dir = "out-ablation/short_conv"
short_conv = 4
