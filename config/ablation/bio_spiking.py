# Leaky integrate-and-fire units along the tokens in place of the gated events.
out_dir = "out-ablation/bio_spiking"
use_bio_mlp = True
bio_spiking = True
