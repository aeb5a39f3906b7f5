# Knots whose threshold is learned.
out_dir = "out-ablation/knots_learned"
use_knot_attention = True
knot_learned_threshold = True
