# The control of calibration: feedback alignment with every tenth step by backpropagation.
out_dir = "out-ablation/fa_calibrate"
method = "fa"
fa_calibrate_every = 10
tie_weights = False
log_alignment = True
