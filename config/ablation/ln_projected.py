# Layer norm's exact gradient, written by hand: equal to the baseline up to rounding.
out_dir = "out-ablation/ln_projected"
ln_mode = "projected"
