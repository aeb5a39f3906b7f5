# The boolean Willshaw memory in place of the decaying Hebbian one.
out_dir = "out-ablation/sdr_willshaw"
use_sdr = True
sdr_rule = "willshaw"
