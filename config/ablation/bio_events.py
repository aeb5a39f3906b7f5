# Oscillators and sparse events: hidden units whose gate is low stay silent. Five times the MLP's parameters.
out_dir = "out-ablation/bio_events"
use_bio_mlp = True
